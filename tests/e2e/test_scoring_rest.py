"""REST: tritonclient[http] unmodified, each rule of the protocol in JSON and binary, each code."""

from __future__ import annotations

import gzip
import http.client
import json
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.utils.shared_memory as shm
from gatelet.agent.scoring.http_types import HttpLimits
from tritonclient.utils import InferenceServerException

from ..bench import onnx_models
from ..bench.scoring_site import Site, serve

pytestmark = [
    # tritonclient leaves closing its sockets to the garbage collector.
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]

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
X = np.arange(4, dtype=np.float32).reshape(1, 4)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("rest")
    with serve(folder / "s", http_limits=HttpLimits(max_body_bytes=1_000_000)) as site:
        models = {
            f"identity_{datatype}": onnx_models.identity_folder(folder / datatype, datatype)
            for datatype in onnx_models.DATATYPES
        }
        models["scale"] = onnx_models.scale_folder(
            folder / "scale", 2.0, name="scaler", version="3", batching={"max": 16}
        )
        site.deploy(models)
        yield site


@pytest.fixture
def client(site: Site) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(site.http) as client:
        yield client


def ask(
    site: Site,
    method: str,
    path: str,
    body: bytes | str | None = None,
    headers: dict[str, str] | None = None,
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(site.http, timeout=20)
    try:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        named = {key.lower(): value for key, value in response.getheaders()}
        return response.status, named, response.read()
    finally:
        connection.close()


def infer(site: Site, model: str, message: Any) -> tuple[int, Any]:
    status, _, body = ask(site, "POST", f"/v2/models/{model}/infer", json.dumps(message))
    return status, json.loads(body)


def tensor(
    array: np.ndarray, datatype: str = "FP32", *, binary: bool = True, name: str = "x"
) -> triton.InferInput:
    made = triton.InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array, binary_data=binary)
    return made


def entry(data: Any, shape: list[int], datatype: str = "FP32", **more: Any) -> dict[str, Any]:
    return {"inputs": [{"name": "x", "shape": shape, "datatype": datatype, "data": data}], **more}


# --- tritonclient


