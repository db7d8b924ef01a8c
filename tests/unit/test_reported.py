"""The reported document: edgeAgent's shape, no secrets, always within a twin's limits."""

from __future__ import annotations

import json
import re
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from gatelet.agent.manifest import ModuleSpec, Runtime, parse_manifest
from gatelet.agent.reported import (
    TWIN_LIMIT_BYTES,
    AgentVersion,
    DesiredStatus,
    ModuleState,
    Platform,
    build_reported,
    fit_to_limit,
    shorten,
    shutdown_report,
    twin_size,
    twin_value,
)
from hypothesis import given, settings
from hypothesis import strategies as st

NOON = datetime(2026, 3, 1, 12, 0, 0, 250, tzinfo=timezone.utc)
SPEC = ModuleSpec(
    name="digits",
    image="example.com/digits:3",
    restart_policy="always",
    startup_order=1,
    version="3",
    env=(("SCORING_TRAFFIC", "10"),),
    create_options='{"Labels":{}}',
)
STATE = ModuleState(
    spec=SPEC,
    runtime_status="running",
    description="Up 3 hours",
    image_hash="sha256:" + "0" * 64,
    started=NOON,
    details={"model": "digits", "backends": ["fpga", "cpu"]},
)


def build(**changes: Any) -> dict[str, Any]:
    given_values: dict[str, Any] = {
        "version": AgentVersion("0.1.0", "77", "abc"),
        "platform": Platform("linux", "aarch64", "6.1"),
        "desired": DesiredStatus(7, 200, ""),
        "modules": (STATE,),
        **changes,
    }
    return build_reported(**given_values)


def test_the_shape_is_that_of_edge_agent() -> None:
    agent = ModuleState(ModuleSpec("edgeAgent", "a:1"), "running", started=NOON)
    hub = ModuleState(ModuleSpec("edgeHub", "h:1"), "running")
    never = "0001-01-01T00:00:00Z"
    document = build(edge_agent=agent, edge_hub=hub, runtime=Runtime("docker", "v1.25", "{}"))
    assert document == {
        "schemaVersion": "1.0",
        "version": {"version": "0.1.0", "build": "77", "commit": "abc"},
        "lastDesiredVersion": 7,
        "lastDesiredStatus": {"code": 200, "description": ""},
        "runtime": {
            "type": "docker",
            "settings": {"minDockerVersion": "v1.25", "loggingOptions": "{}"},
            "platform": {"os": "linux", "architecture": "aarch64", "version": "6.1"},
        },
        "systemModules": {
            "edgeAgent": {
                "exitCode": 0,
                "statusDescription": "",
                "lastStartTimeUtc": "2026-03-01T12:00:00.000250Z",
                "lastExitTimeUtc": never,
                "runtimeStatus": "running",
                "imagePullPolicy": "on-create",
                "type": "docker",
                "settings": {"image": "a:1", "imageHash": "", "createOptions": "{}"},
                "env": {},
            },
            "edgeHub": {
                "exitCode": 0,
                "statusDescription": "",
                "lastStartTimeUtc": never,
                "lastExitTimeUtc": never,
                "restartCount": 0,
                "lastRestartTimeUtc": never,
                "runtimeStatus": "running",
                "status": "running",
                "restartPolicy": "on-unhealthy",
                "imagePullPolicy": "on-create",
                "startupOrder": 4294967295,
                "type": "docker",
                "settings": {"image": "h:1", "imageHash": "", "createOptions": "{}"},
                "env": {},
            },
        },
        "modules": {
            "digits": {
                "exitCode": 0,
                "statusDescription": "Up 3 hours",
                "lastStartTimeUtc": "2026-03-01T12:00:00.000250Z",
                "lastExitTimeUtc": never,
                "restartCount": 0,
                "lastRestartTimeUtc": never,
                "runtimeStatus": "running",
                "version": "3",
                "status": "running",
                "restartPolicy": "always",
                "imagePullPolicy": "on-create",
                "startupOrder": 1,
                "type": "docker",
                "settings": {
                    "image": "example.com/digits:3",
                    "imageHash": "sha256:" + "0" * 64,
                    "createOptions": '{"Labels":{}}',
                },
                "env": {"SCORING_TRAFFIC": {"value": "10"}},
                "gatelet": {"model": "digits", "backends": ["fpga", "cpu"]},
            }
        },
    }


