"""Clients of the HTTP/2 transport that break the rules, take their time, or leave."""

from __future__ import annotations

import gzip
import http.client
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from gatelet.accelerators.backend import LoadOptions, Variant
from gatelet.accelerators.tensors import Array, TensorSpec
from gatelet.agent.scoring import h2_frames as h2
from gatelet.agent.scoring import h2_timeouts
from gatelet.agent.scoring.grpc_server import GrpcLimits
from gatelet.agent.scoring.h2_headers import literals
from gatelet.agent.scoring.http_types import HttpLimits
from gatelet.protos.inference import InferenceStub

from ..bench import onnx_models
from ..bench.scoring_site import Site, serve
from .h2_peer import INFER, STREAM, Peer, X, answered, framed, request, send_anyway, status

BOMB = gzip.compress(bytes(20_000_000))
PATIENT = GrpcLimits(
    handshake_timeout_ms=60_000,
    max_connection_idle_ms=60_000,
    keepalive_time_ms=60_000,
    max_message_bytes=4_000_000,
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("http2-faults")
    with serve(folder / "s", limits=PATIENT, settings={"grpc_transport": "http2"}) as site:
        site.deploy(
            {
                "e": onnx_models.scale_folder(folder / "m", 2.0),
                "big": onnx_models.identity_folder(folder / "big", "FP32"),
            }
        )
        yield site


HASTE = HttpLimits(
    headers=0.3, body_grace=0.4, stalled=0.5, linger=0.5, body_rate=10_000_000, max_connections=16
)


class SlowSession:
    """Runs until the test says so."""

    backend = "cpu"
    # Not on the event loop.
    may_wait = True
    inputs = (TensorSpec("x", "FP32", (-1, 4)),)
    outputs = (TensorSpec("y", "FP32", (-1, 4)), TensorSpec("total", "FP32", (-1, 1)))
    healthy = True

    def __init__(self) -> None:
        self.running = threading.Semaphore(0)
        self.go_on = threading.Event()
        self.go_on.set()
        self.calls = 0

    def run(
        self,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
        deadline: float | None = None,
    ) -> dict[str, Array]:
        self.calls += 1
        self.running.release()
        assert self.go_on.wait(20)
        y = np.asarray(inputs["x"], np.float32) * np.float32(2)
        return {"y": y, "total": y.sum(1, keepdims=True)}

    def close(self) -> None:
        pass


class SlowBackend:
    name = "cpu"

    def __init__(self) -> None:
        self.session = SlowSession()

    def accepts(self, variant: Variant) -> str | None:
        return None

    def load(self, directory: Path, variant: Variant, options: LoadOptions) -> SlowSession:
        return self.session


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[tuple[Site, SlowSession]]:
    """A model that computes one request at a time, and stands still from now on."""
    backend = SlowBackend()
    settings = {"grpc_transport": "http2"}
    with serve(
        tmp_path / "s", [backend], limits=PATIENT, http_limits=HASTE, settings=settings
    ) as site:
        site.deploy({"e": onnx_models.scale_folder(tmp_path / "m", 2.0)})
        instance = site.server_instance("e")
        instance.batching = replace(instance.batching, slots=1, max_batch=1)
        while backend.session.running.acquire(blocking=False):
            pass
        backend.session.go_on.clear()
        try:
            yield site, backend.session
        finally:
            backend.session.go_on.set()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.005)


def buffered(site: Site) -> float:
    connection = http.client.HTTPConnection(site.metrics, timeout=20)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    name = "gatelet_http_buffered_bytes"
    return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(name))


@pytest.mark.parametrize("how", ["reset", "closed", "late"])
def test_what_nobody_waits_for_is_not_begun(slow: tuple[Site, SlowSession], how: str) -> None:
    site, session = slow
    instance = site.server_instance("e")
    body = framed(request().SerializeToString())
    more = ((b"grpc-timeout", b"400m"),) if how == "late" else ()
    with Peer(site) as first, Peer(site) as peer:
        first.call(1, body)
        assert session.running.acquire(timeout=15)
        calls = session.calls
        numbers = range(1, 21, 2)
        for number in numbers:
            peer.call(number, body, *more)
        if how == "late":
            assert {status(answer) for answer in peer.all_ended(numbers).values()} == {4}
        else:
            until(lambda: instance.pending == 10)
        if how == "reset":
            peer.send(*[h2.rst_stream(number, h2.ErrorCode.CANCEL) for number in numbers])
        elif how == "closed":
            peer.link.close()
        until(lambda: instance.pending == 0)
        assert instance.in_flight == 1
        session.go_on.set()
        assert status(first.ended(1)) == 0
        assert session.calls == calls
    snapshot = instance.statistics.snapshot()
    # The probe and the first call.
    assert snapshot.fail.count == 0