def test_health_and_descriptions(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("scale")
    assert client.is_model_ready("scale", "3")
    assert not client.is_model_ready("scale", "4")
    assert not client.is_model_ready("nothing")
    metadata = client.get_server_metadata()
    assert metadata["name"] == "gatelet"
    assert "binary_tensor_data" in metadata["extensions"]
    model = client.get_model_metadata("scale", "3")
    assert model["versions"] == ["3"]
    assert model["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]
    config = client.get_model_config("scale")
    assert config["input"][0]["dims"] == [4]
    assert config["max_batch_size"] >= 1


@pytest.mark.parametrize("datatype", sorted(NUMPY_TYPES))
@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
def test_every_datatype(site: Site, datatype: str, binary: bool) -> None:
    array = (np.arange(6).reshape(3, 2) % 2).astype(NUMPY_TYPES[datatype])
    if datatype == "FP16" and not binary:
        # tritonclient sends FP16 in binary only.
        status, answer = infer(
            site, "identity_FP16", entry(array.tolist(), list(array.shape), "FP16")
        )
        assert (status, answer["outputs"][0]["data"]) == (200, array.ravel().tolist())
        return
    with triton.InferenceServerClient(site.http) as client:
        result = client.infer(
            f"identity_{datatype}",
            [tensor(array, datatype, binary=binary)],
            outputs=[triton.InferRequestedOutput("y", binary_data=binary)],
        ).as_numpy("y")
    assert result.dtype == array.dtype
    np.testing.assert_array_equal(result, array)


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
def test_bytes(client: triton.InferenceServerClient, binary: bool) -> None:
    array = np.array([["", "a"], ["ä€", "y" * 1000]], np.object_)
    result = client.infer(
        "identity_BYTES",
        [tensor(array, "BYTES", binary=binary)],
        outputs=[triton.InferRequestedOutput("y", binary_data=binary)],
    ).as_numpy("y")
    values = [v.decode() if isinstance(v, bytes) else v for v in result.ravel().tolist()]
    assert values == array.ravel().tolist()


@pytest.mark.parametrize("algorithm", ["gzip", "deflate", None])
def test_compression(client: triton.InferenceServerClient, algorithm: str | None) -> None:
    x = np.zeros((500, 4), np.float32)
    result = client.infer(
        "scale",
        [tensor(x)],
        request_compression_algorithm=algorithm,
        response_compression_algorithm=algorithm,
    )
    assert result.as_numpy("y").shape == (500, 4)


def test_requested_outputs_id_and_classes(client: triton.InferenceServerClient) -> None:
    result = client.infer(
        "scale",
        [tensor(X)],
        model_version="3",
        request_id="id-7",
        outputs=[triton.InferRequestedOutput("y", class_count=2)],
        priority=1,
        timeout=10_000_000,
    )
    response = result.get_response()
    assert (response["id"], response["model_name"], response["model_version"]) == (
        "id-7",
        "scale",
        "3",
    )
    assert [output["name"] for output in response["outputs"]] == ["y"]
    assert result.as_numpy("y").tolist() == [[b"6.000000:3", b"4.000000:2"]]


def test_async_infer(client: triton.InferenceServerClient) -> None:
    asked = [client.async_infer("scale", [tensor(X + n)]) for n in range(5)]
    for n, one in enumerate(asked):
        np.testing.assert_array_equal(one.get_result().as_numpy("y"), 2 * (X + n))


async def test_the_asyncio_client(site: Site) -> None:
    import tritonclient.http.aio as triton_aio

    async with triton_aio.InferenceServerClient(site.http) as client:
        assert await client.is_server_ready()
        result = await client.infer("scale", [tensor(X + 1)])
        assert result.as_numpy("total").tolist() == [[20.0]]
        with pytest.raises(InferenceServerException, match="not deployed"):
            await client.infer("nothing", [tensor(X)])


def test_shared_memory(client: triton.InferenceServerClient) -> None:
    given = shm.create_shared_memory_region("in", "/gatelet_rest_in", 64)
    taken = shm.create_shared_memory_region("out", "/gatelet_rest_out", 64)
    try:
        shm.set_shared_memory_region(given, [X])
        client.register_system_shared_memory("in", "/gatelet_rest_in", 64)
        client.register_system_shared_memory("out", "/gatelet_rest_out", 64)
        names = {region["name"] for region in client.get_system_shared_memory_status()}
        assert names == {"in", "out"}
        x = triton.InferInput("x", [1, 4], "FP32")
        x.set_shared_memory("in", 16)
        y = triton.InferRequestedOutput("y")
        y.set_shared_memory("out", 16, offset=16)
        answer = client.infer("scale", [x], outputs=[y]).get_response()
        assert answer["outputs"][0]["parameters"]["shared_memory_byte_size"] == 16
        whole = shm.get_contents_as_numpy(taken, np.float32, [8])
        np.testing.assert_array_equal(whole[4:].reshape(1, 4), 2 * X)
        client.unregister_system_shared_memory("in")
        with pytest.raises(InferenceServerException, match="'in' is not registered") as caught:
            client.infer("scale", [x])
        assert caught.value.status() == "404"
        with pytest.raises(InferenceServerException, match="there is no object"):
            client.register_system_shared_memory("more", "/gatelet_rest_none", 64)
    finally:
        client.unregister_system_shared_memory()
        shm.destroy_shared_memory_region(given)
        shm.destroy_shared_memory_region(taken)
    assert client.get_system_shared_memory_status() == []


def test_repository_statistics_and_settings(client: triton.InferenceServerClient) -> None:
    index = client.get_model_repository_index()
    assert {"name": "scale", "version": "3", "state": "READY", "reason": ""} in index
    client.load_model("scale")
    with pytest.raises(InferenceServerException) as caught:
        client.load_model("nothing", config="{}")
    assert caught.value.status() == "503"
    with pytest.raises(InferenceServerException, match="the deployment names it"):
        client.unload_model("scale")
    before = client.get_inference_statistics("scale", "3")["model_stats"][0]
    client.infer("scale", [tensor(np.zeros((5, 4), np.float32))])
    after = client.get_inference_statistics("scale", "3")["model_stats"][0]
    assert after["inference_count"] - before["inference_count"] == 5
    assert len(client.get_inference_statistics()["model_stats"]) == len(index)
    assert client.get_trace_settings()["trace_level"] == ["OFF"]
    assert client.get_log_settings()["log_info"] is True
    client.update_log_settings({"log_verbose_level": 0})
    with pytest.raises(InferenceServerException) as caught:
        client.update_trace_settings(settings={"trace_level": ["TIMESTAMPS"]})
    assert caught.value.status() == "501"
    with pytest.raises(InferenceServerException) as caught:
        client.get_cuda_shared_memory_status()
    assert caught.value.status() == "501"


# --- the protocol by hand


def test_flat_and_nested_data(site: Site) -> None:
    for data in ([1, 2, 3, 4], [[1, 2, 3, 4]], [[1.0, 2, 3.0, 4e0]]):
        status, answer = infer(site, "scale", entry(data, [1, 4], id="a"))
        assert status == 200
        assert answer == {
            "model_name": "scale",
            "model_version": "3",
            "id": "a",
            "outputs": [
                {"name": "y", "datatype": "FP32", "shape": [1, 4], "data": [2.0, 4.0, 6.0, 8.0]},
                {"name": "total", "datatype": "FP32", "shape": [1, 1], "data": [20.0]},
            ],
        }


def test_numbers_that_are_not_finite_become_null(site: Site) -> None:
    status, answer = infer(site, "scale", entry([1e300, 0, 0, 0], [1, 4]))
    assert status == 200
    assert answer["outputs"][0]["data"] == [None, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("message", "status", "text"),
    [
        (entry([1, 2, 3], [1, 3]), 400, "shape [1, 3], expected [-1, 4]"),
        (entry([1, 2, 3], [1, 4]), 400, "data has shape [3], expected [1, 4]"),
        (entry([[1, 2], [3, 4]], [1, 4]), 400, "data has shape [2, 2], expected [1, 4]"),
        (entry([[1, 2, 3], [4]], [1, 4]), 400, "rows differ in length"),
        (entry(["a", 2, 3, 4], [1, 4]), 400, "Expected `float`, got `str`"),
        (entry([1, 2, 3, 4], [1, 4], "FP64"), 400, "datatype FP64, expected FP32"),
        (entry([1, 2, 3, 4], [1, 4], "FP33"), 400, "unknown datatype 'FP33'"),
        (entry([1, 2, 3, 4], [-1, 4]), 400, "must not have negative sizes"),
        (entry([1, 2, 3, 4], [1] * 40), 400, "at most 32"),
        ({"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32"}]}, 400, "has no data"),
        ({"inputs": []}, 400, "missing: 'x'"),
        ({}, 400, "missing required field `inputs`"),
        ([], 400, "Expected `object`"),
        (entry([1, 2, 3, 4], [1, 4], outputs=[{"name": "w"}]), 400, "no output 'w'"),
        (entry([1, 2, 3, 4], [1, 4], parameters={"priority": -1}), 400, "whole number"),
        (entry([1, 2, 3, 4], [1, 4], parameters={"priority": "x"}), 400, "whole number"),
        (entry([[[[[[1]]]]]], [1, 4]), 400, "data"),
    ],
)
def test_requests_that_are_refused(site: Site, message: Any, status: int, text: str) -> None:
    code, answer = infer(site, "scale", message)
    assert (code, text in answer["error"]) == (status, True), answer