def test_times_are_utc_whatever_zone_they_carry() -> None:
    east = NOON.astimezone(timezone(timedelta(hours=2)))
    entry = build(modules=(ModuleState(SPEC, exited=east),))["modules"]["digits"]
    assert entry["lastExitTimeUtc"] == "2026-03-01T12:00:00.000250Z"


def test_long_create_options_are_chunked_and_read_back() -> None:
    options = json.dumps({"Labels": {"a": "x" * 1500}}, separators=(",", ":"))
    spec = ModuleSpec("m", "a:1", create_options=options)
    reported = build(modules=(ModuleState(spec),))["modules"]["m"]["settings"]
    assert [key for key in reported if key.startswith("create")] == [
        "createOptions",
        "createOptions01",
        "createOptions02",
    ]
    manifest = {
        "schemaVersion": "1.1",
        "runtime": {"type": "docker", "settings": {}},
        "systemModules": {"edgeAgent": {"type": "docker", "settings": {"image": "a"}}},
        "modules": {
            "m": {
                "type": "docker",
                "status": "running",
                "settings": {k: v for k, v in reported.items() if k != "imageHash"},
            }
        },
    }
    assert parse_manifest(json.dumps(manifest).encode()).modules[0] == spec


def test_the_shutdown_report_leaves_nothing_known() -> None:
    before = build(edge_agent=STATE, edge_hub=STATE)
    kept = json.dumps(before)
    after = shutdown_report(before)
    assert after["lastDesiredStatus"]["code"] == 406
    assert after["lastDesiredVersion"] == 7
    entries = [*after["systemModules"].values(), *after["modules"].values()]
    assert {entry["runtimeStatus"] for entry in entries} == {"unknown"}
    assert len(entries) == 3
    assert json.dumps(before) == kept


def crowd(count: int, size: int, status: str = "running") -> tuple[ModuleState, ...]:
    return tuple(
        ModuleState(
            ModuleSpec(
                f"m{number}",
                f"example.com/m{number}:1",
                env=(("A", "v" * size),),
                create_options=json.dumps({"a": "o" * size}, separators=(",", ":")),
            ),
            "failed" if number == count - 1 else "running",
            description="d" * size,
            details={"note": "n" * size},
        )
        for number in range(count)
    )


def omitted(document: dict[str, Any]) -> list[str]:
    return document.get("gatelet", {}).get("omitted", [])


def test_a_document_that_fits_is_not_touched() -> None:
    document = build(details={"engine": "none"})
    assert document["gatelet"] == {"engine": "none"}
    assert omitted(document) == []


@pytest.mark.parametrize(
    ("states", "first_lost", "still_there"),
    [
        (crowd(16, 400), "long texts in details", "lastStartTimeUtc"),
        (crowd(40, 100), "details", "env"),
        (crowd(80, 2), "times, counts and policies", "statusDescription"),
        (crowd(300, 2), "descriptions and images", "runtimeStatus"),
    ],
)
def test_the_least_useful_goes_first(
    states: tuple[ModuleState, ...], first_lost: str, still_there: str
) -> None:
    document = build(modules=states, details={"x": 1})
    assert twin_size(document) < TWIN_LIMIT_BYTES
    assert first_lost in omitted(document)
    assert len(document["modules"]) == len(states)
    assert all(still_there in entry for entry in document["modules"].values())
    assert all(
        (entry["status"], entry["runtimeStatus"]) == (state.spec.status, state.runtime_status)
        for state, entry in zip(states, document["modules"].values(), strict=True)
    )


def test_what_the_device_says_of_itself_stays_while_it_is_short() -> None:
    document = build(modules=crowd(16, 400), details={"unsupported": ["SCORING_AUTH"]})
    assert document["gatelet"] == {
        "unsupported": ["SCORING_AUTH"],
        "omitted": ["long texts in details"],
    }


def test_only_what_was_there_is_called_omitted() -> None:
    document = build(modules=[ModuleState(ModuleSpec(f"m{number}", "a:1")) for number in range(90)])
    assert omitted(document) == ["createOptions", "env", "times, counts and policies"]


