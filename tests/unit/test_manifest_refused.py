"""Manifests that are refused: code, path and what the message tells; nothing else ever happens."""

from __future__ import annotations

import copy
import json
import time
from typing import Any

import pytest
from gatelet.agent.manifest import Manifest, ManifestError, parse_manifest
from hypothesis import example, given, settings
from hypothesis import strategies as st

BASE: dict[str, Any] = {
    "modulesContent": {
        "$edgeAgent": {
            "properties.desired": {
                "schemaVersion": "1.1",
                "runtime": {
                    "type": "docker",
                    "settings": {
                        "registryCredentials": {
                            "acr": {"username": "u", "password": "hunter2", "address": "a.io"}
                        }
                    },
                },
                "systemModules": {"edgeAgent": {"type": "docker", "settings": {"image": "agent"}}},
                "modules": {
                    "m": {
                        "type": "docker",
                        "status": "running",
                        "restartPolicy": "always",
                        "startupOrder": 1,
                        "env": {"A": {"value": "1"}},
                        "settings": {"image": "m:1", "createOptions": "{}"},
                    }
                },
            }
        },
        "$edgeHub": {
            "properties.desired": {
                "schemaVersion": "1.2",
                "routes": {"r": {"route": "FROM /messages/* INTO $upstream", "priority": 0}},
                "storeAndForwardConfiguration": {"timeToLiveSecs": 100},
            }
        },
    }
}
A = ("modulesContent", "$edgeAgent", "properties.desired")
M = (*A, "modules", "m")
H = ("modulesContent", "$edgeHub", "properties.desired")
ABSENT = object()


def refused(body: bytes) -> ManifestError:
    with pytest.raises(ManifestError) as caught:
        parse_manifest(body)
    assert str(caught.value).startswith(caught.value.path)
    return caught.value


def changed(path: tuple[str, ...], value: Any) -> bytes:
    document = copy.deepcopy(BASE)
    owner = document
    for key in path[:-1]:
        owner = owner[key]
    if value is ABSENT:
        del owner[path[-1]]
    else:
        owner[path[-1]] = value
    return json.dumps(document).encode()


def test_the_base_is_accepted() -> None:
    assert parse_manifest(json.dumps(BASE).encode()).modules[0].name == "m"


OUTSIDE = [
    (b"", 417, "", "empty"),
    (b" \n", 417, "", "empty"),
    (b"{}", 417, "", "empty"),
    (b'{"$version":1}', 417, "", "empty"),
    (b'{"deployment":{}}', 417, "deployment", "empty"),
    (b'{"modulesContent":{}}', 417, "modulesContent", "empty"),
    (b"null", 400, "", "expected an object, found null"),
    (b"[]", 400, "", "expected an object, found a list"),
    (b'"x"', 400, "", 'expected an object, found "x"'),
    (b"{", 400, "", "line 1, column 2"),
    (b'{"a":1,}', 400, "", "not valid JSON"),
    (b'{"a":1} x', 400, "", "Extra data"),
    (b"\xff\xfe{\x00}\x00", 400, "", "not UTF-8"),
    (b'{"a":NaN}', 400, "", "NaN"),
    (b'{"a":-Infinity}', 400, "", "Infinity"),
    (b'{"a":1e999}', 400, "", "out of range"),
    (b'{"a":' + b"1" * 5000 + b"}", 400, "", "too long"),
    (b'{"a":"\\ud800"}', 400, "a", "surrogate"),
    (b'{"a":{"b":1,"c":2,"b":3}}', 400, "a.b", "given twice"),
    (b'{"a":1,"a":{"b":1,"b":2}}', 400, "a.b", "given twice"),
    (b"[" * 33 + b"]" * 33, 400, "", "deeper than 32"),
    (b"[" * 1_000_000, 400, "", "deeper than 32"),
    (b'{"a":' * 200_000, 400, "", "deeper than 32"),
    (b" " * (1024 * 1024 + 1), 400, "", "1,048,577 bytes"),
    (b'{"schemaVersion":"2.0"}', 412, "schemaVersion", "expected 1.0 or 1.1"),
    (b'{"id":"x","modules":{}}', 400, "schemaVersion", 'found an object with "id"'),
    (b'{"manifest":{"url":"x"}}', 400, "manifest", "by reference"),
    (b'{"modulesContent":{"m":{}}}', 400, "modulesContent.$edgeAgent", "missing"),
    (
        b'{"modulesContent":{"$edgeAgent":{"properties.desired.modules.m":{}}}}',
        400,
        "modulesContent.$edgeAgent.properties.desired.modules.m",
        "layered",
    ),
]


