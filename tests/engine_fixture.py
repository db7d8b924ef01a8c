"""A real Docker engine and registry for a test session, and a small image to run on them.

`engine` starts dockerd and docker-registry in a folder of their own (no network, no firewall
rules) and ends them with all they made. Tests share it: a test removes its containers, and one that
stops the engine starts it again.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import tarfile
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from distribution_server import DistributionServer
from gatelet.modules.oci.client import RegistryClient
from gatelet.modules.oci.layout import open_layout, write_index
from gatelet.modules.oci.manifest import (
    CONFIG_TYPE,
    LAYER_TAR_TYPE,
    MANIFEST_TYPE,
    Descriptor,
    Manifest,
    digest_of,
    encode_json,
)
from gatelet.modules.oci.push import push_image
from gatelet.modules.oci.reference import ImageRef
from gatelet.modules.oci.transport import RegistrySettings
from required import SEARCHED, program, unavailable

PROBE = r"""
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

extern char **environ;
static volatile sig_atomic_t ending, healthy = 1;
static void on_signal(int number) {
  if (number == SIGTERM || number == SIGINT) ending = 1;
  else healthy = number == SIGUSR2;
}
static long number(const char *name, long otherwise) {
  const char *text = getenv(name);
  return text ? atol(text) : otherwise;
}
static long now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000 + t.tv_nsec / 1000000;
}
static void nap(long ms) {
  struct timespec t = {ms / 1000, ms % 1000 * 1000000};
  nanosleep(&t, 0);
}
static void mark(int well) {
  if (!well) { unlink("/run/well"); return; }
  int file = open("/run/well", O_CREAT | O_WRONLY, 0644);
  if (file >= 0) close(file);
}
int main(int count, char **words) {
  const char *what = count > 1 ? words[1] : "serve";
  setvbuf(stdout, 0, _IOLBF, 0);
  if (!strcmp(what, "check")) {
    int sick = access("/run/well", F_OK) != 0;
    puts(sick ? "sick" : "well");
    return sick;
  }
  if (!strcmp(what, "exit")) return count > 2 ? atoi(words[2]) : 0;
  if (!strcmp(what, "env")) {
    for (char **entry = environ; *entry; entry++) puts(*entry);
    return 0;
  }
  if (!strcmp(what, "lines")) {
    long lines = count > 2 ? atol(words[2]) : 1, pause = count > 3 ? atol(words[3]) : 0;
    for (long i = 0; i < lines; i++) {
      fprintf(i % 2 ? stderr : stdout, "line %ld\n", i);
      if (pause) nap(pause);
    }
    if (count <= 4) return 0;
  }
  if (!strcmp(what, "eat"))
    for (;;) memset(malloc(1 << 20), 1, 1 << 20);
  long start = now(), end = number("EXIT_AFTER_MS", -1), sick = number("SICK_AFTER_MS", -1);
  long well = number("HEALTHY_AFTER_MS", 0);
  int was = -1;
  signal(SIGTERM, getenv("IGNORE_TERM") ? SIG_IGN : on_signal);
  signal(SIGINT, on_signal);
  signal(SIGUSR1, on_signal);
  signal(SIGUSR2, on_signal);
  mkdir("/run", 0755);
  puts("started");
  while (!ending) {
    long age = now() - start;
    int is = healthy && age >= well && !(sick >= 0 && age >= sick);
    if (is != was) mark(was = is);
    if (end >= 0 && age >= end) return (int)number("EXIT_CODE", 1);
    nap(20);
  }
  puts("ended");
  return 0;
}
"""
"""`/probe serve` (default) runs until SIGTERM, and is healthy for `/probe check` from
HEALTHY_AFTER_MS until SICK_AFTER_MS (SIGUSR1: sick, SIGUSR2: well again); it ends by itself at
EXIT_AFTER_MS with EXIT_CODE and may IGNORE_TERM (SIGINT ends it then). `exit N`, `env`,
`lines N [PAUSE_MS [serve]]` (odd ones to stderr) and `eat` (memory) do that."""

HEALTHCHECK = {
    "Test": ["CMD", "/probe", "check"],
    "Interval": 200_000_000,
    "Timeout": 5_000_000_000,
    "Retries": 1,
}
"""Of Docker's create body: asks five times a second."""


@dataclass(frozen=True)
class PushedImage:
    """`name` is registry/repository:tag."""

    name: str
    digest: str


