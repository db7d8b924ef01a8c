"""hls4ml projects: our adapter, the generated driver and the C simulation, bit for bit."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gatelet.accelerators.errors import InvalidTensor, LoadError
from gatelet.accelerators.fpga.codec import decode, encode
from gatelet.accelerators.fpga.driver import FabricDriver
from gatelet.accelerators.fpga.package import Package, Signature
from gatelet.accelerators.fpga.packages import probe
from gatelet.accelerators.tensors import TensorSpec
from gatelet.simulator.board.boards import simulated_board
from gatelet.simulator.board.hls_engine import LIBRARIES_VARIABLE
from gatelet.simulator.board.vendor_packages import write_hls4ml_bitstream
from required import program, unavailable

# Four C++ projects are compiled first.
pytestmark = pytest.mark.timeout(500)

Z2 = simulated_board("pynq-z2").part
GENERATOR = Path(__file__).parent / "hls4ml_project.py"
RELEASE = "hls4ml==1.3.0"


def truncated(fraction: int, dtype: Any) -> Callable[[np.ndarray], np.ndarray]:
    bits = 8 * np.dtype(dtype).itemsize

    def convert(x: np.ndarray) -> np.ndarray:
        codes = np.floor(x.astype(np.float64) * 2**fraction) % 2**bits
        return codes.astype(np.uint64).astype(f"u{bits // 8}").view(dtype)

    return convert


def saturated(x: np.ndarray) -> np.ndarray:
    return np.clip(np.floor(x.astype(np.float64) * 32 + 0.5), -128, 127).astype(np.int8)


@dataclass(frozen=True)
class Case:
    """`encode` is what a user would give the generated driver, `fraction` what comes out."""

    name: str
    network: str
    io: str
    input: str
    output: str
    inner: str
    dtype: Any
    encode: Callable[[np.ndarray], np.ndarray]
    fraction: int

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return ((10,), (3,)) if self.network == "dense" else ((5, 6, 2), (3, 4, 3))


CASES = (
    Case("float", "dense", "io_parallel", "float", "float", "ap_fixed<18,8>",
         np.float32, lambda x: x, 0),
    Case("fixed16", "dense", "io_parallel", "ap_fixed<16,6>", "ap_fixed<16,6>", "ap_fixed<16,6>",
         np.int16, truncated(10, np.int16), 10),
    Case("fixed8", "conv", "io_stream", "ap_fixed<8,3,AP_RND,AP_SAT>", "ap_fixed<8,5>",
         "ap_fixed<16,6>", np.int8, saturated, 3),
    Case("fixed12", "conv", "io_parallel", "ap_fixed<12,4>", "ap_fixed<16,8,AP_TRN,AP_SAT>",
         "ap_fixed<20,8>", np.int16, truncated(12, np.int16), 8),
)  # fmt: skip


@dataclass(frozen=True)
class Project:
    case: Case
    folder: Path
    shared_object: Path


@pytest.fixture(scope="module")
def projects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Project]:
    program("g++")
    root = tmp_path_factory.mktemp("hls4ml")
    # A folder of its own, found first: hls4ml needs a numpy that pynq cannot work with.
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-compile"]
    done = subprocess.run(
        [*command, "--target", str(root / "site"), RELEASE],
        capture_output=True, text=True, timeout=150, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        unavailable(f"{RELEASE} does not install: {done.stderr[-2000:]}")

    def make(case: Case) -> Project:
        folder = root / case.name
        spec = {
            "folder": str(folder), "network": case.network, "seed": 3, "io": case.io,
            "input": case.input, "output": case.output, "inner": case.inner,
        }  # fmt: skip
        (root / f"{case.name}.json").write_text(json.dumps(spec))
        made = subprocess.run(
            [sys.executable, str(GENERATOR), str(root / f"{case.name}.json")],
            capture_output=True, text=True, timeout=200, check=False,
            env={**os.environ, "PYTHONPATH": str(root / "site")},
        )  # fmt: skip
        assert made.returncode == 0, made.stderr[-3000:]
        library = Path(json.loads(made.stdout.splitlines()[-1])["library"])
        (root / "libraries").mkdir(exist_ok=True)
        shutil.copy(library, root / "libraries" / f"{case.name}.so")
        return Project(case, folder, root / "libraries" / f"{case.name}.so")

    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(make, CASES))
    return {case.name: project for case, project in zip(CASES, made, strict=True)}


@pytest.fixture
def device(pynq: Any, projects: dict[str, Project], monkeypatch: pytest.MonkeyPatch) -> Any:
    from gatelet.simulator.board.device import activate

    monkeypatch.setenv(LIBRARIES_VARIABLE, str(projects["float"].shared_object.parent))
    return activate(simulated_board("pynq-z2"))


@pytest.fixture
def driver(device: Any, tmp_path: Path) -> Iterator[FabricDriver]:
    driver = FabricDriver(tmp_path / "lock", Z2)
    driver.open()
    yield driver
    driver.close()


def packaged(directory: Path, project: Project, **options: Any) -> Package:
    case = project.case
    directory.mkdir()
    for name in ("hls4ml_config.yml", "axi_stream_driver.py"):
        shutil.copy(project.folder / name, directory / name)
    sizes = [int(np.prod(shape)) for shape in case.shapes]
    write_hls4ml_bitstream(
        directory, "net", project.shared_object, part=Z2,
        input=(case.input, sizes[0]), output=(case.output, sizes[1]), **options,
    )  # fmt: skip
    return probe(directory)


def simulated(project: Project, x: np.ndarray) -> np.ndarray:
    """The C simulation, called as hls4ml's own predict does for float32."""
    library = ctypes.CDLL(str(project.shared_object))
    pointer = ctypes.POINTER(ctypes.c_float)
    results = np.zeros((len(x), *project.case.shapes[1]), np.float32)
    for item, result in zip(np.ascontiguousarray(x), results, strict=True):
        library.net_float(item.ctypes.data_as(pointer), result.ctypes.data_as(pointer))
    return results


