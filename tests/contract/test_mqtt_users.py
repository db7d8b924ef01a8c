"""Users of the broker by password and by client certificate, over TLS, with real clients."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from gatelet.simulator.mqtt.access import Grant
from gatelet.simulator.mqtt.broker import Broker
from gatelet.simulator.mqtt.codec import Decoder, encode
from gatelet.simulator.mqtt.packets import (
    V5,
    V311,
    ConnAck,
    Connect,
    PubAck,
    Publish,
    SubAck,
    Subscribe,
    Subscription,
    Will,
)
from required import program

OWN = [Grant("devices/%u/#")]


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ca.pem, and certificates and keys of server, edge-1, edge-2 and nameless."""
    folder = tmp_path_factory.mktemp("pki")
    now = datetime.datetime.now(datetime.timezone.utc)
    ca_key = ec.generate_private_key(ec.SECP256R1())
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ca")])

    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())

    def make(name: str, subject: x509.Name, key, *critical: x509.ExtensionType) -> None:
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(ca_name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(authority, critical=False)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
            )
        )
        for extension in critical:
            builder = builder.add_extension(extension, critical=True)
        certificate = builder.sign(ca_key, hashes.SHA256())
        pem = serialization.Encoding.PEM
        (folder / f"{name}.pem").write_bytes(certificate.public_bytes(pem))
        private = key.private_bytes(
            pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        (folder / f"{name}-key.pem").write_bytes(private)

    words = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment")
    words += ("key_agreement", "encipher_only", "decipher_only")
    usage = x509.KeyUsage(key_cert_sign=True, crl_sign=True, **dict.fromkeys(words, False))
    make("ca", ca_name, ca_key, x509.BasicConstraints(ca=True, path_length=None), usage)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    leaf = x509.BasicConstraints(ca=False, path_length=None)
    for name, extension in (("server", address), ("edge-1", leaf), ("edge-2", leaf)):
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        make(name, subject, ec.generate_private_key(ec.SECP256R1()), extension)
    organization = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "edge-1")])
    make("nameless", organization, ec.generate_private_key(ec.SECP256R1()), leaf)
    return folder


def server_context(pki: Path, mode: ssl.VerifyMode) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pki / "server.pem", pki / "server-key.pem")
    context.load_verify_locations(pki / "ca.pem")
    context.verify_mode = mode
    return context


def client_context(pki: Path, name: str | None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=pki / "ca.pem")
    # From Python 3.13 on that is the default.
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    if name is not None:
        context.load_cert_chain(pki / f"{name}.pem", pki / f"{name}-key.pem")
    return context


@asynccontextmanager
async def running(**arguments) -> AsyncIterator[Broker]:
    broker = Broker(**arguments)
    await broker.start()
    try:
        yield broker
    finally:
        await broker.stop()


async def talk(broker: Broker, context: ssl.SSLContext | None, *packets, answers: int) -> list:
    """What the broker answers to a connection that says this."""
    version = packets[0].version
    reader, writer = await asyncio.open_connection("127.0.0.1", broker.port, ssl=context)
    try:
        writer.write(b"".join(encode(packet, version) for packet in packets))
        decoder, found = Decoder(version=version), []
        while len(found) < answers:
            data = await asyncio.wait_for(reader.read(65_536), 20)
            if not data:
                break
            found += decoder.feed(data)
        return found
    finally:
        writer.close()
        try:
            await writer.wait_closed()
        except (ConnectionError, ssl.SSLError):
            pass
        deadline = asyncio.get_running_loop().time() + 20
        while broker.client_ids:
            assert asyncio.get_running_loop().time() < deadline
            await asyncio.sleep(0.002)


@pytest.mark.parametrize("version", [V311, V5])
async def test_the_certificate_names_the_user(pki: Path, version: int) -> None:
    context = server_context(pki, ssl.CERT_REQUIRED)
    async with running(ssl=context, grants=OWN) as broker:
        for user, granted in (("edge-1", True), ("edge-2", False)):
            wanted = Subscription("devices/edge-1/#", 1)
            answer = await talk(
                broker,
                client_context(pki, user),
                # The name in CONNECT proves nothing.
                Connect(f"c-{user}", version, username="edge-1", password=b"x"),
                Subscribe(1, (wanted,)),
                answers=2,
            )
            refusal = 0x80 if version == V311 else 0x87
            assert answer[1] == SubAck(1, (1,) if granted else (refusal,))
        answer = await talk(
            broker, client_context(pki, "nameless"), Connect("n", version), answers=1
        )
        assert [packet.reason_code for packet in answer] == [5 if version == V311 else 0x87]


async def test_no_certificate_where_one_is_required(pki: Path) -> None:
    async with running(ssl=server_context(pki, ssl.CERT_REQUIRED)) as broker:
        try:
            found = await talk(broker, client_context(pki, None), Connect("c", V5), answers=1)
        except (ConnectionError, ssl.SSLError):
            found = []
        assert found == []
        assert broker.client_ids == set()


async def test_certificates_or_passwords(pki: Path) -> None:
    context = server_context(pki, ssl.CERT_OPTIONAL)
    async with running(ssl=context, users={"edge-2": "secret"}) as broker:
        for name, connect, code in (
            ("edge-1", Connect("a", V5), 0),
            (None, Connect("b", V5), 0x87),
            (None, Connect("b", V5, username="edge-2", password=b"secret"), 0),
            (None, Connect("b", V5, username="edge-2", password=b"wrong"), 0x86),
            (None, Connect("a", V5, username="edge-2", password=b"secret"), 0),
        ):
            (answer,) = await talk(broker, client_context(pki, name), connect, answers=1)
            assert answer.reason_code == code


