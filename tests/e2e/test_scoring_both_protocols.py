"""Rules of the data plane as clients of both protocols meet them: the same over gRPC and HTTP."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from onnx import TensorProto, helper, numpy_helper
from tritonclient.utils import InferenceServerException

from ..bench import onnx_models
from ..bench.scoring_site import Site, serve
from .test_scoring_faults import BODY, INFER, SlowBackend, until

pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")

PROTOCOLS = pytest.mark.parametrize("triton", [triton_grpc, triton_http], ids=["grpc", "http"])
X = np.arange(4, dtype=np.float32).reshape(1, 4)


def optional_folder(folder: Path) -> Path:
    """y = factor * x, with a factor of 3 for who names none."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "factor"], ["y"])],
        "optional",
        [value("x", TensorProto.FLOAT, ["n", 4]), value("factor", TensorProto.FLOAT, [1])],
        [value("y", TensorProto.FLOAT, ["n", 4])],
        [numpy_helper.from_array(np.array([3], np.float32), "factor")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    specs = ([("x", "FP32", (-1, 4)), ("factor", "FP32", (1,))], [("y", "FP32", (-1, 4))])
    return onnx_models.write_folder(folder, model.SerializeToString(), *specs)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("both")
    with serve(folder / "s") as site:
        site.deploy(
            {
                "scale": onnx_models.scale_folder(folder / "scale", 2.0),
                "half": onnx_models.identity_folder(folder / "half", "FP16"),
                "optional": optional_folder(folder / "optional"),
            }
        )
        yield site


def address(site: Site, triton: Any) -> str:
    return site.address if triton is triton_grpc else site.http


def tensor(triton: Any, name: str, array: np.ndarray, datatype: str = "FP32") -> Any:
    made = triton.InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array)
    return made


@PROTOCOLS
def test_an_optional_input(site: Site, triton: Any) -> None:
    with triton.InferenceServerClient(address(site, triton)) as client:
        x = tensor(triton, "x", X)
        assert client.infer("optional", [x]).as_numpy("y").tolist() == (X * 3).tolist()
        both = [x, tensor(triton, "factor", np.array([5], np.float32))]
        assert client.infer("optional", both).as_numpy("y").tolist() == (X * 5).tolist()
        with pytest.raises(InferenceServerException, match="x"):
            client.infer("optional", both[1:])
        config = client.get_model_config(
            "optional", **({"as_json": True} if triton is triton_grpc else {})
        )
    inputs = config.get("config", config)["input"]
    assert [one.get("optional", False) for one in inputs] == [False, True]


@PROTOCOLS
def test_half_precision(site: Site, triton: Any) -> None:
    values = np.array([[0.5, -1.5, 65504.0, 0.0]], np.float32)
    with triton.InferenceServerClient(address(site, triton)) as client:
        # BF16 where the model takes FP32: the upper half of each.
        half = (values.view(np.uint32) & 0xFFFF0000).view(np.float32)
        result = client.infer("scale", [tensor(triton, "x", values, "BF16")])
        assert result.as_numpy("y").tolist() == (half * 2).tolist()
        pair = values[:, :2].astype(np.float16)
        result = client.infer("half", [tensor(triton, "x", pair, "FP16")])
        assert result.as_numpy("y").dtype == np.float16
        assert result.as_numpy("y").tolist() == pair.tolist()


@pytest.mark.parametrize("transport", ["grpcio", "http2"])
def test_reflection_is_off(tmp_path: Path, transport: str) -> None:
    with serve(tmp_path / "s", settings={"grpc_transport": transport}) as site:
        for version in ("v1", "v1alpha"):
            with grpc.insecure_channel(site.address) as channel:
                ask = channel.stream_stream(
                    f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo"
                )
                with pytest.raises(grpc.RpcError) as refused:
                    list(ask(iter([b"\x3a\x00"]), timeout=20))
                assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


def over_http(site: Site) -> tuple[int, str | None, str]:
    connection = http.client.HTTPConnection(site.http, timeout=30)
    connection.request("POST", INFER, BODY)
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    return response.status, response.getheader("Retry-After"), answer.get("error", "")


def over_grpc(site: Site) -> str:
    with triton_grpc.InferenceServerClient(site.address) as client:
        try:
            client.infer("e", [tensor(triton_grpc, "x", X)], client_timeout=30)
        except InferenceServerException as error:
            return str(error.status())
    return "OK"


@pytest.mark.parametrize("overflow", ["reject", "shed-oldest"])
def test_a_full_queue(tmp_path: Path, overflow: str) -> None:
    backend = SlowBackend()
    backend.go_on.set()
    batching = {"max": 1, "maxQueue": 2, "overflow": overflow}
    folder = onnx_models.scale_folder(tmp_path / "m", 2.0, batching=batching)
    with serve(tmp_path / "s", [backend]) as site, ThreadPoolExecutor(8) as clients:
        site.load("e", folder, instances=1)
        site.probe("e")
        site.switch({"e": [("e", 0, True)]})
        while backend.running.acquire(blocking=False):
            pass
        backend.go_on.clear()
        instance = site.server_instance("e")
        running = clients.submit(over_grpc, site)
        assert backend.running.acquire(timeout=20)
        waiting = []
        for way in (over_http, over_grpc):
            waiting.append(clients.submit(way, site))
            until(lambda: instance.pending == len(waiting))
        last = clients.submit(over_http, site)
        if overflow == "reject":
            turned_away = last.result(20)
        else:
            turned_away = waiting[0].result(20)
            until(lambda: instance.pending == 2)
        # Who is turned away is told when to come back.
        status, again, reason = turned_away
        assert (status, again) == (503, "1")
        assert reason
        backend.go_on.set()
        assert running.result(20) == "OK"
        assert waiting[1].result(20) == "OK"
        kept = waiting[0] if overflow == "reject" else last
        assert kept.result(20)[0] == 200


@PROTOCOLS
def test_a_swap_under_load_fails_no_request(tmp_path: Path, triton: Any) -> None:
    ended = threading.Event()
    answers: list[float | str] = []

    def ask() -> None:
        with triton.InferenceServerClient(address(site, triton)) as client:
            while not ended.is_set():
                try:
                    result = client.infer("e", [tensor(triton, "x", np.ones((1, 4), np.float32))])
                    answers.append(float(result.as_numpy("y")[0, 0]))
                except InferenceServerException as error:
                    answers.append(str(error))

    with serve(tmp_path / "s") as site, ThreadPoolExecutor(3) as clients:
        asking: list[Future[None]] = []
        try:
            for version in range(6):
                new, folder = str(version), tmp_path / str(version)
                site.load(new, onnx_models.scale_folder(folder, float(version), version=new))
                site.probe(new)
                site.switch({"e": [(new, 0, True)]})
                if version == 0:
                    asking = [clients.submit(ask) for _ in range(3)]
                else:
                    site.unload(str(version - 1))
                seen = len(answers)
                until(lambda seen=seen: len(answers) > seen + 20)
        finally:
            ended.set()
        for one in asking:
            one.result(20)
    assert set(answers) == {float(version) for version in range(6)}
