"""Swaps, splits, mirrors and canaries on a device under constant load: no request may fail."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import tritonclient.grpc as triton
from gatelet.simulator.demo.cloud import deployment
from tritonclient.utils import InferenceServerException

from ..bench import onnx_models

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]

ENDPOINT = "e"
CLIENTS = 3


class Load:
    """Clients that ask without a pause; `answers` are (version, first value), in order of arrival.
    Every tenth request names a session."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(n,)) for n in range(CLIENTS)]
        self.answers: list[tuple[str, float]] = []
        self.errors: list[InferenceServerException] = []
        self.sessions: dict[str, list[str]] = {}

    def _ask(self, number: int) -> None:
        x = triton.InferInput("x", [1, 4], "FP32")
        x.set_data_from_numpy(np.ones((1, 4), np.float32))
        asked = 0
        with triton.InferenceServerClient(self._address) as client:
            while not self._stop.is_set():
                asked += 1
                session = f"s{number}-{asked // 10 % 6}" if asked % 10 == 0 else ""
                headers = {"x-gatelet-session": session} if session else None
                try:
                    result = client.infer(ENDPOINT, [x], client_timeout=20, headers=headers)
                except InferenceServerException as error:
                    self.errors.append(error)
                    continue
                version = result.get_response().model_version
                if session:
                    self.sessions.setdefault(session, []).append(version)
                else:
                    self.answers.append((version, float(result.as_numpy("y")[0, 0])))

    @contextmanager
    def running(self) -> Iterator[Load]:
        for thread in self._threads:
            thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.join(30)

    async def more(self, count: int) -> list[tuple[str, float]]:
        """The next `count` answers."""
        mark = len(self.answers) + CLIENTS
        while len(self.answers) < mark + count:
            assert not self.errors, self.errors[0]
            await asyncio.sleep(0.01)
        return self.answers[mark : mark + count]


def slow_folder(folder: Path) -> Path:
    """y = 3 x after some milliseconds of work."""
    random = np.random.default_rng(1)
    node = onnx_models.helper.make_node
    content = onnx_models.build(
        [
            node("MatMul", ["x", "wide"], ["h0"]),
            *(node("MatMul", [f"h{n}", "square"], [f"h{n + 1}"]) for n in range(12)),
            node("ReduceMax", ["h12"], ["most"], axes=[1], keepdims=1),
            node("Mul", ["most", "nothing"], ["zero"]),
            node("Mul", ["x", "three"], ["y0"]),
            node("Add", ["y0", "zero"], ["y"]),
            node("ReduceMax", ["y"], ["total"], axes=[1], keepdims=1),
        ],
        [("x", "FP32", (-1, 4))],
        [("y", "FP32", (-1, 4)), ("total", "FP32", (-1, 1))],
        {
            "wide": random.random((4, 1024), np.float32) / 1024,
            "square": random.random((1024, 1024), np.float32) / 1024,
            "nothing": np.array(0, np.float32),
            "three": np.array(3, np.float32),
        },
    )
    specs = [("x", "FP32", (-1, 4))], [("y", "FP32", (-1, 4)), ("total", "FP32", (-1, 1))]
    return onnx_models.write_folder(folder, content, *specs, name="scaler", version="slow")


def ensemble_folder(folder: Path) -> Path:
    """y = 2 (3 x), over the endpoints "two" and "one"."""
    folder.mkdir()
    steps = [
        {"model_name": "two", "input_map": {"x": "x"}, "output_map": {"y": "half"}},
        {"model_name": "one", "input_map": {"x": "half"}, "output_map": {"y": "y"}},
    ]
    tensor = {"datatype": "FP32", "shape": [-1, 4]}
    document = {
        "name": "together",
        "version": "1",
        "framework": "ensemble",
        "inputs": [{"name": "x", **tensor}],
        "outputs": [{"name": "y", **tensor}],
        "variants": [{"kind": "ensemble", "path": "ensemble.json"}],
    }
    (folder / "ensemble.json").write_text(json.dumps({"ensemble_scheduling": {"step": steps}}))
    (folder / "model.json").write_text(json.dumps(document))
    return folder


class Fleet:
    """A device, and the images of three versions of a model."""

    def __init__(self, device: Any, images: dict[str, str]) -> None:
        self.device = device
        self.images = images

    def desire(self, **modules: dict[str, str]) -> int:
        """Deploy these versions, each as a module with these options, of one endpoint if they name
        no other."""
        content = deployment(self.images["one"], backends="cpu")
        desired = content["modulesContent"]["$edgeAgent"]["properties.desired"]
        (pattern,) = desired["modules"].values()
        desired["modules"] = {
            name: {
                **pattern,
                "settings": {"image": self.images[name], "createOptions": ""},
                "env": {
                    "SCORING_ENDPOINT": {"value": ENDPOINT},
                    **{f"SCORING_{key}": {"value": value} for key, value in options.items()},
                },
            }
            for name, options in modules.items()
        }
        return int(self.device.desire(content))

    async def until(self, module: str, condition: Callable[[dict[str, Any]], bool]) -> Any:
        """The module's state once it fulfils `condition`."""

        def found(status: dict[str, Any]) -> Any:
            return next((m for m in status["modules"] if m["name"] == module), None)

        def met(status: dict[str, Any]) -> bool:
            state = found(status)
            return state is not None and condition(state)

        return found(await self.device.until(met))

    async def routed(self, **percents: int) -> None:
        """Until the modules have these shares of the endpoint's requests."""

        def met(status: dict[str, Any]) -> bool:
            targets = status["endpoints"].get(ENDPOINT, ())
            return {t["instance"].partition("@")[0]: t["percent"] for t in targets} == percents

        await self.device.until(met)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(
    shared_device: Any, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Fleet]:
    device, tmp_path = shared_device, tmp_path_factory.mktemp("models")
    folders = {
        "one": onnx_models.scale_folder(tmp_path / "one", 2, name="scaler", version="1"),
        "two": onnx_models.scale_folder(tmp_path / "two", 3, name="scaler", version="2"),
        "slow": slow_folder(tmp_path / "slow"),
    }
    folders["together"] = ensemble_folder(tmp_path / "together")
    images = {
        version: await device.push(version, folder, "scaler") for version, folder in folders.items()
    }
    fleet = Fleet(device, images)
    await device.until_good(fleet.desire(one={}))
    yield fleet


