"""tritonclient, unmodified, against the scoring server: each rule of the protocol and its code."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from gatelet.agent.scoring.grpc_server import GrpcLimits
from gatelet.protos import open_inference_pb2 as oip
from gatelet.protos.inference import InferenceStub
from tritonclient.utils import InferenceServerException

from ..bench import onnx_models
from ..bench.scoring_site import TRANSPORTS, Site, serve

NUMPY_TYPES = {
    "BOOL": np.bool_,
    "UINT8": np.uint8,
    "UINT16": np.uint16,
    "UINT32": np.uint32,
    "UINT64": np.uint64,
    "INT8": np.int8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
}


@pytest.fixture(scope="module", params=TRANSPORTS)
def site(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("scoring")
    settings, limits = {"grpc_transport": request.param}, GrpcLimits(max_message_bytes=1_000_000)
    with serve(folder / "s", limits=limits, settings=settings) as site:
        models = {
            f"identity_{datatype}": onnx_models.identity_folder(folder / datatype, datatype)
            for datatype in onnx_models.DATATYPES
        }
        models["scale"] = onnx_models.scale_folder(
            folder / "scale", 2.0, name="scaler", version="3"
        )
        site.deploy(models)
        yield site


@pytest.fixture
def client(site: Site) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(site.address) as client:
        yield client


@pytest.fixture
def stub(site: Site) -> Iterator[InferenceStub]:
    with grpc.insecure_channel(site.address) as channel:
        yield InferenceStub(channel)


def tensor(name: str, array: np.ndarray, datatype: str) -> triton.InferInput:
    made = triton.InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array)
    return made


def scaled(client: triton.InferenceServerClient, rows: int = 1, **options: object) -> object:
    x = np.arange(rows * 4, dtype=np.float32).reshape(rows, 4)
    return client.infer("scale", [tensor("x", x, "FP32")], **options)


def test_health_and_metadata(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("scale")
    assert client.is_model_ready("scale", "3")
    assert not client.is_model_ready("scale", "4")
    assert not client.is_model_ready("nothing")
    assert client.get_server_metadata().name == "gatelet"
    metadata = client.get_model_metadata("scale", as_json=True)
    assert metadata["name"] == "scale"
    assert metadata["versions"] == ["3"]
    assert metadata["platform"] == "onnxruntime_onnx"
    assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": ["-1", "4"]}]
    assert [output["name"] for output in metadata["outputs"]] == ["y", "total"]


def test_kserves_properties_are_there(stub: InferenceStub) -> None:
    answer = stub.model_metadata(oip.ModelMetadataRequest(name="scale"), 5)
    assert dict(answer.properties) == {"model": "scaler"}


@pytest.mark.parametrize("datatype", sorted(NUMPY_TYPES))
@pytest.mark.parametrize("batch", [1, 5])
def test_every_datatype(client: triton.InferenceServerClient, datatype: str, batch: int) -> None:
    array = (np.arange(batch * 2).reshape(batch, 2) % 2).astype(NUMPY_TYPES[datatype])
    result = client.infer(f"identity_{datatype}", [tensor("x", array, datatype)]).as_numpy("y")
    assert result.dtype == array.dtype
    np.testing.assert_array_equal(result, array)


def test_bytes(client: triton.InferenceServerClient) -> None:
    array = np.array([[b"", b"a"], ["ä€".encode(), b"y" * 1000]], np.object_)
    result = client.infer("identity_BYTES", [tensor("x", array, "BYTES")]).as_numpy("y")
    assert result.tolist() == array.tolist()


@pytest.mark.parametrize("batch", [1, 2, 7, 16, 33, 64])
def test_batches(client: triton.InferenceServerClient, batch: int) -> None:
    result = scaled(client, batch)
    x = np.arange(batch * 4, dtype=np.float32).reshape(batch, 4)
    np.testing.assert_allclose(result.as_numpy("y"), 2 * x)
    np.testing.assert_allclose(result.as_numpy("total"), 2 * x.sum(1, keepdims=True))


def test_an_empty_batch(client: triton.InferenceServerClient) -> None:
    array = np.zeros((0, 2), np.float32)
    result = client.infer("identity_FP32", [tensor("x", array, "FP32")])
    assert result.as_numpy("y").shape == (0, 2)


def test_requested_outputs_version_and_id(client: triton.InferenceServerClient) -> None:
    result = scaled(
        client,
        model_version="3",
        request_id="id-7",
        outputs=[triton.InferRequestedOutput("total")],
    )
    response = result.get_response()
    assert (response.id, response.model_name, response.model_version) == ("id-7", "scale", "3")
    assert [output.name for output in response.outputs] == ["total"]
    assert result.as_numpy("y") is None


X = np.zeros((1, 4), np.float32)


@pytest.mark.parametrize(
    ("model", "version", "inputs", "outputs", "code", "message"),
    [
        ("nothing", "", [("x", X, "FP32")], [], "NOT_FOUND", "model 'nothing' is not deployed"),
        ("scale", "9", [("x", X, "FP32")], [], "NOT_FOUND", "no version '9'; deployed: '3'"),
        ("scale", "", [("q", X, "FP32")], [], "INVALID_ARGUMENT", "no input 'q', it has 'x'"),
        ("scale", "", [("x", X[:, :3], "FP32")], [], "INVALID_ARGUMENT", "[1, 3], expected [-1, 4"),
        ("scale", "", [("x", X[0], "FP32")], [], "INVALID_ARGUMENT", "[4], expected [-1, 4]"),
        (
            "scale",
            "",
            [("x", X.astype("f8"), "FP64")],
            [],
            "INVALID_ARGUMENT",
            "FP64, expected FP3",
        ),
        ("scale", "", [], [], "INVALID_ARGUMENT", "needs 1 inputs, found 0; missing: 'x'"),
        ("scale", "", [("x", X, "FP32")] * 2, [], "INVALID_ARGUMENT", "'x' is given twice"),
        ("scale", "", [("x", X, "FP32")], ["w"], "INVALID_ARGUMENT", "no output 'w', it has 'y'"),
        (
            "identity_BYTES",
            "",
            [("x", np.array([[b"a", b"\xff"]], np.object_), "BYTES")],
            [],
            "INVALID_ARGUMENT",
            "x: element 1 is not UTF-8",
        ),
        ("modèle-ü", "", [("x", X, "FP32")], [], "NOT_FOUND", "model 'modèle-ü' is not deployed"),
    ],
)
def test_requests_that_are_refused(
    client: triton.InferenceServerClient,
    model: str,
    version: str,
    inputs: list[tuple[str, np.ndarray, str]],
    outputs: list[str],
    code: str,
    message: str,
) -> None:
    with pytest.raises(InferenceServerException) as caught:
        client.infer(
            model,
            [tensor(*one) for one in inputs],
            model_version=version,
            outputs=[triton.InferRequestedOutput(name) for name in outputs],
        )
    assert caught.value.status() == f"StatusCode.{code}"
    assert message in caught.value.message()


def test_calls_that_are_not_served_are_unimplemented(client: triton.InferenceServerClient) -> None:
    with pytest.raises(InferenceServerException) as caught:
        client.register_cuda_shared_memory("gpu", b"AAAA", 0, 16)
    assert caught.value.status() == "StatusCode.UNIMPLEMENTED"
    assert "no CUDA" in caught.value.message()


def infer_request(*raw: bytes, shape: tuple[int, ...] = (1, 4)) -> oip.ModelInferRequest:
    request = oip.ModelInferRequest(model_name="scale", raw_input_contents=raw)
    request.inputs.add(name="x", datatype="FP32", shape=shape)
    return request


def refusal(stub: InferenceStub, request: oip.ModelInferRequest) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        stub.model_infer(request, 5)
    return caught.value.code(), caught.value.details()


def test_raw_contents_of_the_wrong_size(stub: InferenceStub) -> None:
    for size in (0, 15, 17, 12):
        code, message = refusal(stub, infer_request(bytes(size)))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert f"tensor 'x': raw contents have {size} bytes, expected 16" in message
    code, message = refusal(stub, infer_request(bytes(16), bytes(16)))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "2 raw contents for 1 tensors ('x')" in message


def test_typed_contents_are_answered_typed(stub: InferenceStub) -> None:
    request = infer_request()
    request.inputs[0].contents.fp32_contents.extend([1, 2, 3, 4])
    answer = stub.model_infer(request, 5)
    assert not answer.raw_output_contents
    assert list(answer.outputs[0].contents.fp32_contents) == [2, 4, 6, 8]
    assert list(answer.outputs[1].contents.fp32_contents) == [20]


@pytest.mark.parametrize(
    ("datatype", "field", "values"),
    [
        ("BOOL", "bool_contents", [True, False]),
        ("INT8", "int_contents", [-128, 127]),
        ("INT64", "int64_contents", [-(2**63), 2**63 - 1]),
        ("UINT16", "uint_contents", [0, 65535]),
        ("UINT64", "uint64_contents", [0, 2**64 - 1]),
        ("FP64", "fp64_contents", [1.5, -2.25]),
        ("BYTES", "bytes_contents", [b"a", "ü".encode()]),
    ],
)
def test_typed_contents_of_other_datatypes(
    stub: InferenceStub, datatype: str, field: str, values: list[object]
) -> None:
    request = oip.ModelInferRequest(model_name=f"identity_{datatype}")
    entry = request.inputs.add(name="x", datatype=datatype, shape=[1, 2])
    getattr(entry.contents, field).extend(values)
    answer = stub.model_infer(request, 5)
    assert list(getattr(answer.outputs[0].contents, field)) == values


def test_typed_contents_that_do_not_fit(stub: InferenceStub) -> None:
    request = infer_request()
    request.inputs[0].contents.fp64_contents.extend([1, 2, 3, 4])
    code, message = refusal(stub, request)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "contents are in fp64_contents, expected fp32_contents for FP32" in message

    request = infer_request(bytes(16))
    request.inputs[0].contents.fp32_contents.extend([1, 2, 3, 4])
    assert "typed contents although raw contents" in refusal(stub, request)[1]

    request = oip.ModelInferRequest(model_name="identity_FP16")
    entry = request.inputs.add(name="x", datatype="FP16", shape=[1, 2])
    entry.contents.fp32_contents.extend([1, 2])
    assert "expected raw contents for FP16" in refusal(stub, request)[1]


def test_a_message_over_the_limit_leaves_the_server_well(
    client: triton.InferenceServerClient,
) -> None:
    with pytest.raises(InferenceServerException) as caught:
        scaled(client, rows=100_000)
    assert caught.value.status() == "StatusCode.RESOURCE_EXHAUSTED"
    assert scaled(client).as_numpy("total").tolist() == [[12.0]]


async def test_the_asyncio_client(site: Site) -> None:
    import tritonclient.grpc.aio as triton_aio

    async with triton_aio.InferenceServerClient(site.address) as client:
        result = await client.infer("scale", [tensor("x", X + 1, "FP32")])
        assert result.as_numpy("total").tolist() == [[8.0]]