def test_a_stream_waits_for_whoever_answers_it(slow: tuple[Site, SlowSession]) -> None:
    site, session = slow
    big = framed(request("e", np.zeros((1000, 4), np.float32)).SerializeToString())
    sent = 0
    with Peer(site) as peer:
        peer.call(1, big, path=STREAM, end=0)
        assert session.running.acquire(timeout=15)
        window = 2**20 - len(big)
        # What the window allows, and not a byte more comes of it while the model stands still.
        while sent + len(big) <= window:
            peer.send(h2.frame(h2.DATA, 0, 1, big[:8000]), h2.frame(h2.DATA, 0, 1, big[8000:]))
            sent += len(big)
        peer.send(h2.frame(h2.PING, 0, 0, b"all read"))
        opened = 0
        for kind, flags, stream, payload in peer.frames():
            if kind == h2.WINDOW_UPDATE and stream == 1:
                opened += int.from_bytes(payload, "big")
            if kind == h2.PING and flags & h2.ACK:
                break
        assert opened == 0
        assert 0 < buffered(site) < 2**21
        # Before there are answers, which would not wait for long.
        peer.send(h2.window_update(0, 2**30), h2.window_update(1, 2**30))
        peer.send(h2.frame(h2.DATA, 1, 1))
        session.go_on.set()
        assert status(peer.ended(1)) == 0
    until(lambda: buffered(site) == 0)


def test_packed_messages_of_streams(site: Site) -> None:
    plain = request().SerializeToString()
    packed = framed(gzip.compress(plain), 1)
    gzipped = (b"grpc-encoding", b"gzip")
    with Peer(site) as peer:
        peer.call(1, packed + framed(plain) + packed, gzipped, path=STREAM)
        answer = peer.ended(1)
        assert answer.count((2 * X).tobytes()) == 3
        assert status(answer) == 0
        peer.call(3, packed + framed(BOMB, 1), gzipped, path=STREAM)
        answer = peer.ended(3)
        assert (answer.count((2 * X).tobytes()), status(answer)) in [(1, 8), (0, 8)]
        peer.call(5, framed(plain) + framed(b"\xff\xff\xff"), path=STREAM)
        assert status(peer.ended(5)) == 13
        peer.call(7, framed(plain)[:-3], path=STREAM)
        assert status(peer.ended(7)) == 13
    answered(site)


@pytest.mark.parametrize("what", ["nothing", "half a body", "half a stream"])
def test_slow_senders_are_told(slow: tuple[Site, SlowSession], what: str) -> None:
    site, session = slow
    session.go_on.set()
    body = framed(request("e", np.zeros((5000, 4), np.float32)).SerializeToString())
    path = STREAM if what == "half a stream" else INFER
    with Peer(site) as peer:
        peer.call(1, b"" if what == "nothing" else body[:20_000], path=path, end=0)
        assert status(peer.ended(1)) == 4
        # The connection is as good as before.
        peer.call(3, framed(request().SerializeToString()))
        assert status(peer.ended(3)) == 0


def test_a_frame_that_never_ends(slow: tuple[Site, SlowSession]) -> None:
    site, _ = slow
    fields = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", INFER.encode())]
    block = literals([*fields, (b"content-type", b"application/grpc")])
    dripped = h2.frame(h2.HEADERS, 0, 1, block) + h2.frame(h2.CONTINUATION, 0, 1) * 3
    with Peer(site) as peer:
        pause = threading.Event()
        for at in range(len(dripped)):
            send_anyway(peer, dripped[at : at + 1])
            pause.wait(0.01)
        assert peer.goodbye() == h2.ErrorCode.ENHANCE_YOUR_CALM


