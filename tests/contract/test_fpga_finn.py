"""FINN packages on the simulated board: our adapter, FINN's sequence and driver, integer maths."""

from __future__ import annotations

import copy
import functools
import importlib.util
import io
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finn_networks import NETWORKS, Network, graph, mlp
from gatelet.accelerators.errors import DeadlineExceeded, LoadError
from gatelet.accelerators.fpga.codec import decode, encode
from gatelet.accelerators.fpga.driver import FabricDriver
from gatelet.accelerators.fpga.package import Package
from gatelet.accelerators.fpga.protocol import FabricSick
from gatelet.simulator.board.boards import simulated_board
from gatelet.simulator.board.faults import Fault, FaultFile, write_fault
from gatelet.simulator.board.vendor_packages import write_bnn_pynq_package, write_finn_package
from required import unavailable

Z2 = simulated_board("pynq-z2").part


@pytest.fixture
def faults(tmp_path: Path) -> Path:
    return tmp_path / "faults.json"


@pytest.fixture
def device(pynq: Any, faults: Path, tmp_path: Path) -> Any:
    from gatelet.simulator.board.device import activate

    return activate(simulated_board("pynq-z2"), FaultFile(faults), tmp_path / "state.json")


@pytest.fixture
def driver(device: Any, tmp_path: Path) -> Iterator[FabricDriver]:
    driver = FabricDriver(tmp_path / "lock", Z2, hang_after=0.1)
    driver.open()
    yield driver
    driver.close()
    assert device.memory.used == 0, "a buffer was not given back"


def write(directory: Path, network: Network, **options: Any) -> Package:
    return write_finn_package(
        directory, network.model, network.inputs, network.outputs, part=Z2, **options
    )


def serve(driver: FabricDriver, package: Package, tensors: list[np.ndarray]) -> list[np.ndarray]:
    shaped = [
        tensor.reshape(len(tensor), *port.spec.shape[1:])
        for tensor, port in zip(tensors, package.inputs, strict=True)
    ]
    items = [encode(tensor, port) for tensor, port in zip(shaped, package.inputs, strict=True)]
    results = driver.infer(package, items, time.monotonic() + 10)
    return [decode(got, port) for got, port in zip(results, package.outputs, strict=True)]


