"""The HTTP/2 transport of gRPC: raw peers, h2load and curl against real connections."""

from __future__ import annotations

import gzip
import os
import random
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
from gatelet.accelerators.backend import LoadOptions, Variant
from gatelet.accelerators.errors import BackendError
from gatelet.accelerators.tensors import Array, TensorSpec
from gatelet.agent.scoring import h2_frames as h2
from gatelet.agent.scoring.grpc_server import GrpcLimits
from gatelet.agent.scoring.h2_headers import literals
from gatelet.agent.scoring.oip_messages import decode_response
from gatelet.protos import open_inference_pb2 as oip
from gatelet.protos.inference import InferenceStub
from onnx import helper
from required import program

from ..bench import onnx_models
from ..bench.scoring_site import Site, serve
from .h2_peer import INFER, Peer, X, answered, framed, request, send_anyway, status

BOMB = gzip.compress(bytes(20_000_000))
PATIENT = GrpcLimits(
    handshake_timeout_ms=60_000,
    max_connection_idle_ms=60_000,
    keepalive_time_ms=60_000,
    max_message_bytes=4_000_000,
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("http2")
    with serve(folder / "s", limits=PATIENT, settings={"grpc_transport": "http2"}) as site:
        site.deploy(
            {
                "e": onnx_models.scale_folder(folder / "m", 2.0),
                "big": onnx_models.identity_folder(folder / "big", "FP32"),
            }
        )
        yield site


def test_interleaved_calls_on_one_connection(site: Site) -> None:
    body = framed(request().SerializeToString())
    with Peer(site) as peer:
        for number in (1, 3, 5):
            peer.call(number, body, end=1)
        assert [status(peer.ended(number)) for number in (1, 3, 5)] == [0, 0, 0]


class Choosy:
    """A model at once, that a 13 among its inputs makes fail."""

    name = backend = "cpu"
    inputs = (TensorSpec("x", "FP32", (-1, 4)),)
    outputs = (TensorSpec("y", "FP32", (-1, 4)), TensorSpec("total", "FP32", (-1, 1)))
    healthy = True

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def accepts(self, variant: Variant) -> str | None:
        return None

    def load(self, directory: Path, variant: Variant, options: LoadOptions) -> Choosy:
        return self

    def run(
        self,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
        deadline: float | None = None,
    ) -> dict[str, Array]:
        x = np.asarray(inputs["x"], np.float32)
        self.sizes.append(len(x))
        if (x == 13).any():
            raise BackendError("13 is unlucky")
        return {"y": x * 2, "total": x.sum(1, keepdims=True)}

    def close(self) -> None:
        pass


def test_what_comes_together_runs_together_and_fails_alone(tmp_path: Path) -> None:
    model = Choosy()
    settings = {"grpc_transport": "http2"}
    with serve(tmp_path / "s", [model], settings=settings) as site:
        site.deploy({"e": onnx_models.scale_folder(tmp_path / "m", 2.0)})
        instance = site.server_instance("e")
        instance.batching = replace(instance.batching, max_batch=16)
        with Peer(site) as peer:
            # What a run takes has to be known, and how such a request reads.
            for number in (1, 3, 5, 7):
                peer.call(number, framed(request().SerializeToString()))
                assert status(peer.ended(number)) == 0
            model.sizes.clear()
            before = instance.statistics.snapshot()
            rows = [np.full((1, 4), float(n), np.float32) for n in range(40)]
            numbers = range(9, 9 + 2 * len(rows), 2)
            with peer.together():
                for number, row in zip(numbers, rows, strict=True):
                    peer.call(number, framed(request("e", row).SerializeToString()))
            answers = peer.all_ended(numbers)
        for number, row in zip(numbers, rows, strict=True):
            unlucky = row[0, 0] == 13
            assert status(answers[number]) == (13 if unlucky else 0)
            assert ((2 * row).tobytes() in answers[number]) is not unlucky
        after = instance.statistics.snapshot()
        assert after.success.count - before.success.count == 39
        assert after.fail.count - before.fail.count == 1
        assert after.inference_count - before.inference_count == 39
        # They came in one packet, or in a few.
        assert max(model.sizes) > 4
        assert len(model.sizes) < 40


def test_answers_without_a_batch_are_whole_every_time(tmp_path: Path) -> None:
    """Outputs of other sizes than the input's first, and one without dimensions."""
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["most"], axes=[0, 1], keepdims=0),
        helper.make_node("ReduceMax", ["x"], ["rows"], axes=[1], keepdims=0),
        helper.make_node("Transpose", ["x"], ["turned"], perm=[1, 0]),
    ]
    inputs = [("x", "FP32", (2, 3))]
    outputs = [("rows", "FP32", (2,)), ("turned", "FP32", (3, 2)), ("most", "FP32", ())]
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    expected = {"rows": [2, 5], "turned": [[0, 3], [1, 4], [2, 5]], "most": 5}
    wanted = [("rows", "turned", "most"), ("most",)]
    folder = onnx_models.write_folder(
        tmp_path / "m", onnx_models.build(nodes, inputs, outputs), inputs, outputs
    )
    with serve(tmp_path / "s", settings={"grpc_transport": "http2"}) as site:
        site.deploy({"e": folder})
        with grpc.insecure_channel(site.address) as channel:
            stub = InferenceStub(channel)
            for names in wanted * 8:
                asked = request("e", x)
                asked.outputs.extend(
                    [oip.ModelInferRequest.InferRequestedOutputTensor(name=n) for n in names]
                )
                answer = decode_response(stub.model_infer(asked, 10))
                found = {tensor.name: tensor.array.tolist() for tensor in answer.outputs}
                assert found == {name: expected[name] for name in names}