def test_depth_and_broken_json(site: Site) -> None:
    deep = b'{"inputs": ' + b"[" * 200_000
    status, _, body = ask(site, "POST", "/v2/models/scale/infer", deep)
    assert status == 400
    assert b"error" in body
    deep = b'{"inputs": [], "custom": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    status, _, body = ask(site, "POST", "/v2/models/scale/infer", deep)
    assert status == 400
    for broken in (b"", b"{", b"\xff\xfe", b'{"inputs": [NaN]}'):
        assert ask(site, "POST", "/v2/models/scale/infer", broken)[0] == 400


@pytest.mark.parametrize(
    ("datatype", "value"),
    [("INT8", 128), ("UINT8", -1), ("INT64", 2**63), ("UINT64", 2**64), ("INT32", 1.5)],
)
def test_integers_do_not_wrap(site: Site, datatype: str, value: object) -> None:
    status, _ = infer(site, f"identity_{datatype}", entry([0, value], [1, 2], datatype))
    assert status == 400


def test_codes_of_models_and_paths(site: Site) -> None:
    good = entry([1, 2, 3, 4], [1, 4])
    assert infer(site, "nothing", good)[0] == 404
    assert infer(site, "scale/versions/9", good)[0] == 404
    assert infer(site, "scale/versions/3", good)[0] == 200
    assert ask(site, "GET", "/v2/models/nothing/ready")[0] == 404
    assert ask(site, "GET", "/v2/nosuch")[0] == 404
    status, headers, _ = ask(site, "GET", "/v2/models/scale/infer")
    assert (status, headers["allow"]) == (405, "POST")
    assert ask(site, "HEAD", "/v2/health/live")[::2] == (200, b"")
    assert ask(site, "GET", "/v2/")[0] == 200
    assert ask(site, "GET", "/v2/models/sc%61le")[0] == 200


def binary_request(*tensors: bytes, sizes: list[int] | None = None, **more: Any) -> Any:
    sizes = sizes or [len(one) for one in tensors]
    inputs = [
        {
            "name": "x",
            "shape": [1, 4],
            "datatype": "FP32",
            "parameters": {"binary_data_size": size},
        }
        for size in sizes
    ]
    head = json.dumps({"inputs": inputs, **more}).encode()
    return head + b"".join(tensors), {"Inference-Header-Content-Length": str(len(head))}


