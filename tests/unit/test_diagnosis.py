"""Checks with their remedies, and a support bundle without the secrets planted for it."""

from __future__ import annotations

import io
import json
import socket
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from gatelet.accelerators.process_log import BoundedLogFile
from gatelet.agent.clock import SystemClock
from gatelet.agent.config import AgentConfig, DockerConfig, parse_config
from gatelet.agent.diagnosis.bundle import BundleParts, make_bundle
from gatelet.agent.diagnosis.findings import Check, Finding, ok, run_checks, summary
from gatelet.agent.diagnosis.machine import (
    configuration,
    deployment,
    disk,
    engine,
    folder,
    fpga,
    machine_checks,
    memory,
    scoring_port,
    trust,
)
from gatelet.agent.diagnosis.network import (
    Endpoint,
    clock_offset,
    clock_right,
    hub_host,
    link_state,
    name,
    network_checks,
    reachable,
    tls,
)
from gatelet.agent.runtime.container import LogFilter, LogLine
from gatelet.agent.store import StateStore

KEY = "c3VwZXJzZWNyZXRrZXlmb3JhZGV2aWNlMDEyMzQ1Njc="


def config(folder: Path, text: str = "") -> AgentConfig:
    paths = (
        f'[device]\nid = "edge-1"\nstate-dir = "{folder}"\nrun-dir = "{folder}"\nboard = "none"\n'
    )
    return parse_config(paths + text, "agent.toml")


def status(**changes: Any) -> dict[str, Any]:
    return {
        "deployment": None, "modules": [], "links": [], "processes": {}, "refused": [], **changes
    }  # fmt: skip


# -- running -----------------------------------------------------------------------------------


def test_findings_come_in_order_and_a_check_that_hangs_is_an_error() -> None:
    never = threading.Event()

    def hang() -> Any:
        never.wait(30)
        return ok("late")

    def fail() -> Any:
        raise OSError("no such device")

    checks = [Check("a", hang), Check("b", lambda: ok("fine")), Check("c", fail)]
    started = time.monotonic()
    a, b, c = run_checks(checks, 1.0)
    never.set()
    assert time.monotonic() - started < 20
    assert (a.level, b.level, c.level) == ("error", "ok", "error")
    assert "1 s" in a.message
    assert c.message == "no such device"
    about = summary([a, b, c])
    assert (about["ok"], about["warnings"], about["errors"]) == (1, 0, 2)
    assert about["checks"][1] == {"name": "b", "status": "ok", "message": "fine", "fix": ""}


def test_a_bare_machine_is_judged_without_an_agent(tmp_path: Path) -> None:
    settings = config(tmp_path)
    checks = [
        *machine_checks(settings, tmp_path / "agent.toml", None),
        *network_checks(settings, None, SystemClock()),
    ]
    levels = {finding.name: finding.level for finding in run_checks(checks)}
    assert levels["agent"] == "warning", "not running"
    assert levels["state folder"] == "ok"
    assert levels["clock"] == "ok"
    assert levels["fpga"] == "skipped"
    assert levels["configuration"] == "warning", "no link"


# -- this machine ------------------------------------------------------------------------------


def test_secrets_that_all_may_read_are_warned_of(tmp_path: Path) -> None:
    settings = config(tmp_path, f'[mqtt]\nhost = "h"\npassword = "{KEY}"\n')
    # Not below tmp_path, which others cannot enter anyway.
    with tempfile.TemporaryDirectory() as made:
        open_folder = Path(made)
        open_folder.chmod(0o755)
        file = open_folder / "agent.toml"
        file.write_text("x")
        file.chmod(0o644)
        level, message, fix = configuration(settings, file)
        assert level == "warning"
        assert KEY not in message
        assert fix == f"chmod o-rwx {file}"
        open_folder.chmod(0o700)
        assert configuration(settings, file)[0] == "ok"
        open_folder.chmod(0o755)
        file.chmod(0o600)
        assert configuration(settings, file)[0] == "ok"


def test_a_configuration_that_cannot_connect_is_an_error(tmp_path: Path) -> None:
    settings = config(tmp_path, '[iothub]\nconnection-string = "HostName=h"\n')
    level, message, _ = configuration(settings, tmp_path / "agent.toml")
    assert level == "error"
    assert "SharedAccessKey" in message


