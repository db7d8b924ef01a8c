"""Checks of this machine: configuration, disk, memory, sockets, ports, board, container engine."""

from __future__ import annotations

import errno
import http.client
import importlib.util
import json
import os
import shutil
import socket
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..config import AgentConfig, ConfigError, DockerConfig
from ..roles import board_of
from .findings import Check, Outcome, error, ok, skipped, warning

DISK_ERROR, DISK_WARNING = 64 * 2**20, 512 * 2**20
MEMORY_ERROR, MEMORY_WARNING = 24 * 2**20, 64 * 2**20
INODES_WARNING = 1000
ENGINE_SECONDS = 5.0

Status = Mapping[str, Any]


def machine_checks(config: AgentConfig, file: Path, status: Status | None) -> list[Check]:
    """`status` is the running agent's own document, None when it does not answer."""
    return [
        Check("configuration", lambda: configuration(config, file)),
        Check("state folder", lambda: folder(config.device.state_dir, "state-dir")),
        Check("run folder", lambda: folder(config.device.run_dir, "run-dir")),
        Check("disk space", lambda: disk(config.device.state_dir)),
        Check("memory", memory),
        Check("trust", lambda: trust(config)),
        Check("agent", lambda: agent(config, status)),
        Check("deployment", lambda: deployment(status)),
        *(
            Check(f"scoring {name}", lambda k=key, a=address: scoring_port(k, a, status))  # type: ignore[misc]
            for name, key, address in (
                ("gRPC", "grpc-address", config.scoring.grpc_address),
                ("HTTP", "http-address", config.scoring.http_address),
                ("metrics", "metrics-address", config.scoring.metrics_address),
            )
            if address
        ),
        Check("fpga", lambda: fpga(config, status)),
        Check("container engine", lambda: engine(config.docker, status)),
    ]


def configuration(config: AgentConfig, file: Path) -> Outcome:
    from ..links import transports

    try:
        links = transports(config)
    except ConfigError as failure:
        return error(str(failure), f"edit {file}")
    exposed = [path for path in _secret_files(config, file) if _readable_by_all(path)]
    if exposed:
        names = ", ".join(map(str, exposed))
        return warning(f"{names} holds secrets, and every user may read it", f"chmod o-rwx {names}")
    if not links:
        return warning(
            f"{file} has neither [iothub] nor [mqtt]: deployments come from `gatelet apply` only",
            "add a section to manage the device from afar",
        )
    return ok(f"{file}, device {config.device_id}, {' and '.join(link.name for link in links)}")


def _secret_files(config: AgentConfig, file: Path) -> list[Path]:
    hub, mqtt = config.iothub, config.mqtt
    inline = [registry.password for registry in config.registry]
    files: list[Path | None] = [registry.password_file for registry in config.registry]
    if hub is not None:
        inline += [hub.connection_string, hub.dps.symmetric_key if hub.dps else ""]
        files += [hub.connection_string_file]
        for section in (hub.sas, hub.x509, hub.dps):
            files += [getattr(section, "key_file", None), getattr(section, "group_key_file", None)]
            files += [getattr(section, "symmetric_key_file", None)]
    if mqtt is not None:
        inline.append(mqtt.password)
        files += [mqtt.password_file, mqtt.key_file]
    return [*([file] if any(inline) else []), *(path for path in files if path is not None)]


def _readable_by_all(path: Path) -> bool:
    try:
        return bool(path.stat().st_mode & stat.S_IROTH) and all(
            parent.stat().st_mode & stat.S_IXOTH for parent in path.absolute().parents
        )
    except OSError:
        return False


def trust(config: AgentConfig) -> Outcome:
    from ..trust import load_trust

    try:
        found = load_trust(config.trust)
    except ConfigError as failure:
        return error(
            str(failure), "correct [trust] in agent.toml: the agent does not start like this"
        )
    asked = ["manifests"] if found.manifests_required else []
    asked += [
        f"images of {rule.prefix or 'every registry'}" for rule in found.images if rule.require
    ]
    if not asked:
        return skipped("no signatures are asked for: [trust] is off")
    return ok(f"signed must be {', '.join(asked)}; keys {', '.join(sorted(found.keys))}")


def folder(path: Path, key: str) -> Outcome:
    if not path.is_dir():
        return error(
            f"{path} does not exist", f"start the agent, or set device.{key} to another folder"
        )
    if not os.access(path, os.W_OK | os.X_OK):
        return warning(
            f"{path} belongs to another user", "run this command as the agent's user to check more"
        )
    return ok(str(path))


def disk(path: Path) -> Outcome:
    there = next((p for p in (path, *path.absolute().parents) if os.path.exists(p)), Path("/"))
    use = shutil.disk_usage(there)
    inodes = os.statvfs(there)
    text = f"{_size(use.free)} of {_size(use.total)} free at {there}"
    fix = "remove files, or move device.state-dir to a larger disk"
    if use.free < DISK_ERROR:
        return error(text, fix)
    if use.free < DISK_WARNING:
        return warning(f"{text}: an image may not fit", fix)
    if inodes.f_files > 0 and inodes.f_favail < INODES_WARNING:
        return warning(f"{inodes.f_favail} inodes left at {there}", fix)
    return ok(text)


def memory(file: Path = Path("/proc/meminfo")) -> Outcome:
    try:
        lines = file.read_text().splitlines()
        values = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if ":" in line}
        free, total = values["MemAvailable"], values["MemTotal"]
    except (OSError, KeyError, ValueError, IndexError):
        return skipped("this system does not tell")
    text = f"{_size(free)} of {_size(total)} available"
    fix = "stop other programs, or deploy fewer or smaller models"
    if free < MEMORY_ERROR:
        return error(text, fix)
    return warning(text, fix) if free < MEMORY_WARNING else ok(text)