def bits(values: np.ndarray, datatype: str, inner: int) -> np.ndarray:
    """Rows packed by Python's integers, apart from our packing and from the simulator's."""
    from gatelet.accelerators.fpga.elements import finn_element

    element = finn_element(datatype)
    rows = []
    for row in np.rint(np.ldexp(values.astype(float), element.fraction)).reshape(-1, inner):
        codes = [int(v + 1) // 2 if element.kind == "bipolar" else int(v) for v in row]
        total = sum((c & (1 << element.bits) - 1) << i * element.bits for i, c in enumerate(codes))
        rows.append(list(total.to_bytes(-(-inner * element.bits // 8), "little")))
    return np.array(rows, np.uint8)


def unbits(raw: np.ndarray, datatype: str, inner: int) -> np.ndarray:
    from gatelet.accelerators.fpga.elements import finn_element

    element = finn_element(datatype)
    rows = []
    for row in raw:
        total = int.from_bytes(row.tobytes(), "little")
        codes = [total >> i * element.bits & (1 << element.bits) - 1 for i in range(inner)]
        signed = element.signed and element.kind == "integer"
        half = 1 << element.bits - 1
        rows.append([code - 2 * half if signed and code >= half else code for code in codes])
    return np.array(rows)


def finns_sequence(pynq: Any, package: Package, network: Network, tensors: list) -> list:
    """What FINN's driver does with pynq, register by register."""
    overlay = pynq.Overlay(str(package.bit))
    count = len(tensors[0])
    sends = []
    for tensor, spec in zip(tensors, network.inputs, strict=True):
        packed = bits(tensor, spec.datatype, spec.folded[-1])
        buffer = pynq.allocate((count, *spec.packed[1:]), np.uint8)
        buffer[:] = packed.reshape(buffer.shape)
        buffer.flush()
        sends.append(buffer)
    receives = [pynq.allocate((count, *s.packed[1:]), np.uint8) for s in network.outputs]
    idma = [getattr(overlay, f"idma{i}") for i in range(len(sends))]
    odma = [getattr(overlay, f"odma{i}") for i in range(len(receives))]
    assert all(core.read(0x00) & 0x4 for core in odma)
    for cores, buffers in ((odma, receives), (idma, sends)):
        for core, buffer in zip(cores, buffers, strict=True):
            core.write(0x10, buffer.device_address)
            core.write(0x1C, count)
            core.write(0x00, 1)
    for core in odma:
        assert core.read(0x00) & 0x2
        assert not core.read(0x00) & 0x2, "done is cleared by reading"
    results = []
    for buffer, spec in zip(receives, network.outputs, strict=True):
        buffer.invalidate()
        raw = np.array(buffer).reshape(-1, spec.packed[-1])
        results.append(unbits(raw, spec.datatype, spec.folded[-1]).reshape(count, -1))
        buffer.freebuffer()
    for buffer in sends:
        buffer.freebuffer()
    return results


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.name)
@pytest.mark.parametrize("plus", [False, True], ids=["finn", "finn+"])
def test_adapter_sequence_and_integers_agree(
    pynq: Any, driver: FabricDriver, tmp_path: Path, network: Network, plus: bool
) -> None:
    package = write(tmp_path / "p", network, plus=plus)
    assert (package.kind, package.part) == ("finn", "7z020clg400")
    driver.load(package)
    for count in (1, 3, 64):
        tensors = network.draw(count, count)
        expected = [one.reshape(count, -1) for one in network.reference(tensors)]
        ours = serve(driver, package, tensors)
        theirs = finns_sequence(pynq, package, network, tensors) if count == 3 else expected
        for one, other, reference in zip(ours, theirs, expected, strict=True):
            np.testing.assert_array_equal(one.reshape(count, -1), reference)
            np.testing.assert_array_equal(other, reference)
    assert driver.counters.hangs == 0


RELEASES = {"finn-plus-driver": "1.6.1", "qonnx": "1.0.0", "bitstring": "5.0.0", "tibs": "2.0.2"}


@functools.cache
def vendor(folder: str) -> Any:
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-compile"]
    subprocess.run(
        [*command, "--target", folder, *(f"{n}=={version}" for n, version in RELEASES.items())],
        check=True, timeout=100, capture_output=True, text=True,
    )  # fmt: skip
    sys.path.insert(0, folder)
    try:
        # By its file: the package around it imports plotting, which this driver does not need.
        path = Path(folder) / "finn_plus_driver" / "overlays" / "dma.py"
        spec = importlib.util.spec_from_file_location("finn_plus_dma", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(folder)
    return module.FINNDMAOverlay


@pytest.fixture(scope="module")
def overlay_class(pynq: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    try:
        return vendor(str(tmp_path_factory.mktemp("vendor")))
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        unavailable(f"the driver of FINN+ does not install: {str(error.stderr)[-2000:]}")


@pytest.mark.parametrize(
    "network", [NETWORKS[0], NETWORKS[3], NETWORKS[6], NETWORKS[7]], ids=lambda n: n.name
)
def test_the_unmodified_driver_of_finn_plus_gives_the_same(
    overlay_class: Any, driver: FabricDriver, tmp_path: Path, network: Network
) -> None:
    package = write(tmp_path / "p", network, plus=True)
    settings = json.loads((tmp_path / "p/driver/settings.json").read_text())
    shapes = copy.deepcopy(settings["driver_information"]["io_shape_dict"])
    count = 5
    (tensor,) = network.draw(count, 1)
    theirs = overlay_class(str(package.bit), "zynq-iodma", shapes, batch_size=count)
    result = theirs.execute(tensor.reshape(count, *network.inputs[0].normal[1:]).astype(np.float32))
    driver.load(package)
    (ours,) = serve(driver, package, [tensor])
    np.testing.assert_array_equal(ours.reshape(count, -1), np.array(result).reshape(count, -1))
    theirs.ibuf_packed_device = theirs.obuf_packed_device = None


def test_runtime_and_external_weights_reach_the_network(
    driver: FabricDriver, tmp_path: Path
) -> None:
    from onnx import helper

    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Add", ["a", "b"], ["y"]),
    ]
    zeros = {"w": np.zeros((4, 3)), "b": np.zeros(3)}
    network = Network(
        "weights",
        graph(nodes, {"x": [4]}, {"y": [3]}, zeros),
        mlp().inputs, mlp().outputs, lambda c, s: [], lambda i: [],
    )  # fmt: skip
    from gatelet.simulator.board.vendor_packages import FinnTensor

    inputs, outputs = [FinnTensor("INT8", (1, 4), (1, 4))], [FinnTensor("INT16", (1, 3), (1, 3))]
    weights = np.arange(-6, 6).reshape(4, 3)
    content = io.BytesIO()
    np.save(content, np.array([7, 250, 3], np.uint8))
    words = "\n".join(f"{int(w) & 0xFFFFFFFF:08x}" for w in weights.reshape(-1))
    package = write_finn_package(
        tmp_path / "p", network.model, inputs, outputs, part=Z2,
        runtime_weights={"1_0_MVAU_hls_0.dat": (words, "w", "<i4")},
        external_weights={"idma9": (content.getvalue(), "b", "<i1")},
    )  # fmt: skip
    driver.load(package)
    assert driver.counters.transfers == 1, "one item to flush what was in the streams"
    x = np.random.default_rng(0).integers(-128, 128, (9, 4)).astype(np.int8)
    (ours,) = serve(driver, package, [x])
    np.testing.assert_array_equal(ours, x.astype(int) @ weights + np.array([7, -6, 3]))


def test_parameters_of_bnn_pynq_are_written_and_bits_come_back(
    driver: FabricDriver, device: Any, tmp_path: Path
) -> None:
    from onnx import helper

    rng = np.random.default_rng(8)
    weights = rng.choice([-1, 1], (784, 64))
    model = graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["a"]),
            helper.make_node(
                "MultiThreshold", ["a", "t"], ["y"], domain="qonnx.custom_op.general"
            ),
        ],
        {"x": [784]}, {"y": [64]}, {"w": weights, "t": np.zeros((1, 1))},
    )  # fmt: skip
    words = rng.integers(0, 2**63, (3, 4), dtype=np.uint64)
    files = {
        "0-0-weights.bin": words[0].astype("<u8").tobytes(),
        "0-1-weights.bin": words[1].astype("<u8").tobytes(),
        "2-0-thres.bin": words[2].astype("<u8").tobytes(),
    }
    package = write_bnn_pynq_package(tmp_path / "p", model, Z2, files)
    assert package.kind == "bnn-pynq"
    assert package.inputs[0].wire.item_bytes == 104
    driver.load(package)
    core = device.fabric.registers("BlackBoxJam_0")
    assert core.written == {
        (layer, unit, index, 0): int(words[row][index])
        for row, (layer, unit) in enumerate(((0, 0), (0, 1), (5, 0)))
        for index in range(4)
    }
    x = rng.integers(-3, 4, (6, 784)).astype(np.int8)
    (ours,) = serve(driver, package, [x])
    signs = np.where(x >= 0, 1, -1)
    np.testing.assert_array_equal(ours, (signs @ weights >= 0).astype(np.uint8))


@pytest.mark.parametrize("name", ["cnvW1A1", "cnvW1A2", "cnvW2A2", "lfcW1A2"])
def test_the_other_networks_of_bnn_pynq(
    driver: FabricDriver, device: Any, tmp_path: Path, name: str
) -> None:
    from onnx import helper

    rng = np.random.default_rng(3)
    if name.startswith("lfc"):
        weights = rng.choice([-1, 1], (784, 64))
        nodes = [
            helper.make_node("MatMul", ["x", "w"], ["a"]),
            helper.make_node("GreaterOrEqual", ["a", "z"], ["b"]),
            helper.make_node("Cast", ["b"], ["y"], to=1),
        ]
        model = graph(nodes, {"x": [784]}, {"y": [64]}, {"w": weights, "z": np.zeros(1)})
        x = rng.integers(-3, 4, (3, 784)).astype(np.int8)
        expected = (np.where(x >= 0, 1, -1) @ weights >= 0).astype(np.uint8)
        last, per_line = 3, 2
    else:
        # Sums of some pixels, so that they stay within 16 bits; whole as 128ths.
        weights = np.zeros((3072, 64), np.int64)
        for column in range(64):
            weights[rng.choice(3072, 100, replace=False), column] = rng.choice([-1, 1], 100)
        nodes = [
            helper.make_node("Flatten", ["x"], ["f"]),
            helper.make_node("MatMul", ["f", "w"], ["y"]),
        ]
        model = graph(nodes, {"x": [32, 32, 3]}, {"y": [64]}, {"w": 128 * weights})
        x = rng.uniform(-1.1, 1.1, (3, 32, 32, 3)).astype(np.float32)
        # ap_fixed<8, 1> rounds to the nearest, halves up, and saturates.
        codes = np.clip(np.floor(x.astype(np.float64) * 128 + 0.5), -128, 127).astype(np.int64)
        expected = codes.reshape(3, -1) @ weights
        last, per_line = 8, 2 if name.endswith("A2") else 1
    words = {
        "0-0-weights.bin": rng.integers(0, 2**63, 3, np.int64),
        "1-2-thres.bin": rng.integers(0, 2**63, 4, np.int64),
        f"{last}-1-thres.bin": rng.integers(0, 2**63, 4, np.int64),
    }
    files = {file: values.astype("<u8").tobytes() for file, values in words.items()}
    package = write_bnn_pynq_package(tmp_path / "p", model, Z2, files, name)
    driver.load(package)
    written = device.fabric.registers("BlackBoxJam_0").written
    wanted = {(0, 0, i, 0): int(v) for i, v in enumerate(words["0-0-weights.bin"])}
    wanted |= {
        (3, 2, i // per_line, i % per_line): int(v) for i, v in enumerate(words["1-2-thres.bin"])
    }
    if last == 3:
        # One threshold per line in the last layer; the convolutional networks have none there.
        wanted |= {(7, 1, i, 0): int(v) for i, v in enumerate(words["3-1-thres.bin"])}
    assert written == wanted
    (ours,) = serve(driver, package, [x])
    np.testing.assert_array_equal(ours.reshape(expected.shape), expected)


def test_parameters_of_bnn_pynq_that_do_not_fit_are_refused(
    driver: FabricDriver, tmp_path: Path
) -> None:
    odd = {"1-0-thres.bin": bytes(8 * 3)}
    package = write_bnn_pynq_package(tmp_path / "p", b"", Z2, odd, "lfcW1A2")
    with pytest.raises(LoadError, match="not whole lines of 2 words"):
        driver.load(package)
    with pytest.raises(LoadError, match="cnvW2A2 are known"):
        write_bnn_pynq_package(tmp_path / "q", b"", Z2, odd, "resnetW1A1")


def test_a_hang_says_which_core_waits_and_costs_one_configuration(
    driver: FabricDriver, tmp_path: Path, faults: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = mlp()
    package = write(tmp_path / "p", network)
    driver.load(package)
    tensors = network.draw(4, 0)
    items = [encode(tensors[0], package.inputs[0])]
    for kind in ("hang", "stuck"):
        write_fault(faults, Fault(kind, times=1))
        with pytest.raises(FabricSick, match="odma0 busy, idma0 busy"):
            driver.infer(package, items, None)
        (ours,) = serve(driver, package, tensors)
        np.testing.assert_array_equal(ours, network.reference(tensors)[0])
    write_fault(faults, Fault("hang", times=1))
    # The driver's time goes on whenever it looks, however busy the machine is.
    clock = itertools.count(time.monotonic(), 0.001).__next__
    monkeypatch.setattr(driver, "_monotonic", clock)
    started = clock()
    with pytest.raises(DeadlineExceeded):
        driver.infer(package, items, started + 0.02)
    assert clock() - started < 0.1
    (ours,) = serve(driver, package, tensors)
    np.testing.assert_array_equal(ours, network.reference(tensors)[0])
    assert driver.counters.reconfigurations == 4
    assert driver.counters.hangs == 3


@pytest.mark.parametrize(("kind", "wrong"), [("bit-flip", 1), ("wrong-data", 24)])
def test_spoilt_results_show(
    driver: FabricDriver, tmp_path: Path, faults: Path, kind: str, wrong: int
) -> None:
    network = mlp()
    package = write(tmp_path / "p", network)
    driver.load(package)
    tensors = network.draw(4, 0)
    write_fault(faults, Fault(kind, times=1))
    (ours,) = serve(driver, package, tensors)
    assert np.count_nonzero(ours != network.reference(tensors)[0]) == wrong


def test_a_fabric_that_another_process_took_is_taken_back(
    driver: FabricDriver, device: Any, tmp_path: Path
) -> None:
    network = mlp()
    package = write(tmp_path / "p", network)
    driver.load(package)
    tensors = network.draw(3, 0)
    for round_ in range(1, 3):
        serve(driver, package, tensors)
        device.configure_elsewhere()
        (ours,) = serve(driver, package, tensors)
        np.testing.assert_array_equal(ours, network.reference(tensors)[0])
        assert driver.counters.replaced == round_
        assert driver.counters.reconfigurations == 1 + round_


def test_weights_that_do_not_fit_are_refused(driver: FabricDriver, tmp_path: Path) -> None:
    network = mlp()
    for text, words in (("0xzz", "not hexadecimal"), ("1ffffffff", "wider than 32 bits")):
        package = write(
            tmp_path / words.replace(" ", "-"), network,
            runtime_weights={"1_0_MVAU.dat": (text, "w1", "<i4")},
        )  # fmt: skip
        with pytest.raises(LoadError, match=words):
            driver.load(package)


def test_a_dpu_without_its_runtime_is_refused_before_the_fabric_is_touched(
    driver: FabricDriver, tmp_path: Path
) -> None:
    from gatelet.accelerators.fpga.package import Signature
    from gatelet.accelerators.fpga.packages import probe
    from gatelet.accelerators.tensors import TensorSpec
    from gatelet.simulator.board.container import Container
    from gatelet.simulator.board.handoff import StreamDesign
    from gatelet.simulator.board.vendor_packages import write_bitstream

    write_bitstream(tmp_path / "p/dpu.bit", Z2, Container({}), StreamDesign("dpu", Z2, 100.0))
    (tmp_path / "p/dpu.xclbin").write_bytes(b"x")
    (tmp_path / "p/net.xmodel").write_bytes(b"x")
    spec = (TensorSpec("x", "FP32", (-1, 4)),)
    with pytest.raises(LoadError, match="vart and xir cannot be imported"):
        driver.load(probe(tmp_path / "p", Signature(spec, spec)))
    assert driver.counters.reconfigurations == 0