def test_with_too_many_modules_the_troubled_ones_stay() -> None:
    document = build(modules=crowd(400, 1), limit=16 * 1024)
    assert twin_size(document) < 16 * 1024
    assert document["modules"]["m399"]["runtimeStatus"] == "failed"
    kept = len(document["modules"])
    assert 150 < kept < 400
    assert f"{400 - kept} modules" in omitted(document)


def test_credentials_have_no_way_in() -> None:
    # Whatever a caller passes, the only inputs are these; none of them holds a credential.
    manifest = parse_manifest(
        json.dumps(
            {
                "schemaVersion": "1.1",
                "runtime": {
                    "type": "docker",
                    "settings": {
                        "registryCredentials": {
                            "r": {"username": "someone", "password": "hunter2", "address": "a.io"}
                        }
                    },
                },
                "systemModules": {"edgeAgent": {"type": "docker", "settings": {"image": "a"}}},
                "modules": {},
            }
        ).encode()
    )
    agent = ModuleState(manifest.system_modules[0])
    text = json.dumps(build(runtime=manifest.runtime, edge_agent=agent, modules=()))
    assert "hunter2" not in text
    assert "someone" not in text


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.binary(max_size=9)
    | st.just(NOON)
    | st.sampled_from(["x" * 5000, "ü" * 3000, "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.text(max_size=9) | st.sampled_from(["a.b", "$c d"]), inner)
        | st.frozensets(st.integers(), max_size=3)
    ),
    max_leaves=8,
)


def check_twin(value: Any, level: int = 0) -> None:
    assert level <= 10
    if isinstance(value, dict):
        for key, item in value.items():
            assert key
            assert not re.search(r"[.$#\s\x00-\x1f]", key)
            assert item is not None
            check_twin(item, level + 1)
    elif isinstance(value, list):
        for item in value:
            check_twin(item, level + 1)
    elif isinstance(value, str):
        assert len(value.encode()) <= 4096
    elif isinstance(value, int) and not isinstance(value, bool):
        assert abs(value) < 2**52


states = st.builds(
    ModuleState,
    spec=st.builds(
        ModuleSpec,
        name=st.from_regex(r"[a-zA-Z0-9_-]{1,40}", fullmatch=True),
        image=st.text("abc/:.", max_size=512),
        version=st.text(),
        env=st.dictionaries(
            st.from_regex(r"[A-Z_]{1,40}", fullmatch=True), st.text() | st.just("v" * 9000)
        ).map(lambda env: tuple(sorted(env.items()))),
        create_options=st.sampled_from(["{}", json.dumps({"a": "x" * 60_000}), '{"ü":"ü"}']),
    ),
    runtime_status=st.sampled_from(["unknown", "backoff", "running", "failed"]),
    description=st.text() | st.just("ü" * 9000),
    image_hash=st.none() | st.just("sha256:" + "f" * 64),
    started=st.none() | st.just(NOON),
    restart_count=st.integers(0, 10**6),
    details=st.dictionaries(st.text(max_size=9), anything),
)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(states, max_size=4, unique_by=lambda state: state.spec.name),
    st.text() | st.just("d" * 9000),
    st.dictionaries(st.text(max_size=9), anything),
    st.sampled_from([600, 2048, 8192, TWIN_LIMIT_BYTES]),
)
def test_it_always_fits_and_is_what_a_twin_takes(
    modules: list[ModuleState], description: str, details: dict[str, Any], limit: int
) -> None:
    document = build(
        modules=modules, desired=DesiredStatus(9, 500, description), details=details, limit=limit
    )
    text = json.dumps(document, allow_nan=False)
    assert json.loads(text) == document
    assert twin_size(document) < limit
    assert (document["lastDesiredVersion"], document["lastDesiredStatus"]["code"]) == (9, 500)
    check_twin(document)
    assert fit_to_limit(document, limit) == document
    assert twin_size(shutdown_report(document, limit)) < limit


@settings(deadline=None)
@given(anything)
def test_any_detail_becomes_a_twin_value(value: Any) -> None:
    converted = twin_value({"a": value})
    check_twin(converted)
    assert twin_value(converted) == converted


@given(st.text(), st.integers(3, 40))
def test_shortened_text_is_valid_and_short(text: str, limit: int) -> None:
    short = shorten(text, limit)
    assert len(short.encode()) <= limit
    if len(text.encode("utf-8", "replace")) <= limit:
        assert short == text.encode("utf-8", "replace").decode()
    else:
        assert short.endswith("...")