def test_gzip_and_other_encodings(site: Site) -> None:
    plain = request().SerializeToString()
    with Peer(site) as peer:
        peer.call(1, framed(gzip.compress(plain), 1), (b"grpc-encoding", b"gzip"))
        assert status(peer.ended(1)) == 0
        peer.call(3, framed(plain), (b"grpc-encoding", b"snappy"))
        answer = peer.ended(3)
        assert status(answer) == 12
        assert b"identity, gzip" in answer
        peer.call(5, framed(plain, 1))
        assert status(peer.ended(5)) == 13
        peer.call(7, framed(BOMB, 1), (b"grpc-encoding", b"gzip"))
        assert status(peer.ended(7)) == 8


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"\0\0\0\0", 13),
        (framed(b"abc")[:-1], 13),
        (framed(b"a") + framed(b"b"), 13),
        (framed(b"\xff\xff\xff"), 13),
        (b"\0\x7f\xff\xff\xff" + bytes(100), 8),
    ],
)
def test_bodies_that_are_no_message(site: Site, body: bytes, expected: int) -> None:
    with Peer(site) as peer:
        peer.call(1, body)
        assert status(peer.ended(1)) == expected
    answered(site)


def test_headers_that_are_no_call(site: Site) -> None:
    with Peer(site) as peer:
        peer.call(1, framed(b""), path="/nothing/Here")
        assert status(peer.ended(1)) == 12
        peer.call(3, framed(b""), (b"grpc-timeout", b"soon"))
        assert status(peer.ended(3)) == 13
        peer.call(5, framed(b""), (b"x-large", b"y" * 16_200), path=INFER)
        assert status(peer.ended(5)) == 8
        fields = [(b":method", b"GET"), (b":scheme", b"http"), (b":path", b"/")]
        peer.send(h2.frame(h2.HEADERS, 5, 7, literals(fields)))
        assert b"405" in peer.ended(7)
    answered(site)


def test_http1_is_told_so(site: Site) -> None:
    host, _, port = site.address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=10) as link:
        link.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        got = b""
        while data := link.recv(4096):
            got += data
    assert got.startswith(b"HTTP/1.1 400")
    head, _, body = got.partition(b"\r\n\r\n")
    assert f"Content-Length: {len(body)}".encode() in head


def test_silent_and_idle_connections_are_closed(tmp_path: Path) -> None:
    quick = GrpcLimits(handshake_timeout_ms=1000, max_connection_idle_ms=2000)
    settings = {"grpc_transport": "http2"}
    with serve(tmp_path / "s", limits=quick, settings=settings) as site:
        host, _, port = site.address.rpartition(":")
        started = time.monotonic()
        with socket.create_connection((host, int(port)), timeout=10) as silent, Peer(site) as idle:
            assert idle.goodbye() == 0
            while silent.recv(4096):
                pass
        assert time.monotonic() - started < 15


