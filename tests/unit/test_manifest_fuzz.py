"""Ten thousand generated documents: a manifest or a clear ManifestError, in little time.

A part grows from the manifest's grammar (Hypothesis), with something odd in places; the rest are
damaged copies of real documents. Set GATELET_FUZZ_SEED to see a failure of the latter again.
"""

from __future__ import annotations

import copy
import gc
import json
import os
import random
import secrets
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from gatelet.agent.document import ManifestError
from gatelet.agent.layers import layered_document
from gatelet.agent.manifest import parse_manifest
from gatelet.agent.manifest_reference import find_reference, signed_generation
from gatelet.agent.twin_fit import twin_misfits
from gatelet.agent.unsupported import unsupported
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

TOTAL = 10_000
FROM_GRAMMAR = 1_000
MUTATED = TOTAL - FROM_GRAMMAR
CPU_SECONDS = 0.05
CODES = (400, 403, 412, 417)

outcomes: Counter[str] = Counter()


def read_as_a_device_does(body: bytes) -> str:
    """Everything that looks at a document before it is a deployment."""
    try:
        reference = find_reference(body)
        if reference is not None:
            if reference.url:
                return "reference"
            body = reference.body
            signed_generation(body)
        manifest = parse_manifest(body)
        unsupported(manifest, 1_000_000)
        twin_misfits(body)
        hash(manifest.modules)
    except ManifestError as refusal:
        error = refusal
    else:
        return "accepted"
    assert error.code in CODES, error
    assert 0 < len(str(error).encode()) < 2_000, str(error)[:4_000]
    return str(error.code)


def check(body: bytes) -> None:
    for _ in range(3):
        began = time.thread_time()
        outcome = read_as_a_device_does(body)
        took = time.thread_time() - began
        if took < CPU_SECONDS:
            break
        # A collection of everybody's garbage is not this document's fault.
        gc.collect()
    else:
        raise AssertionError(f"{took:.3f} s of CPU for {body[:2000]!r}")
    outcomes[outcome] += 1


# -- from the grammar ------------------------------------------------------------------------------

odd = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(max_size=8),
    st.lists(st.integers(0, 3), max_size=2),
    st.dictionaries(st.text(max_size=4), st.integers(0, 3), max_size=2),
)