@pytest.mark.parametrize("wide", [True, False])
def test_readers_that_stop_lose_their_connection(tmp_path: Path, wide: bool) -> None:
    # More than the kernel keeps of an answer on its way.
    body = framed(request("e", np.zeros((625_000, 4), np.float32)).SerializeToString())
    limits = replace(HASTE, body_grace=60.0, stalled=1.5)
    settings = {"grpc_transport": "http2"}
    with serve(tmp_path / "s", http_limits=limits, settings=settings) as site:
        site.deploy({"e": onnx_models.scale_folder(tmp_path / "m", 2.0)})
        with Peer(site, {h2.INITIAL_WINDOW_SIZE: 2**31 - 1 if wide else 1000}) as peer:
            peer.link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
            if wide:
                peer.send(h2.window_update(0, 2**30))
            sender = threading.Thread(target=lambda peer=peer: _send_all(peer, body))
            sender.start()
            until(lambda: buffered(site) > 2_000_000)
            until(lambda: buffered(site) == 0)
            sender.join(15)
        with Peer(site) as peer:
            peer.call(1, framed(request().SerializeToString()))
            assert status(peer.ended(1)) == 0


def _send_all(peer: Peer, body: bytes) -> None:
    """A large request, as fast as the server makes room for it; its answer is not read on."""
    try:
        peer.call(1, b"", end=0)
        window, connection = 2**20, 2**22
        at = 0
        while at < len(body):
            while min(window, connection) < h2.MAX_FRAME:
                kind, _, stream, payload = next(peer.frames())
                if kind == h2.WINDOW_UPDATE:
                    window += int.from_bytes(payload, "big") * (stream == 1)
                    connection += int.from_bytes(payload, "big") * (stream == 0)
            part = body[at : at + h2.MAX_FRAME]
            at += len(part)
            window, connection = window - len(part), connection - len(part)
            peer.send(h2.frame(h2.DATA, int(at == len(body)), 1, part))
    except (OSError, StopIteration):
        pass


def test_calls_on_their_way_while_it_stops_are_answered(
    slow: tuple[Site, SlowSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(h2_timeouts, "_RETIRING_SECONDS", 60.0)
    site, session = slow
    session.go_on.set()
    assert site.server is not None
    body = framed(request().SerializeToString())
    with Peer(site) as peer:
        peer.call(1, body)
        assert status(peer.ended(1)) == 0
        stopping = threading.Thread(target=site.server.stop, args=(20.0,))
        stopping.start()
        lasts, answer = [], b""
        for kind, _, stream, payload in peer.frames():
            if kind == h2.GOAWAY:
                lasts.append(int.from_bytes(payload[:4], "big"))
            elif kind == h2.PING:
                # Sent before the goodbye was seen.
                peer.call(3, body)
                peer.send(h2.frame(h2.PING, h2.ACK, 0, payload))
            elif stream == 3:
                answer += payload
        stopping.join(30)
        assert not stopping.is_alive()
    assert lasts == [2**31 - 1, 3]
    assert status(answer) == 0


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ((b"te", b"gzip"), "reset"),
        ((b"Upper", b"x"), "reset"),
        ((b"x", b"a\nb"), "reset"),
        ((b"connection", b"close"), "reset"),
        ((b"content-type", b"text/plain"), b"415"),
    ],
)
def test_headers_that_no_client_sends(
    site: Site, field: tuple[bytes, bytes], expected: str | bytes
) -> None:
    fields = {b":method": b"POST", b":scheme": b"http", b":path": INFER.encode()}
    fields |= {b"content-type": b"application/grpc", field[0]: field[1]}
    with Peer(site) as peer:
        peer.send(h2.frame(h2.HEADERS, 5, 1, literals(fields.items())))
        kind, payload = next((f[0], f[3]) for f in peer.frames() if f[2] == 1)
        if expected == "reset":
            assert (kind, payload[-1]) == (h2.RST_STREAM, h2.ErrorCode.PROTOCOL_ERROR)
        else:
            assert expected in payload
    answered(site)


def test_large_requests_and_answers_are_given_back(site: Site) -> None:
    x = np.arange(400_000, dtype=np.float32).reshape(-1, 2)
    with grpc.insecure_channel(site.address) as channel:
        stub = InferenceStub(channel)
        calls = [stub.model_infer.future(request("big", x), 20) for _ in range(8)]
        for call in calls:
            assert call.result().raw_output_contents[0] == x.tobytes()
    until(lambda: buffered(site) == 0)