ONE, TWO = ("1", 2.0), ("2", 3.0)


async def test_split_mirror_canary_and_swap_under_load(fleet: Fleet) -> None:
    with Load(fleet.device.grpc_address).running() as load:
        assert set(await load.more(100)) == {ONE}

        # Copies are scored and compared, and nobody sees them.
        fleet.desire(one={}, two={"MIRROR": "50"})
        mirrored = await fleet.until("two", lambda m: m.get("mirror", {}).get("compared", 0) > 100)
        assert mirrored["mirror"]["differing"] == mirrored["mirror"]["compared"]
        assert mirrored["mirror"]["failed"] == 0
        assert mirrored["mirror"]["largestDifference"] == pytest.approx(4 / 9)
        assert set(await load.more(100)) == {ONE}

        # A split by percentage: six standard deviations of 2,000 draws at 25 %.
        fleet.desire(one={}, two={"TRAFFIC": "25"})
        await fleet.routed(one=75, two=25)
        load.sessions.clear()
        answers = await load.more(2000)
        assert set(answers) == {ONE, TWO}
        assert abs(answers.count(TWO) - 500) < 6 * (2000 * 0.25 * 0.75) ** 0.5
        # Whoever names a session stays with one version.
        sessions = [versions[1:] for versions in load.sessions.values() if len(versions) > 2]
        assert len(sessions) > 10
        assert all(len(set(versions)) == 1 for versions in sessions)
        assert len({versions[0] for versions in sessions}) == 2

        # A good canary is promoted in steps.
        canary = {"CANARY": "20,60,100", "CANARY_STEP_S": "0.3", "CANARY_MIN_REQUESTS": "30"}
        # Two models of equal cost on a busy machine: only failures are to be judged here.
        fleet.desire(one={}, two={**canary, "CANARY_MAX_LATENCY_RATIO": "1000"})
        promoted = await fleet.until(
            "two", lambda m: m.get("canary", {}).get("phase") == "promoted"
        )
        assert promoted["canary"] == {"phase": "promoted", "percent": 100, "steps": [20, 60, 100]}
        await fleet.routed(one=0, two=100)
        assert set(await load.more(200)) == {TWO}
        await fleet.device.until_reported(
            lambda r: (
                r["modules"].get("two", {}).get("gatelet", {}).get("canary", {}).get("phase")
                == "promoted"
            )
        )

        # And back, as a plain swap of what the endpoint's only module runs.
        await fleet.device.until_good(fleet.desire(one={}))
        assert set(await load.more(100)) == {ONE}
    assert load.errors == []
    assert set(load.answers) == {ONE, TWO}


async def test_a_slow_canary_is_rolled_back_for_good(fleet: Fleet) -> None:
    canary = {"CANARY": "25,100", "CANARY_STEP_S": "600", "CANARY_MIN_REQUESTS": "40"}
    with Load(fleet.device.grpc_address).running() as load:
        await load.more(50)
        version = fleet.desire(one={}, slow={**canary, "CANARY_MAX_LATENCY_RATIO": "3"})
        state = await fleet.until(
            "slow", lambda m: m.get("canary", {}).get("phase") == "rolled-back"
        )
        assert "allowed are 3 times as much" in state["canary"]["reason"]
        assert state["canary"]["percent"] == 0
        await fleet.routed(one=100, slow=0)
        assert set(await load.more(200)) == {ONE}
    assert load.errors == []
    assert ("slow", 3.0) in load.answers
    await fleet.device.until_good(version)

    # Neither a restart of the scoring process nor one of the agent gives it requests again.
    await fleet.device.kill("scoring")
    await fleet.device.stop_agent()
    await fleet.device.start_agent()
    await fleet.routed(one=100, slow=0)
    stored = await fleet.until("slow", lambda m: m.get("canary") is not None)
    assert stored["canary"] == state["canary"], json.dumps(stored)


async def test_an_ensemble_is_deployed_like_any_model(fleet: Fleet) -> None:
    endpoints = {name: {"ENDPOINT": name} for name in ("together", "one", "two")}
    await fleet.device.until_good(fleet.desire(**endpoints))

    def ask() -> Any:
        x = triton.InferInput("x", [1, 4], "FP32")
        x.set_data_from_numpy(np.ones((1, 4), np.float32))
        with triton.InferenceServerClient(fleet.device.grpc_address) as client:
            return client.infer("together", [x]).as_numpy("y").tolist()

    assert await asyncio.to_thread(ask) == [[6.0] * 4]