def generated_driver(package: Package) -> Any:
    path = package.directory / "axi_stream_driver.py"
    spec = importlib.util.spec_from_file_location("generated_driver", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.NeuralNetworkOverlay


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_adapter_driver_and_simulation_agree(
    driver: FabricDriver, projects: dict[str, Project], tmp_path: Path, name: str
) -> None:
    project = projects[name]
    case = project.case
    package = packaged(tmp_path / "p", project, dma_length_width=12)
    assert (package.kind, package.board, package.name) == ("hls4ml", "pynq-z2", "net")
    assert [port.spec.shape[1:] for port in (*package.inputs, *package.outputs)] == [*case.shapes]
    rng = np.random.default_rng(1)
    # Off the grid of every precision, and far outside of the narrow ones.
    x = rng.normal(0, 3, (90, *case.shapes[0])).astype(np.float32)
    x[:20] *= 30
    x[20:30] = np.round(x[20:30] * 64) / 64
    expected = simulated(project, x)

    overlay = generated_driver(package)(
        str(package.bit), (16, *case.shapes[0]), (16, *case.shapes[1]), dtype=case.dtype
    )
    theirs = np.array(overlay.predict(x[:16], encode=case.encode))
    np.testing.assert_array_equal(
        np.ldexp(theirs.astype(np.float64), -case.fraction), expected[:16]
    )
    overlay.input_buffer.freebuffer()
    overlay.output_buffer.freebuffer()

    driver.load(package)
    source, target = package.inputs[0], package.outputs[0]
    for count in (1, 7, 90):
        (items,) = driver.infer(package, [encode(x[:count], source)], time.monotonic() + 20)
        ours = decode(items, target)
        assert ours.dtype == np.float32
        np.testing.assert_array_equal(ours, expected[:count])
    assert driver.counters.transfers >= 3
    if case.dtype == np.int16 and case.network == "conv":
        assert driver.counters.transfers > 3, "90 items are more than 4,095 bytes"


def test_other_signatures_and_values_are_refused(
    projects: dict[str, Project], tmp_path: Path
) -> None:
    package = packaged(tmp_path / "p", projects["fixed16"])
    names = Signature(
        (TensorSpec("image", "FP64", (-1, 5, 2)),), (TensorSpec("scores", "FP32", (-1, 3)),)
    )
    renamed = probe(package.directory, names)
    assert [port.spec for port in renamed.inputs] == list(names.inputs)
    with pytest.raises(LoadError, match="11 values per item, the package has 10"):
        probe(package.directory, Signature((TensorSpec("x", "FP32", (-1, 11)),), names.outputs))
    with pytest.raises(LoadError, match="no BYTES tensors"):
        probe(package.directory, Signature((TensorSpec("x", "BYTES", (-1, 10)),), names.outputs))
    with pytest.raises(InvalidTensor, match="NaN"):
        encode(np.full((1, 10), np.nan, np.float32), package.inputs[0])


def test_a_library_is_never_taken_from_the_package(
    driver: FabricDriver, projects: dict[str, Project], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    package = packaged(tmp_path / "p", projects["float"])
    shutil.copy(projects["float"].shared_object, package.directory)
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv(LIBRARIES_VARIABLE, str(tmp_path / "empty"))
    with pytest.raises(LoadError, match="no library with sha256"):
        driver.load(package)
