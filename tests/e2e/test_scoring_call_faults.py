"""gRPC clients that misbehave, and bursts of calls, on both transports: the right status, bounded
memory, and everybody else is answered. The same over HTTP is in test_scoring_faults.py."""

from __future__ import annotations

import selectors
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
from gatelet.agent.scoring import h2_frames as h2
from gatelet.agent.scoring.h2_headers import literals
from gatelet.protos import open_inference_pb2 as oip
from gatelet.protos.inference import InferenceStub

from ..bench import onnx_models
from ..bench.scoring_site import ScoringProcess, scoring_process

MIB = 2**20
INFER = "/inference.GRPCInferenceService/ModelInfer"
UNBOUNDED = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),
]
PROMPT = 15.0
"""Seconds: not behind somebody who is slow. How long exactly is a matter of benchmarks."""

PATIENCE = 40.0
"""Seconds, after which nobody is left who says nothing, takes 3 without other load."""


def many_folder(folder: Path) -> Path:
    """A model that answers with as many zeros as it is asked for."""
    node = onnx_models.helper.make_node("ConstantOfShape", ["n"], ["y"])
    specs = [("n", "INT64", (1,))], [("y", "FP32", (-1,))]
    content = onnx_models.build([node], *specs)
    sample = {"inputs": [{"name": "n", "datatype": "INT64", "shape": [1], "data": [3]}]}
    return onnx_models.write_folder(folder, content, *specs, name="many", sample=sample)


@pytest.fixture(scope="module", params=["grpcio", "http2"])
def process(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ScoringProcess]:
    """A process of its own, with the limits of a device."""
    folder = tmp_path_factory.mktemp("calls")
    with scoring_process(folder / "p", "--grpc-transport", request.param) as process:
        process.site.deploy(
            {
                "e": onnx_models.scale_folder(folder / "e", 2.0),
                "big": onnx_models.identity_folder(folder / "big", "FP32"),
                "many": many_folder(folder / "many"),
            }
        )
        yield process
        # Whatever was done to it, it answers and ends as it should.
        answered(process)
        assert process.terminate() == 0


def request_of(megabytes: float = 0.0) -> oip.ModelInferRequest:
    """To "big" with so much of data, or a small one to "e"."""
    rows = int(megabytes * MIB) // 8
    shape = [rows, 2] if rows else [1, 4]
    size = 4 * shape[0] * shape[1]
    made = oip.ModelInferRequest(
        model_name="big" if rows else "e", raw_input_contents=[bytes(size)]
    )
    made.inputs.add(name="x", datatype="FP32", shape=shape)
    return made


@contextmanager
def stub(process: ScoringProcess) -> Iterator[InferenceStub]:
    with grpc.insecure_channel(process.site.address, UNBOUNDED) as channel:
        yield InferenceStub(channel)


def answered(process: ScoringProcess) -> None:
    """A well-behaved call is answered, and promptly."""
    with stub(process) as one:
        answer = one.model_infer(request_of(), PROMPT)
    assert np.frombuffer(answer.raw_output_contents[0], np.float32).tolist() == [0] * 4


def memory(process: ScoringProcess) -> int:
    return int(psutil.Process(process.process.pid).memory_info().rss)


@contextmanager
def memory_grows_less_than(process: ScoringProcess, mebibytes: int) -> Iterator[None]:
    before = memory(process)
    peak, ended = [before], threading.Event()

    def watch() -> None:
        while not ended.wait(0.01):
            peak.append(memory(process))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
    assert (max(peak) - before) // MIB < mebibytes


def connect(process: ScoringProcess) -> socket.socket:
    host, _, port = process.site.address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=20)


def until_closed(links: list[socket.socket], seconds: float) -> int:
    """How many are still open after so long, whatever they were sent meanwhile."""
    deadline = time.monotonic() + seconds
    with selectors.DefaultSelector() as selector:
        for link in links:
            selector.register(link, selectors.EVENT_READ)
        while selector.get_map() and time.monotonic() < deadline:
            for key, _ in selector.select(0.2):
                assert isinstance(key.fileobj, socket.socket)
                try:
                    data = key.fileobj.recv(65536)
                except ConnectionResetError:
                    data = b""
                if not data:
                    selector.unregister(key.fileobj)
        return len(selector.get_map())


