"""The real paho client and our MQTT transport against our broker and against the real mosquitto.

Every test that asks for `broker` runs against both, so our broker is held to what mosquitto does.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime
import errno
import gc
import importlib
import json
import shutil
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import paho.mqtt.client as mqtt
import pytest
from gatelet.agent.twin.backoff import full_jitter
from gatelet.agent.twin.mqtt import MqttSettings, MqttTransport
from gatelet.agent.twin.transport import Desired, MethodResult, TransportUnavailable
from gatelet.simulator.mqtt.broker import Broker
from gatelet.simulator.mqtt.connection import Limits
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions
from required import program

P = "gatelet/v1/edge-1"

# paho leaves the sockets that wake its thread open when it connects again, and a handshake may be
# under way when a test ends: what is collected later is no finding.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module", autouse=True)
def collected() -> Iterator[None]:
    """Nothing of this is left for the tests of another file."""
    yield
    gc.collect()


async def until(condition: Callable[[], Any], what: str = "", seconds: float = 10) -> None:
    deadline = asyncio.get_running_loop().time() + seconds
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, f"timed out: {what}"
        await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def mosquitto(folder: Path) -> AsyncIterator[int]:
    binary = program("mosquitto")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = folder / "mosquitto.conf"
    config.write_text(
        f"listener {port} 127.0.0.1\nallow_anonymous true\npersistence false\nlog_dest none\n"
    )
    process = await asyncio.create_subprocess_exec(binary, "-c", str(config))

    def listens() -> bool:
        assert process.returncode is None, "mosquitto ended at once"
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        await until(listens, "mosquitto listens")
        yield port
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


@pytest.fixture(params=["ours", "mosquitto"])
async def broker(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[int]:
    """The port of a running broker."""
    if request.param == "mosquitto":
        async with mosquitto(tmp_path) as port:
            yield port
    else:
        ours = Broker()
        await ours.start()
        yield ours.port
        await ours.stop()


class Paho:
    """A paho client on its own network thread, awaited from the test."""

    def __init__(self, client_id: str, version: int = mqtt.MQTTv5, clean: bool = True) -> None:
        self.version, self.clean = version, clean
        self.loop = asyncio.get_running_loop()
        self.messages: asyncio.Queue[mqtt.MQTTMessage] = asyncio.Queue()
        self.events: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
        arguments: dict[str, Any] = {"client_id": client_id, "protocol": version}
        if version == mqtt.MQTTv311:
            arguments["clean_session"] = clean
        if hasattr(mqtt, "CallbackAPIVersion"):
            arguments["callback_api_version"] = mqtt.CallbackAPIVersion.VERSION2
        self.client = mqtt.Client(**arguments, reconnect_on_failure=False)
        self.client.on_connect = lambda c, u, flags, *more: self.tell("connect", flags)
        self.client.on_subscribe = lambda c, u, mid, *more: self.tell("subscribe", mid)
        self.client.on_publish = lambda c, u, mid, *more: self.tell("publish", mid)
        self.client.on_message = lambda c, u, message: self.loop.call_soon_threadsafe(
            self.messages.put_nowait, message
        )

    def tell(self, what: str, value: Any) -> None:
        self.loop.call_soon_threadsafe(self.events.put_nowait, (what, value))

    async def event(self, what: str) -> Any:
        while True:
            kind, value = await asyncio.wait_for(self.events.get(), 5)
            if kind == what:
                return value

    async def connect(self, port: int, expiry: int = 0) -> bool:
        """Whether the session was present."""
        arguments: dict[str, Any] = {}
        if self.version == mqtt.MQTTv5:
            properties = Properties(PacketTypes.CONNECT)
            properties.SessionExpiryInterval = expiry
            arguments = {"clean_start": self.clean, "properties": properties}
        await asyncio.to_thread(self.client.connect, "127.0.0.1", port, **arguments)
        self.client.loop_start()
        flags = await self.event("connect")
        return bool(flags["session present"] if isinstance(flags, dict) else flags.session_present)

    async def subscribe(self, *arguments: Any, **more: Any) -> None:
        self.client.subscribe(*arguments, **more)
        await self.event("subscribe")

    async def publish(self, *arguments: Any, **more: Any) -> None:
        self.client.publish(*arguments, **more)
        await self.event("publish")

    async def message(self) -> mqtt.MQTTMessage:
        return await asyncio.wait_for(self.messages.get(), 5)

    async def stop(self) -> None:
        self.client.disconnect()
        await asyncio.to_thread(self.client.loop_stop)

    async def break_down(self) -> None:
        """Lose the network without DISCONNECT."""
        self.client.socket().shutdown(socket.SHUT_RDWR)
        await asyncio.to_thread(self.client.loop_stop)


@contextlib.asynccontextmanager
async def paho(
    port: int, client_id: str, version: int = mqtt.MQTTv5, clean: bool = True, expiry: int = 0
) -> AsyncIterator[Paho]:
    client = Paho(client_id, version, clean)
    client.present = await client.connect(port, expiry)
    try:
        yield client
    finally:
        await client.stop()


both = pytest.mark.parametrize("version", [mqtt.MQTTv311, mqtt.MQTTv5])


@both
@pytest.mark.parametrize("qos", [0, 1, 2])
async def test_qos(broker: int, version: int, qos: int) -> None:
    async with paho(broker, "a", version) as a, paho(broker, "b") as b:
        await a.subscribe("t/+/x", qos)
        for number in range(50):
            b.client.publish("t/1/x", str(number), qos)
        received = [await a.message() for _ in range(50)]
        assert [int(message.payload) for message in received] == list(range(50))
        assert {message.qos for message in received} == {qos}


@both
async def test_retained_and_cleared(broker: int, version: int) -> None:
    async with paho(broker, "a", version) as a:
        await a.publish("kept/1", b"one", 1, True)
        await a.publish("kept/2", b"two", 1, True)
        await a.publish("kept/2", b"", 1, True)
    async with paho(broker, "b", version) as b:
        await b.subscribe("kept/#", 1)
        message = await b.message()
        assert (message.topic, message.payload, message.retain) == ("kept/1", b"one", 1)
        await b.publish("kept/3", b"live", 1, True)
        message = await b.message()
        assert (message.topic, bool(message.retain)) == ("kept/3", False)


@both
async def test_will(broker: int, version: int) -> None:
    async with paho(broker, "watcher") as watcher:
        await watcher.subscribe("will/#", 1)
        dying = Paho("dying", version)
        dying.client.will_set("will/dying", b"bye", 1, True)
        await dying.connect(broker)
        await dying.break_down()
        assert (await watcher.message()).payload == b"bye"


@both
async def test_session_resumes_with_queued_messages(broker: int, version: int) -> None:
    async with paho(broker, "s", version, False, 60) as s:
        assert not s.present
        await s.subscribe([("q/#", 1)])
    async with paho(broker, "other") as other:
        await other.publish("q/1", b"while away", 1)
    async with paho(broker, "s", version, False, 60) as s:
        assert s.present
        assert (await s.message()).payload == b"while away"


async def test_request_and_response_of_mqtt_5(broker: int) -> None:
    async with paho(broker, "a") as a, paho(broker, "b") as b:
        await a.subscribe("ask", options=SubscribeOptions(qos=1))
        properties = Properties(PacketTypes.PUBLISH)
        properties.ResponseTopic = "answer/b"
        properties.CorrelationData = b"\x00\x01"
        properties.UserProperty = [("k", "v"), ("k", "w")]
        await b.publish("ask", b"?", 1, properties=properties)
        received = (await a.message()).properties
        assert received.ResponseTopic == "answer/b"
        assert received.CorrelationData == b"\x00\x01"
        assert received.UserProperty == [("k", "v"), ("k", "w")]


async def test_a_second_client_with_the_id_takes_over(broker: int) -> None:
    first = Paho("same")
    ended = asyncio.Event()
    first.client.on_disconnect = lambda *_: first.loop.call_soon_threadsafe(ended.set)
    await first.connect(broker)
    async with paho(broker, "same") as second:
        await asyncio.wait_for(ended.wait(), 5)
        await second.subscribe("t")
    await first.stop()


# The transport


class Sink:
    def __init__(self) -> None:
        self.documents: asyncio.Queue[Desired] = asyncio.Queue()
        self.links: list[tuple[str, Any]] = []
        self.release = asyncio.Event()

    async def desired(self, desired: Desired) -> None:
        self.documents.put_nowait(desired)

    async def connected(self, source: str, reported: Mapping[str, Any] | None) -> None:
        self.links.append(("up", reported))

    async def disconnected(self, source: str, reason: str) -> None:
        self.links.append(("down", reason))

    async def method(self, source: str, name: str, payload: Any) -> MethodResult:
        if name == "hang":
            await self.release.wait()
        return MethodResult(404 if name == "missing" else 200, {"echo": payload})

    async def next(self) -> Desired:
        return await asyncio.wait_for(self.documents.get(), 10)

    def ups(self) -> list[Any]:
        return [value for kind, value in self.links if kind == "up"]


@contextlib.asynccontextmanager
async def agent(
    port: int, version: int = mqtt.MQTTv5, settings: dict | None = None, **options: Any
) -> AsyncIterator[tuple[MqttTransport, Sink]]:
    wanted = MqttSettings("127.0.0.1", port, "edge-1", **settings or {})
    transport = MqttTransport(
        wanted, random=Random(1), **{"base_delay": 0.02, "max_delay": 0.05, **options}
    )
    transport._version = version
    sink = Sink()
    running = asyncio.create_task(transport.run(sink))
    try:
        yield transport, sink
        assert not running.done(), running
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def is_up(transport: MqttTransport) -> bool:
    return transport._ready is not None and not transport._ready.lost.done()


async def connected(sink: Sink, times: int = 1) -> None:
    await until(lambda: len(sink.ups()) >= times, f"connected {times} times; {sink.links}")


@both
async def test_desired_arrives_raw_retained_and_live(broker: int, version: int) -> None:
    raw = b'{ "$version": 7,\n "deployment": {"n": 1.0} }'
    async with paho(broker, "cloud") as cloud:
        await cloud.publish(f"{P}/desired", raw, 1, True)
        async with agent(broker, version) as (_, sink):
            assert await sink.next() == Desired("mqtt", 7, raw)
            await cloud.publish(f"{P}/desired", b'{"deployment": {}}', 1, True)
            assert await sink.next() == Desired("mqtt", 0, b'{"deployment": {}}')
            await cloud.publish(f"{P}/desired", b"", 1, True)
            await cloud.publish(f"{P}/desired", b"not json", 1, True)
            assert await sink.next() == Desired("mqtt", 0, b"not json")


@both
async def test_reported_is_merged_retained_and_seeded(broker: int, version: int) -> None:
    async with paho(broker, "cloud") as cloud:
        await cloud.subscribe(f"{P}/reported", 1)
        async with agent(broker, version) as (transport, sink):
            await connected(sink)
            assert sink.links == [("up", {})]
            await transport.report({"a": {"b": 1, "c": 2}})
            await transport.report({"a": {"b": None}, "d": "ü"})
            assert json.loads((await cloud.message()).payload) == {"a": {"b": 1, "c": 2}}
            assert json.loads((await cloud.message()).payload) == {"a": {"c": 2}, "d": "ü"}
        async with agent(broker, version) as (transport, sink):
            await connected(sink)
            assert sink.ups() == [{"a": {"c": 2}, "d": "ü"}]
            await transport.report({"e": 1})
            expected = {"a": {"c": 2}, "d": "ü", "e": 1}
            assert json.loads((await cloud.message()).payload) == expected


async def test_methods_with_mqtt_5(broker: int) -> None:
    async with paho(broker, "cloud") as cloud, agent(broker) as (_, sink):
        await connected(sink)
        await cloud.subscribe("cloud/answers", 1)

        async def call(name: str, payload: bytes) -> tuple[str, Any]:
            properties = Properties(PacketTypes.PUBLISH)
            properties.ResponseTopic = "cloud/answers"
            properties.CorrelationData = name.encode()
            await cloud.publish(f"{P}/cmd/{name}", payload, 1, properties=properties)
            answer = await cloud.message()
            assert answer.properties.CorrelationData == name.encode()
            return dict(answer.properties.UserProperty)["status"], json.loads(answer.payload)

        assert await call("ping", b'{"x": 1}') == ("200", {"echo": {"x": 1}})
        assert await call("missing", b"") == ("404", {"echo": None})
        status, body = await call("ping", b"{")
        assert status == "400"
        assert "not JSON" in body["error"]


@both
async def test_methods_with_request_ids_in_topics(broker: int, version: int) -> None:
    async with paho(broker, "cloud", version) as cloud, agent(broker, version) as (_, sink):
        await connected(sink)
        await cloud.subscribe(f"{P}/resp/#", 1)
        await cloud.publish(f"{P}/cmd/ping/r1", b"[1]", 1)
        answer = await cloud.message()
        assert (answer.topic, answer.payload) == (f"{P}/resp/r1/200", b'{"echo":[1]}')
        for number in range(16):
            await cloud.publish(f"{P}/cmd/hang/h{number}", b"", 1)
        await cloud.publish(f"{P}/cmd/ping/late", b"", 1)
        assert (await cloud.message()).topic == f"{P}/resp/late/429"
        sink.release.set()
        assert {(await cloud.message()).topic for _ in range(16)} == {
            f"{P}/resp/h{number}/200" for number in range(16)
        }


async def test_bottomless_documents_of_others_end_nothing() -> None:
    deep = b"[" * 100_000
    nested = b'{"a":' * 900 + b"1" + b"}" * 900
    async with ours() as broker, paho(broker.port, "cloud") as cloud:
        await cloud.subscribe(f"{P}/resp/#", 1)
        for report in (deep, nested):
            await cloud.publish(f"{P}/reported", report, 1, True)
            await cloud.publish(f"{P}/status", report, 1, True)
            async with agent(broker.port) as (transport, sink):
                await connected(sink)
                assert sink.links == [("up", {})]
                await transport.report({"a": {"b": 1}})
                await cloud.publish(f"{P}/cmd/ping/r1", report, 1)
                assert (await cloud.message()).topic == f"{P}/resp/r1/400"
                await cloud.publish(f"{P}/status", report, 1)
                await cloud.publish(f"{P}/cmd/ping/r2", b"", 1)
                assert (await cloud.message()).topic == f"{P}/resp/r2/200"
                assert len(sink.links) == 1


async def test_calls_without_end_are_not_kept_without_end() -> None:
    class Deaf(Broker):
        answers = 0

        def on_publish(self, connection: Any, publish: Any) -> int | None:
            if "/resp/" in publish.topic:
                Deaf.answers += 1
                return None  # never acknowledged
            return super().on_publish(connection, publish)

    broker = Deaf(limits=Limits(receive_maximum=1000))
    await broker.start()
    async with paho(broker.port, "cloud") as cloud, agent(broker.port) as (_, sink):
        await connected(sink)
        before = len(asyncio.all_tasks())
        for number in range(300):
            await cloud.publish(f"{P}/cmd/ping/p{number}", b"", 1)
        await cloud.publish(f"{P}/desired", b"{}", 1)
        await sink.next()  # so all calls before it have arrived
        assert 16 <= len(asyncio.all_tasks()) - before < 100
        assert len(sink.links) == 1
    await broker.stop()


async def test_an_answer_cannot_become_a_document_of_the_device() -> None:
    async with ours() as broker, paho(broker.port, "cloud") as cloud:
        await cloud.subscribe(f"{P}/resp/#", 1)
        async with agent(broker.port) as (_, sink):
            await connected(sink)
            for topic in (f"{P}/desired", f"{P}/resp/mine"):
                properties = Properties(PacketTypes.PUBLISH)
                properties.ResponseTopic = topic
                await cloud.publish(f"{P}/cmd/ping", b"1", 1, properties=properties)
            assert (await cloud.message()).topic == f"{P}/resp/mine"
            await cloud.publish(f"{P}/desired", b"{}", 1)
            assert (await sink.next()).body == b"{}"


async def test_a_retained_method_call_is_not_executed(broker: int) -> None:
    async with paho(broker, "cloud") as cloud:
        await cloud.subscribe(f"{P}/resp/#", 1)
        await cloud.publish(f"{P}/cmd/reboot/old", b"", 1, True)
        async with agent(broker) as (_, sink):
            await connected(sink)
            await cloud.publish(f"{P}/cmd/ping/new", b"", 1)
            assert (await cloud.message()).topic == f"{P}/resp/new/200"
        await cloud.publish(f"{P}/cmd/reboot/old", b"", 1, True)


@both
async def test_birth_farewell_and_will(broker: int, version: int) -> None:
    async with paho(broker, "cloud") as cloud:
        await cloud.subscribe(f"{P}/status", 1)
        async with agent(broker, version) as (_, sink):
            await connected(sink)
            birth = json.loads((await cloud.message()).payload)
            assert birth["status"] == "online"
        farewell = json.loads((await cloud.message()).payload)
        stopped = {"status": "offline", "session": birth["session"], "reason": "stopped"}
        assert farewell == stopped
        async with agent(broker, version) as (transport, sink):
            await connected(sink)
            second = json.loads((await cloud.message()).payload)
            assert second["session"] > birth["session"]
            transport._ready.drop("the network fails")
            lost = {"session": second["session"], "status": "offline", "reason": "connection lost"}
            assert json.loads((await cloud.message()).payload) == lost
            third = json.loads((await cloud.message()).payload)
            assert third["session"] > second["session"]
            assert third["status"] == "online"


async def test_a_late_will_cannot_hide_the_birth(broker: int) -> None:
    async with paho(broker, "cloud") as cloud, agent(broker) as (_, sink):
        await connected(sink)
        await cloud.subscribe(f"{P}/status", 1)
        birth = json.loads((await cloud.message()).payload)
        late = {"status": "offline", "session": birth["session"] - 1}
        await cloud.publish(f"{P}/status", json.dumps(late), 1, True)
        assert json.loads((await cloud.message()).payload) == late
        assert json.loads((await cloud.message()).payload) == birth


@both
async def test_telemetry(broker: int, version: int) -> None:
    async with paho(broker, "cloud") as cloud, agent(broker, version) as (transport, sink):
        await connected(sink)
        await cloud.subscribe(f"{P}/telemetry/#", 1)
        await transport.send(b"\x00body", {"route": "a/b +", "n": "1"})
        message = await cloud.message()
        assert message.payload == b"\x00body"
        if version == mqtt.MQTTv5:
            assert message.topic == f"{P}/telemetry"
            assert dict(message.properties.UserProperty) == {"route": "a/b +", "n": "1"}
        else:
            assert message.topic == f"{P}/telemetry/route=a%2Fb%20%2B&n=1"


# Faults, which only our broker can be made to show


@contextlib.asynccontextmanager
async def ours(**arguments: Any) -> AsyncIterator[Broker]:
    broker = Broker(**arguments)
    await broker.start()
    try:
        yield broker
    finally:
        await broker.stop()


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
            properties = msgspec.structs.replace(decision.properties, server_keep_alive=1)
            return dataclasses.replace(decision, properties=properties)

    broker = Strict()
    await broker.start()
    async with agent(broker.port) as (transport, sink):
        await connected(sink)
        started = asyncio.get_running_loop().time()
        await until(lambda: asyncio.get_running_loop().time() > started + 2, "idle for a while")
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
    async with agent(broker.port, answer_timeout=0.2) as (transport, sink):
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
            await asyncio.wait({running}, timeout=5)
            assert running.cancelled(), f"after {microseconds} us"


def certificates(folder: Path) -> dict[str, Path]:
    """A CA, a server certificate for 127.0.0.1 and a client certificate."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    ipaddress = importlib.import_module("ipaddress")
    now = datetime.datetime.now(datetime.timezone.utc)
    made: dict[str, Path] = {}

    def make(name: str, issuer: Any, issuer_key: Any, extension: Any) -> tuple[Any, Any]:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer or subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(extension, critical=True)
            # From Python 3.13 on a chain without them is refused.
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(
                    (issuer_key or key).public_key()
                ),
                critical=False,
            )
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
            )
        )
        if issuer is None:
            words = ("digital_signature", "content_commitment", "key_encipherment")
            words += ("data_encipherment", "key_agreement", "encipher_only", "decipher_only")
            usage = dict.fromkeys(words, False)
            builder = builder.add_extension(
                x509.KeyUsage(key_cert_sign=True, crl_sign=True, **usage), critical=True
            )
        certificate = builder.sign(issuer_key or key, hashes.SHA256())
        made[name] = folder / f"{name}.pem"
        made[name].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        made[f"{name}-key"] = folder / f"{name}-key.pem"
        made[f"{name}-key"].write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return subject, key

    subject, key = make("ca", None, None, x509.BasicConstraints(ca=True, path_length=None))
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    make("server", subject, key, x509.SubjectAlternativeName([address]))
    make("client", subject, key, x509.BasicConstraints(ca=False, path_length=None))
    return made