@pytest.mark.parametrize(("body", "code", "path", "words"), OUTSIDE)
def test_documents(body: bytes, code: int, path: str, words: str) -> None:
    error = refused(body)
    assert (error.code, error.path) == (code, path)
    assert words in str(error)
    assert len(str(error)) < 400


INSIDE = [
    ((*A, "schemaVersion"), "1.2", 412, "schemaVersion", '"1.2"'),
    ((*A, "schemaVersion"), "one", 412, "schemaVersion", '"one"'),
    ((*A, "schemaVersion"), 1.1, 400, "schemaVersion", "found 1.1"),
    ((*A, "schemaVersion"), ABSENT, 400, "schemaVersion", "missing"),
    ((*A, "runtime"), ABSENT, 400, "runtime", "required"),
    ((*A, "systemModules"), ABSENT, 400, "systemModules", "required"),
    ((*A, "modules"), ABSENT, 400, "modules", "required"),
    ((*A, "modules"), [], 400, "modules", "expected an object, found a list"),
    ((*A, "moduels"), {}, 400, "moduels", "did you mean modules?"),
    ((*A, "runtime", "type"), "podman", 400, "runtime.type", 'expected docker, found "podman"'),
    (
        (*A, "runtime", "settings", "loggingOptions"),
        {},
        400,
        "runtime.settings.loggingOptions",
        "expected a string, found an empty object",
    ),
    (
        (*A, "runtime", "settings", "registryCredentials", "acr", "password"),
        12345,
        400,
        "runtime.settings.registryCredentials.acr.password",
        "found a number",
    ),
    (
        (*A, "runtime", "settings", "registryCredentials", "acr", "address"),
        "a b",
        400,
        "runtime.settings.registryCredentials.acr.address",
        "without blanks",
    ),
    ((*A, "systemModules"), {}, 400, "systemModules.edgeAgent", "missing"),
    ((*A, "systemModules", "edgeHab"), {}, 400, "systemModules.edgeHab", "edgeHub?"),
    ((*A, "modules", "a b"), {}, 400, 'modules."a b"', "letters, digits"),
    ((*A, "modules", "$m"), {}, 400, "modules.$m", "letters, digits"),
    ((*A, "modules", "x" * 129), {}, 400, 'modules."', "at most 128"),
    ((*A, "modules", "edgeHub"), {}, 400, "modules.edgeHub", "system module"),
    (M, "m:1", 400, "modules.m", 'expected an object, found "m:1"'),
    ((*M, "type"), ABSENT, 400, "modules.m.type", "missing"),
    ((*M, "status"), ABSENT, 400, "modules.m.status", "missing"),
    ((*M, "status"), "Running", 400, "modules.m.status", "did you mean running?"),
    ((*M, "restartPolicy"), "on-failed", 400, "modules.m.restartPolicy", "on-failure?"),
    ((*M, "imagePullPolicy"), "always", 400, "modules.m.imagePullPolicy", "on-create or never"),
    ((*M, "startupOrder"), -1, 400, "modules.m.startupOrder", "found -1"),
    ((*M, "startupOrder"), 4294967296, 400, "modules.m.startupOrder", "0 to 4294967295"),
    ((*M, "startupOrder"), True, 400, "modules.m.startupOrder", "found true"),
    ((*M, "startupOrder"), "1", 400, "modules.m.startupOrder", 'found "1"'),
    ((*M, "startuporder"), 1, 400, "modules.m.startuporder", "did you mean startupOrder?"),
    ((*M, "version"), 1, 400, "modules.m.version", "expected a string, found 1"),
    ((*M, "env"), [], 400, "modules.m.env", "expected an object"),
    ((*M, "env", "A"), "1", 400, "modules.m.env.A", "expected an object"),
    ((*M, "env", "A"), {}, 400, "modules.m.env.A.value", "missing"),
    ((*M, "env", "A", "value"), [], 400, "modules.m.env.A.value", "found a list"),
    ((*M, "env", "A", "value"), "a\0b", 400, "modules.m.env.A.value", "NUL"),
    ((*M, "env", "A=B"), {"value": ""}, 400, 'modules.m.env."A=B"', "'='"),
    ((*M, "env", "A.B"), {"value": ""}, 400, "modules.m.env.A.B", "'.'"),
    ((*M, "settings"), ABSENT, 400, "modules.m.settings", "missing"),
    ((*M, "settings", "image"), ABSENT, 400, "modules.m.settings.image", "missing"),
    ((*M, "settings", "image"), " ", 400, "modules.m.settings.image", "not blank"),
    ((*M, "settings", "image"), "${MODULES.m}", 400, "modules.m.settings.image", "template"),
    ((*M, "settings", "image"), "A/../b", 400, "modules.m.settings.image", "expected an image"),
    ((*M, "settings", "image"), "a" * 513, 400, "modules.m.settings.image", "expected an image"),
    ((*M, "settings", "createOption"), "", 400, "modules.m.settings.createOption", "createOption"),
    (
        (*M, "settings", "createOptions"),
        "{",
        400,
        "modules.m.settings.createOptions",
        "line 1, column 2",
    ),
    (
        (*M, "settings", "createOptions"),
        "[]",
        400,
        "modules.m.settings.createOptions",
        "JSON object, found a list",
    ),
    (
        (*M, "settings", "createOptions"),
        '{"HostConfig":{"Privileged":true,"Privileged":false}}',
        400,
        "modules.m.settings.createOptions.HostConfig.Privileged",
        "given twice",
    ),
    (
        (*M, "settings", "createOptions"),
        '{"a":' * 100,
        400,
        "modules.m.settings.createOptions",
        "deeper",
    ),
    ((*M, "settings", "createOptions"), 5, 400, "modules.m.settings.createOptions", "found 5"),
    (
        (*M, "settings", "createOptions02"),
        "",
        400,
        "modules.m.settings.createOptions02",
        'Error while parsing chunked field "createOptions", '
        "expected createOptions01 found createOptions02",
    ),
    (
        (*M, "settings", "createOptions00"),
        "",
        400,
        "modules.m.settings.createOptions00",
        'Error while parsing chunked field "createOptions", '
        "expected createOptions01 found createOptions00",
    ),
    (
        (*M, "settings"),
        {"image": "m", "createOptions01": "{}"},
        400,
        "modules.m.settings.createOptions01",
        'Error while parsing chunked field "createOptions", '
        'expected empty field number but found "01"',
    ),
    ((*H, "schemaVersion"), "1.4", 412, "$edgeHub.schemaVersion", "1.0 to 1.3"),
    ((*H, "routes"), ABSENT, 400, "$edgeHub.routes", "missing"),
    ((*H, "routes", "r"), "FROM x", 400, "$edgeHub.routes.r", "expected a route"),
    ((*H, "routes", "r"), "FROM /* TO $upstream", 400, "$edgeHub.routes.r", "INTO $upstream"),
    ((*H, "routes", "r"), "FROM /* IF x INTO $upstream", 400, "$edgeHub.routes.r", "WHERE"),
    ((*H, "routes", "r"), "FROM /* INTO cloud", 400, "$edgeHub.routes.r", 'found "cloud"'),
    ((*H, "routes", "r", "priority"), 10, 400, "$edgeHub.routes.r.priority", "0 to 9"),
    ((*H, "routes", "r", "ttl"), 10, 400, "$edgeHub.routes.r.ttl", "timeToLiveSecs"),
    ((*H, "routes", "a b"), "", 400, '$edgeHub.routes."a b"', "route name"),
    (
        (*H, "storeAndForwardConfiguration"),
        {},
        400,
        "$edgeHub.storeAndForwardConfiguration.timeToLiveSecs",
        "missing",
    ),
    (("modulesContent", "a b"), {}, 400, 'modulesContent."a b"', "letters, digits"),
]