def test_800_silent_connections(process: ScoringProcess) -> None:
    hello = h2.PREFACE + h2.settings({})
    with ExitStack() as opened, memory_grows_less_than(process, 100):
        links = [opened.enter_context(connect(process)) for _ in range(800)]
        # Every other one says hello in HTTP/2 and then nothing.
        for link in links[::2]:
            link.sendall(hello)
        answered(process)
        assert until_closed(links, PATIENCE) == 0


def test_1000_parallel_calls(process: ScoringProcess) -> None:
    with memory_grows_less_than(process, 150), ExitStack() as channels:
        stubs = [channels.enter_context(stub(process)) for _ in range(10)]
        calls = [stubs[n % 10].model_infer.future(request_of(), 30) for n in range(1000)]
        codes = Counter(call.code().name for call in calls)
    assert set(codes) <= {"OK", "RESOURCE_EXHAUSTED", "UNAVAILABLE"}, codes
    assert codes["OK"] >= 200, codes


@pytest.mark.parametrize(("megabytes", "code"), [(63, "OK"), (65, "RESOURCE_EXHAUSTED")])
def test_messages_up_to_64_mib(process: ScoringProcess, megabytes: int, code: str) -> None:
    with stub(process) as one:
        assert one.model_infer.future(request_of(megabytes), 60).code().name == code
    answered(process)


def test_many_large_messages_at_once_do_not_fill_the_memory(process: ScoringProcess) -> None:
    message = request_of(40)

    def ask(_: int) -> str:
        with stub(process) as one:
            return str(one.model_infer.future(message, 60).code().name)

    with memory_grows_less_than(process, 1000), ThreadPoolExecutor(8) as clients:
        codes = Counter(clients.map(ask, range(8)))
    assert set(codes) <= {"OK", "RESOURCE_EXHAUSTED", "UNAVAILABLE"}, codes
    assert codes["OK"] >= 1, codes


def test_slow_readers(process: ScoringProcess) -> None:
    """Calls with answers of 16 MiB, of which nobody takes more than the first 64 KiB, the window
    that a connection has from the start."""
    asked = oip.ModelInferRequest(model_name="many")
    asked.inputs.add(name="n", datatype="INT64", shape=[1])
    asked.raw_input_contents.append((4 * MIB).to_bytes(8, "little"))
    message = asked.SerializeToString()
    body = b"\0" + len(message).to_bytes(4, "big") + message
    fields = [
        *((b":method", b"POST"), (b":scheme", b"http"), (b":path", INFER.encode())),
        *((b":authority", b"x"), (b"content-type", b"application/grpc"), (b"te", b"trailers")),
    ]
    head, data = h2.frame(h2.HEADERS, 4, 1, literals(fields)), h2.frame(h2.DATA, 1, 1, body)
    with ExitStack() as opened, memory_grows_less_than(process, 600):
        links = [opened.enter_context(connect(process)) for _ in range(6)]
        for link in links:
            link.sendall(h2.PREFACE + h2.settings({}) + head + data)
        answered(process)
        assert until_closed(links, PATIENCE) == 0
    answered(process)


def test_calls_that_are_given_up(process: ScoringProcess) -> None:
    with stub(process) as one, memory_grows_less_than(process, 150):
        for _ in range(5):
            calls = [one.model_infer.future(request_of(), 30) for _ in range(100)]
            for call in calls[1:]:
                call.cancel()
            codes = {call.code().name for call in calls}
            # Who cancels too much at once loses the connection (HTTP/2's rapid reset).
            assert codes <= {"OK", "CANCELLED", "UNAVAILABLE"}, codes
        large = one.model_infer.future(request_of(40), 30)
        large.cancel()
    answered(process)


def test_deadlines_of_a_millisecond(process: ScoringProcess) -> None:
    with stub(process) as one:
        one.server_live(oip.ServerLiveRequest(), 10)
        calls = [one.model_infer.future(request_of(), 0.001) for _ in range(200)]
        codes = Counter(call.code().name for call in calls)
        # A full queue says UNAVAILABLE at once, which is no worse.
        assert set(codes) <= {"OK", "DEADLINE_EXCEEDED", "UNAVAILABLE"}, codes
        late = request_of()
        late.parameters["timeout"].int64_param = 1
        codes = Counter(one.model_infer.future(late, 10).code().name for _ in range(50))
        assert set(codes) == {"DEADLINE_EXCEEDED"}, codes
    answered(process)
