"""The broker of a site as users meet it: TLS, certificates, access lists, restarts, websockets."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from gatelet.simulator.background import BackgroundLoop
from gatelet.simulator.pki import Pki
from gatelet.simulator.site import Site
from gatelet.simulator.site_config import (
    BROKER,
    BrokerSettings,
    GrantRule,
    SiteConfigError,
    SiteSettings,
    parse_settings,
)
from required import needs

pytestmark = pytest.mark.e2e
GATELET = (sys.executable, "-m", "gatelet.agent.main")
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
needs_mosquitto = needs("mosquitto_pub", package="mosquitto-clients")


@contextmanager
def running(folder: Path, *words: str) -> Iterator[dict[str, Any]]:
    """`gatelet sim ...` in `folder`; what it prints."""
    process = subprocess.Popen(
        [*GATELET, "sim", *words, "--json"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.communicate(timeout=30)
        yield json.loads(line)
    finally:
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (0, "", "")


def mosquitto(kind: str, broker: dict[str, Any], user: str, *words: str) -> str:
    """What a mosquitto client says; `user` by certificate where there is one, else by password."""
    files = broker["clientCertificates"].get(user)
    who = ("-u", user, "-P", broker["users"].get(user, ""))
    if files is not None:
        who = ("--cert", files["certFile"], "--key", files["keyFile"])
    done = subprocess.run(
        [
            *(f"mosquitto_{kind}", "-h", broker["host"], "-p", str(broker["port"])),
            *("--cafile", broker["caFile"], "-V", "mqttv5", "-q", "1", *who, *words),
        ],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    return done.stdout + done.stderr


@needs_mosquitto
def test_certificates_grants_and_a_restart(tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text(
        '[[broker.grants]]\ntopic = "plants/%u/#"\n'
        '[[broker.grants]]\ntopic = "#"\nuser = "operator"\n'
        '[users]\noperator = "secret"\n'
    )
    flags = ("--config", "site.toml", "--dir", "state", "--persist")
    flags = (*flags, "--client-certificate", "camera-7", "--client-certificate", "camera-8")
    with running(tmp_path, "broker", *flags) as about:
        broker = about["broker"]
        assert broker["tls"]
        assert broker["folder"] == str(tmp_path / "state" / "broker")
        assert broker["websocketUrl"] is None
        said = mosquitto("pub", broker, "camera-7", "-r", "-t", "plants/camera-7/x", "-m", "kept")
        assert said == ""
        said = mosquitto("pub", broker, "camera-7", "-r", "-t", "plants/camera-8/x", "-m", "no")
        assert "Not authorized" in said
        own = mosquitto("pub", broker, "edge-1", "-r", "-t", "gatelet/v1/edge-1/x", "-m", "own")
        assert own == "", "the site's device has its topics in any case"
        broker["users"]["operator"] = "wrong"
        for user in ("nobody", "operator"):
            said = mosquitto("pub", broker, user, "-t", "a", "-m", "")
            assert "Bad User Name or Password" in said
        ca_before = Path(broker["caFile"]).read_bytes()
    with running(tmp_path, "broker", *flags) as about:
        broker = about["broker"]
        assert Path(broker["caFile"]).read_bytes() == ca_before
        listen = ("-t", "#", "-v", "-W", "10", "-C", "2")
        assert sorted(mosquitto("sub", broker, "operator", *listen).splitlines()) == [
            "gatelet/v1/edge-1/x own",
            "plants/camera-7/x kept",
        ]
        said = mosquitto("sub", broker, "camera-8", "-t", "plants/camera-7/x", "-W", "2")
        assert "subscription requests were denied" in said


@needs_mosquitto
def test_nobody_by_password_where_certificates_are_required(tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text('[users]\noperator = "secret"\n')
    words = ("broker", "--config", "site.toml", "--require-certificate")
    with running(tmp_path, *words) as about:
        broker = about["broker"]
        assert set(broker["clientCertificates"]) == {"edge-1", "operator"}
        assert mosquitto("pub", broker, "operator", "-t", "a", "-m", "x") == ""
        del broker["clientCertificates"]["operator"]
        assert mosquitto("pub", broker, "operator", "-t", "a", "-m", "x") != ""


def test_paho_over_secure_websockets_and_mqtt_at_once(tmp_path: Path) -> None:
    import paho.mqtt.client as mqtt

    def client(transport: str, user: str) -> mqtt.Client:
        options: dict[str, Any] = {"transport": transport, "protocol": mqtt.MQTTv5}
        if hasattr(mqtt, "CallbackAPIVersion"):
            options["callback_api_version"] = mqtt.CallbackAPIVersion.VERSION2
        made = mqtt.Client(client_id=f"{user}-{transport}", **options)
        files = site.broker_certificates[user]
        context = ssl.create_default_context(cafile=str(site.ca_file))
        context.load_cert_chain(files.certificate, files.key)
        made.tls_set_context(context)
        return made

    wanted = BrokerSettings(
        client_certificates=("a", "b"), require_certificate=True, websockets=True
    )
    settings = SiteSettings(tmp_path / "site", parts=frozenset({BROKER}), broker=wanted)
    received: list[tuple[str, bytes]] = []
    subscribed, done = threading.Event(), threading.Event()
    with BackgroundLoop() as loop:
        site = loop.call(lambda: Site(settings))
        loop.run(site.start())
        listener, speaker = client("websockets", "a"), client("tcp", "b")
        listener.on_connect = lambda c, *_: c.subscribe("t/#", 1)
        listener.on_subscribe = lambda *_: subscribed.set()
        listener.on_message = lambda c, u, message: (
            received.append((message.topic, message.payload)),
            done.set(),
        )
        try:
            listener.connect("localhost", site.broker.websocket_port)
            listener.loop_start()
            assert subscribed.wait(10)
            speaker.connect("127.0.0.1", site.broker.port)
            speaker.loop_start()
            speaker.publish("t/x", bytes(100_000), 1).wait_for_publish(10)
            assert done.wait(10)
            url = site.describe()["broker"]["websocketUrl"]
            assert url == f"wss://127.0.0.1:{site.broker.websocket_port}/mqtt"
        finally:
            for one in (listener, speaker):
                one.disconnect()
                one.loop_stop()
            loop.run(site.stop())
    assert received == [("t/x", bytes(100_000))]


def test_the_agent_of_a_site_with_certificates(tmp_path: Path) -> None:
    """`gatelet run` with the agent.toml as it is; the folder's name needs quoting in TOML."""
    folder = tmp_path / 'the "site"'
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        grpc_address = f"127.0.0.1:{probe.getsockname()[1]}"
    wanted = BrokerSettings(require_certificate=True, grants=(GrantRule("news/#"),))
    settings = SiteSettings(folder, board="none", grpc_address=grpc_address, broker=wanted)
    config = folder / "agent.toml"
    with BackgroundLoop() as loop:
        site = loop.call(lambda: Site(settings))
        loop.run(site.start())
        assert config.stat().st_mode & 0o077 == 0, "it holds keys"
        with (tmp_path / "agent.log").open("wb") as log:
            command = [*GATELET, "run", "--config", str(config)]
            agent = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        status = f"gatelet/v1/{settings.device}/status"
        try:
            deadline = time.monotonic() + 40
            state = ""
            while state != "online":
                text = (tmp_path / "agent.log").read_text()
                assert agent.poll() is None, text
                assert time.monotonic() < deadline, text
                payload = loop.call(lambda: site.broker.retained).get(status, b"{}")
                state = json.loads(payload).get("status")
                threading.Event().wait(0.05)
        finally:
            agent.terminate()
            agent.wait(30)
            loop.run(site.stop())


