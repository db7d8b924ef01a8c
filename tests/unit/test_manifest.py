"""Manifests that are accepted: forms, defaults, conversions, chunks, fingerprints."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import msgspec
import pytest
from gatelet.agent.create_options import write_create_options
from gatelet.agent.manifest import (
    Manifest,
    ManifestError,
    ModuleSpec,
    RegistryCredential,
    Runtime,
    fingerprint,
    parse_manifest,
)
from hypothesis import given, settings
from hypothesis import strategies as st

AGENT = {"type": "docker", "settings": {"image": "mcr.microsoft.com/azureiotedge-agent:1.5"}}
HUB = {
    "type": "docker",
    "status": "running",
    "restartPolicy": "always",
    "startupOrder": 0,
    "settings": {
        "image": "mcr.microsoft.com/azureiotedge-hub:1.5",
        "createOptions": '{"HostConfig":{"PortBindings":{"8883/tcp":[{"HostPort":"8883"}]}}}',
    },
    "env": {"OptimizeForPerformance": {"value": False}},
}


def module(**changes: Any) -> dict[str, Any]:
    entry = {"type": "docker", "status": "running", "settings": {"image": "example.com/digits:3"}}
    return {key: value for key, value in {**entry, **changes}.items() if value is not ...}


def desired(modules: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    return {
        "schemaVersion": "1.1",
        "runtime": {"type": "docker", "settings": {}},
        "systemModules": {"edgeAgent": AGENT, "edgeHub": HUB},
        "modules": {"digits": module()} if modules is None else modules,
        **changes,
    }


def parse(document: Any) -> Manifest:
    return parse_manifest(json.dumps(document).encode())


def only(entry: dict[str, Any]) -> ModuleSpec:
    return parse(desired({"digits": entry})).modules[0]


# What `az iot edge set-modules --content` is given: a solution template after its variables were
# replaced, with the chunks its tool makes, routes and a module twin.
SOLUTION = {
    "modulesContent": {
        "$edgeAgent": {
            "properties.desired": desired(
                {
                    "SimulatedTemperatureSensor": module(
                        version="1.0",
                        restartPolicy="always",
                        startupOrder=2,
                        settings={
                            "image": "mcr.microsoft.com/azureiotedge-simulated-temperature-sensor",
                            "createOptions": "",
                        },
                    ),
                    "filter": module(
                        restartPolicy="on-failure",
                        startupOrder=1,
                        imagePullPolicy="never",
                        env={"tempLimit": {"value": "100"}, "verbose": {"value": True}},
                        settings={
                            "image": "myacr.azurecr.io/filtermodule:0.0.1-amd64",
                            "createOptions": '{"Labels":{"a":"',
                            "createOptions01": 'b"},"Env"',
                            "createOptions02": ":[]}",
                        },
                    ),
                },
                runtime={
                    "type": "docker",
                    "settings": {
                        "minDockerVersion": "v1.25",
                        "loggingOptions": "",
                        "registryCredentials": {
                            "Contoso": {
                                "username": "myacr",
                                "password": "hunter2",
                                "address": "myacr.azurecr.io",
                            }
                        },
                    },
                },
            )
        },
        "$edgeHub": {
            "properties.desired": {
                "schemaVersion": "1.2",
                "routes": {
                    "toCloud": "FROM /messages/modules/filter/outputs/* INTO $upstream",
                    "toFilter": {
                        "route": "FROM /messages/modules/S/outputs/t WHERE note = ' INTO x' "
                        'INTO BrokeredEndpoint("/modules/filter/inputs/input1")',
                        "priority": 0,
                        "timeToLiveSecs": 1800,
                    },
                },
                "storeAndForwardConfiguration": {
                    "timeToLiveSecs": 100,
                    "storeLimits": {"maxSizeBytes": 1048576},
                },
            }
        },
        "filter": {"properties.desired": {"TemperatureThreshold": 21}},
    }
}


def test_a_whole_solution() -> None:
    manifest = parse(SOLUTION)
    assert manifest.schema_version == "1.1"
    assert manifest.runtime == Runtime("docker", "v1.25", "")
    assert [spec.name for spec in manifest.modules] == ["filter", "SimulatedTemperatureSensor"]
    assert [spec.name for spec in manifest.system_modules] == ["edgeAgent", "edgeHub"]
    assert manifest.system_modules[1].env == (("OptimizeForPerformance", "false"),)
    assert manifest.modules[0] == ModuleSpec(
        name="filter",
        image="myacr.azurecr.io/filtermodule:0.0.1-amd64",
        restart_policy="on-failure",
        image_pull_policy="never",
        startup_order=1,
        env=(("tempLimit", "100"), ("verbose", "true")),
        create_options='{"Env":[],"Labels":{"a":"b"}}',
    )
    assert manifest.modules[1].image.endswith("temperature-sensor:latest")
    assert manifest.modules[1].version == "1.0"
    assert manifest.registry_credentials == (
        RegistryCredential("Contoso", "myacr.azurecr.io", "myacr", "hunter2"),
    )
    assert manifest.module_twins == ("filter",)
    hub = manifest.edge_hub
    assert hub is not None
    assert (hub.ttl_seconds, hub.max_size_bytes, hub.mqtt_broker) == (100, 1048576, False)
    cloud, to_filter = hub.routes
    assert (cloud.sink, cloud.priority, cloud.condition) == ("$upstream", None, "")
    assert to_filter.sink == "modules/filter/inputs/input1"
    assert to_filter.condition == "note = ' INTO x'"
    assert (to_filter.priority, to_filter.ttl_seconds) == (0, 1800)


def test_a_password_is_not_in_the_repr() -> None:
    assert "hunter2" not in repr(parse(SOLUTION))


AGENT_ONLY = desired()
FORMS = {
    "bare": AGENT_ONLY,
    "twin": {**AGENT_ONLY, "$version": 7, "$metadata": {"$lastUpdated": "x"}},
    "manifest": {"modulesContent": {"$edgeAgent": {"properties.desired": AGENT_ONLY}}},
    "legacy": {"moduleContent": {"$edgeAgent": {"properties.desired": AGENT_ONLY}}},
    "configuration": {
        "id": "blue",
        "schemaVersion": "2.0",
        "priority": 10,
        "content": {"modulesContent": {"$edgeAgent": {"properties.desired": AGENT_ONLY}}},
    },
    "device twin": {"deployment": AGENT_ONLY, "interval": 5, "$version": 3},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_outer_form_gives_the_same(form: str) -> None:
    assert parse(FORMS[form]) == parse(AGENT_ONLY)


def test_a_byte_order_mark_and_nulls_are_tolerated() -> None:
    document = desired({"digits": module(env=None, version=None), "gone": None})
    body = b"\xef\xbb\xbf" + json.dumps(document).encode()
    assert parse_manifest(body) == parse(desired())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("restart_policy", "on-unhealthy"),
        ("image_pull_policy", "on-create"),
        ("startup_order", 4294967295),
        ("version", ""),
        ("env", ()),
        ("create_options", "{}"),
        ("status", "running"),
        ("type", "docker"),
    ],
)
def test_defaults_are_those_of_edge_agent(field: str, value: object) -> None:
    assert getattr(only(module()), field) == value


def test_the_agent_itself_is_always_running_and_first() -> None:
    agent = {**AGENT, "status": "stopped", "restartPolicy": "never", "startupOrder": 9}
    spec = parse(desired(systemModules={"edgeAgent": agent})).system_modules[0]
    assert (spec.status, spec.restart_policy, spec.startup_order) == ("running", "always", 0)


@pytest.mark.parametrize("version", ["1.0", "1.1", "1.1.0"])
def test_schema_versions(version: str) -> None:
    assert parse(desired(schemaVersion=version)).schema_version == version


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ("digits", "digits:latest"),
        ("localhost:5000/a/digits", "localhost:5000/a/digits:latest"),
        ("localhost:5000/digits:3", "localhost:5000/digits:3"),
        (" example.com/digits:3 ", "example.com/digits:3"),
        ("a/b@sha256:" + "0" * 64, "a/b@sha256:" + "0" * 64),
        ("a/b:1@sha256:" + "0" * 64, "a/b:1@sha256:" + "0" * 64),
        ("[::1]:5000/a__b-c.d:V1", "[::1]:5000/a__b-c.d:V1"),
    ],
)
def test_images(image: str, expected: str) -> None:
    assert only(module(settings={"image": image})).image == expected


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("x", "x"),
        ("", ""),
        (5, "5"),
        (-0.5, "-0.5"),
        (1e3, "1000.0"),
        (True, "true"),
        (False, "false"),
        ("Grüße\n", "Grüße\n"),
    ],
)
def test_env_values_become_text(value: object, text: str) -> None:
    assert only(module(env={"A": {"value": value}})).env == (("A", text),)


@pytest.mark.parametrize("order", [0, 1, 4294967295])
def test_startup_order_bounds(order: int) -> None:
    assert only(module(startupOrder=order)).startup_order == order


def test_modules_are_ordered_by_startup_then_name() -> None:
    modules = {"b": module(startupOrder=1), "z": module(), "c": module(startupOrder=0)}
    modules["a"] = module(startupOrder=1)
    assert [spec.name for spec in parse(desired(modules)).modules] == ["c", "a", "b", "z"]


@pytest.mark.parametrize(
    ("chunks", "expected"),
    [
        ({}, "{}"),
        ({"createOptions": ""}, "{}"),
        ({"createOptions": "null"}, "{}"),
        ({"createOptions": " \n"}, "{}"),
        ({"createOptions": {"b": 1, "a": {}}}, '{"a":{},"b":1}'),
        ({"createOptions": ' {"b" : 1} '}, '{"b":1}'),
        ({"createOptions01": ":1}", "createOptions": '{"b"'}, '{"b":1}'),
        ({"createOptions": "", "createOptions01": "{}"}, "{}"),
        ({"createOptions": '{"a":"' + "x" * 600 + '"}'}, '{"a":"' + "x" * 600 + '"}'),
    ],
)
def test_chunks(chunks: dict[str, Any], expected: str) -> None:
    assert only(module(settings={"image": "a", **chunks})).create_options == expected


def test_a_hundred_chunks_are_the_most() -> None:
    options = json.dumps({"a": "x" * 51_100}, separators=(",", ":"))
    chunks = write_create_options(options)
    assert (len(chunks), list(chunks)[-1]) == (100, "createOptions99")
    assert only(module(settings={"image": "a", **chunks})).create_options == options
    with pytest.raises(ManifestError, match="createOptions99 is the last"):
        only(module(settings={"image": "a", **chunks, "createOptions100": ""}))


names = st.from_regex(r"[a-zA-Z0-9_-]{1,12}", fullmatch=True).filter(
    lambda name: name not in ("edgeAgent", "edgeHub")
)
texts = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=12)
objects = st.dictionaries(
    texts, st.recursive(st.booleans() | st.integers(-9, 9) | texts, st.lists, max_leaves=4)
)
specs = st.builds(
    ModuleSpec,
    name=names,
    image=st.sampled_from(["a:1", "example.com/b:latest", "c@sha256:" + "1" * 64]),
    status=st.sampled_from(["running", "stopped"]),
    restart_policy=st.sampled_from(["never", "on-failure", "on-unhealthy", "always"]),
    image_pull_policy=st.sampled_from(["on-create", "never"]),
    startup_order=st.integers(0, 4294967295),
    version=texts,
    env=st.dictionaries(names, texts, max_size=4).map(
        lambda env: tuple(sorted((f"V{name}", value) for name, value in env.items()))
    ),
    create_options=objects.map(
        lambda value: json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    ),
)


def as_entry(spec: ModuleSpec) -> dict[str, Any]:
    return module(
        status=spec.status,
        restartPolicy=spec.restart_policy,
        imagePullPolicy=spec.image_pull_policy,
        startupOrder=spec.startup_order,
        version=spec.version,
        env={name: {"value": value} for name, value in spec.env},
        settings={"image": spec.image, **write_create_options(spec.create_options)},
    )


@settings(deadline=None)
@given(st.lists(specs, max_size=4, unique_by=lambda spec: spec.name))
def test_what_is_written_is_what_is_read(wanted: list[ModuleSpec]) -> None:
    manifest = parse(desired({spec.name: as_entry(spec) for spec in wanted}))
    assert manifest.modules == tuple(sorted(wanted, key=lambda s: (s.startup_order, s.name)))
    again = msgspec.json.decode(msgspec.json.encode(manifest), type=Manifest)
    assert again == manifest


@settings(deadline=None)
@given(specs, specs, st.data())
def test_the_fingerprint_changes_exactly_with_the_spec(
    one: ModuleSpec, other: ModuleSpec, data: st.DataObject
) -> None:
    assert (fingerprint(one) == fingerprint(other)) == (one == other)
    field = data.draw(st.sampled_from(one.__struct_fields__))
    mixed = msgspec.structs.replace(one, **{field: getattr(other, field)})
    assert (fingerprint(mixed) == fingerprint(one)) == (mixed == one)
    # Equal, but not the same objects.
    copy = msgspec.json.decode(msgspec.json.encode(one), type=ModuleSpec)
    assert fingerprint(copy) == fingerprint(one)


def test_the_fingerprint_outlives_releases() -> None:
    # Stored on devices: were it to change with an update, every module would look changed.
    spec = ModuleSpec(name="digits", image="example.com/digits:3", env=(("A", "1"),))
    text = b'[["name","digits"],["image","example.com/digits:3"],["env",[["A","1"]]]]'
    assert fingerprint(spec) == hashlib.sha256(text).hexdigest()
