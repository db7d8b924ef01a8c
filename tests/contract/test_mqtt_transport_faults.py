"""Our MQTT transport and faults, which only our broker can be made to show."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import json
import threading
from random import Random
from typing import Any

import msgspec
import paho.mqtt.client as mqtt
import pytest
from gatelet.agent.twin.backoff import full_jitter
from gatelet.agent.twin.mqtt import MqttSettings, MqttTransport
from gatelet.agent.twin.transport import TransportUnavailable
from gatelet.simulator.mqtt.broker import Broker
from gatelet.simulator.mqtt.connection import Limits
from mqtt_agent import P, Sink, agent, connected, is_up
from paho_peer import both, ignores_what_paho_leaves, ours, until
from paho_peer import collected as collected

pytestmark = ignores_what_paho_leaves


@both
async def test_no_report_is_lost_over_an_outage(version: int) -> None:
    async with ours() as broker, agent(broker.port, version) as (transport, sink):
        await connected(sink)
        await transport.report({"n": 0})

        async def keep_reporting() -> int:
            refused = 0
            for number in range(1, 200):
                while True:
                    try:
                        await transport.report({"n": number, f"k{number}": number})
                        break
                    except TransportUnavailable:
                        refused += 1
                        await until(lambda: is_up(transport), "reconnected")
            return refused

        reporting = asyncio.create_task(keep_reporting())
        for times in (2, 3):
            topic = f"{P}/reported"
            seen = broker.retained[topic]
            await until(lambda: broker.retained[topic] != seen, "reports flow")  # noqa: B023
            await broker.pause()
            broker.drop_connections()
            await until(lambda: not is_up(transport), "noticed")
            broker.publish(f"{P}/desired", b'{"$version": %d}' % times, 1, retain=True)
            await broker.resume()
            await connected(sink, times)
            assert (await sink.next()).version == times
        assert await reporting >= 1
        final = json.loads(broker.retained[f"{P}/reported"])
        assert final == {"n": 199, **{f"k{number}": number for number in range(1, 200)}}


async def test_not_connected_means_unavailable() -> None:
    transport = MqttTransport(MqttSettings("127.0.0.1", 1, "edge-1"))
    with pytest.raises(TransportUnavailable, match="not connected"):
        await transport.report({"a": 1})
    with pytest.raises(TransportUnavailable):
        await transport.send(b"", {})


async def test_refusal_is_told_once_and_overcome() -> None:
    users = {"edge-1": "other"}
    settings = {"username": "edge-1", "password": "secret"}
    async with ours(users=users) as broker, agent(broker.port, settings=settings) as (_, sink):
        await until(lambda: sink.links, "told")
        users["edge-1"] = "secret"
        await connected(sink)
        assert [kind for kind, _ in sink.links] == ["down", "up"]
        assert "refuses" in sink.links[0][1]


async def test_falls_back_to_311() -> None:
    limits = Limits(versions=frozenset({4}))
    async with ours(limits=limits) as broker, agent(broker.port) as (transport, sink):
        await connected(sink)
        assert transport._version == mqtt.MQTTv311
        assert sink.links == [("up", {})]
        await transport.report({"a": 1})


async def test_a_shorter_keep_alive_of_the_broker_is_heeded() -> None:
    class Strict(Broker):
        async def on_connect(self, connection: Any, connect: Any) -> Any:
            decision = await super().on_connect(connection, connect)
            properties = msgspec.structs.replace(decision.properties, server_keep_alive=3)
            return dataclasses.replace(decision, properties=properties)

    broker = Strict()
    await broker.start()
    async with agent(broker.port) as (transport, sink):
        await connected(sink)
        started = asyncio.get_running_loop().time()
        await until(lambda: asyncio.get_running_loop().time() > started + 5, "idle for a while")
        assert sink.links == [("up", {})]
        await transport.report({"a": 1})
    await broker.stop()


async def test_what_the_broker_cannot_take_does_not_cost_the_connection() -> None:
    limits = Limits(max_packet_size=10_000)
    async with ours(limits=limits) as broker, agent(broker.port) as (transport, sink):
        await connected(sink)
        with pytest.raises(TransportUnavailable, match="the broker takes 10000"):
            await transport.send(bytes(10_000), {})
        await transport.send(bytes(9_900), {})
        assert sink.links == [("up", {})]


async def test_a_missing_acknowledgement_ends_the_connection() -> None:
    class Deaf(Broker):
        deaf = True

        def on_publish(self, connection: Any, publish: Any) -> int | None:
            if publish.topic.endswith("/telemetry") and self.deaf:
                return None
            return super().on_publish(connection, publish)

    broker = Deaf()
    await broker.start()
    async with agent(broker.port, answer_timeout=3.0) as (transport, sink):
        await connected(sink)
        with pytest.raises(TransportUnavailable, match="not acknowledged within"):
            await transport.send(b"x", {})
        broker.deaf = False
        await connected(sink, 2)
        await transport.send(b"x", {})
    await broker.stop()


async def test_a_network_that_goes_away_while_something_is_sent_ends_the_connection() -> None:
    def gone(data: bytes) -> int:
        raise OSError(errno.EHOSTUNREACH, "No route to host")

    async with ours() as broker, agent(broker.port) as (transport, sink):
        await connected(sink)
        assert transport._ready is not None
        transport._ready._client._sock_send = gone
        # paho 2 keeps the reason for itself.
        with pytest.raises(TransportUnavailable, match=r"No route to host|Unspecified error"):
            await transport.send(b"x", {})
        await connected(sink, 2)
        await transport.send(b"x", {})


async def test_a_broker_that_talks_nonsense_is_survived() -> None:
    answers = [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"\x20\x05\x00\x00\x02\xff\xff",
        b"\x20\xff\xff",
    ]
    seen = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal seen
        await reader.read(100)
        writer.write(answers[seen % len(answers)])
        seen += 1
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with agent(server.sockets[0].getsockname()[1]) as (_, sink):
        await until(lambda: seen > 6, "it keeps trying")
        assert sink.ups() == []
    server.close()


async def test_two_agents_with_one_identity_back_off() -> None:
    options = {"base_delay": 0.1, "max_delay": 5.0}
    async with ours() as broker, agent(broker.port, **options) as (_, one):
        await connected(one)
        async with agent(broker.port, **options) as (_, two):
            await connected(two)
            await until(lambda: len(one.ups()) + len(two.ups()) >= 5, "they kick each other")
            started = asyncio.get_running_loop().time()
            before = len(one.ups()) + len(two.ups())
            await until(lambda: asyncio.get_running_loop().time() > started + 1, "a second")
            assert len(one.ups()) + len(two.ups()) - before <= 6


def test_full_jitter_stays_within_the_cap() -> None:
    random = Random(0)
    for attempt in (0, 1, 5, 2000):
        delays = [full_jitter(attempt, 0.5, 60, random) for _ in range(500)]
        most = min(60.0, 0.5 * 2.0 ** min(attempt, 64))
        assert all(0 <= delay <= most for delay in delays)
        assert max(delays) > 0.9 * most
        assert min(delays) < 0.1 * most
    assert full_jitter(3, 0, 60, random) == 0
    with pytest.raises(ValueError):
        full_jitter(-1, 1, 1, random)


async def test_nothing_is_left_behind() -> None:
    threads = set(threading.enumerate())
    async with ours() as broker:
        async with agent(broker.port) as (_, sink):
            await connected(sink)
            assert set(threading.enumerate()) - threads == set()
        await until(lambda: not broker.client_ids, "the broker heard of it")
        async with agent(broker.port):
            pass  # cancelled while connecting
        port = broker.port
    async with agent(port) as (_, sink):
        await until(lambda: sink.links, "refused")
        assert "cannot connect" in sink.links[0][1]
    await until(lambda: set(threading.enumerate()) <= threads, "threads end")
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    assert tasks == set()


@pytest.mark.parametrize("listening", [True, False])
async def test_a_cancellation_at_any_moment_ends_it(listening: bool) -> None:
    """asyncio.wait_for before Python 3.12 loses one that meets the result it waits for."""
    async with ours() as broker:
        if not listening:
            await broker.pause()
        loop = asyncio.get_running_loop()
        for microseconds in range(0, 12_000, 60):
            settings = MqttSettings("127.0.0.1", broker.port, "edge-1")
            transport = MqttTransport(settings, base_delay=0)
            running = asyncio.create_task(transport.run(Sink()))
            now = loop.time()
            while loop.time() < now + microseconds / 1e6:
                await asyncio.sleep(0)
            running.cancel()
            await asyncio.wait({running}, timeout=20)
            assert running.cancelled(), f"after {microseconds} us"