EDGE_MODULE = """
import sys
from azure.iot.device import IoTHubModuleClient, ProxyOptions
host, port = sys.argv[1].split(":")
client = IoTHubModuleClient.create_from_edge_environment(
    proxy_options=ProxyOptions("HTTP", host, int(port))
)
client.connect()
client.patch_twin_reported_properties({"seen": client.get_twin()["desired"]["$version"]})
client.shutdown()
"""


def test_a_module_from_the_edge_environment(tmp_path: Path) -> None:
    words = ("hub", "--dir", "state", "--edge-module", "vision", "--edge-module", "audio")
    for _ in range(2):  # the second time over what the first one left
        with running(tmp_path, *words) as about:
            assert set(about["edge"]["modules"]) == {"vision", "audio"}
            environment = about["edge"]["modules"]["vision"]
            assert environment["IOTEDGE_WORKLOADURI"] == about["edge"]["workloadUri"]
            done = subprocess.run(
                [sys.executable, "-W", "ignore", "-c", EDGE_MODULE, about["hub"]["proxy"]],
                env={**os.environ, **environment},
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            assert (done.returncode, done.stderr) == (0, "")
        assert not list((tmp_path / "state" / "edge").iterdir()), "sockets end with the site"
    twin = json.loads((tmp_path / "state" / "hub" / "hub.json").read_text())["twins"]
    assert '"seen":1' in json.dumps(twin["edge-1/vision"], separators=(",", ":"))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[broker]\nclient-certificates = ['']", "common name"),
        ("[broker]\nclient-certificates = ['" + "x" * 65 + "']", "common name"),
        ("[broker]\nssl = true", "ssl"),
        ("[[broker.grants]]\ntopic = 'a/#/b'", "a/#/b"),
        ("[[broker.grants]]\ntopic = '#'\nuser = 'operater'", "no user 'operater'"),
        ("[[broker.grants]]\npublish = true", "topic"),
        ("[ports]\nbroker-websockets = -1", "ports.broker-websockets"),
        ("edge-modules = ['a b']", "a b"),
        ("host-name = 'hüb.test'", "host-name"),
        ("host-name = ''", "host-name"),
        ("[faults]\nrefuse-connects = inf", "refuse_connects"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(SiteConfigError, match=re.escape(why)) as caught:
        parse_settings(text, "site.toml", tmp_path)
    assert "site.toml" in str(caught.value)


def test_an_empty_access_list_grants_nothing_but_the_devices_own(tmp_path: Path) -> None:
    settings = parse_settings("[broker]\ngrants = []", "site.toml", tmp_path)
    site = Site(settings)
    assert site.broker._access is not None
    for topic, granted in (("gatelet/v1/edge-1/status", True), ("news", False)):
        assert site.broker._access.may_publish("edge-1", "c", topic) is granted
        assert not site.broker._access.may_publish("other", "c", topic)


@pytest.mark.parametrize(
    ("words", "code", "why"),
    [
        (("broker", "--persist"), 2, "--dir"),
        (("broker", "--port", "70000"), 2, "port number"),
        (("broker", "--dir", "bad", "--persist"), 1, "move the file away"),
        (("hub", "--dir", "bad"), 1, "move it away"),
        (("broker", "--dir", "damaged"), 1, "pki away"),
        (("hub", "--dir", "x" * 108, "--edge-module", "m"), 1, "shorter folder"),
        (("hub", "--edge-module", "a b"), 2, "a b"),
        (("hub", "--config", "taken.toml"), 1, "cannot be had for devices"),
    ],
)
def test_what_cannot_start_says_why(
    tmp_path: Path, words: tuple[str, ...], code: int, why: str
) -> None:
    for name in ("broker/broker.db", "hub/hub.json"):
        file = tmp_path / "bad" / name
        file.parent.mkdir(parents=True)
        file.write_bytes(b"not ours" * 100)
    for name in ("ca.pem", "ca.key.pem"):
        file = tmp_path / "damaged" / "pki" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("-----BEGIN NOTHING-----")
    with socket.socket() as other:
        # As another hub has it.
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        (tmp_path / "taken.toml").write_text(f"[ports]\nhub-mqtt = {other.getsockname()[1]}\n")
        done = run_sim(tmp_path, *words)
    assert (done.returncode, why in done.stderr) == (code, True), done.stderr
    assert "Traceback" not in done.stderr


def test_fixed_ports_of_the_hub(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tmp_path / "site.toml").write_text(f"[ports]\nhub-mqtt = {port}\n")
    for _ in range(2):
        with running(tmp_path, "hub", "--config", "site.toml") as about:
            assert about["hub"]["mqttPort"] == port
            trust = ssl.create_default_context(cafile=about["hub"]["caFile"])
            for name in ("mqttPort", "httpsPort"):
                address = ("127.0.0.1", about["hub"][name])
                with (
                    socket.create_connection(address, 10) as plain,
                    trust.wrap_socket(plain, server_hostname=about["hub"]["hostName"]),
                ):
                    pass


def run_sim(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*GATELET, "sim", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_different_names_get_different_files(tmp_path: Path) -> None:
    pki = Pki(tmp_path)
    names = ("a/b", "a_b", "a:b", "a b", "é")
    files = [pki.device(name) for name in names]
    assert [one.leaf.subject.rfc4514_string() for one in files] == [f"CN={n}" for n in names]


def test_certificates_follow_their_authority(tmp_path: Path) -> None:
    first = Pki(tmp_path)
    before = first.device("a").leaf
    server = first.server(["x.test"])
    assert Pki(tmp_path).device("a").leaf == before
    server.certificate.write_text("damaged")
    assert Pki(tmp_path).server(["x.test"]).leaf
    (tmp_path / "ca.key.pem").unlink()
    second = Pki(tmp_path)
    assert second.device("a").leaf != before
    assert second.device("a").leaf == second.device("a").leaf
    first.device("b", self_signed=True).certificate.unlink()
    assert second.device("b", self_signed=True).leaf


@needs_mosquitto
def test_the_examples_of_the_document(tmp_path: Path) -> None:
    document = (Path(__file__).resolve().parents[2] / "docs" / "mqtt-broker.md").read_text()

    def block(language: str) -> str:
        (text,) = re.findall(rf"^```{language}\n(.*?)^```", document, re.MULTILINE | re.DOTALL)
        return textwrap.dedent(text)

    (tmp_path / "site.toml").write_text(block("toml"))
    script = block("sh").replace("kill %1", "kill %1; wait %1 || true")
    done = subprocess.run(
        ["bash", "-e", "-m", "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PATH": PATH},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert "running\n" in done.stdout
    code = block("python")
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"\d+ \d+\n", done.stdout)


def test_two_sites_do_not_share_a_folder(tmp_path: Path) -> None:
    settings = SiteSettings(
        tmp_path, parts=frozenset({BROKER}), broker=BrokerSettings(persist=True)
    )
    from gatelet.simulator.mqtt.store import StoreUnreadable

    async def scenario() -> None:
        first, second = Site(settings), Site(settings)
        await first.start()
        try:
            with pytest.raises(StoreUnreadable, match="other broker"):
                await second.start()
        finally:
            await first.stop()
        await second.start()
        await second.stop()

    asyncio.run(scenario())