def test_whose_word_is_taken(tmp_path: Path) -> None:
    assert trust(config(tmp_path))[0] == "skipped"
    key = tmp_path / "a.pub"
    text = f'[trust]\nmanifests = "require"\nkeys = [{{id = "a", file = "{key}"}}]\n'
    text += '[[trust.images]]\nprefix = "registry.test/models"\n'
    missing = trust(config(tmp_path, text))
    assert missing[0] == "error"
    assert "cannot read" in missing[1]
    key.write_bytes(
        ec.generate_private_key(ec.SECP256R1())
        .public_key()
        .public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    found = trust(config(tmp_path, text))
    assert found[0] == "ok"
    assert found[1] == "signed must be manifests, images of registry.test/models; keys a"


def test_folders_disk_and_memory(tmp_path: Path) -> None:
    assert folder(tmp_path / "none", "state-dir")[0] == "error"
    assert disk(tmp_path / "not" / "there")[0] in ("ok", "warning", "error")
    for free, level in ((10_000, "error"), (40_000, "warning"), (400_000, "ok")):
        file = tmp_path / "meminfo"
        file.write_text(f"MemTotal: 500000 kB\nMemAvailable: {free} kB\n")
        assert memory(file)[0] == level
    assert memory(tmp_path / "none")[0] == "skipped"


def test_a_port_that_another_program_has(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        level, message, fix = scoring_port("grpc-address", address, None)
        assert level == "error"
        assert "another program" in message
        assert "grpc-address" in fix
        assert (
            scoring_port("grpc-address", address, status(processes={"scoring": {"pid": 1}}))[0]
            == "ok"
        )
    assert scoring_port("grpc-address", address, None)[0] == "ok"
    assert (
        scoring_port("grpc-address", address, status(processes={"scoring": {"pid": 1}}))[0]
        == "error"
    )
    assert scoring_port("http-address", "unix:/x", None)[0] == "ok"


def test_deployments_and_boards(tmp_path: Path) -> None:
    about = {"generation": 3, "source": "local", "phase": "good", "description": ""}
    module = {"name": "m", "status": "running", "description": "", "backends": {}}
    assert deployment(status())[0] == "ok"
    assert deployment(status(deployment=about, modules=[module]))[0] == "ok"
    bad = {**module, "status": "backoff", "description": "no such image"}
    level, message, fix = deployment(status(deployment=about, modules=[bad]))
    assert (level, fix) == ("error", "see `gatelet logs m`")
    assert "no such image" in message
    failed = {**about, "phase": "failed", "description": "load m: damaged"}
    assert "damaged" in deployment(status(deployment=failed))[1]

    board = parse_config(f'[device]\nrun-dir="{tmp_path}"\nboard="pynq-z2"\n', "x")
    assert fpga(board, None)[0] == "ok"
    assert fpga(board, status())[0] == "error", "no fabric process"
    board.fabric_socket.touch()
    assert fpga(board, status())[0] == "ok"
    sick = {**module, "backends": {"fpga": {"healthy": False, "detail": "hangs"}}}
    level, message, _ = fpga(board, status(modules=[sick]))
    assert (level, "hangs" in message) == ("error", True)


class EngineStub(threading.Thread):
    """Answers one request on a Unix socket as an engine would."""

    def __init__(self, path: Path, answer: bytes) -> None:
        super().__init__(daemon=True)
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(path))
        self._server.listen()
        self._answer = answer

    def run(self) -> None:
        link, _ = self._server.accept()
        with link:
            link.recv(65536)
            link.sendall(self._answer)
        self._server.close()


@pytest.mark.parametrize(
    ("body", "level"),
    [
        (b'{"Version": "20.10.24", "ApiVersion": "1.41"}', "ok"),
        (b"{}", "warning"),
        (b"not JSON", "warning"),
    ],
)
def test_an_engine_is_asked_for_its_version(tmp_path: Path, body: bytes, level: str) -> None:
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    stub = EngineStub(tmp_path / "docker.sock", head + body)
    stub.start()
    found, message, _ = engine(DockerConfig(socket=tmp_path / "docker.sock"), None)
    stub.join(10)
    assert found == level
    assert level != "ok" or "20.10.24" in message


def test_where_no_engine_is(tmp_path: Path) -> None:
    missing = tmp_path / "none.sock"
    assert engine(DockerConfig(socket=missing), None)[0] == "skipped"
    assert engine(DockerConfig(socket=missing, enabled=True), None)[0] == "error"
    assert engine(DockerConfig(socket=missing, enabled=False), None)[0] == "skipped"
    used = status(modules=[{"container": "x"}])
    assert engine(DockerConfig(socket=missing), used)[0] == "error"


# -- the network -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "level"),
    [(0, "ok"), (-29, "ok"), (31, "warning"), (-60, "warning"), (-9999, "error")],
)
def test_clocks(seconds: float, level: str) -> None:
    found, message, _ = clock_offset(seconds, "hub")
    assert found == level
    if level != "ok":
        assert ("ahead of" if seconds > 0 else "behind") in message