@both
async def test_mutual_tls(tmp_path: Path, version: int) -> None:
    files = certificates(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files["server"], files["server-key"])
    context.load_verify_locations(files["ca"])
    context.verify_mode = ssl.CERT_REQUIRED
    with_tls = {"ca_file": files["ca"], "cert_file": tmp_path / "device.pem"}
    with_tls["key_file"] = files["client-key"]
    async with ours(ssl=context) as broker:
        async with agent(broker.port, version, with_tls) as (transport, sink):
            await until(lambda: sink.links, "the missing file is told")
            assert "device.pem" in sink.links[0][1]
            shutil.copy(files["client"], tmp_path / "device.pem")
            await connected(sink)
            big = {f"k{number}": "x" * 1000 for number in range(200)}
            await transport.report(big)
            # Larger than a TLS record: what TLS holds back must be read without a new event.
            for number in range(20):
                broker.publish(f"{P}/desired", b'{"$version":%d}' % number + b" " * 40_000, 1)
            while (await sink.next()).version != 19:
                pass
            assert json.loads(broker.retained[f"{P}/reported"]) == big
        async with agent(broker.port, version, {"ca_file": files["client"]}) as (_, sink):
            await until(lambda: sink.links, "a stranger's certificate is told")
            assert "certificate verify failed" in sink.links[0][1]


def test_settings_refuse_what_cannot_be_a_topic() -> None:
    for device in ("", "a/b", "a+", "#"):
        with pytest.raises(ValueError):
            MqttSettings("h", 1, device)
    for prefix in ("", "/x", "a/#", "+/{device}", "$SYS/x", "x/{name}"):
        with pytest.raises(ValueError):
            MqttSettings("h", 1, "d", prefix)
    assert MqttSettings("h", 1, "d", "x/{device}/").topics == "x/d"
    assert "secret" not in repr(MqttSettings("h", 1, "d", password="secret"))


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
