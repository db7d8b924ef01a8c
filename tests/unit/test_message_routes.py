"""Routes of `$edgeHub`: which messages they take, how urgently, and what of them has no effect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gatelet.agent.clock import SystemClock
from gatelet.agent.document import Node
from gatelet.agent.edge_hub import EdgeHub, parse_edge_hub
from gatelet.agent.manifest import parse_manifest
from gatelet.agent.message_condition import Message, UnsupportedCondition, parse_condition
from gatelet.agent.message_routes import MessageRoutes, compile_routes
from gatelet.agent.outbox import Limits, Outbox, Telemetry
from gatelet.agent.telemetry import Upstream
from gatelet.agent.unsupported import MAX_REPORTED, shortened, unsupported
from hypothesis import given
from hypothesis import strategies as st

BODY = json.dumps({"a": {"b": [1, {"c": "x"}]}, "n": 5, "t": True, "z": None}).encode()
MESSAGE = Message(
    "/messages/modules/digits/outputs/scores",
    BODY,
    {"level": "high", "count": "7", "odd name": "1"},
    {"connectionModuleId": "digits", "contentType": "application/json"},
)


@pytest.mark.parametrize(
    ("condition", "result"),
    [
        ("", True),
        ("level = 'high'", True),
        ('level = "low"', False),
        ("level <> 'low' AND NOT level = 'mid'", True),
        ("level != 'high' or count = '7'", True),
        ("{odd name} = '1'", True),
        ("count = 7", None),  # properties are texts
        ("nothing = 'x'", None),
        ("NOT nothing = 'x'", None),
        ("nothing = 'x' OR true = true", True),
        ("nothing = 'x' AND false = true", False),
        ("IS_DEFINED(level)", True),
        ("NOT IS_DEFINED(nothing)", True),
        ("is_defined($connectionModuleId)", True),
        ("NOT IS_DEFINED($messageId)", True),
        ("$connectionModuleId = 'digits'", True),
        ("$body.n > 4 AND $body.n <= 5", True),
        ("$body.n = -5", False),
        ("5e0 = $body.n", True),
        ("$body.a.b[0] = 1 AND $body.a.b[1].c = 'x'", True),
        ("$body.a.b[9].c = 'x'", None),
        ("$body.t", True),
        ("$body.t = true", True),
        ("$body.t > false", None),
        ("$body.z = null", True),
        ("$body.a = $body.a", None),
        ("(level = 'high' OR level = 'low') AND (count = '8')", False),
        ("level = 'x' OR level = 'high' AND count = '7'", True),
        ("NOT (level = 'high')", False),
        ("level < 'i'", True),
    ],
)
def test_conditions(condition: str, result: bool | None) -> None:
    assert parse_condition(condition)(MESSAGE) is result
    assert parse_condition(condition)(Message("", b"\xff", {}, {})) in (True, False, None)


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        ("as_number(count) > 3", "function as_number"),
        ("starts_with(level, 'h')", "function starts_with"),
        ("$twin.tags.x = 1", "not known"),
        ("level = ", "its end"),
        ("level = 'high", "cannot be read"),
        ("level LIKE 'x'", "'LIKE'"),
        ("count + 1 = 2", r"'\+'"),
        ("(level = 'high'", "its end"),
        ("a = 1)", r"'\)'"),
        ("- 'x' = 1", "'-'|'x'"),
        ("AND", "'AND'"),
        ("(" * 40 + "a" + ")" * 40, "nested deeper"),
        ("NOT " * 40 + "a", "nested deeper"),
        ("a = '" + "x" * 5000 + "'", "4096 at most"),
    ],
)
def test_what_is_not_understood_is_said(condition: str, said: str) -> None:
    with pytest.raises(UnsupportedCondition, match=said):
        parse_condition(condition)


words = st.sampled_from(
    [*"()=<>-{}[].$'\"", "AND", "OR", "NOT", "a", "$body.a", "1", "'x'", "IS_DEFINED", "true", "é"]
)


@given(st.lists(words, max_size=12).map(" ".join) | st.text(max_size=40))
def test_any_text_is_a_condition_or_is_refused(text: str) -> None:
    try:
        condition = parse_condition(text)
    except UnsupportedCondition:
        return
    assert condition(MESSAGE) in (True, False, None)


def hub(routes: dict[str, Any], **more: Any) -> EdgeHub:
    return parse_edge_hub(Node({"schemaVersion": "1.2", "routes": routes, **more}, "$edgeHub"))


def compiled(**routes: Any) -> MessageRoutes:
    return compile_routes(hub(routes))


@pytest.mark.parametrize(
    ("source", "takes"),
    [
        ("/*", True),
        ("/messages/*", True),
        ("/messages/modules/*", True),
        ("/messages/modules/digits/*", True),
        ("/messages/modules/digits/outputs/*", True),
        ("/messages/modules/digits/outputs/scores", True),
        ("/messages/modules/digits/outputs/score", False),
        ("/messages/modules/digit/*", False),
    ],
)
def test_sources(source: str, takes: bool) -> None:
    routes = compiled(r=f"FROM {source} INTO $upstream")
    assert routes.unsupported == ()
    assert (routes.upstream(MESSAGE) is not None) is takes


def test_of_several_routes_the_most_urgent_counts() -> None:
    routes = compiled(
        a="FROM /* INTO $upstream",
        b={"route": "FROM /* INTO $upstream", "priority": 3, "timeToLiveSecs": 60},
        c={"route": "FROM /* WHERE level = 'high' INTO $upstream", "priority": 1},
        d={"route": "FROM /* WHERE level = 'low' INTO $upstream", "priority": 0},
    )
    found = routes.upstream(MESSAGE)
    assert found is not None
    assert (found.route, found.priority, found.ttl_seconds) == ("c", 1, None)


def test_routes_without_effect_are_named() -> None:
    routes = compiled(
        inner='FROM /messages/* INTO BrokeredEndpoint("/modules/m/inputs/i")',
        twins="FROM /twinChangeNotifications/* INTO $upstream",
        function="FROM /* WHERE as_number(x) > 1 INTO $upstream",
        good="FROM /* INTO $upstream",
    )
    assert [path for path, _ in routes.unsupported] == [
        "$edgeHub.routes.function",
        "$edgeHub.routes.inner",
        "$edgeHub.routes.twins",
    ]
    found = routes.upstream(MESSAGE)
    assert found is not None
    assert found.route == "good"


async def test_the_outbox_follows_the_section(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "outbox.db", SystemClock())
    upstream = Upstream(outbox, "edge-1", Limits(1_000_000, 50.0))

    async def sent() -> list[tuple[int, bytes]]:
        order = []
        while (held := outbox.head()) is not None:
            order.append((held.priority, held.body))
            outbox.acknowledge(held.sequence)
        return order

    section = hub(
        {
            "late": {"route": "FROM /messages/modules/slow/* INTO $upstream", "priority": 9},
            "soon": {
                "route": "FROM /* WHERE level = 'high' INTO $upstream",
                "priority": 0,
                "timeToLiveSecs": 5,
            },
        },
        storeAndForwardConfiguration={
            "timeToLiveSecs": 7,
            "storeLimits": {"maxSizeBytes": 2_000_000},
        },
    )
    try:
        await upstream.put("slow", "o", Telemetry(b"before"))
        upstream.configure(section)
        assert outbox.limits == Limits(1_000_000, 7.0)
        first = await upstream.put("slow", "o", Telemetry(b"1"))
        await upstream.put("slow", "o", Telemetry(b"2", properties={"level": "high"}))
        await upstream.put("slow", "o", Telemetry(b"3"))
        await upstream.put("$edgeAgent", "events", Telemetry(b"own", priority=2))
        # No route takes it; the same key again is the same message.
        assert await upstream.put("fast", "o", Telemetry(b"lost")) == ""
        keyed = [await upstream.put("slow", "o", Telemetry(b"4", key="k")) for _ in range(2)]
        assert keyed[0] == keyed[1] != first
        assert await sent() == [
            (0, b"2"),
            (2, b"own"),
            (5, b"before"),
            (9, b"1"),
            (9, b"3"),
            (9, b"4"),
        ]
        upstream.configure(None)
        assert outbox.limits == Limits(1_000_000, 50.0)
        assert await upstream.put("fast", "o", Telemetry(b"kept"))
    finally:
        await outbox.close()


def test_one_list_says_what_is_not_done() -> None:
    settings = {"image": "m:1", "createOptions": '{"Env":[]}'}
    agent = {
        "schemaVersion": "1.1",
        "runtime": {"type": "docker", "settings": {}},
        "systemModules": {
            "edgeAgent": {
                "type": "docker",
                "settings": settings,
                "env": {
                    "ModuleUpdateMode": {"value": "NonBlocking"},
                    "UpstreamProtocol": {"value": "x"},
                },
            },
        },
        "modules": {"m": {"type": "docker", "status": "running", "settings": {"image": "m:1"}}},
    }
    section = {
        "schemaVersion": "1.2",
        "routes": {"r": 'FROM /* INTO BrokeredEndpoint("/modules/m/inputs/i")'},
        "mqttBroker": {"authorizations": []},
        "storeAndForwardConfiguration": {"timeToLiveSecs": 1, "storeLimits": {"maxSizeBytes": 9}},
    }
    content = {
        "$edgeAgent": {"properties.desired": agent},
        "$edgeHub": {"properties.desired": section},
        "m": {"properties.desired": {"x": 1}},
    }
    layers = {
        "base": {"priority": 1, "modulesContent": content, "targetCondition": "*"},
        "low": {"priority": 0, "modulesContent": {"$edgeAgent": {}}},
    }
    manifest = parse_manifest(json.dumps({"layers": layers}).encode())
    found = unsupported(manifest, 8)
    assert [sentence.split(": ")[0] for sentence in found] == [
        "layers.base.targetCondition",
        "layers.low",
        "systemModules.edgeAgent.settings.image",
        "systemModules.edgeAgent.settings.createOptions",
        "systemModules.edgeAgent.env",
        "$edgeHub.routes.r",
        "$edgeHub.mqttBroker",
        "$edgeHub.storeAndForwardConfiguration.storeLimits.maxSizeBytes",
        "m.properties.desired",
    ]
    assert "UpstreamProtocol" in found[4]
    assert "ModuleUpdateMode" not in found[4]
    assert len(unsupported(manifest)) == len(found) - 1
    many = tuple(map(str, range(MAX_REPORTED + 3)))
    assert shortened(many)[-1] == "... and 3 more"
    assert shortened(found) == list(found)