class FixedClock(SystemClock):
    def now(self) -> datetime:
        return datetime(1970, 1, 1, 0, 5, tzinfo=timezone.utc)


def test_a_clock_that_starts_anew_is_noticed_without_any_server() -> None:
    assert clock_right(None, FixedClock())[0] == "error"


def test_what_cannot_be_reached_says_what_to_do() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    nowhere = Endpoint("127.0.0.1", port)
    level, message, fix = reachable(nowhere)
    assert (level, "refused" in message, "firewall" in fix) == ("error", True, True)
    assert tls(nowhere, SystemClock())[0] == "error"
    assert tls(Endpoint("127.0.0.1", port, proxy="nonsense"), SystemClock())[0] == "error"
    assert tls(Endpoint("127.0.0.1", port, ca_file=Path("/none")), SystemClock())[0] == "error"
    assert name(Endpoint("host.invalid", 1))[0] == "error"
    assert name(Endpoint("localhost", 1))[0] == "ok"


def test_links() -> None:
    up = {"source": "iothub", "connected": True, "reason": "", "warnings": []}
    assert link_state("iothub", None)[0] == "skipped"
    assert link_state("iothub", status())[0] == "warning"
    assert link_state("iothub", status(links=[up]))[0] == "ok"
    down = {**up, "connected": False, "reason": "refused"}
    assert link_state("iothub", status(links=[down])) == (
        "error", "not connected: refused", "see `gatelet logs edgeHub`",
    )  # fmt: skip
    assert link_state("iothub", status(links=[{**up, "warnings": ["ends soon"]}]))[0] == "warning"


def test_the_hubs_name_from_any_identity(tmp_path: Path) -> None:
    text = f"HostName=h.example;DeviceId=d;SharedAccessKey={KEY}"
    found = config(tmp_path, f'[iothub]\nconnection-string = "{text}"\n').iothub
    assert found is not None
    assert hub_host(found) == "h.example"
    broken = config(tmp_path, "[iothub]\n").iothub
    assert broken is not None
    assert hub_host(broken) == ""


# -- the bundle --------------------------------------------------------------------------------

SECRETS = {
    "hub key": KEY,
    "broker password": "br0ker-passw0rd",
    "registry password file": "f1le-registry-pw",
    "key file": "a2V5ZmlsZWtleWZpbGVrZXlmaWxla2V5ZmlsZTAxMjM=",
    "sas signature": "c2lnbmF0dXJl%2Fabc%3D",
    "registry credential": "r3gistry-cred",
    "env": "env-s3cret-value",
    "create option env": "create 0ption secret",
    "create option label": "l4bel-token-value",
    "command line": "cmdl1ne-password",
    "bearer": "bearertokenabcdef",
    "url password": "urlpassw0rd",
    "env in log": "logged-s3cret",
}


