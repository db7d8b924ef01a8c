"""The same models and requests on MLServer and here: the same answers.

MLServer lives in an environment of its own, kept between runs; making it takes a minute, so that
happens in CI only.
"""

from __future__ import annotations

import http.client
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from gatelet.protos import open_inference_pb2 as oip
from gatelet.protos.inference import InferenceStub
from required import in_ci, unavailable

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import onnx_models
import scoring_servers
from scoring_servers import NotAvailable, Running

SHAPES = {"mlp": (64,), "cnn": (1, 28, 28)}
BUILD = {"mlp": onnx_models.mlp, "cnn": onnx_models.cnn}


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, Running]]:
    ready = (scoring_servers.VENVS / "mlserver" / "complete").exists()
    if not ready and not in_ci():
        pytest.skip("no environment with MLServer; CI makes one, and so does bench_scoring.py")
    folder = tmp_path_factory.mktemp("servers")
    models = {
        name: onnx_models.write_folder(
            folder / name,
            BUILD[name](),
            [("x", "FP32", (-1, *shape))],
            [("y", "FP32", (-1, 10))],
            name=name,
        )
        for name, shape in SHAPES.items()
    }
    checks = {name: grpc_request(name, np.zeros((1, *SHAPES[name]), np.float32)) for name in models}
    for name in ("a", "b"):
        (folder / name).mkdir()
    try:
        with (
            scoring_servers.mlserver(folder / "a", models, checks) as other,
            scoring_servers.gatelet(folder / "b", models, checks) as ours,
        ):
            yield other, ours
    except NotAvailable as error:
        unavailable(f"MLServer: {error}")


def grpc_request(model: str, x: Any, *, raw: bool = True) -> oip.ModelInferRequest:
    request = oip.ModelInferRequest(model_name=model, id="7")
    entry = request.inputs.add(name="x", datatype="FP32", shape=x.shape)
    if raw:
        request.raw_input_contents.append(x.tobytes())
    else:
        entry.contents.fp32_contents.extend(x.ravel().tolist())
    return request


def over_grpc(address: str, model: str, x: Any, *, raw: bool) -> tuple[str, Any]:
    with grpc.insecure_channel(address) as channel:
        try:
            answer = InferenceStub(channel).model_infer(grpc_request(model, x, raw=raw), 20)
        except grpc.RpcError as error:
            return error.code().name, None
    (output,) = answer.outputs
    if answer.raw_output_contents:
        data = np.frombuffer(answer.raw_output_contents[0], "<f4")
    else:
        data = np.array(output.contents.fp32_contents, np.float32)
    return f"{answer.id} {output.name} {output.datatype}", data.reshape(list(output.shape))


def over_rest(address: str, model: str, x: Any) -> tuple[str, Any]:
    entry = {"name": "x", "datatype": "FP32", "shape": x.shape, "data": x.ravel().tolist()}
    connection = http.client.HTTPConnection(address, timeout=20)
    body = json.dumps({"id": "7", "inputs": [entry]})
    headers = {"Content-Type": "application/json"}
    connection.request("POST", f"/v2/models/{model}/infer", body, headers)
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    if response.status != 200:
        return str(response.status), None
    (output,) = answer["outputs"]
    data = np.array(output["data"], np.float32).reshape(output["shape"])
    return f"{answer['id']} {output['name']} {output['datatype']}", data


@pytest.mark.timeout(500)
@pytest.mark.parametrize("model", sorted(SHAPES))
def test_the_same_answers(servers: tuple[Running, Running], model: str) -> None:
    other, ours = servers
    random = np.random.default_rng(5)
    name = ours.ways["singly"].format(model)
    for rows in (1, 2, 7, 32):
        x = random.normal(size=(rows, *SHAPES[model])).astype(np.float32)
        told, expected = over_grpc(other.grpc_address, model, x, raw=False)
        assert told == "7 y FP32"
        for got_told, got in (
            over_grpc(ours.grpc_address, name, x, raw=True),
            over_grpc(ours.grpc_address, name, x, raw=False),
            over_rest(ours.http_address, name, x),
            over_rest(other.http_address, model, x),
        ):
            assert got_told == told
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_the_same_codes(servers: tuple[Running, Running]) -> None:
    other, ours = servers
    x = np.zeros((1, 64), np.float32)
    for server in servers:
        assert over_grpc(server.grpc_address, "nothing", x, raw=True)[0] == "NOT_FOUND"
        assert over_rest(server.http_address, "nothing", x)[0] == "404"
    for path, status in (("/v2/health/live", 200), ("/v2/health/ready", 200), ("/v2", 200)):
        for server in servers:
            connection = http.client.HTTPConnection(server.http_address, timeout=20)
            connection.request("GET", path)
            assert connection.getresponse().status == status
            connection.close()
    del other, ours