async def test_a_will_needs_its_grant() -> None:
    async with running(users={"edge-1": "p"}, grants=OWN) as broker:
        for topic, code in (("devices/edge-1/status", 0), ("devices/edge-2/status", 0x87)):
            connect = Connect("c", V5, username="edge-1", password=b"p", will=Will(topic, b"gone"))
            (answer,) = await talk(broker, None, connect, answers=1)
            assert answer.reason_code == code


async def test_another_users_client_id_opens_nothing() -> None:
    async with running(users={"a": "p", "b": "p"}) as broker:
        first = Connect("id", V311, False, username="a", password=b"p")
        wanted = Subscribe(1, (Subscription("secret", 1),))
        await talk(broker, None, first, wanted, answers=2)
        broker.publish("secret", b"for a", 1)
        second = Connect("id", V311, False, username="b", password=b"p")
        assert await talk(broker, None, second, answers=2) == [ConnAck(False, 2)]
        found = await talk(broker, None, first, answers=2)
        assert [type(packet) for packet in found] == [ConnAck, Publish]


async def test_publishing_to_other_devices_reaches_nobody() -> None:
    async with running(users={"edge-1": "p"}, grants=OWN) as broker:
        connect = Connect("c", V5, username="edge-1", password=b"p")
        found = await talk(
            broker,
            None,
            connect,
            Publish("devices/edge-2/x", b"1", 1, True, packet_id=1),
            Publish("devices/edge-1/x", b"1", 1, True, packet_id=2),
            answers=3,
        )
        assert found[1:] == [PubAck(1, 0x87), PubAck(2, 0x10)]
        assert broker.retained == {"devices/edge-1/x": b"1"}


async def test_mosquitto_clients_with_certificates_and_grants(pki: Path, tmp_path: Path) -> None:
    publish = program("mosquitto_pub", "mosquitto-clients")
    subscribe = program("mosquitto_sub", "mosquitto-clients")

    def arguments(user: str, version: str) -> list[str]:
        return [
            *("-h", "127.0.0.1", "-p", str(broker.port), "-V", version),
            *("--cafile", str(pki / "ca.pem"), "--cert", str(pki / f"{user}.pem")),
            *("--key", str(pki / f"{user}-key.pem"), "-q", "1"),
        ]

    async def run(*command: str) -> tuple[int, str]:
        process = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        output, _ = await asyncio.wait_for(process.communicate(), 40)
        return process.returncode or 0, output.decode()

    context = server_context(pki, ssl.CERT_REQUIRED)
    async with running(ssl=context, grants=OWN, folder=tmp_path / "state") as broker:
        for version in ("mqttv311", "mqttv5"):
            topic = f"devices/edge-1/{version}"
            code, output = await run(
                publish, *arguments("edge-1", version), "-t", topic, "-m", "hello", "-r"
            )
            assert code == 0, output
            code, output = await run(
                subscribe, *arguments("edge-1", version), "-t", topic, "-C", "1", "-W", "30"
            )
            assert (code, output) == (0, "hello\n")
        code, output = await run(
            publish, *arguments("edge-2", "mqttv5"), "-t", "devices/edge-1/x", "-m", "hello", "-r"
        )
        assert "devices/edge-1/x" not in broker.retained


async def test_websockets_with_tls(pki: Path) -> None:
    context = server_context(pki, ssl.CERT_REQUIRED)
    async with (
        running(ssl=context, grants=OWN, websockets=True) as broker,
        aiohttp.ClientSession() as session,
    ):
        url = f"https://127.0.0.1:{broker.websocket_port}/mqtt"
        trust = client_context(pki, "edge-1")
        async with session.ws_connect(url, protocols=["mqtt"], ssl=trust) as socket:
            wanted = Subscribe(1, (Subscription("devices/edge-1/#"), Subscription("#")))
            await socket.send_bytes(encode(Connect("c", V5), V5) + encode(wanted, V5))
            decoder, found = Decoder(version=V5), []
            while len(found) < 2:
                found += decoder.feed((await socket.receive(timeout=20)).data)
            assert found[1] == SubAck(1, (0, 0x87))
            # The broker closes first: the client is told.
            await broker.stop()
            message = await socket.receive(timeout=20)
            assert decoder.feed(message.data)[0].reason_code == 0x8B


async def test_paho_over_websockets() -> None:
    import threading

    import paho.mqtt.client as mqtt

    options = {"client_id": "c", "transport": "websockets", "protocol": mqtt.MQTTv5}
    if hasattr(mqtt, "CallbackAPIVersion"):
        options["callback_api_version"] = mqtt.CallbackAPIVersion.VERSION2
    async with running(websockets=True) as broker:
        client = mqtt.Client(**options)
        client.ws_set_options(path="/mqtt")
        received: list[bytes] = []
        done = threading.Event()
        # Without a cycle: the client closes the sockets that wake its thread when it is let go.
        client.on_connect = lambda c, *_: c.subscribe("t", 2)
        client.on_subscribe = lambda c, *_: c.publish("t", bytes(200_000), 2)
        client.on_message = lambda c, u, message: (received.append(message.payload), done.set())
        await asyncio.to_thread(client.connect, "127.0.0.1", broker.websocket_port)
        client.loop_start()
        try:
            assert await asyncio.to_thread(done.wait, 20)
        finally:
            client.disconnect()
            await asyncio.to_thread(client.loop_stop)
        assert received == [bytes(200_000)]