def test_floods_end_the_connection_only(site: Site) -> None:
    fields = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", INFER.encode())]
    block = literals([*fields, (b"content-type", b"application/grpc")])
    resets = b"".join(
        h2.frame(h2.HEADERS, 4, n, block) + h2.rst_stream(n, h2.ErrorCode.CANCEL)
        for n in range(1, 8001, 2)
    )
    pings = h2.frame(h2.PING, 0, 0, bytes(8)) * 5000
    for flood in (resets, pings, h2.settings({}) * 5000):
        with Peer(site) as peer:
            sender = threading.Thread(target=lambda flood=flood: send_anyway(peer, flood))
            sender.start()
            assert peer.goodbye() == h2.ErrorCode.ENHANCE_YOUR_CALM
            sender.join()
    answered(site)


def test_an_answer_waits_for_a_small_window(site: Site) -> None:
    x = np.arange(50_000, dtype=np.float32).reshape(-1, 2)
    with Peer(site, {h2.INITIAL_WINDOW_SIZE: 1000}) as peer:
        peer.call(1, framed(request("big", x).SerializeToString()))
        got = b""
        for kind, flags, stream, payload in peer.frames():
            if kind == h2.DATA:
                assert len(payload) <= 1000
                got += payload
                peer.send(h2.window_update(1, len(payload)), h2.window_update(0, len(payload)))
            if stream == 1 and flags & h2.END_STREAM and kind == h2.HEADERS:
                break
    assert x.tobytes() in got


def test_random_and_mutated_bytes(site: Site) -> None:
    random_ = random.Random(5)
    body = framed(request().SerializeToString())
    memory = psutil.Process().memory_info().rss
    fields = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", INFER.encode())]
    block = literals([*fields, (b"content-type", b"application/grpc")])
    whole = h2.frame(h2.HEADERS, 4, 1, block) + h2.frame(h2.DATA, 1, 1, body)
    for round_ in range(300):
        data = bytearray(whole * 2 if round_ % 2 else random_.randbytes(400))
        for _ in range(random_.randrange(1, 9)):
            data[random_.randrange(len(data))] = random_.randrange(256)
        with Peer(site) as peer:
            send_anyway(peer, bytes(data))
    answered(site)
    assert psutil.Process().memory_info().rss - memory < 100 * 2**20


def test_curl_and_h2load(site: Site, tmp_path: Path) -> None:
    for tool, package in (("curl", "curl"), ("h2load", "nghttp2-client")):
        program(tool, package)
    body = tmp_path / "body"
    body.write_bytes(framed(request().SerializeToString()))
    url = f"http://{site.address}{INFER}"
    headers = ("-H", "content-type: application/grpc", "-H", "te: trailers")
    done = subprocess.run(
        ["curl", "-s", "--http2-prior-knowledge", "--data-binary", f"@{body}", *headers, url],
        capture_output=True,
        timeout=20,
        check=True,
    )
    assert (2 * X).tobytes() in done.stdout
    load = subprocess.run(
        ["h2load", "-n", "2000", "-c", "4", "-m", "8", "-d", str(body), *headers, url],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert "2000 succeeded, 0 failed, 0 errored" in load.stdout


def test_calls_under_way_are_answered_when_it_stops(tmp_path: Path) -> None:
    settings = {"grpc_transport": "http2"}
    folder = onnx_models.scale_folder(tmp_path / "m", 2.0)
    codes: list[str] = []
    with serve(tmp_path / "s", settings=settings, address=f"unix:{tmp_path}/g") as site:
        site.deploy({"e": folder})
        stop = threading.Event()

        def ask() -> None:
            with grpc.insecure_channel(site.address) as channel:
                stub = InferenceStub(channel)
                while not stop.is_set():
                    try:
                        stub.model_infer(request(), 5)
                        codes.append("OK")
                    except grpc.RpcError as error:
                        codes.append(error.code().name)
                        return

        askers = [threading.Thread(target=ask) for _ in range(4)]
        for asker in askers:
            asker.start()
        while len(codes) < 200 and any(asker.is_alive() for asker in askers):
            stop.wait(0.01)
        assert site.server is not None
        site.server.stop(2.0)
        stop.set()
        for asker in askers:
            asker.join(10)
    # Those refused never began, and say so.
    assert set(codes) <= {"OK", "UNAVAILABLE"}
    assert codes.count("UNAVAILABLE") <= 4
    assert not os.path.exists(tmp_path / "g")