class Engine:
    """dockerd on `socket`, `registry` beside it, and `client`, the SDK's low-level client."""

    def __init__(self, folder: Path) -> None:
        from docker import APIClient

        self.folder = folder
        self.socket = folder / "docker.sock"
        self.log = folder / "dockerd.log"
        self._options: tuple[str, ...] = ()
        self._process: subprocess.Popen[bytes] | None = None
        self.registry = DistributionServer(folder / "registry")
        self._registries = [self.registry]
        self._probe = self._compile()
        self.client = APIClient(f"unix://{self.socket}", version="1.41", timeout=30)

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    def start(self) -> None:
        """Until the engine answers. Raises AssertionError with its log."""
        folder = self.folder
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *("dockerd", "--data-root", folder / "data", "--exec-root", folder / "exec"),
                    *("-H", self.url, "--pidfile", folder / "pid"),
                    *("--bridge=none", "--iptables=false", "--ip6tables=false"),
                    # Whoever stops the engine in a test does not wait for its containers.
                    *("--shutdown-timeout", "1", *self._options),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Neither a proxy nor somebody's settings and credentials.
                env={"PATH": SEARCHED, "HOME": str(folder), "DOCKER_CONFIG": str(folder)},
                start_new_session=True,
            )
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self._process.poll() is None:
            if self._answers():
                return
            time.sleep(0.05)
        raise AssertionError(f"dockerd does not answer:\n{self.log.read_text()[-4000:]}")

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End the engine, and with it (it is told so) its containers."""
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(number)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)
        # Left over when dockerd was killed: the next one would find them in its way.
        self._end_leftover(self.folder / "exec" / "containerd" / "containerd.pid")
        for name in ("pid", "docker.sock"):
            (self.folder / name).unlink(missing_ok=True)

    def signal(self, number: signal.Signals) -> None:
        """To dockerd itself; its containers go on."""
        assert self._process is not None
        self._process.send_signal(number)
        if number is signal.SIGSTOP:
            # Its threads go on, and answer, until the signal has reached one of them.
            os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WNOWAIT)

    def close(self) -> None:
        if self._process is not None and self._answers():
            for container in self.client.containers(all=True):
                self._remove(container["Id"])
        self.client.close()
        self.stop()
        for registry in self._registries:
            registry.stop()
        for mount in reversed(self._mounts()):
            subprocess.run(["umount", "-l", mount], env={"PATH": SEARCHED}, check=False)
        shutil.rmtree(self.folder, ignore_errors=True)

    def make_sure(self) -> None:
        """That containers run here, with whatever this machine has. Raises AssertionError."""
        attempts: list[tuple[str, ...]] = [(), (), ("--storage-driver=vfs",)]
        failures = []
        for number, options in enumerate(attempts):
            self._options = options
            try:
                self.start()
                self._run_one()
            except AssertionError as error:
                failures.append(f"{' '.join(options) or 'as it is'}: {error}")
                self.stop()
                if number == 0:
                    _mount_cgroups()
                    _delegate_cgroups()
            else:
                return
        raise AssertionError("\n".join(failures))

    def add_registry(
        self, *, login: bool = False, tls: tuple[Path, Path] | None = None
    ) -> DistributionServer:
        """One more registry, which ends with the engine; `login` asks for USER and PASSWORD."""
        folder = self.folder / f"registry{len(self._registries)}"
        registry = DistributionServer(folder, login=login, tls=tls)
        self._registries.append(registry)
        return registry

    def push(
        self,
        name: str = "probe:1",
        *,
        config: Mapping[str, Any] | None = None,
        files: Mapping[str, bytes] | None = None,
        registry: RegistrySettings | None = None,
        probe: bool = True,
    ) -> PushedImage:
        """Push an image made of `/probe` and `files` (one layer each); `config` is the Docker
        config (Cmd, Env, Labels, Healthcheck, ...), whose entry point is `/probe` by default."""
        settings = registry or RegistrySettings(self.registry.address)
        layers = [tar({"probe": self._probe.read_bytes()}, 0o755)] if probe else []
        layers += [tar({path: content}) for path, content in (files or {}).items()]
        with tempfile.TemporaryDirectory(dir=self.folder) as layout:
            write_layout(Path(layout), layers, {"Entrypoint": ["/probe"], **(config or {})})
            ref = ImageRef.parse(f"{settings.address}/{name}")
            with RegistryClient(settings) as client:
                pushed = push_image(client, ref, open_layout(Path(layout)))
        assert pushed.digest is not None
        return PushedImage(str(ref), pushed.digest)

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Without the engine; it runs again afterwards."""
        self.stop()
        try:
            yield
        finally:
            self.start()

    def _answers(self) -> bool:
        # The SDK leaves its socket open when connecting fails.
        with socket.socket(socket.AF_UNIX) as peer:
            peer.settimeout(10)
            try:
                peer.connect(str(self.socket))
                peer.sendall(b"GET /_ping HTTP/1.0\r\n\r\n")
                return peer.recv(4096).split(maxsplit=2)[1:2] == [b"200"]
            except OSError:
                return False

    def _run_one(self) -> None:
        from docker.errors import DockerException

        image = self.push("smoke:1")
        name = f"smoke-{uuid.uuid4().hex}"
        try:
            self.client.pull(image.name)
            self.client.create_container_from_config(
                {
                    "Image": image.name,
                    "Cmd": ["exit", "7"],
                    "HostConfig": {"NetworkMode": "none", "Memory": 64 << 20, "PidsLimit": 10},
                },
                name,
            )
            self.client.start(name)
            assert self.client.wait(name)["StatusCode"] == 7
        except DockerException as error:
            tail = self.log.read_text()[-3000:]
            raise AssertionError(f"a container does not run: {error}\n{tail}") from error
        finally:
            self._remove(name)

    def _remove(self, name: str) -> None:
        from docker.errors import APIError

        with contextlib.suppress(APIError):
            self.client.remove_container(name, v=True, force=True)

    def _compile(self) -> Path:
        binary = self.folder / "probe"
        source = self.folder / "probe.c"
        source.write_text(PROBE)
        subprocess.run(
            ["cc", "-O1", "-static", "-s", "-o", binary, source],
            check=True,
            env={"PATH": SEARCHED},
        )
        return binary

    def _mounts(self) -> list[str]:
        """Mount points below our folder, the outer ones first."""
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        return [line.split()[4] for line in lines if line.split()[4].startswith(f"{self.folder}/")]

    def _end_leftover(self, pidfile: Path) -> None:
        try:
            pid = int(pidfile.read_text())
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (OSError, ValueError):
            return
        if os.fsencode(self.folder) in command:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        pidfile.unlink(missing_ok=True)


