"""Models that a container serves: one scoring process behind another, over a Unix socket."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
from gatelet.accelerators.tensors import NUMPY_DTYPES
from gatelet.agent.scoring.client import ScoringClient
from gatelet.agent.scoring.errors import Code, ScoringError
from gatelet.protos import control_pb2 as pb
from gatelet.protos import open_inference_pb2 as oip
from gatelet.protos.inference import INFERENCE

from ..bench import onnx_models
from ..bench.scoring_site import TIMEOUT, ScoringProcess, Site, scoring_process, serve

X = {"x": np.ones((1, 4), np.float32)}


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with serve(tmp_path / "outer.sock") as site:
        yield site


@pytest.fixture
def client(site: Site) -> Iterator[ScoringClient]:
    with ScoringClient(site.address, timeout=TIMEOUT) as client:
        yield client


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "scoring.sock"


@contextmanager
def container(path: Path, **folders: Path) -> Iterator[ScoringProcess]:
    """What runs in a container: a server on `path` with a model for each endpoint."""
    arguments = ("--grpc-address", f"unix:{path}", "--http-address", "", "--metrics-address", "")
    with scoring_process(path.with_name("inner.sock"), *arguments) as inner:
        inner.site.deploy(folders)
        yield inner


def load(site: Site, path: Path, model: str = "", instance: str = "m@1", **options: int):
    request = pb.LoadRequest(
        instance=instance, socket=str(path), model=model, options=pb.ScoringOptions(**options)
    )
    return site.control.load(request, TIMEOUT).status


def deploy(site: Site, path: Path, model: str = "", **options: int) -> None:
    load(site, path, model, **options)
    assert site.probe("m@1").state == pb.InstanceStatus.READY
    site.switch({"served": [("m@1", 0, True)]})


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.02)


def healthy(site: Site) -> bool:
    return site.status().instances[0].backends[0].healthy


def scored(client: ScoringClient) -> bool:
    try:
        return client.infer("served", X)["total"].tolist() == [[8.0]]
    except ScoringError as error:
        if error.code is not Code.UNAVAILABLE:
            raise
        return False


def failure(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as failed:
        call()
    return failed.value.code(), failed.value.details()


def test_served_by_name_like_any_model(site, client, path, tmp_path) -> None:
    folder = onnx_models.scale_folder(tmp_path / "m", 2, name="scaler", version="7")
    with container(path, inner=folder):
        status = load(site, path)
        assert (status.state, status.model, status.version) == (
            pb.InstanceStatus.LOADED,
            "inner",
            "7",
        )
        assert [backend.name for backend in status.backends] == ["container"]
        code, details = failure(lambda: site.switch({"served": [("m@1", 0, True)]}))
        assert (code, "probe it first" in details) == (grpc.StatusCode.FAILED_PRECONDITION, True)
        deploy(site, path)
        answer = client.request("served", X)
        assert (answer.model, answer.version) == ("served", "7")
        assert [tensor.name for tensor in answer.outputs] == ["y", "total"]
        only = client.request("served", X, outputs=["total"])
        assert [tensor.array.tolist() for tensor in only.outputs] == [[[8.0]]]
        metadata = client.metadata("served")
        assert [str(spec) for spec in metadata.inputs] == ["x FP32[-1,4]"]
        assert client.ready("served")
        with pytest.raises(ScoringError, match="x") as refused:
            client.infer("served", {"x": np.ones((1, 3), np.float32)})
        assert refused.value.code is Code.INVALID_ARGUMENT
        site.switch({})
        site.unload("m@1")
        assert not site.status().instances


def test_every_datatype_arrives_as_it_was_sent(site, client, path, tmp_path) -> None:
    folders = {}
    for datatype in onnx_models.DATATYPES:
        folders[datatype] = onnx_models.identity_folder(tmp_path / datatype, datatype)
    with container(path, **folders):
        for datatype in onnx_models.DATATYPES:
            load(site, path, datatype, instance=datatype)
            site.probe(datatype)
        site.switch({datatype: [(datatype, 0, True)] for datatype in folders})
        for datatype in onnx_models.DATATYPES:
            if datatype == "BYTES":
                value = np.array([[b"", "é".encode()], [b"a", b"b" * 70_000]], np.object_)
            else:
                dtype = NUMPY_DTYPES[datatype]
                value = np.array([[0, 1], [1, 0]]).astype(dtype)
            found = client.infer(datatype, {"x": value})["y"]
            assert found.dtype == value.dtype
            assert found.tolist() == value.tolist()


def test_a_container_that_is_not_there_yet(site, client, path, tmp_path) -> None:
    code, details = failure(lambda: load(site, path))
    assert code is grpc.StatusCode.UNAVAILABLE
    assert str(path) in details
    with container(path):
        code, details = failure(lambda: load(site, path))
        assert (code, "serves no model yet" in details) == (grpc.StatusCode.UNAVAILABLE, True)
        assert failure(lambda: load(site, path, "e"))[0] is grpc.StatusCode.UNAVAILABLE


def test_which_model(site, client, path, tmp_path) -> None:
    two = {
        name: onnx_models.scale_folder(tmp_path / name, factor, name=name)
        for name, factor in (("a", 2), ("b", 3))
    }
    with container(path, **two):
        code, details = failure(lambda: load(site, path))
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert "there are a, b" in details
        assert load(site, path, instance="b@1").model == "b"
        deploy(site, path, "a")
        assert scored(client)
        code, details = failure(lambda: load(site, path, "b"))
        assert (code, "already loaded" in details) == (grpc.StatusCode.FAILED_PRECONDITION, True)


def test_a_server_that_does_not_list_its_models(site, client, path) -> None:
    """The least that serves: three methods, as servers that are not Triton have."""

    class Least:
        def model_ready(self, request, context):
            return oip.ModelReadyResponse(ready=request.name == "m")

        def model_metadata(self, request, context):
            spec = oip.ModelMetadataResponse.TensorMetadata(name="x", datatype="FP32", shape=[-1])
            return oip.ModelMetadataResponse(name=request.name, inputs=[spec], outputs=[spec])

        def model_infer(self, request, context):
            values = np.frombuffer(request.raw_input_contents[0], np.float32)
            answer = {"short": values[:-1], "wrong": values.astype(np.float64)}.get(mode[0], values)
            datatype = "FP64" if mode[0] == "wrong" else "FP32"
            output = oip.ModelInferResponse.InferOutputTensor(
                name="x", datatype=datatype, shape=[len(values)]
            )
            return oip.ModelInferResponse(
                outputs=[] if mode[0] == "nothing" else [output],
                raw_output_contents=[] if mode[0] == "nothing" else [answer.tobytes()],
            )

    mode = [""]
    with ThreadPoolExecutor(4) as pool:
        server = grpc.server(pool)
        methods = {
            name: grpc.unary_unary_rpc_method_handler(
                getattr(Least(), method), kind.FromString, lambda answer: answer.SerializeToString()
            )
            for name, method, kind in (
                ("ModelReady", "model_ready", oip.ModelReadyRequest),
                ("ModelMetadata", "model_metadata", oip.ModelMetadataRequest),
                ("ModelInfer", "model_infer", oip.ModelInferRequest),
            )
        }
        handler = grpc.method_handlers_generic_handler(INFERENCE.full_name, methods)
        server.add_generic_rpc_handlers((handler,))
        server.add_insecure_port(f"unix:{path}")
        server.start()
        try:
            deploy(site, path)
            value = {"x": np.arange(3, dtype=np.float32)}
            assert client.infer("served", value)["x"].tolist() == [0, 1, 2]
            for mode[0] in ("short", "wrong", "nothing"):
                with pytest.raises(ScoringError) as failed:
                    client.infer("served", value)
                assert failed.value.code is Code.INTERNAL
                assert str(path) in failed.value.message
        finally:
            server.stop(None).wait()


def test_wrong_requests(site, path, tmp_path) -> None:
    for request, message in (
        (pb.LoadRequest(instance="i", socket="s"), "socket 's' must be an absolute path"),
        (pb.LoadRequest(instance="i"), "either a directory or a socket"),
        (pb.LoadRequest(instance="i", socket="/s", directory="/d"), "either a directory or"),
    ):
        code, details = failure(lambda request=request: site.control.load(request, TIMEOUT))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert message in details


def test_a_container_that_dies_and_comes_back(site, client, path, tmp_path) -> None:
    folder = onnx_models.scale_folder(tmp_path / "m", 2)
    with container(path, inner=folder) as inner:
        deploy(site, path, "inner")
        assert scored(client)
        inner.process.kill()
        inner.process.wait(TIMEOUT)
        with pytest.raises(ScoringError) as failed:
            client.infer("served", X)
        assert failed.value.code is Code.UNAVAILABLE
        until(lambda: not healthy(site))
        assert not client.ready("served")
    with container(path, inner=folder):
        until(lambda: scored(client) and healthy(site))
        assert client.ready("served")


def test_a_crashing_container_leaves_hosted_models_untouched(site, client, path, tmp_path) -> None:
    hosted = onnx_models.scale_folder(tmp_path / "hosted", 3)
    with container(path, inner=onnx_models.scale_folder(tmp_path / "m", 2)) as inner:
        load(site, path)
        site.load("hosted", hosted)
        for instance in ("m@1", "hosted"):
            assert site.probe(instance).state == pb.InstanceStatus.READY
        site.switch({"served": [("m@1", 0, True)], "hosted": [("hosted", 0, True)]})
        assert scored(client)
        ended = threading.Event()
        answers: list[object] = []

        def ask() -> None:
            with ScoringClient(site.address, timeout=TIMEOUT) as own:
                while not ended.is_set():
                    try:
                        answers.append(own.infer("hosted", X)["total"].tolist())
                    except ScoringError as error:
                        answers.append(error)

        asking = threading.Thread(target=ask)
        asking.start()
        try:
            until(lambda: len(answers) > 20)
            os.kill(inner.process.pid, signal.SIGSEGV)
            inner.process.wait(TIMEOUT)
            crashed = len(answers)
            with pytest.raises(ScoringError) as caught:
                client.infer("served", X)
            until(lambda: len(answers) > crashed + 50)
        finally:
            ended.set()
            asking.join(TIMEOUT)
        assert caught.value.code is Code.UNAVAILABLE
        assert [answer for answer in answers if answer != [[12.0]]] == []


def test_another_model_at_the_same_socket_is_not_asked(site, client, path, tmp_path) -> None:
    with container(path, inner=onnx_models.scale_folder(tmp_path / "m", 2)):
        deploy(site, path, "inner")
    until(lambda: not healthy(site))
    other = onnx_models.identity_folder(tmp_path / "other", "FP32")
    with container(path, inner=other) as inner:
        asked = inner.site.status().instances[0].counts.successes
        with ScoringClient(f"unix:{path}") as direct:
            assert direct.ready("inner")
        # The connection comes back by itself, the model is not taken.
        until(lambda: "another signature" in failure(lambda: site.probe("m@1"))[1])
        assert not scored(client)
        assert inner.site.status().instances[0].counts.successes == asked


def stopped(inner) -> None:
    os.kill(inner.process.pid, signal.SIGSTOP)
    # Its threads go on, and answer, until the signal has reached one of them.
    os.waitid(os.P_PID, inner.process.pid, os.WSTOPPED | os.WNOWAIT)


def test_a_container_that_hangs_costs_no_more_than_the_deadline(
    site, client, path, tmp_path
) -> None:
    with container(path, inner=onnx_models.scale_folder(tmp_path / "m", 2)) as inner:
        deploy(site, path, "inner", timeout_ms=2000)
        assert scored(client)
        stopped(inner)
        begin = time.monotonic()
        with pytest.raises(ScoringError) as failed:
            client.infer("served", X)
        assert failed.value.code is Code.DEADLINE_EXCEEDED
        assert time.monotonic() - begin < TIMEOUT / 2
        until(lambda: not healthy(site))
        # Now known to be away: nobody waits for it.
        waited = []
        for _ in range(10):
            begin = time.monotonic()
            assert not scored(client)
            waited.append(time.monotonic() - begin)
        assert min(waited) < 0.25
        os.kill(inner.process.pid, signal.SIGCONT)
        until(lambda: scored(client) and healthy(site))


def test_unloading_ends_what_waits_for_a_hanging_container(site, client, path, tmp_path) -> None:
    with container(path, inner=onnx_models.scale_folder(tmp_path / "m", 2)) as inner:
        deploy(site, path, "inner")
        stopped(inner)
        failed: list[ScoringError] = []

        def ask() -> None:
            try:
                client.infer("served", X)
            except ScoringError as error:
                failed.append(error)

        asking = threading.Thread(target=ask)
        asking.start()
        until(lambda: site.server_instance("served").in_flight == 1)
        site.switch({})
        site.unload("m@1", drain_ms=50)
        asking.join(TIMEOUT)
        assert [error.code for error in failed] == [Code.UNAVAILABLE]
