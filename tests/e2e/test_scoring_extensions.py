"""Triton's extensions over gRPC, each asked for by the unmodified tritonclient."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
import tritonclient.utils.shared_memory as shm
from gatelet.agent.scoring.grpc_server import GrpcLimits
from gatelet.protos import health_pb2 as health
from gatelet.protos import open_inference_pb2 as oip
from gatelet.protos.inference import InferenceStub
from gatelet.protos.services import HealthStub
from tritonclient.utils import InferenceServerException

from ..bench import onnx_models
from ..bench.scoring_site import TRANSPORTS, Site, serve

DEADLINE = 30.0
X = np.arange(4, dtype=np.float32).reshape(1, 4)


@pytest.fixture(scope="module", params=TRANSPORTS)
def site(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("scoring")
    settings = {"grpc_transport": request.param}
    with serve(folder / "s", limits=GrpcLimits(streams=3), settings=settings) as site:
        models = {
            "scale": onnx_models.scale_folder(
                folder / "scale", 2.0, version="3", batching={"max": 16, "preferred": [4, 8]}
            ),
            "bytes": onnx_models.identity_folder(folder / "bytes", "BYTES"),
            "int64": onnx_models.identity_folder(folder / "int64", "INT64"),
        }
        site.deploy(models)
        site.load("stacked", models["scale"], max_batch=8, max_delay_us=1500)
        site.probe("stacked")
        routes = {name: [(name, 0, True)] for name in (*models, "stacked")}
        site.switch(routes)
        yield site


@pytest.fixture
def client(site: Site) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(site.address) as client:
        yield client


@pytest.fixture
def stub(site: Site) -> Iterator[InferenceStub]:
    with grpc.insecure_channel(site.address) as channel:
        yield InferenceStub(channel)


def tensor(array: np.ndarray, datatype: str = "FP32") -> triton.InferInput:
    made = triton.InferInput("x", list(array.shape), datatype)
    made.set_data_from_numpy(array)
    return made


@contextmanager
def refused(code: str, text: str) -> Iterator[None]:
    with pytest.raises(InferenceServerException) as caught:
        yield
    assert caught.value.status() == f"StatusCode.{code}"
    assert text in caught.value.message()


def test_the_server_names_its_extensions(client: triton.InferenceServerClient) -> None:
    names = set(client.get_server_metadata().extensions)
    assert {"classification", "statistics", "system_shared_memory", "model_configuration"} <= names
    assert "cuda_shared_memory" not in names


def test_configuration(client: triton.InferenceServerClient) -> None:
    config = client.get_model_config("stacked").config
    assert (config.name, config.platform, config.backend) == (
        "stacked",
        "onnxruntime_onnx",
        "onnxruntime",
    )
    assert config.max_batch_size == 8
    assert [(i.name, i.data_type, list(i.dims)) for i in config.input] == [("x", 11, [4])]
    assert [(o.name, list(o.dims)) for o in config.output] == [("y", [4]), ("total", [1])]
    assert config.dynamic_batching.max_queue_delay_microseconds == 1500
    assert list(config.dynamic_batching.preferred_batch_size) == [4, 8]
    assert client.get_model_config("bytes").config.input[0].data_type == 13
    with refused("NOT_FOUND", "model 'nothing' is not deployed"):
        client.get_model_config("nothing")
    with refused("NOT_FOUND", "no version '9'"):
        client.get_model_config("scale", "9")


def test_statistics(client: triton.InferenceServerClient) -> None:
    def counts() -> tuple[int, ...]:
        (stats,) = client.get_inference_statistics("scale", "3").model_stats
        inner = stats.inference_stats
        return (
            stats.inference_count,
            stats.execution_count,
            inner.success.count,
            inner.fail.count,
            sum(batch.compute_infer.count for batch in stats.batch_stats if batch.batch_size == 5),
        )

    before = counts()
    started = time.time_ns() // 1_000_000
    client.infer("scale", [tensor(X)])
    client.infer("scale", [tensor(np.zeros((5, 4), np.float32))])
    with pytest.raises(InferenceServerException):
        client.infer("scale", [tensor(np.zeros((1, 3), np.float32))])
    after = counts()
    assert [b - a for a, b in zip(before, after, strict=True)] == [6, 2, 2, 1, 1]
    (stats,) = client.get_inference_statistics("scale").model_stats
    assert abs(stats.last_inference - started) < 10_000
    assert stats.inference_stats.success.ns >= stats.inference_stats.compute_infer.ns > 0
    everything = client.get_inference_statistics(as_json=True)["model_stats"]
    assert {entry["name"] for entry in everything} == {"scale", "bytes", "int64", "stacked"}
    with refused("NOT_FOUND", "not deployed"):
        client.get_inference_statistics("nothing")


def test_repository(client: triton.InferenceServerClient) -> None:
    index = client.get_model_repository_index().models
    assert {(m.name, m.version, m.state) for m in index} == {
        ("scale", "3", "READY"),
        ("stacked", "3", "READY"),
        ("bytes", "1", "READY"),
        ("int64", "1", "READY"),
    }
    client.load_model("scale")
    client.unload_model("nothing")
    with refused("UNAVAILABLE", "add a module for it to the deployment manifest"):
        client.load_model("nothing")
    with refused("UNAVAILABLE", "remove its module from the deployment manifest"):
        client.unload_model("scale")
    with refused("UNAVAILABLE", "models come with the deployment"):
        client.load_model("scale", config="{}", files={"file:1/model.onnx": b"x" * 1_000_000})
    assert client.is_model_ready("scale")


def test_trace_and_log_settings(client: triton.InferenceServerClient) -> None:
    assert client.get_trace_settings(as_json=True)["settings"]["trace_level"]["value"] == ["OFF"]
    assert client.get_log_settings(as_json=True)["settings"]["log_info"] == {"bool_param": True}
    client.update_log_settings({"log_verbose_level": 0})
    with refused("UNIMPLEMENTED", "log setting 'log_verbose_level' cannot be changed"):
        client.update_log_settings({"log_verbose_level": 3})
    with refused("UNIMPLEMENTED", "trace setting 'trace_level' cannot be changed"):
        client.update_trace_settings(settings={"trace_level": ["TIMESTAMPS"]})


def test_cuda_shared_memory_is_unimplemented(client: triton.InferenceServerClient) -> None:
    for call in (
        client.get_cuda_shared_memory_status,
        client.unregister_cuda_shared_memory,
        lambda: client.register_cuda_shared_memory("gpu", b"AAAA", 0, 16),
    ):
        with refused("UNIMPLEMENTED", "no CUDA"):
            call()


def test_a_stream_answers_in_order_and_outlives_errors(
    client: triton.InferenceServerClient,
) -> None:
    answers: queue.Queue[tuple[object, object]] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    for number in range(5):
        wrong = number == 2
        x = X[:, :3] if wrong else X + number
        client.async_stream_infer("scale", [tensor(x)], request_id=str(number))
    got = [answers.get(timeout=DEADLINE) for _ in range(5)]
    client.stop_stream()
    for number, (result, error) in enumerate(got):
        if number == 2:
            assert result is None
            assert "shape [1, 3], expected [-1, 4]" in str(error)
        else:
            assert error is None
            assert result.get_response().id == str(number)
            assert result.get_response().parameters["triton_final_response"].bool_param
            np.testing.assert_array_equal(result.as_numpy("y"), 2 * (X + number))


def test_streams_leave_other_calls_their_threads(
    site: Site, client: triton.InferenceServerClient
) -> None:
    with grpc.insecure_channel(site.address) as channel:
        stub = InferenceStub(channel)
        gates: list[queue.Queue[oip.ModelInferRequest | None]] = [queue.Queue() for _ in range(3)]
        streams = [stub.model_stream_infer(iter(gate.get, None), DEADLINE) for gate in gates]
        # An answer of each shows that all are open.
        for gate, stream in zip(gates, streams, strict=True):
            gate.put(request(b"\0" * 16))
            next(iter(stream))
        with pytest.raises(grpc.RpcError) as caught:
            next(iter(stub.model_stream_infer(iter([request(b"\0" * 16)]), DEADLINE)))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert client.is_server_live()
        for gate, stream in zip(gates, streams, strict=True):
            gate.put(None)
            assert list(stream) == []


def request(*raw: bytes, **options: object) -> oip.ModelInferRequest:
    made = oip.ModelInferRequest(model_name="scale", raw_input_contents=raw, **options)
    made.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    return made


def test_the_end_does_not_wait_for_idle_streams(tmp_path: Path) -> None:
    folder = onnx_models.scale_folder(tmp_path / "m", 2.0)
    with serve(tmp_path / "s") as site, grpc.insecure_channel(site.address) as channel:
        site.deploy({"scale": folder})
        gate: queue.Queue[oip.ModelInferRequest | None] = queue.Queue()
        stream = InferenceStub(channel).model_stream_infer(iter(gate.get, None))
        gate.put(request(b"\0" * 16))
        next(iter(stream))
        watch = HealthStub(channel).watch(health.HealthCheckRequest())
        assert next(iter(watch)).status == health.HealthCheckResponse.SERVING
        before = time.monotonic()
        site.server.stop(DEADLINE)
        assert time.monotonic() - before < DEADLINE / 2
        gate.put(None)


def test_health(site: Site) -> None:
    with grpc.insecure_channel(site.address) as channel:
        stub = HealthStub(channel)
        for service in ("", "inference.GRPCInferenceService", "grpc.health.v1.Health"):
            answer = stub.check(health.HealthCheckRequest(service=service), DEADLINE)
            assert answer.status == health.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as caught:
            stub.check(health.HealthCheckRequest(service="other"), DEADLINE)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        unknown = stub.watch(health.HealthCheckRequest(service="other"), DEADLINE)
        assert next(iter(unknown)).status == health.HealthCheckResponse.SERVICE_UNKNOWN
        unknown.cancel()


def test_health_tells_when_the_model_goes(tmp_path: Path) -> None:
    folder = onnx_models.scale_folder(tmp_path / "m", 2.0)
    with serve(tmp_path / "s") as site, grpc.insecure_channel(site.address) as channel:
        watch = iter(HealthStub(channel).watch(health.HealthCheckRequest(), DEADLINE))
        assert next(watch).status == health.HealthCheckResponse.NOT_SERVING
        site.deploy({"scale": folder})
        assert next(watch).status == health.HealthCheckResponse.SERVING


@pytest.fixture
def region() -> Iterator[object]:
    handle = shm.create_shared_memory_region("in", "/gatelet-test-region", 256, create_only=True)
    try:
        yield handle
    finally:
        shm.destroy_shared_memory_region(handle)


def test_tensors_in_shared_memory(client: triton.InferenceServerClient, region: object) -> None:
    client.register_system_shared_memory("both", "/gatelet-test-region", 256)
    try:
        status = client.get_system_shared_memory_status(as_json=True)["regions"]
        assert status["both"]["key"] == "/gatelet-test-region"
        assert status["both"]["byte_size"] == "256"
        shm.set_shared_memory_region(region, [X + 1], offset=16)
        x = triton.InferInput("x", [1, 4], "FP32")
        x.set_shared_memory("both", 16, offset=16)
        y = triton.InferRequestedOutput("y")
        y.set_shared_memory("both", 64, offset=128)
        total = triton.InferRequestedOutput("total")
        result = client.infer("scale", [x], outputs=[y, total])
        placed = result.get_output("y")
        assert placed.parameters["shared_memory_region"].string_param == "both"
        assert placed.parameters["shared_memory_byte_size"].int64_param == 16
        found = shm.get_contents_as_numpy(region, np.float32, [1, 4], offset=128)
        np.testing.assert_array_equal(found, 2 * (X + 1))
        assert result.as_numpy("total").tolist() == [[20.0]]

        y.set_shared_memory("both", 8, offset=0)
        with refused("INVALID_ARGUMENT", "the output has 16 bytes, set aside are 8"):
            client.infer("scale", [x], outputs=[y])
        x.set_shared_memory("both", 16, offset=250)
        with refused("INVALID_ARGUMENT", "16 bytes from 250 on do not lie in its 256 bytes"):
            client.infer("scale", [x])
        with refused("INVALID_ARGUMENT", "registered already"):
            client.register_system_shared_memory("both", "/gatelet-test-region", 16)
    finally:
        client.unregister_system_shared_memory("both")
    x.set_shared_memory("both", 16)
    with refused("NOT_FOUND", "'both' is not registered"):
        client.infer("scale", [x])
    with refused("NOT_FOUND", "'both' is not registered"):
        client.get_system_shared_memory_status("both")
    assert not client.get_system_shared_memory_status().regions


def test_bf16_is_widened(client: triton.InferenceServerClient) -> None:
    x = np.array([[1.5, -2.0, 0.0, 3.0]], np.float32)
    result = client.infer("scale", [tensor(x, "BF16")])
    np.testing.assert_array_equal(result.as_numpy("y"), 2 * x)
    with refused("INVALID_ARGUMENT", "datatype BF16, expected INT64"):
        client.infer("int64", [tensor(x[:, :2], "BF16")])


def test_classification(client: triton.InferenceServerClient) -> None:
    x = np.array([[0.25, 3, -1, 2], [9, 8, 7, 6]], np.float32)
    wanted = triton.InferRequestedOutput("y", class_count=2)
    result = client.infer("scale", [tensor(x)], outputs=[wanted]).as_numpy("y")
    assert result.tolist() == [[b"6.000000:1", b"4.000000:3"], [b"18.000000:0", b"16.000000:1"]]
    many = client.infer(
        "int64",
        [tensor(np.array([[-(2**63), 7]]), "INT64")],
        outputs=[triton.InferRequestedOutput("y", class_count=9)],
    )
    assert many.as_numpy("y").tolist() == [[b"7:1", b"-9223372036854775808:0"]]
    with refused("INVALID_ARGUMENT", "classes cannot be told from BYTES"):
        client.infer(
            "bytes",
            [tensor(np.array([[b"a", b"b"]], np.object_), "BYTES")],
            outputs=[triton.InferRequestedOutput("y", class_count=1)],
        )


def test_priority_and_timeout_parameters(
    client: triton.InferenceServerClient, stub: InferenceStub
) -> None:
    result = client.infer(
        "stacked", [tensor(X)], priority=3, timeout=5_000_000, parameters={"mine": "x"}
    )
    np.testing.assert_array_equal(result.as_numpy("y"), 2 * X)
    bad = request(b"\0" * 16)
    bad.parameters["timeout"].string_param = "soon"
    with pytest.raises(grpc.RpcError) as caught:
        stub.model_infer(bad, DEADLINE)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "parameter 'timeout' must be a whole number" in caught.value.details()


def test_requests_at_the_same_time_are_stacked_and_answered_rightly(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    instance = site.server_instance("stacked")
    session = instance.members[0].session
    # Not on the event loop, which would then take no more requests.
    monkeypatch.setattr(instance.members[0], "prompt", False)
    gathered = threading.Event()

    def run(*arguments: Any, run: Any = session.run) -> Any:
        # The model is quicker than requests come in: it has to be held up for them to meet.
        assert gathered.wait(DEADLINE)
        return run(*arguments)

    monkeypatch.setattr(session, "run", run)
    with triton.InferenceServerClient(site.address) as client:
        before = client.get_inference_statistics("stacked").model_stats[0]
        answers: queue.Queue[tuple[int, object, object]] = queue.Queue()
        for number in range(100):
            client.async_infer(
                "stacked",
                [tensor(X + number)],
                lambda result, error, number=number: answers.put((number, result, error)),
            )
        deadline = time.monotonic() + DEADLINE
        while instance.pending < 8:
            assert time.monotonic() < deadline
            threading.Event().wait(0.005)
        gathered.set()
        for _ in range(100):
            number, result, error = answers.get(timeout=DEADLINE)
            assert error is None, (error.status(), error.message())
            np.testing.assert_array_equal(result.as_numpy("y"), 2 * (X + number))
        after = client.get_inference_statistics("stacked").model_stats[0]
    assert after.inference_count - before.inference_count == 100
    assert after.execution_count - before.execution_count < 100
    assert max(batch.batch_size for batch in after.batch_stats) <= 8


async def test_the_asyncio_client(site: Site) -> None:
    async with triton_aio.InferenceServerClient(site.address) as client:
        assert (await client.get_model_config("scale")).config.name == "scale"
        stats = await client.get_inference_statistics("scale", as_json=True)
        assert stats["model_stats"][0]["version"] == "3"
        index = await client.get_model_repository_index()
        assert len(index.models) == 4

        async def requests() -> object:
            for number in range(3):
                yield {"model_name": "scale", "inputs": [tensor(X + number)]}

        got = [answer async for answer in client.stream_infer(requests())]
        assert [error for _, error in got] == [None] * 3
        for number, (result, _) in enumerate(got):
            np.testing.assert_array_equal(result.as_numpy("y"), 2 * (X + number))