def agent(config: AgentConfig, status: Status | None) -> Outcome:
    path = config.agent_socket
    if status is not None:
        ages = [f"{n} pid {p['pid']}" for n, p in status["processes"].items() if "pid" in p]
        restarts = sum(p.get("restarts", 0) for p in status["processes"].values())
        if restarts > 5:
            return warning(f"processes were restarted {restarts} times", "see `gatelet logs agent`")
        return ok(", ".join(ages) or f"answers on {path}")
    closed = os.path.exists(path.parent) and not os.access(path.parent, os.X_OK)
    if closed or (os.path.exists(path) and not os.access(path, os.W_OK)):
        return warning(
            f"{path} belongs to another user", "run this command as the agent's user, or as root"
        )
    if not os.path.exists(path):
        return warning("not running", "start it: `systemctl start gatelet.target` or `gatelet run`")
    return error(f"does not answer on {path}", "restart it, and see `gatelet logs agent`")


def deployment(status: Status | None) -> Outcome:
    if status is None:
        return skipped("the agent does not answer")
    about = status["deployment"]
    if about is None:
        return ok("none yet")
    text = f"{about['generation']} from {about['source']} is {about['phase']}"
    bad = [m for m in status["modules"] if m["status"] in ("failed", "unhealthy", "backoff")]
    if about["phase"] == "failed":
        return error(f"{text}: {about['description']}", "correct the manifest and deploy it again")
    if bad:
        names = "; ".join(f"{m['name']} {m['status']}: {m['description']}" for m in bad)
        return error(f"{text}; {names}", f"see `gatelet logs {bad[0]['name']}`")
    return ok(text)


def scoring_port(key: str, address: str, status: Status | None) -> Outcome:
    """`key` is the address's in `[scoring]`."""
    host, _, port = address.rpartition(":")
    if address.startswith("unix:") or not port.isdecimal():
        return ok(address)
    if port == "0":
        serving = {} if status is None else status.get("scoring", {})
        chosen = serving.get(key.removesuffix("-address"), "")
        return ok(f"{chosen}, chosen by the system" if chosen else f"{address}: any free port")
    served = status is not None and "scoring" in status["processes"]
    host = host.strip("[]") or "127.0.0.1"
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, int(port)))
    except OSError as failure:
        if failure.errno != errno.EADDRINUSE:
            return error(f"{address}: {failure.strerror}", f"correct scoring.{key}")
        if served:
            return ok(f"{address}, in use by scoring")
        return error(
            f"{address} is in use by another program",
            f"stop it, or choose another scoring.{key}",
        )
    if served:
        return error(
            f"nobody listens on {address}, though scoring runs", "see `gatelet logs scoring`"
        )
    return ok(f"{address} is free")


def fpga(config: AgentConfig, status: Status | None) -> Outcome:
    try:
        board = board_of(config)
    except ValueError as failure:
        return error(str(failure), "correct device.board")
    if board is None:
        return skipped("no FPGA board; models run on the CPU")
    if status is None:
        return ok(f"{board.name} ({board.part})")
    away = {
        f"{backend.get('detail') or 'not healthy'}"
        for module in status["modules"]
        for name, backend in module.get("backends", {}).items()
        if name == "fpga" and not backend["healthy"]
    }
    if away:
        return error(f"{board.name}: {'; '.join(sorted(away))}", "see `gatelet logs fabric`")
    if not config.fabric_socket.exists():
        return error(
            f"{board.name}: the fabric process does not serve {config.fabric_socket}",
            "see `gatelet logs fabric`; it needs root and PYNQ's environment (fabric.python)",
        )
    return ok(f"{board.name} ({board.part}), the fabric process serves it")


def engine(docker: DockerConfig, status: Status | None) -> Outcome:
    address = docker.socket
    used = status is not None and any("container" in module for module in status["modules"])
    fail: Callable[[str, str], Outcome] = error if used else warning
    hint = "" if used else " (only container modules need it)"
    if docker.enabled is False:
        return skipped("docker.enabled is false")
    if not address.exists():
        wanted = used or docker.enabled is True
        text = f"no engine at {address}"
        fix = "install Docker (apt install docker.io) and start it, or correct docker.socket"
        return error(text, fix) if wanted else skipped(f"{text}; only container modules need one")
    try:
        version = engine_version(address)
    except PermissionError:
        return fail(
            f"no permission for {address}{hint}",
            "add the agent's user to the group docker, which makes it as powerful as root",
        )
    except (OSError, ValueError, http.client.HTTPException) as failure:
        return fail(f"{address}: {failure}{hint}", "systemctl restart docker")
    if importlib.util.find_spec("docker") is None:
        return fail(
            f"{version}, but the docker package is missing{hint}", "pip install 'gatelet[docker]'"
        )
    return ok(f"{version} at {address}")


def engine_version(path: Path) -> str:
    """Raises OSError, ValueError or HTTPException."""
    connection = _UnixConnection(path)
    try:
        connection.request("GET", "/version")
        answer = connection.getresponse()
        if answer.status != 200:
            raise ValueError(f"the engine answered {answer.status}")
        about = json.loads(answer.read(1024 * 1024))
        return f"engine {about['Version']} (API {about['ApiVersion']})"
    except KeyError as failure:
        raise ValueError("the engine's answer has no version") from failure
    finally:
        connection.close()


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=ENGINE_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(ENGINE_SECONDS)
        self.sock.connect(str(self._path))


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
