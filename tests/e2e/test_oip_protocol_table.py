"""Each rule of the Open Inference Protocol in a table, asked in all four forms: gRPC with raw and
typed contents, REST with binary and JSON tensors. All must answer alike.

Sources: KServe, Open Inference Protocol v2 (gRPC and REST); Triton's binary tensor data,
classification, parameters and schedule policy extensions.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
import pytest
from gatelet.agent.scoring.tensor_codec import TYPED_FIELDS, encode_raw
from gatelet.agent.scoring.types import Tensor
from gatelet.protos import health_pb2 as health
from gatelet.protos import open_inference_pb2 as oip
from gatelet.protos.inference import InferenceStub
from gatelet.protos.services import HealthStub

from ..bench import onnx_models
from ..bench.scoring_site import TRANSPORTS, Site, serve

PAIRS = {
    "OK": 200,
    "INVALID_ARGUMENT": 400,
    "NOT_FOUND": 404,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
    "UNIMPLEMENTED": 501,
}
"""Codes of gRPC and HTTP for one and the same thing."""

X = np.arange(8, dtype=np.float32).reshape(2, 4)
ROW = X[:1]


@dataclass(frozen=True)
class Input:
    array: Any
    name: str = "x"
    datatype: str = "FP32"
    shape: tuple[int, ...] | None = None
    """None: the array's."""

    @property
    def told_shape(self) -> list[int]:
        return list(self.array.shape if self.shape is None else self.shape)

    @property
    def raw(self) -> bytes:
        return encode_raw(Tensor(self.name, self.datatype, self.array))


@dataclass(frozen=True)
class Case:
    rule: str
    code: str = "OK"
    model: str = "scale"
    version: str = ""
    inputs: tuple[Input, ...] = (Input(ROW),)
    outputs: tuple[str, ...] = ()
    classes: int = 0
    parameters: dict[str, int | str] = field(default_factory=dict)
    id: str = ""
    text: str = ""
    """Part of the message of an error."""
    answer: dict[str, Any] = field(default_factory=dict)
    """Outputs by name."""


def identity(datatype: str, array: Any) -> Case:
    inputs = (Input(array, datatype=datatype),)
    return Case(datatype, model=f"id_{datatype}", inputs=inputs, answer={"y": array})


def texts(*values: bytes) -> Any:
    made = np.empty((1, len(values)), np.object_)
    made[0, :] = values
    return made