@pytest.mark.parametrize(("place", "value", "code", "path", "words"), INSIDE)
def test_values(place: tuple[str, ...], value: Any, code: int, path: str, words: str) -> None:
    error = refused(changed(place, value))
    assert error.code == code
    assert error.path == path or (path.endswith('"') and error.path.startswith(path))
    assert words in str(error)
    assert "hunter2" not in str(error)
    assert "12345" not in str(error)


SCORING = [
    ("SCORING_TRAFFIC", "101", "from 0 to 100"),
    ("SCORING_TRAFFIC", "10%", 'found "10%"'),
    ("SCORING_TRAFFIC", 0.5, 'found "0.5"'),
    ("SCORING_TRAFFIC", "٣", "whole number"),
    ("SCORING_MAX_BATCH", 0, "from 1"),
    ("SCORING_MAX_DELAY_US", -1, "from 0"),
    ("SCORING_TIMEOUT_MS", "1" * 11, "from 1"),
    ("SCORING_MIRROR", "all", "whole number"),
    ("SCORING_BACKENDS", "gpu", "fpga and cpu"),
    ("SCORING_BACKENDS", "cpu,cpu", "at most once"),
    ("SCORING_ENDPOINT", "a/b", "letters, digits"),
    ("SCORING_ENDPOINT", "..", "letters, digits"),
    ("SCORING_AUTH", "basic", "none, key or token"),
]