def _mount_cgroups() -> None:
    """On a machine without systemd nobody may have mounted them."""
    mounts = Path("/proc/mounts").read_text().splitlines()
    if any(line.split()[2] in ("cgroup", "cgroup2") for line in mounts):
        return
    root = Path("/sys/fs/cgroup")

    def mount(*arguments: str) -> bool:
        command = ["mount", "-t", *arguments]
        return subprocess.run(command, env={"PATH": SEARCHED}, check=False).returncode == 0

    if mount("cgroup2", "cgroup2", str(root)):
        if (root / "cgroup.controllers").read_text().split():
            return
        # The kernel's first version has the controllers.
        subprocess.run(["umount", root], env={"PATH": SEARCHED}, check=False)
    if not mount("tmpfs", "cgroup", str(root)):
        return
    for line in Path("/proc/cgroups").read_text().splitlines()[1:]:
        name, _, _, enabled = line.split()
        if enabled == "1":
            (root / name).mkdir()
            mount("cgroup", "-o", name, "cgroup", str(root / name))


def _delegate_cgroups() -> None:
    """In a container with cgroup 2: make room for the engine's groups, as for a nested engine.

    A group with processes in it cannot hand controllers to its children, so they move into one.
    """
    root = Path("/sys/fs/cgroup")
    if not (root / "cgroup.controllers").exists():
        return
    with contextlib.suppress(OSError):
        (root / "init").mkdir(exist_ok=True)
        for pid in (root / "cgroup.procs").read_text().split():
            with contextlib.suppress(OSError):
                (root / "init" / "cgroup.procs").write_text(pid)
        for controller in (root / "cgroup.controllers").read_text().split():
            with contextlib.suppress(OSError):
                (root / "cgroup.subtree_control").write_text(f"+{controller}")


def tar(files: Mapping[str, bytes], mode: int = 0o644) -> bytes:
    """The same bytes for the same files."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as archive:
        folders: set[str] = set()
        for name, content in sorted(files.items()):
            for parent in reversed(Path(name).parents):
                if str(parent) not in (".", *folders):
                    folders.add(str(parent))
                    folder = tarfile.TarInfo(str(parent))
                    folder.type, folder.mode = tarfile.DIRTYPE, 0o755
                    archive.addfile(folder)
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), mode
            archive.addfile(entry, io.BytesIO(content))
    return raw.getvalue()


def write_layout(layout: Path, layers: list[bytes], config: Mapping[str, Any]) -> Descriptor:
    """An OCI layout of an ordinary image with these (uncompressed) layers."""
    blobs = layout / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def blob(data: bytes, media_type: str) -> Descriptor:
        (blobs / hashlib.sha256(data).hexdigest()).write_bytes(data)
        return Descriptor(media_type, digest_of(data), len(data))

    parts = tuple(blob(layer, LAYER_TAR_TYPE) for layer in layers)
    document = {
        "architecture": "amd64",
        "os": "linux",
        "created": "1970-01-01T00:00:00Z",
        "config": dict(config),
        "rootfs": {"type": "layers", "diff_ids": [part.digest for part in parts]},
    }
    manifest = Manifest(blob(json.dumps(document).encode(), CONFIG_TYPE), parts)
    top = blob(encode_json(manifest), MANIFEST_TYPE)
    write_index(layout, top)
    return top


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """A running engine of our own; skips where dockerd or docker-registry is missing."""
    tools = {"dockerd": "docker.io", "docker-registry": "docker-registry", "cc": "gcc"}
    for tool, package in tools.items():
        program(tool, package)
    if os.geteuid() != 0:
        unavailable("needs root: dockerd makes mounts and control groups")
    # Not below pytest's folder: the engine's sockets have a limit of 108 bytes.
    engine = Engine(Path(tempfile.mkdtemp(prefix="gatelet-engine-")))
    try:
        try:
            engine.make_sure()
        except AssertionError as error:
            unavailable(f"no engine runs here: {error}")
        yield engine
    finally:
        engine.close()
