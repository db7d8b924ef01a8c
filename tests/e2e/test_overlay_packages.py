"""Overlay packages of other tools in model images, served by a real device on a simulated board."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from gatelet.accelerators.rtl import PRESETS
from gatelet.accelerators.rtl.offload import CostModel, compile_model
from gatelet.agent.scoring.client import ScoringClient
from gatelet.simulator.board.boards import simulated_board
from gatelet.simulator.board.hls_engine import LIBRARIES_VARIABLE
from gatelet.simulator.board.rtl_core import missing_tools
from gatelet.simulator.board.vendor_packages import (
    write_finn_package,
    write_hls4ml_bitstream,
    write_rtl_package,
)
from gatelet.simulator.demo.dataset import load_heldout, model_directory
from required import program, unavailable

sys.path.insert(0, str(Path(__file__).parents[1] / "contract"))
from finn_networks import mlp

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.asyncio(loop_scope="module"),
    # The Verilated core is compiled first where it has not been before.
    pytest.mark.timeout(400),
]

Z2 = simulated_board("pynq-z2").part
Deployment = Callable[..., dict[str, Any]]

# What hls4ml compiles of a project, in its smallest form: y = 2 x + 1 of ap_fixed<16,6>, wrapped.
SIMULATION = """
#include <math.h>
static double wrap(double v) {
  double r = fmod(floor(v * 1024), 65536);
  if (r >= 32768) r -= 65536;
  if (r < -32768) r += 65536;
  return r / 1024;
}
void net_double(double *x, double *y) { for (int i = 0; i < 5; ++i) y[i] = wrap(2 * x[i] + 1); }
"""


@pytest.fixture(scope="module", autouse=True)
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the simulated board of `shared_device` finds C simulations."""
    folder = tmp_path_factory.mktemp("libraries")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(LIBRARIES_VARIABLE, str(folder))
        yield folder


def describe(directory: Path, kind: str, inputs: list[Any], outputs: list[Any]) -> None:
    def tensors(specs: list[Any]) -> list[dict[str, Any]]:
        return [{"name": n, "datatype": d, "shape": list(s)} for n, d, s in specs]

    document = {
        "name": kind, "version": "1", "framework": kind,
        "inputs": tensors(inputs), "outputs": tensors(outputs),
        "variants": [{"kind": kind, "path": "overlays/z2", "board": "pynq-z2", "part": Z2}],
        "batching": {"max": 16},
    }  # fmt: skip
    (directory / "model.json").write_text(json.dumps(document))


async def served(
    device: Any, make_deployment: Deployment, folder: Path, feeds: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    name = folder.name
    image = await device.push("1", folder, name)
    changes = make_deployment(endpoint=name, image=image, backends="fpga")
    await device.until_good(device.desire(changes))

    def work() -> dict[str, np.ndarray]:
        with ScoringClient(device.grpc_address) as client:
            return client.infer(name, feeds)

    return await asyncio.to_thread(work)


async def test_a_finn_package(
    shared_device: Any, make_deployment: Deployment, tmp_path: Path
) -> None:
    network = mlp()
    folder = tmp_path / "finn-net"
    write_finn_package(
        folder / "overlays/z2", network.model, network.inputs, network.outputs, part=Z2
    )
    describe(folder, "finn", [("image", "FP32", (-1, 24))], [("sums", "INT32", (-1, 6))])
    (x,) = network.draw(40, 2)
    result = await served(shared_device, make_deployment, folder, {"image": x})
    assert result["sums"].dtype == np.int32
    np.testing.assert_array_equal(result["sums"], network.reference([x])[0])
    await tells_of_its_fabric(shared_device, "finn-accel")


async def tells_of_its_fabric(device: Any, loaded: str) -> None:
    """In the agent's status, in what it reports, and to Prometheus."""
    found = await device.until(lambda s: (s["fabric"] or {}).get("loaded") == loaded)
    fabric = found["fabric"]
    assert (fabric["up"], fabric["board"], fabric["part"]) == (True, "pynq-z2", Z2)
    assert fabric["requests"] > 0 < fabric["busySeconds"]
    assert fabric["pid"] == found["processes"]["fabric"]["pid"]
    await device.until_reported(
        lambda r: r.get("gatelet", {}).get("board", {}).get("fabric") == "serving"
    )

    def scraped() -> str:
        with urllib.request.urlopen(f"http://{found['scoring']['metrics']}/metrics") as answer:
            return str(answer.read().decode())

    metrics = await asyncio.to_thread(scraped)
    assert "gatelet_fabric_up 1" in metrics
    assert f'part="{Z2}",loaded="{loaded}"' in metrics
    assert 'gatelet_fabric_clock_hertz{clock="fclk0"} 100000000.0' in metrics


async def test_an_hls4ml_package(
    shared_device: Any, make_deployment: Deployment, tmp_path: Path, libraries: Path
) -> None:
    program("gcc")
    library = libraries / "net.so"
    (tmp_path / "net.c").write_text(SIMULATION)
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-O1", str(tmp_path / "net.c"), "-o", str(library), "-lm"],
        check=True, timeout=60,
    )  # fmt: skip
    folder = tmp_path / "hls-net"
    package = folder / "overlays/z2"
    precision = "ap_fixed<16,6>"
    write_hls4ml_bitstream(
        package, "net", library, part=Z2, input=(precision, 5), output=(precision, 5)
    )
    (package / "hls4ml_config.yml").write_text(
        "AcceleratorConfig:\n  Board: pynq-z2\n  Interface: axi_stream\n  Precision:\n"
        f"    Input: {precision}\n    Output: {precision}\nBackend: VivadoAccelerator\n"
        "ProjectName: net\n"
    )
    describe(folder, "hls4ml", [("x", "FP32", (-1, 5))], [("y", "FP32", (-1, 5))])
    x = np.random.default_rng(0).normal(0, 9, (33, 5)).astype(np.float32)
    result = await served(shared_device, make_deployment, folder, {"x": x})

    def wrapped(values: np.ndarray) -> np.ndarray:
        return (np.floor(values * 1024) + 32768) % 65536 - 32768

    taken = wrapped(x.astype(np.float64)) / 1024
    np.testing.assert_array_equal(result["y"], wrapped(2 * taken + 1) / 1024)


async def test_gatelets_own_core(
    shared_device: Any, make_deployment: Deployment, tmp_path: Path
) -> None:
    if problem := missing_tools():
        unavailable(problem)
    source = model_directory("v3")
    model = source / "onnx/model.onnx"
    compiled = await asyncio.to_thread(
        compile_model, model, PRESETS["pynq-z2"], CostModel(batch=64, transfer_us=0.0)
    )
    assert compiled.offload is not None, compiled.report
    folder = tmp_path / "rtl-digits"
    write_rtl_package(
        folder / "overlays/rtl", compiled.offload, name="digits", board="pynq-z2", part=Z2
    )
    shutil.copytree(source / "onnx", folder / "onnx")
    shutil.copy(source / "sample.json", folder / "sample.json")
    document = json.loads((source / "model.json").read_text())
    document["variants"] = [
        {"kind": "onnx", "path": "onnx/model.onnx"},
        {"kind": "gatelet-rtl", "path": "overlays/rtl", "board": "pynq-z2", "part": Z2},
    ]
    (folder / "model.json").write_text(json.dumps(document))
    images, _ = load_heldout()
    result = await served(shared_device, make_deployment, folder, {"x": images[:200]})
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(result["scores"], session.run(None, {"x": images[:200]})[0])
    status = await shared_device.status()
    (module,) = status["modules"]
    assert module["backends"]["fpga"]["requests"] > 0