@pytest.mark.parametrize(
    ("body", "more", "path", "expected"),
    [
        (framed(b"packed", 1), (), INFER, 13),
        (framed(b"packed", 7), ((b"grpc-encoding", b"gzip"),), INFER, 13),
        (framed(b"packed", 1), ((b"grpc-encoding", b"gzip"),), INFER, 13),
        (framed(b"packed", 1), (), STREAM, 13),
        (framed(b"packed")[:-1], (), INFER, 13),
    ],
)
def test_calls_that_fail_make_room_for_others(
    tmp_path: Path, body: bytes, more: Sequence[tuple[bytes, bytes]], path: str, expected: int
) -> None:
    limits, settings = replace(PATIENT, max_concurrent_rpcs=2), {"grpc_transport": "http2"}
    with serve(tmp_path / "s", limits=limits, settings=settings) as site, Peer(site) as peer:
        for number in (1, 3):
            peer.call(number, body, *more, path=path)
        assert {status(answer) for answer in peer.all_ended((1, 3)).values()} == {expected}

        def is_taken(number: int) -> bool:
            peer.call(number, framed(request().SerializeToString()))
            return status(peer.ended(number)) != 8

        # A stream counts until its handler has noticed.
        numbers = iter(range(5, 2**20, 2))
        until(lambda: is_taken(next(numbers)))


async def test_tritonclient_packs_and_streams(site: Site) -> None:
    value = triton.InferInput("x", [1, 4], "FP32")
    value.set_data_from_numpy(X)
    async with triton_aio.InferenceServerClient(site.address) as client:
        for algorithm in ("gzip", None):
            result = await client.infer("e", [value], compression_algorithm=algorithm)
            assert result.as_numpy("y").tolist() == (2 * X).tolist()

        async def requests() -> AsyncIterator[dict[str, object]]:
            for number in range(20):
                yield {"model_name": "e", "inputs": [value], "request_id": str(number)}

        numbers = []
        async for result, error in client.stream_infer(requests(), compression_algorithm="gzip"):
            assert error is None
            numbers.append(result.get_response().id)
        assert numbers == [str(number) for number in range(20)]


def test_a_peer_that_is_gone_is_noticed(tmp_path: Path) -> None:
    limits = GrpcLimits(keepalive_time_ms=200, keepalive_timeout_ms=2500)
    settings = {"grpc_transport": "http2"}
    with (
        serve(tmp_path / "s", limits=limits, settings=settings) as site,
        Peer(site) as there,
        Peer(site) as gone,
    ):
        for peer in (there, gone):
            peer.call(1, b"", path=STREAM, end=0)
        codes: list[int] = []
        leaving = threading.Thread(target=lambda: codes.append(gone.goodbye()))
        leaving.start()
        pings = 0
        for kind, flags, _, payload in there.frames():
            if kind == h2.PING and not flags & h2.ACK:
                pings += 1
                there.send(h2.frame(h2.PING, h2.ACK, 0, payload))
                if pings >= 3 and not leaving.is_alive():
                    break
        # Asked as well, it said nothing, and was closed meanwhile.
        assert codes == [-1]
        there.send(h2.frame(h2.DATA, h2.END_STREAM, 1))
        assert status(there.ended(1)) == 0


def test_too_many_connections(tmp_path: Path) -> None:
    limits, settings = HttpLimits(max_connections=2), {"grpc_transport": "http2"}
    with serve(tmp_path / "s", limits=PATIENT, http_limits=limits, settings=settings) as site:
        site.deploy({"e": onnx_models.scale_folder(tmp_path / "m", 2.0)})
        body = framed(request().SerializeToString())
        with Peer(site) as busy, Peer(site) as idle:
            busy.call(1, b"", path=STREAM, end=0)
            busy.call(3, body)
            assert status(busy.ended(3)) == 0
            idle.call(1, body)
            assert status(idle.ended(1)) == 0
            with Peer(site) as other:
                # The one that idles made room.
                other.call(1, b"", path=STREAM, end=0)
                other.call(3, body)
                assert status(other.ended(3)) == 0
                assert idle.goodbye() == -1
                with Peer(site) as late:
                    assert late.goodbye() == h2.ErrorCode.ENHANCE_YOUR_CALM