LIMITS = [
    identity(name, np.array([[np.iinfo(dtype).min, np.iinfo(dtype).max]], dtype))
    for name, dtype in (
        ("INT8", np.int8),
        ("INT16", np.int16),
        ("INT32", np.int32),
        ("INT64", np.int64),
        ("UINT8", np.uint8),
        ("UINT16", np.uint16),
        ("UINT32", np.uint32),
        ("UINT64", np.uint64),
    )
]
CASES = [
    *LIMITS,
    identity("BOOL", np.array([[True, False]])),
    identity("FP32", np.array([[1.5, -np.float32(1e-45)]], np.float32)),
    identity("FP64", np.array([[1e300, -0.1]], np.float64)),
    identity("BYTES", texts(b"", 'ä"\\\n€'.encode())),
    Case("all outputs in order", answer={"y": 2 * ROW, "total": [[12.0]]}),
    Case("only requested outputs", outputs=("total",), answer={"total": [[12.0]]}),
    Case("outputs in the order asked", outputs=("total", "y"), answer={"total": [[12.0]]}),
    Case("a batch", inputs=(Input(X),), answer={"total": [[12.0], [44.0]]}),
    Case("an empty batch", inputs=(Input(X[:0]),), answer={"y": X[:0]}),
    Case("the id comes back", id="an id: ä", answer={"y": 2 * ROW}),
    Case("a version", version="3", answer={"y": 2 * ROW}),
    Case("a priority", parameters={"priority": 1}),
    Case("a priority as text", parameters={"priority": "1"}),
    Case("a timeout in microseconds", parameters={"timeout": 20_000_000}),
    Case("other parameters are ignored", parameters={"sequence_id": 7, "custom": "x"}),
    Case(
        "classification",
        outputs=("y",),
        classes=2,
        answer={"y": texts(b"6.000000:3", b"4.000000:2")},
    ),
    Case("unknown model", "NOT_FOUND", model="nothing", text="model 'nothing' is not deployed"),
    Case("unknown version", "NOT_FOUND", version="9", text="no version '9'; deployed: '3'"),
    Case("unknown input", "INVALID_ARGUMENT", inputs=(Input(ROW, "q"),), text="no input 'q'"),
    Case("missing input", "INVALID_ARGUMENT", inputs=(), text="missing: 'x'"),
    Case("input twice", "INVALID_ARGUMENT", inputs=(Input(ROW), Input(ROW)), text="given twice"),
    Case("wrong size", "INVALID_ARGUMENT", inputs=(Input(ROW[:, :3]),), text="expected [-1, 4]"),
    Case("wrong rank", "INVALID_ARGUMENT", inputs=(Input(ROW[0]),), text="expected [-1, 4]"),
    Case(
        "wrong datatype",
        "INVALID_ARGUMENT",
        inputs=(Input(ROW.astype("f8"), datatype="FP64"),),
        text="datatype FP64, expected FP32",
    ),
    Case(
        "unknown datatype",
        "INVALID_ARGUMENT",
        inputs=(Input(ROW, datatype="FP31"),),
        text="unknown datatype 'FP31'",
    ),
    Case(
        "negative size",
        "INVALID_ARGUMENT",
        inputs=(Input(ROW, shape=(-1, 4)),),
        text="must not have negative sizes",
    ),
    Case("fewer data than the shape", "INVALID_ARGUMENT", inputs=(Input(ROW, shape=(2, 4)),)),
    Case("more data than the shape", "INVALID_ARGUMENT", inputs=(Input(X, shape=(1, 4)),)),
    Case("unknown output", "INVALID_ARGUMENT", outputs=("w",), text="no output 'w'"),
    Case("output twice", "INVALID_ARGUMENT", outputs=("y", "y"), text="requested twice"),
    Case(
        "classes of text",
        "INVALID_ARGUMENT",
        model="id_BYTES",
        inputs=(Input(texts(b"a", b"b"), datatype="BYTES"),),
        outputs=("y",),
        classes=1,
    ),
    Case("a timeout that passed", "DEADLINE_EXCEEDED", parameters={"timeout": 1}),
    Case("a negative timeout", "INVALID_ARGUMENT", parameters={"timeout": -1}, text="'timeout'"),
    Case("no number", "INVALID_ARGUMENT", parameters={"priority": "x"}, text="'priority'"),
]


@dataclass(frozen=True)
class Answered:
    code: str
    text: str = ""
    id: str = ""
    version: str = ""
    outputs: tuple[tuple[str, str, tuple[int, ...], tuple[Any, ...]], ...] = ()


