"""What the engine says: logs, times, progress, refusals, and what does not count as drift."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import socket
import sys
import tempfile
import threading
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingMixIn, UnixStreamServer
from typing import ClassVar

import pytest
import pytest_asyncio
from gatelet.agent.runtime.container import ContainerSpec, PullProgress, RuntimeFailed
from gatelet.agent.runtime.docker import DockerRuntime
from gatelet.agent.runtime.drift import drift
from gatelet.agent.runtime.engine_errors import explained, unreachable
from gatelet.agent.runtime.engine_own import EnginesOwn
from gatelet.agent.runtime.engine_reader import Sockets
from gatelet.agent.runtime.inspection import parse_time
from gatelet.agent.runtime.log_frames import MAX_LINE, LogDecoder
from gatelet.agent.runtime.pull_progress import PullMeter
from hypothesis import given
from hypothesis import strategies as st

AT = "2026-11-21T05:39:54.546016737Z"
WHEN = datetime(2026, 11, 21, 5, 39, 54, 546016, timezone.utc)


def frame(text, stream=1):
    data = f"{AT} {text}".encode()
    return bytes((stream, 0, 0, 0)) + len(data).to_bytes(4, "big") + data


def decoded(data, tty=False, cuts=()):
    decoder = LogDecoder(tty)
    found, start = [], 0
    for cut in [*sorted(cuts), len(data)]:
        found += decoder.feed(data[start:cut])
        start = cut
    return [*found, *decoder.end()]


@given(st.data())
def test_frames_may_arrive_in_any_pieces(data):
    raw = frame("one\n") + frame("two\r\n", 2) + frame("half ") + frame("line\n") + frame("é\n")
    cuts = data.draw(st.lists(st.integers(0, len(raw))))
    found = decoded(raw, cuts=cuts)
    assert [(line.stream, line.text) for line in found] == [
        ("stdout", "one"),
        ("stderr", "two"),
        ("stdout", "half line"),
        ("stdout", "é"),
    ]
    assert {line.at for line in found} == {WHEN}


def test_what_has_no_line_end_comes_at_the_end_and_bad_utf8_is_shown():
    raw = bytes((1, 0, 0, 0)) + (35).to_bytes(4, "big") + f"{AT} ".encode() + b"\xff\xfeok"
    assert [line.text for line in decoded(raw)] == ["��ok"]


def test_a_line_without_end_is_cut():
    part = "x" * 16_000
    raw = frame(part) * 100 + frame("\n")
    found = decoded(raw)
    assert sum(len(line.text) for line in found) == 1_600_000
    assert max(len(line.text) for line in found) <= MAX_LINE + 16_000


def test_a_terminal_has_no_frames():
    raw = f"{AT} one\r\n{AT} two\r\n{AT} rest".encode()
    assert [line.text for line in decoded(raw, tty=True, cuts=(10, 50))] == ["one", "two", "rest"]


def test_times():
    assert parse_time(AT) == WHEN
    assert parse_time("2026-11-21T07:39:54+02:00") == WHEN.replace(microsecond=0)
    assert parse_time("2026-11-21T03:09:54.5-02:30") == WHEN.replace(microsecond=500000)
    for nothing in ("0001-01-01T00:00:00Z", "", "yesterday", "2026-13-21T05:39:54Z"):
        assert parse_time(nothing) is None
    assert parse_time(AT).utcoffset() == timedelta(0)


class _Engine(BaseHTTPRequestHandler):
    """Holds on to the task of a container that it was killed over."""

    protocol_version = "HTTP/1.1"
    removed: ClassVar[list[str]] = []
    labels: ClassVar[dict[str, str]] = {}

    def _answer(self, status, body):
        data = json.dumps(body).encode() if body is not None else b""
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        config = {"Labels": self.labels, "Image": "x"}
        found = {"Id": "a" * 64, "Config": config, "HostConfig": {"NetworkMode": "none"}}
        self._answer(200, found if "/containers/" in self.path else {"ApiVersion": "1.41"})

    def do_POST(self):
        self._answer(500, {"message": f"task {'a' * 64}: already exists: unknown"})

    def do_DELETE(self):
        self.removed.append(self.path)
        self._answer(204, None)

    def address_string(self):
        return "engine"

    def log_message(self, *_):
        pass


class _Server(ThreadingMixIn, UnixStreamServer):
    daemon_threads = True

    def handle_error(self, *_):
        # Clients that went away.
        pass


@pytest_asyncio.fixture
async def runtime():
    with tempfile.TemporaryDirectory(prefix="g-") as folder:
        path = Path(folder) / "s"
        with _Server(str(path), _Engine) as server:
            thread = threading.Thread(target=server.serve_forever, args=(0.05,))
            thread.start()
            found = DockerRuntime(path, "edge-1")
            try:
                yield found
            finally:
                await found.close()
                server.shutdown()
                thread.join()


async def test_the_container_of_another_device_is_named_as_such(runtime, monkeypatch):
    labels = {"io.gatelet.module": "web", "io.gatelet.device": "edge-2"}
    monkeypatch.setattr(_Engine, "labels", labels)
    spec = ContainerSpec("web", "web", "r/x:1", "sha256:" + "a" * 64, "{}")
    with pytest.raises(RuntimeFailed, match="device edge-2 has a container of this name") as failed:
        await runtime.create(spec)
    assert not failed.value.retryable


async def test_a_container_whose_start_was_cut_short_is_made_anew(runtime):
    with pytest.raises(RuntimeFailed, match="made anew") as failed:
        await runtime.start("web")
    assert failed.value.retryable
    assert ["/containers/web" in path for path in _Engine.removed] == [True]


@pytest.mark.parametrize(
    ("status", "body", "cut", "reason", "retryable"),
    [
        (200, b"", 0, "not understood", True),
        (200, b"<html>", 0, "not understood", True),
        (200, b'{"ApiVersion": 1}', 0, "API 1;", True),
        (200, b'{"ApiVersion": "1.40"}', 0, "API 1.40;", True),
        (200, b'{"ApiVersion": "1.41"}', 7, "IncompleteRead|more expected", True),
        (500, b'{"message": "the disk: no space left on device"}', 0, "free space", True),
        (400, b'{"message": "client version 1.41 is too old"}', 0, "is too old", False),
        (404, b"page not found", 0, "page not found", False),
        (503, b"", 0, "status 503", True),
    ],
)
async def test_answers_that_are_of_no_use_are_explained(
    runtime, monkeypatch, status, body, cut, reason, retryable
):
    def answer(request):
        request.send_response(status)
        request.send_header("Content-Length", str(len(body) + cut))
        request.send_header("Connection", "close")
        request.end_headers()
        request.wfile.write(body)

    monkeypatch.setattr(_Engine, "do_GET", answer)
    for look in (runtime.info, runtime.images, runtime.containers, runtime.events().__anext__):
        with pytest.raises(RuntimeFailed, match=reason) as failed:
            await look()
        assert failed.value.retryable is retryable


async def test_events_come_in_any_pieces_until_the_engine_ends_them(runtime, monkeypatch):
    go = threading.Event()

    def answer(request):
        if "/events" not in request.path:
            request._answer(200, {"ApiVersion": "1.41"})
            return
        request.send_response(200)
        request.send_header("Transfer-Encoding", "chunked")
        request.end_headers()
        for piece in (b'{"status": "st', b'art"}', b"\r\n", b"\n"):
            request.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        go.wait(20)
        request.wfile.write(b"0\r\n\r\n")

    monkeypatch.setattr(_Engine, "do_GET", answer)
    events = runtime.events()
    await events.__anext__()
    await events.__anext__()
    go.set()
    with pytest.raises(RuntimeFailed, match="ended the connection"):
        await events.__anext__()


async def test_who_waits_for_a_silent_engine_is_not_held_up_when_the_runtime_is_closed(
    runtime, monkeypatch
):
    asked, go = threading.Event(), threading.Event()

    def answer(request):
        if request.path == "/version":
            request._answer(200, {"ApiVersion": "1.41"})
            return
        asked.set()
        go.wait(20)
        request.close_connection = True

    monkeypatch.setattr(_Engine, "do_GET", answer)
    waiting = [asyncio.ensure_future(work) for work in (runtime.images(), anext(runtime.events()))]
    try:
        assert await asyncio.to_thread(asked.wait, 20)
        await runtime.close()
        for failed in await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 20):
            assert isinstance(failed, RuntimeFailed)
    finally:
        go.set()


def test_connections_are_ended_while_others_are_made():
    sockets = Sockets()
    ended = threading.Event()

    def make():
        while not ended.is_set():
            with contextlib.suppress(FileNotFoundError):
                sockets.open("nobody", 5)

    maker = threading.Thread(target=make)
    interval = sys.getswitchinterval()
    with (
        tempfile.TemporaryDirectory(prefix="g-") as folder,
        socket.socket(socket.AF_UNIX) as listening,
        contextlib.ExitStack() as held,
    ):
        address = f"{folder}/s"
        listening.bind(address)
        listening.listen(200)
        peers = [held.enter_context(sockets.open(address, 5)) for _ in range(100)]
        maker.start()
        sys.setswitchinterval(1e-6)
        try:
            for _ in range(500):
                sockets.abort()
        finally:
            sys.setswitchinterval(interval)
            ended.set()
            maker.join()
        assert {peer.recv(1) for peer in peers} == {b""}
        with pytest.raises(ConnectionAbortedError):
            sockets.open(address, 5)


def test_what_an_engine_does_by_itself_is_saved_in_the_order_in_which_it_is_noted():
    saved = []
    others = []

    def save(text):
        if not others:
            # Another container is made at the same time, and is faster.
            others.append(threading.Thread(target=own.note, args=("b" * 64, frozenset({"Y"}))))
            others[0].start()
            others[0].join(0.3)
        saved.append(text)

    own = EnginesOwn("", save)
    own.note("a" * 64, frozenset({"X"}))
    others[0].join()
    known = EnginesOwn(saved[-1])
    assert (known.of("a" * 64), known.of("b" * 64)) == ({"X"}, {"Y"})


def test_progress_adds_up_what_docker_says():
    meter = PullMeter()
    assert meter.take({"status": "Pulling from models/cam"}) is None
    seen = [
        meter.take(message)
        for message in (
            {"status": "Pulling fs layer", "id": "a"},
            {"status": "Already exists", "id": "b"},
            {"status": "Downloading", "id": "a", "progressDetail": {"current": 10, "total": 40}},
            {"status": "Download complete", "id": "a"},
            {"status": "Extracting", "id": "a", "progressDetail": {"current": 5, "total": 40}},
            {"status": "Pull complete", "id": "a"},
        )
    ]
    assert seen[1:] == [
        PullProgress(0, 0, 1, 2),
        PullProgress(10, 40, 1, 2),
        PullProgress(40, 40, 1, 2),
        PullProgress(40, 40, 1, 2),
        PullProgress(40, 40, 2, 2),
    ]
    assert meter.take({"status": "Digest: sha256:0"}) is None
    assert meter.take({"status": "Downloading", "id": "a", "progressDetail": {}}) is not None


@pytest.mark.parametrize(
    ("said", "status", "retryable", "remedy"),
    [
        ("write /x: no space left on device", 500, True, "free space"),
        ("http: server gave HTTP response to HTTPS client", 500, True, "insecure-registries"),
        ("x509: certificate signed by unknown authority", 500, True, "certs.d/reg.test:5000/ca"),
        ("x509: certificate has expired", 500, True, "the clock"),
        ("unauthorized: authentication required", 500, True, "for reg.test:5000"),
        ("manifest for a:1 not found: manifest unknown", 404, True, "push the image"),
        ("no matching manifest for linux/arm64", 500, False, "architecture"),
        ("exec: 'x': executable file not found in $PATH", 400, False, "Entrypoint"),
        ("Bind for 0.0.0.0:80 failed: port is already allocated", 500, True, "PortBindings"),
        ("dial tcp 10.0.0.1:5000: connect: connection refused", 500, True, "the network"),
        ("something new", 500, True, ""),
        ("something new", None, True, ""),
        ("bad parameter", 400, False, ""),
        ("in progress", 409, True, ""),
        ("no such container", 404, False, ""),
    ],
)
def test_refusals_are_explained(said, status, retryable, remedy):
    failure = explained("do it", said, status=status, host="reg.test:5000")
    assert failure.retryable is retryable
    assert said in str(failure)
    assert remedy in str(failure)


def test_no_answer_says_what_to_start():
    for reason, remedy in (
        ("[Errno 13] Permission denied", "docker group"),
        ("timed out", "stuck"),
        ("[Errno 2] No such file or directory", "start the engine"),
    ):
        failure = unreachable("list containers", "/run/docker.sock", reason)
        assert failure.retryable
        assert remedy in str(failure)


BODY = {
    "Image": "a:1",
    "Env": ["A=1", "GONE"],
    "Labels": {"x": "y"},
    "HostConfig": {
        "NetworkMode": "none",
        "CapAdd": ["net_admin"],
        "Memory": 1 << 20,
        "Devices": [{"PathOnHost": "/dev/a"}],
        "PortBindings": {"80/tcp": [{"HostPort": "80"}]},
        "LogConfig": {"Type": "json-file", "Config": {"max-size": "1m"}},
        "RestartPolicy": {"Name": "no"},
    },
}
IMAGE = {"Env": ["B=2", "GONE=1"], "Cmd": ["serve"], "Labels": {"of": "image"}}
INSPECT = {
    "Name": "/cam",
    "Image": "sha256:1",
    "Config": {
        "Env": ["A=1", "B=2", "PATH=/bin"],
        "Cmd": ["serve"],
        "Entrypoint": None,
        "User": "",
        "Labels": {"x": "y", "of": "image"},
    },
    "HostConfig": {
        "NetworkMode": "none",
        "CapAdd": ["CAP_NET_ADMIN"],
        "Memory": 1 << 20,
        "MemorySwap": 2 << 20,
        "Devices": [
            {"PathOnHost": "/dev/a", "PathInContainer": "/dev/a", "CgroupPermissions": "rwm"}
        ],
        "PortBindings": {"80/tcp": [{"HostIp": "", "HostPort": "80"}]},
        "LogConfig": {"Type": "json-file", "Config": {"max-size": "1m", "max-file": "9"}},
        "RestartPolicy": {"Name": "no", "MaximumRetryCount": 0},
        "IpcMode": "private",
        "ShmSize": 64 << 20,
        "Runtime": "runc",
        "PidsLimit": None,
        "Binds": None,
        "ConsoleSize": [0, 0],
        "MaskedPaths": ["/proc/kcore"],
        "SomethingNew": True,
    },
    "NetworkSettings": {"Networks": {"none": {}}},
}


def drifted(path=(), value=None, image=IMAGE):
    inspect = copy.deepcopy(INSPECT)
    place = inspect
    for key in path[:-1]:
        place = place[key]
    if path:
        place[path[-1]] = value
    return drift("cam", "sha256:1", BODY, inspect, image)


def test_what_the_engine_adds_is_no_drift():
    assert drifted() == ()
    assert drifted(image=None) == ()


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("Name",), "/old", "Name"),
        (("Image",), "sha256:2", "Image"),
        (("Config", "Env"), ["A=2", "B=2"], "Env.A"),
        (("Config", "Env"), ["A=1", "B=2", "EVIL=1"], "Env.EVIL"),
        (("Config", "Env"), ["A=1", "B=2", "GONE=1"], "Env.GONE"),
        (("Config", "Cmd"), ["sh"], "Cmd"),
        (("Config", "User"), "root", "User"),
        (("Config", "Entrypoint"), ["sh"], "Entrypoint"),
        (("Config", "Labels"), {}, "Labels.x"),
        (("HostConfig", "Privileged"), True, "HostConfig.Privileged"),
        (("HostConfig", "CapAdd"), ["CAP_NET_ADMIN", "CAP_SYS_ADMIN"], "HostConfig.CapAdd"),
        (("HostConfig", "Binds"), ["/:/host"], "HostConfig.Binds"),
        (("HostConfig", "NetworkMode"), "host", "HostConfig.NetworkMode"),
        (("HostConfig", "PidMode"), "host", "HostConfig.PidMode"),
        (("HostConfig", "IpcMode"), "host", "HostConfig.IpcMode"),
        (("HostConfig", "Memory"), 2 << 20, "HostConfig.Memory"),
        (("HostConfig", "MemorySwap"), 5 << 20, "HostConfig.MemorySwap"),
        (("HostConfig", "PidsLimit"), 5, "HostConfig.PidsLimit"),
        (("HostConfig", "NanoCpus"), 5, "HostConfig.NanoCpus"),
        (("HostConfig", "RestartPolicy"), {"Name": "always"}, "HostConfig.RestartPolicy"),
        (("HostConfig", "LogConfig"), {"Type": "none"}, "HostConfig.LogConfig"),
        (("HostConfig", "Devices"), [], "HostConfig.Devices"),
        (("NetworkSettings", "Networks"), {"none": {}, "bridge": {}}, "Networks"),
    ],
)
def test_drift(path, value, named):
    assert drifted(path, value) == (named,)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        # Kernels without the control group, and engines that drop what they cannot do.
        (("HostConfig", "Memory"), 0),
        (("HostConfig", "MemorySwap"), -1),
        (("HostConfig", "MemorySwap"), 0),
        (("HostConfig", "Runtime"), "crun"),
        (("HostConfig", "IpcMode"), "shareable"),
    ],
)
def test_no_drift(path, value):
    assert drifted(path, value) == ()