@pytest.fixture
def planted(tmp_path: Path) -> Iterator[tuple[AgentConfig, BundleParts]]:
    """A device with secrets wherever they may be."""
    s = SECRETS
    (tmp_path / "pw").write_text(s["registry password file"] + "\n")
    (tmp_path / "key").write_text(s["key file"])
    settings = config(
        tmp_path,
        f"""
[iothub]
connection-string = "HostName=h;DeviceId=d;SharedAccessKey={s["hub key"]}"
[mqtt]
host = "h"
password = "{s["broker password"]}"
[[registry]]
address = "r:5000"
username = "user-name"
password-file = "{tmp_path / "pw"}"
[iothub.sas]
host-name = "h"
device-id = "d"
key-file = "{tmp_path / "key"}"
""",
    )
    options = json.dumps(
        {
            "Env": [f"DB_PASSWORD={s['create option env']}", "MODE=fast"],
            "Labels": {"access-token": s["create option label"]},
            "Cmd": ["serve", "--password", s["command line"]],
        }
    )
    half = len(options) // 2
    manifest = {
        "modulesContent": {
            "$edgeAgent": {
                "properties.desired": {
                    "runtime": {
                        "settings": {
                            "registryCredentials": {
                                "main": {
                                    "username": "user-name",
                                    "password": s["registry credential"],
                                    "address": "r:5000",
                                }
                            }
                        }
                    },
                    "modules": {
                        "m": {
                            "settings": {
                                "image": "r:5000/m:1",
                                # The cut goes right through a secret.
                                "createOptions": options[:half],
                                "createOptions01": options[half:],
                            },
                            "env": {
                                "API_TOKEN": {"value": s["env"]},
                                "MODE": {"value": "visible-mode"},
                            },
                        }
                    },
                }
            }
        }
    }
    store = StateStore(tmp_path / "state.db", SystemClock())
    generation = store.accept("local", 0, json.dumps(manifest).encode()).generation
    store.journal(generation, "pull m", "failed", f"login with {s['registry credential']} refused")
    import logging

    logger = logging.Logger("gatelet.agent.x")
    # Without the redaction that the processes' own logs have: an older version wrote them.
    logger.addHandler(BoundedLogFile(tmp_path / "logs" / "agent.log", 1 << 20, 2))
    logger.info("put https://a/c?sr=c&sig=%s&se=1", s["sas signature"])
    logger.info("Authorization: Bearer %s", s["bearer"])
    logger.info("GET https://user:%s@host/x", s["url password"])
    logger.info("the value %s appeared bare", s["env"])
    logger.info("a %s line", "plain-visible")
    for handler in logger.handlers:
        handler.close()
    lines = [LogLine(None, "stdout", f"DB_PASSWORD={s['env in log']} started")]
    found = [Finding("x", "error", f"login failed: password={s['broker password']}", "")]
    about = status(links=[{"reason": f"SharedAccessKey={s['hub key']}"}])
    yield settings, BundleParts(about, found, {"m": lines})
    store.close()


def test_a_bundle_holds_everything_but_secrets(
    planted: tuple[AgentConfig, BundleParts], tmp_path: Path
) -> None:
    settings, parts = planted
    body = make_bundle(settings, parts, LogFilter(), SystemClock())
    inside = zipfile.ZipFile(io.BytesIO(body))
    assert inside.testzip() is None
    texts = {name: inside.read(name).decode() for name in inside.namelist()}
    assert {
        "about.json", "configuration.json", "status.json", "check.json", "versions.json",
        "journal.txt", "deployments/1.json", "logs/agent.log", "logs/modules/m.log",
    } <= set(texts)  # fmt: skip
    for what, secret in SECRETS.items():
        for name_, text in texts.items():
            assert secret not in text, f"{what} is in {name_}"
            assert secret[: len(secret) // 2] not in text, f"half of {what} is in {name_}"
    # What helps is still there.
    for visible in ("user-name", "visible-mode", "r:5000/m:1", "MODE=fast", "serve"):
        assert visible in texts["deployments/1.json"] + texts["configuration.json"]
    assert "plain-visible" in texts["logs/agent.log"]
    assert {"gatelet", "msgspec"} <= set(json.loads(texts["versions.json"]))
    assert "started" in texts["logs/modules/m.log"]
    assert "pull m" in texts["journal.txt"]


def test_the_journal_of_an_agent_that_has_ended_is_inside(tmp_path: Path) -> None:
    store = StateStore(tmp_path / "state.db", SystemClock())
    generation = store.accept("local", 0, b"{}").generation
    store.journal(generation, "pull m", "done")
    store.close()
    body = make_bundle(config(tmp_path), BundleParts(None, [], {}), LogFilter(), SystemClock())
    inside = zipfile.ZipFile(io.BytesIO(body))
    assert "pull m" in inside.read("journal.txt").decode()
    assert json.loads(inside.read("deployments/1.json")) == {}


def test_a_bundle_without_anything_to_read(tmp_path: Path) -> None:
    settings = config(tmp_path)
    body = make_bundle(settings, BundleParts(None, [], {}), LogFilter(), SystemClock())
    names = zipfile.ZipFile(io.BytesIO(body)).namelist()
    assert "about.json" in names
    assert not (tmp_path / "state.db").exists(), "looking must not make a database"