@pytest.fixture(scope="module", params=TRANSPORTS)
def site(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("oip")
    with serve(folder / "s", settings={"grpc_transport": request.param}) as site:
        models = {
            f"id_{name}": onnx_models.identity_folder(folder / name, name)
            for name in onnx_models.DATATYPES
        }
        models["scale"] = onnx_models.scale_folder(folder / "scale", 2.0, version="3")
        site.deploy(models)
        yield site


def values(data: Any) -> tuple[Any, ...]:
    """Flat Python values of an array or of a list that is flat already."""
    flat = data if isinstance(data, list) else data.ravel().tolist()
    return tuple(one.decode() if isinstance(one, bytes) else one for one in flat)


def over_grpc(site: Site, case: Case, *, raw: bool) -> Answered:
    request = oip.ModelInferRequest(model_name=case.model, model_version=case.version, id=case.id)
    for key, value in case.parameters.items():
        if isinstance(value, int):
            request.parameters[key].int64_param = value
        else:
            request.parameters[key].string_param = value
    for one in case.inputs:
        entry = request.inputs.add(name=one.name, datatype=one.datatype, shape=one.told_shape)
        if raw:
            request.raw_input_contents.append(one.raw)
        else:
            contents = getattr(entry.contents, TYPED_FIELDS.get(one.datatype, "fp32_contents"))
            contents.extend(one.array.ravel().tolist())
    for name in case.outputs:
        output = request.outputs.add(name=name)
        if case.classes:
            output.parameters["classification"].int64_param = case.classes
    with grpc.insecure_channel(site.address) as channel:
        try:
            answer = InferenceStub(channel).model_infer(request, 30)
        except grpc.RpcError as error:
            return Answered(error.code().name, error.details())
    assert bool(answer.raw_output_contents) is (raw and bool(case.inputs))
    outputs = []
    for index, output in enumerate(answer.outputs):
        shape = tuple(output.shape)
        if raw:
            data = unpacked(output.datatype, answer.raw_output_contents[index])
        else:
            data = list(getattr(output.contents, TYPED_FIELDS[output.datatype]))
        outputs.append((output.name, output.datatype, shape, values(data)))
    return Answered("OK", "", answer.id, answer.model_version, tuple(outputs))


def unpacked(datatype: str, raw: bytes) -> list[Any]:
    if datatype != "BYTES":
        dtype = {"BOOL": "?", "FP32": "<f4", "FP64": "<f8"}.get(datatype)
        dtype = dtype or f"<{datatype[0].lower()}{int(datatype.lstrip('UINT')) // 8}"
        return list(np.frombuffer(raw, dtype).tolist())
    made = []
    while raw:
        end = 4 + int.from_bytes(raw[:4], "little")
        made.append(raw[4:end])
        raw = raw[end:]
    return made


def over_rest(site: Site, case: Case, *, binary: bool) -> Answered:
    message: dict[str, Any] = {"parameters": {**case.parameters, "binary_data_output": binary}}
    if case.id:
        message["id"] = case.id
    tails = []
    message["inputs"] = []
    for one in case.inputs:
        entry: dict[str, Any] = {
            "name": one.name,
            "datatype": one.datatype,
            "shape": one.told_shape,
        }
        if binary:
            tails.append(one.raw)
            entry["parameters"] = {"binary_data_size": len(one.raw)}
        else:
            entry["data"] = list(values(one.array))
        message["inputs"].append(entry)
    if case.outputs:
        wanted = {"classification": case.classes} if case.classes else {}
        message["outputs"] = [{"name": name, "parameters": wanted} for name in case.outputs]
    text = json.dumps(message).encode()
    version = f"/versions/{case.version}" if case.version else ""
    headers = {"Inference-Header-Content-Length": str(len(text))} if binary else {}
    connection = http.client.HTTPConnection(site.http, timeout=30)
    connection.request(
        "POST", f"/v2/models/{case.model}{version}/infer", text + b"".join(tails), headers
    )
    response = connection.getresponse()
    body = response.read()
    length = response.headers.get("Inference-Header-Content-Length")
    connection.close()
    code = next(name for name, status in PAIRS.items() if status == response.status)
    if code != "OK":
        return Answered(code, json.loads(body)["error"])
    assert (length is not None) is binary
    answer = json.loads(body[: int(length)] if length else body)
    rest = body[int(length) :] if length else b""
    outputs = []
    for output in answer["outputs"]:
        if binary:
            size = output["parameters"]["binary_data_size"]
            data, rest = unpacked(output["datatype"], rest[:size]), rest[size:]
        else:
            data = output["data"]
        shape = tuple(output["shape"])
        outputs.append((output["name"], output["datatype"], shape, values(data)))
    assert rest == b""
    return Answered("OK", "", answer.get("id", ""), answer["model_version"], tuple(outputs))


@pytest.mark.parametrize("case", CASES, ids=[case.rule for case in CASES])
def test_every_form_answers_alike(site: Site, case: Case) -> None:
    got = {
        "raw": over_grpc(site, case, raw=True),
        "typed": over_grpc(site, case, raw=False),
        "binary": over_rest(site, case, binary=True),
        "json": over_rest(site, case, binary=False),
    }
    for form, answer in got.items():
        assert answer.code == case.code, (form, answer)
        assert case.text in answer.text, (form, answer)
        assert (answer.id, answer.outputs) == (
            case.id if case.code == "OK" else "",
            got["raw"].outputs,
        ), form
    outputs = {name: (shape, data) for name, _, shape, data in got["raw"].outputs}
    for name, expected in case.answer.items():
        array = np.asarray(expected)
        assert outputs[name] == (array.shape, values(array))
    if case.outputs and case.code == "OK":
        assert tuple(outputs) == case.outputs


@dataclass(frozen=True)
class Call:
    """A call without tensors, over gRPC and REST."""

    rule: str
    method: str
    request: Any
    path: str
    code: str = "OK"
    http: str = "GET"
    body: Any = None


CALLS = [
    Call("live", "server_live", oip.ServerLiveRequest(), "/v2/health/live"),
    Call("ready", "server_ready", oip.ServerReadyRequest(), "/v2/health/ready"),
    Call("metadata", "server_metadata", oip.ServerMetadataRequest(), "/v2"),
    Call("model", "model_metadata", oip.ModelMetadataRequest(name="scale"), "/v2/models/scale"),
    Call(
        "model's version",
        "model_metadata",
        oip.ModelMetadataRequest(name="scale", version="3"),
        "/v2/models/scale/versions/3",
    ),
    Call(
        "unknown model",
        "model_metadata",
        oip.ModelMetadataRequest(name="no"),
        "/v2/models/no",
        "NOT_FOUND",
    ),
    Call(
        "unknown version",
        "model_metadata",
        oip.ModelMetadataRequest(name="scale", version="9"),
        "/v2/models/scale/versions/9",
        "NOT_FOUND",
    ),
    Call("config", "model_config", oip.ModelConfigRequest(name="scale"), "/v2/models/scale/config"),
    Call(
        "config of none",
        "model_config",
        oip.ModelConfigRequest(name="no"),
        "/v2/models/no/config",
        "NOT_FOUND",
    ),
    Call("statistics", "model_statistics", oip.ModelStatisticsRequest(), "/v2/models/stats"),
    Call(
        "index",
        "repository_index",
        oip.RepositoryIndexRequest(),
        "/v2/repository/index",
        http="POST",
    ),
    Call(
        "load what is loaded",
        "repository_model_load",
        oip.RepositoryModelLoadRequest(model_name="scale"),
        "/v2/repository/models/scale/load",
        http="POST",
    ),
    Call(
        "load another",
        "repository_model_load",
        oip.RepositoryModelLoadRequest(model_name="no"),
        "/v2/repository/models/no/load",
        "UNAVAILABLE",
        "POST",
    ),
    Call(
        "unknown region",
        "system_shared_memory_status",
        oip.SystemSharedMemoryStatusRequest(name="no"),
        "/v2/systemsharedmemory/region/no/status",
        "NOT_FOUND",
    ),
    Call(
        "region without object",
        "system_shared_memory_register",
        oip.SystemSharedMemoryRegisterRequest(name="r", key="/no-such-object", byte_size=1),
        "/v2/systemsharedmemory/region/r/register",
        "NOT_FOUND",
        "POST",
        {"key": "/no-such-object", "byte_size": 1},
    ),
    Call(
        "region that is a path",
        "system_shared_memory_register",
        oip.SystemSharedMemoryRegisterRequest(name="r", key="/../etc", byte_size=1),
        "/v2/systemsharedmemory/region/r/register",
        "INVALID_ARGUMENT",
        "POST",
        {"key": "/../etc", "byte_size": 1},
    ),
    Call(
        "CUDA",
        "cuda_shared_memory_status",
        oip.CudaSharedMemoryStatusRequest(),
        "/v2/cudasharedmemory/status",
        "UNIMPLEMENTED",
    ),
    Call("settings", "log_settings", oip.LogSettingsRequest(), "/v2/logging"),
]


@pytest.mark.parametrize("call", CALLS, ids=[call.rule for call in CALLS])
def test_calls_without_tensors(site: Site, call: Call) -> None:
    with grpc.insecure_channel(site.address) as channel:
        try:
            getattr(InferenceStub(channel), call.method)(call.request, 30)
            code = "OK"
        except grpc.RpcError as error:
            code = error.code().name
    connection = http.client.HTTPConnection(site.http, timeout=30)
    body = None if call.body is None else json.dumps(call.body)
    connection.request(call.http, call.path, body)
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    assert (code, response.status) == (call.code, PAIRS[call.code]), answer
    assert ("error" in answer) is (code != "OK")


def test_readiness_is_the_same_everywhere(site: Site) -> None:
    def ready() -> tuple[bool, bool, bool]:
        with grpc.insecure_channel(site.address) as channel:
            told = InferenceStub(channel).server_ready(oip.ServerReadyRequest(), 30).ready
            status = HealthStub(channel).check(health.HealthCheckRequest(), 30).status
        connection = http.client.HTTPConnection(site.http, timeout=30)
        connection.request("GET", "/v2/health/ready")
        over_http = connection.getresponse().status == 200
        connection.close()
        return told, status == health.HealthCheckResponse.SERVING, over_http

    assert ready() == (True, True, True)
    assert site.plane is not None
    table = site.plane.table
    site.switch({})
    # Nothing is deployed, which is fine: there is nothing that could not be scored.
    assert ready() == (True, True, True)
    site.plane.switch(table.routes.values())