def mostly(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Now and then something else."""
    return st.integers(0, 40).flatmap(lambda n: odd if n == 40 else strategy)


def record(required: dict[str, Any], optional: dict[str, Any] | None = None) -> Any:
    return mostly(st.fixed_dictionaries(required, optional=optional or {}))


def mapping(keys: st.SearchStrategy[str], values: Any, most: int) -> Any:
    return mostly(st.dictionaries(keys, values, max_size=most))


def word(*words: str) -> Any:
    return mostly(st.sampled_from(words))


names = st.sampled_from(["digits", "filter", "m-1", "edgeAgent", "a.b", "x" * 129, "é"])
image = word("example.com/digits:3", "digits", "r:5000/a/b@sha256:" + "0" * 64, "Bad Name", "${I}")
options = word("{}", "", "null", '{"HostConfig":{"Privileged":true}}', "{", "[1]")
settings_of = record({"image": image}, {"createOptions": options, "createOptions01": options})
env = mapping(
    st.sampled_from(["A", "SCORING_TRAFFIC", "SCORING_BACKENDS", "SCORING_MIRROR", "B=C"]),
    record({"value": mostly(st.one_of(st.text(max_size=6), st.integers(), st.booleans()))}),
    3,
)
module = record(
    {
        "type": word("docker", "podman"),
        "status": word("running", "stopped"),
        "settings": settings_of,
    },
    {
        "restartPolicy": word("always", "never", "on-failure", "on-unhealthy", "Always"),
        "imagePullPolicy": word("on-create", "never"),
        "startupOrder": mostly(st.integers(-1, 2**32)),
        "version": word("1.0", ""),
        "env": env,
    },
)
agent = record(
    {
        "schemaVersion": word("1.0", "1.1", "1.1.2", "2.0"),
        "runtime": record(
            {
                "type": word("docker"),
                "settings": record(
                    {},
                    {
                        "minDockerVersion": word("v1.25"),
                        "registryCredentials": mapping(
                            st.sampled_from(["a", "b"]),
                            record({"username": odd, "password": odd, "address": word("r:5000")}),
                            2,
                        ),
                    },
                ),
            }
        ),
        "systemModules": record(
            {"edgeAgent": record({"type": word("docker"), "settings": settings_of}, {"env": env})},
            {"edgeHub": module},
        ),
        "modules": mapping(names, module, 3),
    },
    {"$version": st.integers(0, 9), "signed": record({"generation": mostly(st.integers(-1, 9))})},
)
conditions = st.lists(
    st.sampled_from(["a = 'x'", "AND", "OR", "NOT", "$body.a > 1", "as_number(a)", "(", ")", "'"]),
    max_size=5,
).map(" ".join)
routes = st.builds(
    lambda source, condition, sink: f"FROM {source} {condition} INTO {sink}",
    st.sampled_from(["/*", "/messages/modules/m/outputs/o", "/x", ""]),
    conditions.map(lambda text: text and f"WHERE {text}"),
    st.sampled_from(["$upstream", 'BrokeredEndpoint("/modules/m/inputs/i")', "x", ""]),
)
hub = record(
    {"schemaVersion": word("1.0", "1.2", "3"), "routes": mapping(names, mostly(routes), 3)},
    {
        "storeAndForwardConfiguration": record(
            {"timeToLiveSecs": mostly(st.integers(-2, 2**33))},
            {"storeLimits": record({"maxSizeBytes": mostly(st.integers(-1, 2**64))})},
        ),
        "mqttBroker": odd,
    },
)
paths = st.sampled_from(
    [
        "modules.digits",
        "modules.new",
        "routes.r",
        "runtime.settings.loggingOptions",
        "..",
        "a" * 300,
    ]
)
layer_parts = st.dictionaries(
    paths.map(lambda p: f"properties.desired.{p}"), module | odd, max_size=3
)
content = st.fixed_dictionaries(
    {"$edgeAgent": record({"properties.desired": agent})},
    optional={"$edgeHub": record({"properties.desired": hub}), "digits": odd},
)
base = st.fixed_dictionaries({"priority": st.integers(0, 2), "modulesContent": content})
layer = record(
    {
        "priority": mostly(st.integers(0, 9)),
        "content": record({"modulesContent": record({"$edgeAgent": mostly(layer_parts)})}),
    },
    {"createdTimeUtc": word("2026-03-01T10:00:00Z", "now"), "targetCondition": word("", "*")},
)
reference = record(
    {"url": word("https://h/x", "http://h/x", "file:///x"), "sha256": word("0" * 64, "sha256:0")},
    {"signature": odd, "keyId": odd},
)
inline = record({"body": mostly(agent.map(json.dumps).map(lambda t: [t[:40], t[40:]]))})
documents = st.one_of(
    agent,
    content.map(lambda value: {"modulesContent": value}),
    content.map(lambda value: {"content": {"modulesContent": value}}),
    st.builds(
        lambda b, more: {"layers": {"base": b, **more} if isinstance(more, dict) else more},
        base,
        mapping(names, layer, 2) | odd,
    ),
    st.builds(lambda inside: {"manifest": inside}, reference | inline),
    odd,
)


@settings(
    max_examples=FROM_GRAMMAR,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(documents)
def from_grammar(document: Any) -> None:
    try:
        body = json.dumps(document).encode()
    except (TypeError, ValueError):
        return
    check(body)


# -- damaged copies of real documents --------------------------------------------------------------


def real_documents() -> list[Any]:
    entry = {
        "version": "1.0",
        "type": "docker",
        "status": "running",
        "restartPolicy": "always",
        "startupOrder": 1,
        "imagePullPolicy": "on-create",
        "env": {"SCORING_BACKENDS": {"value": "fpga,cpu"}, "LIMIT": {"value": 100}},
        "settings": {
            "image": "registry.example:5000/models/digits:v3",
            "createOptions": '{"HostConfig":{"PortBindings":{"8883/tcp":[{"HostPort":"88',
            "createOptions01": '83"}]},"Binds":["/run/x:/run/x"]}}',
        },
    }
    system = {
        "edgeAgent": {
            "type": "docker",
            "settings": {"image": "mcr.example/azureiotedge-agent:1.5"},
        },
        "edgeHub": {**entry, "startupOrder": 0},
    }
    credentials = {"own": {"username": "u", "password": "p", "address": "registry.example:5000"}}
    desired = {
        "schemaVersion": "1.1",
        "runtime": {
            "type": "docker",
            "settings": {"minDockerVersion": "v1.25", "registryCredentials": credentials},
        },
        "systemModules": system,
        "modules": {"digits": entry, "filter": {**entry, "startupOrder": 2}},
    }
    edge_hub = {
        "schemaVersion": "1.2",
        "routes": {
            "up": "FROM /messages/modules/digits/outputs/* WHERE level = 'high' INTO $upstream",
            "on": {
                "route": 'FROM /messages/* INTO BrokeredEndpoint("/modules/filter/inputs/i")',
                "priority": 3,
                "timeToLiveSecs": 60,
            },
        },
        "storeAndForwardConfiguration": {
            "timeToLiveSecs": 7200,
            "storeLimits": {"maxSizeBytes": 9},
        },
    }
    whole = {
        "modulesContent": {
            "$edgeAgent": {"properties.desired": desired},
            "$edgeHub": {"properties.desired": edge_hub},
            "filter": {"properties.desired": {"limit": 21}},
        }
    }
    over = {
        "modulesContent": {
            "$edgeAgent": {
                "properties.desired.modules.extra": entry,
                "properties.desired.modules.digits.env.LIMIT": {"value": 5},
            },
            "$edgeHub": {"properties.desired.routes.more": "FROM /* INTO $upstream"},
        }
    }
    layers = json.loads(
        layered_document(json.dumps(whole).encode(), [(9, "a", json.dumps(over).encode())])
    )
    text = json.dumps({"signed": {"generation": 7}, **desired})
    signature = "MEUCIQ" + "A" * 88
    return [
        desired,
        {"$version": 4, **desired},
        whole,
        {"id": "x", "content": whole, "priority": 3},
        layers,
        {"manifest": {"url": "https://h/m.json", "sha256": "ab" * 32, "signature": signature}},
        {"manifest": {"body": [text[:512], text[512:]], "signature": signature, "keyId": "k"}},
    ]


ODD = (
    *(None, True, False, 0, -1, 1.5, 2**31, 2**53, 10**19, "", " ", "x", "é", "\0", "a.b", "$x"),
    *([], {}, [[]], {"": {}}, "x" * 5000, "{", '{"a":1}', "running", "docker", "\ud800"),
)
FRAGMENTS = (
    *(b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\", b"\\u0000", b"\\ud800", b"\0", b"\xff"),
    *(
        b"NaN",
        b"1e999",
        b"9" * 40,
        b"null",
        b"[" * 200,
        b'{"a":' * 50,
        b'"modules":{},',
        b"\xef\xbb\xbf",
    ),
)


def nodes(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """(container, key) of everything inside `value`."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        found.append((value, key))
        if isinstance(item, (dict, list)):
            nodes(item, found)
    return found


def change(dice: random.Random, document: Any) -> None:
    places = nodes(document, [])
    if not places:
        return
    owner, key = dice.choice(places)
    kind = dice.randrange(6)
    if kind == 0:
        owner[key] = copy.deepcopy(dice.choice(ODD))
    elif kind == 1 and isinstance(owner, dict):
        del owner[key]
    elif kind == 2 and isinstance(owner, dict):
        owner[dice.choice([key.upper(), key + " ", key[:-1], "x" * 600, "a.b", "$" + key])] = (
            owner.pop(key)
        )
    elif kind == 3:
        other, name = dice.choice(places)
        owner[key] = copy.deepcopy(other[name])
    elif kind == 4 and isinstance(owner, dict):
        owner.update({f"{key}{n}": copy.deepcopy(owner[key]) for n in range(dice.randrange(1, 12))})
    else:
        for _ in range(dice.randrange(1, 40)):
            owner[key] = [owner[key]] if dice.random() < 0.5 else {"a": owner[key]}


def damage(dice: random.Random, body: bytes) -> bytes:
    at, length = dice.randrange(len(body) + 1), dice.choice([1, 1, 2, 8, 64, 512])
    kind = dice.randrange(5)
    if kind == 0:
        return body[:at] + bytes([dice.randrange(256)]) + body[at + 1 :]
    if kind == 1:
        return body[:at] + body[at + length :]
    if kind == 2:
        return body[:at] + dice.choice(FRAGMENTS) + body[at:]
    if kind == 3:
        return body[:at] + body[at : at + length] * dice.randrange(2, 8) + body[at + length :]
    return body[:at]


def mutated(dice: random.Random, originals: list[Any]) -> bytes:
    document = copy.deepcopy(dice.choice(originals))
    deep = dice.random() < 0.6
    for _ in range(dice.choice([1, 1, 1, 2, 3]) if deep else 0):
        change(dice, document)
    body = json.dumps(document).encode()
    for _ in range(0 if deep else dice.choice([1, 1, 2, 4])):
        body = damage(dice, body)
    return body


def test_ten_thousand_documents_give_a_manifest_or_a_clear_error() -> None:
    outcomes.clear()
    originals = real_documents()
    for document in originals:
        check(json.dumps(document).encode())
    assert outcomes.pop("accepted", 0) + outcomes.pop("reference", 0) == len(originals), outcomes
    while sum(outcomes.values()) < FROM_GRAMMAR:
        from_grammar()
    while sum(outcomes.values()) < TOTAL:
        seed = int(os.environ.get("GATELET_FUZZ_SEED", 0)) or secrets.randbits(32)
        dice = random.Random(seed)
        for _ in range(min(MUTATED, TOTAL - sum(outcomes.values()))):
            body = mutated(dice, originals)
            try:
                check(body)
            except Exception as error:
                raise AssertionError(f"seed {seed}: {error!r} for {body!r}") from error
    assert sum(outcomes.values()) >= TOTAL
    # Each kind of answer occurred: this is no ten thousand times the same one.
    for outcome in ("accepted", "reference", "400", "412", "417"):
        assert outcomes[outcome] > 10, outcomes


def test_a_long_document_costs_time_in_proportion() -> None:
    """Shapes that invite quadratic work: four times the size takes at most about four times."""

    def seconds(make: Callable[[int], bytes], count: int) -> float:
        body = make(count)
        best = 9.0
        for _ in range(3):
            began = time.thread_time()
            read_as_a_device_does(body)
            best = min(best, time.thread_time() - began)
        return best

    whole = real_documents()[2]
    entry = whole["modulesContent"]["$edgeAgent"]["properties.desired"]["modules"]["digits"]

    def modules(count: int) -> bytes:
        document = copy.deepcopy(whole)
        many = {f"m{n}": entry for n in range(count)}
        document["modulesContent"]["$edgeAgent"]["properties.desired"]["modules"] = many
        return json.dumps(document).encode()

    def layers(count: int) -> bytes:
        parts = {f"properties.desired.modules.m{n}": entry for n in range(count)}
        over = {"modulesContent": {"$edgeAgent": parts}}
        return layered_document(json.dumps(whole).encode(), [(1, "a", json.dumps(over).encode())])

    def brackets(count: int) -> bytes:
        return b'{"a":' + b"[" * 300 * count

    def quotes(count: int) -> bytes:
        return b'{"manifest":"' + b'\\"' * 300 * count

    def route(count: int) -> bytes:
        document = copy.deepcopy(whole)
        text = "FROM /* WHERE " + "a " * 10 * count + "INTO x" * count
        document["modulesContent"]["$edgeHub"]["properties.desired"]["routes"] = {"r": text}
        return json.dumps(document).encode()

    for make in (modules, layers, brackets, quotes, route):
        small, large = seconds(make, 100), seconds(make, 400)
        assert large < 10 * small + 0.01, (make.__name__, small, large)