@pytest.mark.parametrize(("name", "value", "words"), SCORING)
def test_scoring_values(name: str, value: object, words: str) -> None:
    error = refused(changed((*M, "env", name), {"value": value}))
    assert (error.code, error.path) == (400, f"modules.m.env.{name}.value")
    assert words in str(error)


def test_an_unknown_scoring_option_is_refused_with_a_hint() -> None:
    error = refused(changed((*M, "env", "SCORING_TRAFIC"), {"value": "10"}))
    assert error.path == "modules.m.env.SCORING_TRAFIC"
    assert "did you mean SCORING_TRAFFIC?" in str(error)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=20,
)
known_keys = (
    st.sampled_from(["schemaVersion", "runtime", "systemModules", "modules", "settings", "env"])
    | st.sampled_from(["value", "image", "createOptions", "createOptions01", "type", "status"])
    | st.sampled_from(["m", "edgeAgent", "content", "modulesContent", "deployment", "$edgeAgent"])
    | st.sampled_from(["properties.desired", "SCORING_TRAFFIC"])
)
known_values = st.sampled_from(["1.1", "docker", "running", "a:1", "{}", "", None, {}, 5])
near_misses = st.recursive(
    known_values,
    lambda inner: st.dictionaries(known_keys, inner, max_size=5),
    max_leaves=12,
)


def parses_or_refuses(body: bytes) -> Manifest | ManifestError:
    result: Manifest | ManifestError
    try:
        result = parse_manifest(body)
    except ManifestError as error:
        result = error
    if isinstance(result, ManifestError):
        assert result.code in (400, 412, 417)
        assert len(str(result).encode()) < 2000
    return result


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=200))
@example(b'{"\\u0000":1}')
@example(b"{" + b'"' * 9999)
def test_any_bytes(body: bytes) -> None:
    parses_or_refuses(body)


@settings(deadline=None, max_examples=300)
@given(json_values | near_misses)
def test_any_json(value: Any) -> None:
    parses_or_refuses(json.dumps(value).encode())


def places(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = [path] if path else []
    if isinstance(value, dict):
        for key, item in value.items():
            found += places(item, (*path, key))
    return found


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(places(BASE)), json_values | known_values | near_misses, st.booleans())
def test_any_value_at_any_place(place: tuple[str, ...], value: Any, remove: bool) -> None:
    result = parses_or_refuses(changed(place, ABSENT if remove else value))
    assert isinstance(result, ManifestError) or result.modules is not None


@pytest.mark.parametrize(
    "body",
    [
        b"[]" * 500_000,
        b"[" * 500_000 + b"]" * 500_000,
        b'"' + b'\\"' * 500_000,
        b'{"a"' * 250_000,
        b"{" + b",".join(b'"%d":1' % number for number in range(80_000)) + b',"79999":1}',
        changed((*M, "settings", "image"), "a-" * 500_000),
        changed((*M, "settings", "image"), "a" * 511 + "!"),
        changed((*H, "routes", "r"), "FROM /* WHERE" + " " * 900_000),
        changed((*H, "routes", "r"), "FROM /* WHERE " + "INTO " * 100_000),
        changed((*M, "env"), {"SCORING_" + "X" * 900_000: {"value": ""}}),
        changed((*M, "x" * 900_000), 1),
    ],
    ids=lambda body: body[:12].decode() + f"..{len(body)}",
)
def test_hostile_megabytes_cost_little(body: bytes) -> None:
    started = time.process_time()
    refused(body)
    # About 0.2 s; quadratic behaviour would take minutes.
    assert time.process_time() - started < 3
