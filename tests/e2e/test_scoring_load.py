"""The scoring server while models change and backends fail under constant load."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from gatelet.accelerators.backend import LoadOptions, Variant
from gatelet.accelerators.cpu import CpuBackend
from gatelet.accelerators.errors import BackendUnavailable
from gatelet.accelerators.tensors import Array, TensorSpec
from gatelet.agent.scoring.grpc_server import GrpcLimits
from gatelet.protos import control_pb2 as pb
from gatelet.protos import open_inference_pb2 as oip
from gatelet.protos.inference import InferenceStub
from tritonclient.utils import InferenceServerException

from ..bench import onnx_models
from ..bench.scoring_site import Site, serve
from .test_scoring_faults import until

OVERLAY = {"kind": "overlay", "path": "overlay", "board": "test"}


class Accelerator:
    """Answers 10 x in place of a model; the test says when it hangs up or waits."""

    name = "fpga"

    def __init__(self) -> None:
        self.healthy = True
        self.sick = False
        self.calls = 0
        self.waiting = threading.Semaphore(0)
        self.go_on = threading.Event()
        self.go_on.set()

    def accepts(self, variant: Variant) -> str | None:
        return None if variant.kind == "overlay" else "overlays only"

    def load(self, directory: Path, variant: Variant, options: LoadOptions) -> AcceleratorSession:
        return AcceleratorSession(self)


class AcceleratorSession:
    backend = "fpga"
    inputs = (TensorSpec("x", "FP32", (-1, 4)),)
    outputs = (TensorSpec("y", "FP32", (-1, 4)), TensorSpec("total", "FP32", (-1, 1)))

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    @property
    def healthy(self) -> bool:
        return self._accelerator.healthy

    def run(
        self,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
        deadline: float | None = None,
    ) -> dict[str, Array]:
        self._accelerator.calls += 1
        self._accelerator.waiting.release()
        assert self._accelerator.go_on.wait(20)
        if self._accelerator.sick:
            raise BackendUnavailable("the fabric was reset")
        y = np.asarray(inputs["x"], np.float32) * np.float32(10)
        return {"y": y, "total": y.sum(1, keepdims=True)}

    def close(self) -> None:
        pass


class Load:
    """Clients that ask without a pause; every answer or error is kept."""

    def __init__(self, address: str, threads: int) -> None:
        self._address = address
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(threads)]
        self.answers: list[float] = []
        self.errors: list[Exception] = []

    def _ask(self) -> None:
        x = np.ones((1, 4), np.float32)
        value = triton.InferInput("x", [1, 4], "FP32")
        value.set_data_from_numpy(x)
        with triton.InferenceServerClient(self._address) as client:
            while not self._stop.is_set():
                try:
                    result = client.infer("e", [value], client_timeout=20)
                    self.answers.append(float(result.as_numpy("y")[0, 0]))
                except InferenceServerException as error:
                    self.errors.append(error)

    @contextmanager
    def running(self) -> Iterator[Load]:
        for thread in self._threads:
            thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.join(20)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 20
        while not condition():
            assert not self.errors, self.errors[0]
            assert time.monotonic() < deadline, f"only {len(self.answers)} answers"
            seen = len(self.answers)
            while len(self.answers) == seen and time.monotonic() < deadline:
                threading.Event().wait(0.001)


def test_a_model_is_swapped_under_load_without_one_failed_request(tmp_path: Path) -> None:
    with serve(tmp_path / "s") as site:
        swaps = 12
        for version in range(swaps + 1):
            onnx_models.scale_folder(tmp_path / str(version), version, version=str(version))
        site.load("0", tmp_path / "0")
        site.probe("0")
        site.switch({"e": [("0", 0, True)]})
        with Load(site.address, 4).running() as load:
            load.wait_for(lambda: len(load.answers) > 0)
            for version in range(1, swaps + 1):
                new, old = str(version), str(version - 1)
                site.load(new, tmp_path / new)
                site.probe(new)
                site.switch({"e": [(new, 0, True)]})
                site.unload(old)
                # From the switch on, nothing but the new version begins.
                mark = len(load.answers)
                load.wait_for(lambda mark=mark: len(load.answers) > mark + 20)
                assert set(load.answers[mark + 8 :]) <= {float(version)}
        assert load.errors == []
        assert sorted(set(load.answers)) == [float(v) for v in range(swaps + 1)]
        assert [i.instance for i in site.status().instances] == [str(swaps)]


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    accelerator = Accelerator()
    yield accelerator
    accelerator.go_on.set()


@pytest.fixture
def site(accelerator: Accelerator, tmp_path: Path) -> Iterator[Site]:
    """Endpoint "e": 10 x on the accelerator, 2 x on the CPU."""
    folder = onnx_models.scale_folder(tmp_path / "m", 2, more_variants=[OVERLAY])
    limits = GrpcLimits(threads=6)
    with serve(tmp_path / "s", [accelerator, CpuBackend()], limits=limits) as site:
        site.deploy({"e": folder})
        yield site


def backend(site: Site, name: str) -> pb.BackendStatus:
    return next(b for b in site.status().instances[0].backends if b.name == name)


def test_the_cpu_takes_over_from_a_sick_accelerator_and_hands_back(
    site: Site, accelerator: Accelerator
) -> None:
    with Load(site.address, 4).running() as load:
        load.wait_for(lambda: 10.0 in load.answers)
        accelerator.sick = True
        load.wait_for(lambda: 2.0 in load.answers[-8:])
        load.wait_for(lambda: not backend(site, "fpga").healthy)
        assert backend(site, "fpga").detail == "the fabric was reset"
        accelerator.sick = False
        mark = len(load.answers)
        load.wait_for(lambda: 10.0 in load.answers[mark:])
    assert load.errors == []
    assert set(load.answers) == {2.0, 10.0}
    fpga, cpu = backend(site, "fpga"), backend(site, "cpu")
    assert fpga.healthy
    assert fpga.fallbacks == cpu.requests > fpga.failures > 0


def test_an_accelerator_that_is_away_costs_nothing(site: Site, accelerator: Accelerator) -> None:
    accelerator.healthy = False
    calls = accelerator.calls
    with Load(site.address, 2).running() as load:
        load.wait_for(lambda: len(load.answers) > 50)
    assert load.errors == []
    assert accelerator.calls == calls


def ask(address: str, timeout: float) -> object:
    value = triton.InferInput("x", [1, 4], "FP32")
    value.set_data_from_numpy(np.ones((1, 4), np.float32))
    with triton.InferenceServerClient(address) as client:
        return client.infer("e", [value], client_timeout=timeout).as_numpy("y")


def test_unload_waits_for_the_requests_that_run(site: Site, accelerator: Accelerator) -> None:
    while accelerator.waiting.acquire(blocking=False):
        pass
    accelerator.go_on.clear()
    answers: list[object] = []
    asking = threading.Thread(target=lambda: answers.append(ask(site.address, 20)))
    asking.start()
    assert accelerator.waiting.acquire(timeout=20)
    site.switch({})
    unloading = threading.Thread(target=site.unload, args=("e", 20_000))
    unloading.start()
    unloading.join(0.1)
    assert unloading.is_alive()
    accelerator.go_on.set()
    unloading.join(20)
    asking.join(20)
    assert not unloading.is_alive()
    assert np.asarray(answers[0]).tolist() == [[10.0] * 4]


def test_work_that_is_too_late_is_not_begun(tmp_path: Path, accelerator: Accelerator) -> None:
    folder = onnx_models.scale_folder(tmp_path / "m", 2, more_variants=[OVERLAY])
    with serve(tmp_path / "s", [accelerator], limits=GrpcLimits(threads=1)) as site:
        site.deploy({"e": folder})
        instance = site.server_instance("e")
        instance.batching = replace(instance.batching, slots=1)
        while accelerator.waiting.acquire(blocking=False):
            pass
        accelerator.go_on.clear()
        first = threading.Thread(target=ask, args=(site.address, 20))
        first.start()
        assert accelerator.waiting.acquire(timeout=20)
        calls = accelerator.calls
        # The model is busy: the second call waits for it until it is too late.
        with pytest.raises(InferenceServerException) as caught:
            ask(site.address, 0.1)
        assert caught.value.status() == "StatusCode.DEADLINE_EXCEEDED"
        # The server's clock for it started a little later than the client's.
        until(lambda: instance.pending == 0)
        accelerator.go_on.set()
        first.join(20)
        ask(site.address, 20)
        assert accelerator.calls == calls + 1


def test_the_models_own_time_limit_is_kept(tmp_path: Path, accelerator: Accelerator) -> None:
    folder = onnx_models.scale_folder(tmp_path / "m", 2, more_variants=[OVERLAY])
    with serve(tmp_path / "s", [accelerator, CpuBackend()]) as site:
        site.load("e", folder, timeout_ms=50)
        site.probe("e")
        accelerator.sick = True
        site.switch({"e": [("e", 0, True)]})
        accelerator.go_on.clear()
        while accelerator.waiting.acquire(blocking=False):
            pass

        def answer_late() -> None:
            # From when it is asked on, however long the request took to get there.
            accelerator.waiting.acquire(timeout=20)
            threading.Event().wait(0.2)
            accelerator.go_on.set()

        release = threading.Thread(target=answer_late)
        release.start()
        with pytest.raises(InferenceServerException) as caught:
            ask(site.address, 20)
        release.join()
        assert caught.value.status() == "StatusCode.DEADLINE_EXCEEDED"
        assert "fpga: the fabric was reset" in caught.value.message()


def test_more_calls_than_allowed_are_turned_away(tmp_path: Path, accelerator: Accelerator) -> None:
    folder = onnx_models.scale_folder(tmp_path / "m", 2, more_variants=[OVERLAY])
    limits = GrpcLimits(threads=1, max_concurrent_rpcs=1)
    with serve(tmp_path / "s", [accelerator], limits=limits) as site:
        site.deploy({"e": folder})
        while accelerator.waiting.acquire(blocking=False):
            pass
        accelerator.go_on.clear()
        first = threading.Thread(target=ask, args=(site.address, 20))
        first.start()
        assert accelerator.waiting.acquire(timeout=20)
        with pytest.raises(InferenceServerException) as caught:
            ask(site.address, 20)
        assert caught.value.status() == f"StatusCode.{grpc.StatusCode.RESOURCE_EXHAUSTED.name}"
        accelerator.go_on.set()
        first.join(20)


def test_what_waits_for_an_accelerator_goes_to_it_together(
    tmp_path: Path, accelerator: Accelerator
) -> None:
    folder = onnx_models.scale_folder(
        tmp_path / "m", 2, more_variants=[OVERLAY], batching={"max": 8, "maxQueue": 3}
    )
    with serve(tmp_path / "s", [accelerator]) as site, grpc.insecure_channel(site.address) as ch:
        site.load("e", folder, max_batch=8)
        assert site.probe("e").state == pb.InstanceStatus.READY
        site.switch({"e": [("e", 0, True)]})
        slots = site.server_instance("e").batching.slots
        while accelerator.waiting.acquire(blocking=False):
            pass
        calls = accelerator.calls
        accelerator.go_on.clear()
        answers: list[object] = []
        threads = [
            threading.Thread(target=lambda: answers.append(ask(site.address, 20)))
            for _ in range(slots + 3)
        ]
        for thread in threads[:slots]:
            thread.start()
            assert accelerator.waiting.acquire(timeout=20)
        for thread in threads[slots:]:
            thread.start()
        until(lambda: site.server_instance("e").pending == 3)
        request = oip.ModelInferRequest(model_name="e", raw_input_contents=[bytes(16)])
        request.inputs.add(name="x", datatype="FP32", shape=[1, 4])
        with pytest.raises(grpc.RpcError) as caught:
            InferenceStub(ch).model_infer(request, 20)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "3 requests are waiting already" in caught.value.details()
        trailers = dict(caught.value.trailing_metadata())
        assert int(trailers["grpc-retry-pushback-ms"]) >= 1
        accelerator.go_on.set()
        for thread in threads:
            thread.join(20)
        assert [np.asarray(answer).tolist() for answer in answers] == [[[10.0] * 4]] * (slots + 3)
        assert accelerator.calls == calls + slots + 1
        (status,) = site.status().instances
        assert status.backends[0].requests == slots + 3
