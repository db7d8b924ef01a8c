"""Client certificates over plain MQTT, against our broker and the real mosquitto, with ACLs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from pathlib import Path
from random import Random
from typing import Any

import pytest
from gatelet.agent.twin.mqtt import MqttSettings, MqttTransport
from gatelet.agent.twin.transport import Desired, MethodResult, TransportUnavailable
from gatelet.simulator.mqtt.access import Grant
from gatelet.simulator.mqtt.broker import Broker
from gatelet.simulator.pki import Pki
from required import program

PREFIX = "gatelet/v1"


class Sink:
    def __init__(self) -> None:
        self.documents: list[Desired] = []
        self.links: list[str] = []
        self.reported: list[Any] = []

    async def desired(self, desired: Desired) -> None:
        self.documents.append(desired)

    async def connected(self, source: str, reported: Any) -> None:
        self.links.append("up")
        self.reported.append(reported)

    async def disconnected(self, source: str, reason: str) -> None:
        self.links.append(reason)

    async def method(self, source: str, name: str, payload: Any) -> MethodResult:
        return MethodResult(200, None)


class Bench:
    """A broker that lets in certificates only, each to its own topics, and agents at it."""

    def __init__(self, folder: Path, port: int, pki: Pki) -> None:
        self.folder, self.port, self.pki = folder, port, pki
        self.certificate, self.key = folder / "device.pem", folder / "device.key"

    def install(self, name: str = "edge-1", only_certificate: bool = False, **options: Any) -> None:
        made = self.pki.device(name, **options)
        pairs = [(made.certificate, self.certificate), (made.key, self.key)]
        for new, old in pairs[:1] if only_certificate else pairs:
            shutil.copy(new, self.folder / "new")
            (self.folder / "new").replace(old)

    @contextlib.asynccontextmanager
    async def agent(self, **changes: Any) -> AsyncIterator[tuple[MqttTransport, Sink]]:
        settings = MqttSettings(
            "127.0.0.1",
            self.port,
            "edge-1",
            ca_file=self.pki.ca_file,
            cert_file=self.certificate,
            key_file=self.key,
            watch_interval=0.05,
            **changes,
        )
        sink = Sink()
        transport = MqttTransport(settings, random=Random(1), base_delay=0.05, max_delay=0.3)
        run = asyncio.ensure_future(transport.run(sink))
        try:
            yield transport, sink
        finally:
            run.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await run

    async def deploy(self, version: int) -> None:
        """Somebody else with edge-1's certificate of another client id."""
        made = self.pki.device("edge-1", version=99)
        publisher = program("mosquitto_pub", "mosquitto-clients")
        process = await asyncio.create_subprocess_exec(
            *(publisher, "-h", "127.0.0.1", "-p", str(self.port), "-i", "operator"),
            *("--cafile", str(self.pki.ca_file), "--cert", str(made.certificate)),
            *("--key", str(made.key), "-q", "1", "-r", "-t", f"{PREFIX}/edge-1/desired"),
            *("-m", f'{{"$version":{version}}}'),
        )
        assert await process.wait() == 0


async def until(condition: Callable[[], Any], what: Any = "", seconds: float = 30) -> None:
    deadline = asyncio.get_running_loop().time() + seconds
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, f"timed out: {what}"
        await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def mosquitto(folder: Path, pki: Pki) -> AsyncIterator[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    server = pki.server(["127.0.0.1"])
    (folder / "acl").write_text(f"pattern readwrite {PREFIX}/%u/#\n")
    os.chmod(folder / "acl", 0o600)
    config = folder / "mosquitto.conf"
    config.write_text(
        f"user root\nlistener {port} 127.0.0.1\npersistence false\nlog_dest none\n"
        f"cafile {pki.ca_file}\ncertfile {server.certificate}\nkeyfile {server.key}\n"
        "require_certificate true\nuse_identity_as_username true\n"
        f"acl_file {folder / 'acl'}\n"
    )
    process = await asyncio.create_subprocess_exec(program("mosquitto"), "-c", str(config))

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
async def bench(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Bench]:
    program("mosquitto")
    program("mosquitto_pub", "mosquitto-clients")
    pki = Pki(tmp_path / "pki")
    if request.param == "mosquitto":
        async with mosquitto(tmp_path, pki) as port:
            yield Bench(tmp_path, port, pki)
        return
    context = pki.server_context(["127.0.0.1"])
    context.load_verify_locations(pki.ca_file)
    context.verify_mode = ssl.CERT_REQUIRED
    broker = Broker(ssl=context, grants=[Grant(f"{PREFIX}/%u/#")])
    await broker.start()
    try:
        yield Bench(tmp_path, broker.port, pki)
    finally:
        await broker.stop()


async def test_own_topics_with_an_encrypted_key(bench: Bench) -> None:
    word = bench.folder / "word"
    word.write_text("open sesame\n")
    bench.install(passphrase="open sesame")
    async with bench.agent(passphrase_file=word) as (transport, sink):
        await until(lambda: sink.links == ["up"], sink.links)
        await transport.report({"a": 1})
        await bench.deploy(7)
        await until(lambda: sink.documents)
        assert sink.documents[-1].version == 7
        assert transport.warnings() == ()


async def test_missing_pass_phrase_is_told(bench: Bench) -> None:
    bench.install(passphrase="open sesame")
    async with bench.agent() as (_, sink):
        await until(lambda: sink.links)
        assert "cannot use the TLS files" in sink.links[0]


async def test_somebody_elses_certificate(bench: Bench) -> None:
    bench.install("edge-2")
    async with bench.agent() as (transport, sink):
        await until(lambda: sink.links)
        # Mosquitto takes forbidden subscriptions and messages, and does nothing with them.
        await bench.deploy(1)
        with contextlib.suppress(TransportUnavailable):
            await transport.report({"forged": 1})
        assert sink.documents == []
    bench.install()
    async with bench.agent() as (_, sink):
        await until(lambda: sink.documents)
        assert sink.reported == [{}]


async def test_renewed_certificate(bench: Bench) -> None:
    bench.install(lifetime=timedelta(days=3))
    async with bench.agent() as (transport, sink):
        await until(lambda: sink.links == ["up"], sink.links)
        assert "in 2 days" in transport.warnings()[0]
        bench.install(only_certificate=True, version=2)
        await until(lambda: any("stays on its old" in w for w in transport.warnings()))
        await transport.report({"still": "there"})
        bench.install(self_signed=True)
        await until(lambda: any("refused" in w for w in transport.warnings()))
        await transport.report({"still": "up"})
        bench.install(version=2)
        await until(lambda: sink.links == ["up", "up"], sink.links)
        await transport.report({"now": "renewed"})
        await bench.deploy(3)
        await until(lambda: sink.documents and sink.documents[-1].version == 3)
        assert transport.warnings() == ()