def test_binary_data(site: Site) -> None:
    path = "/v2/models/scale/infer"
    # An odd length of the JSON leaves the floats where no processor likes them.
    for padding in range(4):
        body, headers = binary_request(X.tobytes(), id="i" * (padding + 1))
        status, _, answer = ask(site, "POST", path, body, headers)
        assert status == 200
        assert json.loads(answer)["outputs"][0]["data"] == [0.0, 2.0, 4.0, 6.0]
    outputs = [{"name": "total"}, {"name": "y", "parameters": {"binary_data": True}}]
    body, headers = binary_request(X.tobytes(), outputs=outputs)
    status, got, answer = ask(site, "POST", path, body, headers)
    length = int(got["inference-header-content-length"])
    assert got["content-type"] == "application/octet-stream"
    assert json.loads(answer[:length])["outputs"][0]["data"] == [12.0]
    assert np.frombuffer(answer[length:], "<f4").tolist() == [0.0, 2.0, 4.0, 6.0]


@pytest.mark.parametrize(
    ("sizes", "length", "text"),
    [
        ([17], None, "binary_data_size is 17"),
        ([-1], None, "binary_data_size is -1"),
        ([8], None, "raw contents have 8 bytes, expected 16"),
        ([12], None, "raw contents have 12 bytes"),
        ([16], "1", "no JSON"),
        ([16], "100000", "the body has"),
        ([16], "x", "must be a number"),
        ([16], "-1", "must be a number"),
    ],
)
def test_binary_data_that_does_not_fit(
    site: Site, sizes: list[int], length: str | None, text: str
) -> None:
    body, headers = binary_request(X.tobytes(), sizes=sizes)
    if length is not None:
        headers = {"Inference-Header-Content-Length": length}
    status, _, answer = ask(site, "POST", "/v2/models/scale/infer", body, headers)
    assert (status, text in answer.decode()) == (400, True), answer


def test_surplus_binary_data(site: Site) -> None:
    body, headers = binary_request(X.tobytes())
    status, _, answer = ask(site, "POST", "/v2/models/scale/infer", body + b"12", headers)
    assert (status, b"2 bytes follow the last tensor" in answer) == (400, True)


def test_the_body_may_be_the_only_tensor(site: Site) -> None:
    headers = {"Inference-Header-Content-Length": "0"}
    path = "/v2/models/scale/infer"
    status, got, answer = ask(site, "POST", path, np.vstack([X, X]).tobytes(), headers)
    assert status == 200
    length = int(got["inference-header-content-length"])
    assert json.loads(answer[:length])["outputs"][0]["shape"] == [2, 4]
    assert ask(site, "POST", path, b"123", headers)[0] == 400


def test_text_that_is_none_needs_binary(site: Site) -> None:
    array = np.array([[b"\xff", b"a"]], np.object_)
    with triton.InferenceServerClient(site.http) as client:
        with pytest.raises(InferenceServerException) as caught:
            client.infer("identity_BYTES", [tensor(array, "BYTES")])
        # onnxruntime's own strings are text.
        assert caught.value.status() == "400"


def test_packed_bodies(site: Site) -> None:
    body = json.dumps(entry([1, 2, 3, 4], [1, 4])).encode()
    path = "/v2/models/scale/infer"
    for encoding, packed in (("gzip", gzip.compress(body)), ("deflate", zlib.compress(body))):
        headers = {"Content-Encoding": encoding}
        assert ask(site, "POST", path, packed, headers)[0] == 200
        assert ask(site, "POST", path, packed[:-9], headers)[0] == 400
        assert ask(site, "POST", path, b"no" + packed, headers)[0] == 400
    assert ask(site, "POST", path, body, {"Content-Encoding": "br"})[0] == 415
    bomb = gzip.compress(bytes(50_000_000))
    assert ask(site, "POST", path, bomb, {"Content-Encoding": "gzip"})[0] == 413


def test_large_answers_are_packed_for_who_takes_them(site: Site) -> None:
    body = json.dumps(entry([0.0] * 4000, [1000, 4]))
    path = "/v2/models/scale/infer"
    for accept, expected in (
        ("gzip", "gzip"),
        ("deflate, gzip;q=0.5", "deflate"),
        ("br, gzip;q=0", None),
        ("identity", None),
    ):
        status, headers, answer = ask(site, "POST", path, body, {"Accept-Encoding": accept})
        assert (status, headers.get("content-encoding")) == (200, expected)
        if expected == "gzip":
            answer = gzip.decompress(answer)
        elif expected == "deflate":
            answer = zlib.decompress(answer)
        assert len(json.loads(answer)["outputs"][0]["data"]) == 4000


def test_a_body_over_the_limit(site: Site) -> None:
    path = "/v2/models/scale/infer"
    status, headers, answer = ask(site, "POST", path, bytes(1_000_001))
    assert (status, b"exceeds 1000000 bytes" in answer) == (413, True)
    assert headers["connection"] == "close"
    chunks = iter([bytes(100_000)] * 11)
    connection = http.client.HTTPConnection(site.http, timeout=20)
    connection.request("POST", path, chunks, {"Transfer-Encoding": "chunked"}, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()
    assert infer(site, "scale", entry([1, 2, 3, 4], [1, 4]))[0] == 200
