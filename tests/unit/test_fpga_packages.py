"""Probing packages: what is read, that nothing is run, and what hostile or broken files meet."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gatelet.accelerators.backend import Variant
from gatelet.accelerators.errors import LoadError
from gatelet.accelerators.fpga.backend import FpgaBackend
from gatelet.accelerators.fpga.board import KNOWN_PARTS
from gatelet.accelerators.fpga.handoff import read_hardware
from gatelet.accelerators.fpga.package import KINDS, PackedWire, Signature, StartedCores
from gatelet.accelerators.fpga.packages import NotAPackage, probe
from gatelet.accelerators.fpga.packages.finn import literal_assignment
from gatelet.accelerators.fpga.packages.hls4ml import started_core
from gatelet.accelerators.fpga.packages.yaml_subset import parse_mappings
from gatelet.accelerators.fpga.preflight import Device, examine, look, preflight
from gatelet.accelerators.tensors import TensorSpec
from gatelet.agent.main import main
from gatelet.simulator.board.container import Container
from gatelet.simulator.board.handoff import LiteCore, StreamDesign, encode_handoff
from gatelet.simulator.board.vendor_packages import (
    FinnTensor,
    write_bitstream,
    write_finn_package,
)
from hypothesis import given, settings
from hypothesis import strategies as st

Z2 = KNOWN_PARTS["pynq-z2"]
IN = FinnTensor("UINT4", (1, 28, 28, 1), (1, 28, 28, 1))
OUT = FinnTensor("INT16", (1, 10), (1, 5, 2))


def finn(directory: Path, **options: Any) -> Path:
    write_finn_package(directory, b"", [IN], [OUT], part=Z2, **options)
    return directory


@pytest.mark.parametrize("plus", [False, True], ids=["finn", "finn+"])
def test_a_finn_package_is_read_and_not_run(tmp_path: Path, plus: bool) -> None:
    package = probe(finn(tmp_path, plus=plus, clock_mhz=150.0))
    assert (package.kind, package.name, package.part) == ("finn", "finn-accel", "7z020clg400")
    assert package.clock_mhz == 150.0, "what the design was built for, not the driver's default"
    (source,), (target,) = package.inputs, package.outputs
    assert source.spec == TensorSpec("in0", "UINT8", (-1, 28, 28, 1))
    assert source.wire.item_bytes == 784
    assert target.spec == TensorSpec("out0", "INT16", (-1, 10))
    assert isinstance(target.wire, PackedWire)
    assert (target.wire.rows, target.wire.inner, target.wire.item_bytes) == (5, 2, 20)
    assert isinstance(package.transport, StartedCores)
    assert [core.core for core in package.transport.cores] == ["odma0", "idma0"]
    assert package.transport.awaited == ("odma0",)


def test_model_json_names_the_tensors(tmp_path: Path) -> None:
    promised = Signature(
        (TensorSpec("image", "FP32", (-1, 784)),), (TensorSpec("scores", "INT32", (-1, 10)),)
    )
    package = probe(finn(tmp_path), promised)
    assert package.inputs[0].spec == promised.inputs[0]
    assert package.outputs[0].spec == promised.outputs[0]
    for inputs, words in (
        ((TensorSpec("image", "FP32", (-1, 783)),), "783 values per item, the package has 784"),
        ((TensorSpec("image", "BYTES", (-1, 784)),), "no BYTES tensors"),
        ((TensorSpec("image", "FP32", (784,)),), "-1 followed by fixed sizes"),
        (promised.inputs * 2, "has 1 inputs but model.json promises 2"),
    ):
        with pytest.raises(LoadError, match=words):
            probe(tmp_path, Signature(inputs, promised.outputs))


def edit_driver(directory: Path, old: str, new: str) -> None:
    path = directory / "driver/driver.py"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("[(1, 28, 28, 1)]", "[__import__('os').getcwd()]", "line .*never run"),
        ("DataType['UINT4']", "DataType['UINT99']", "UINT99.* not supported"),
        ('"ishape_packed" : [(1, 28, 28, 1)]', '"ishape_packed" : [(1, 28, 28, 9)]', "packed"),
        ('"ishape_folded" : [(1, 28, 28, 1)]', '"ishape_folded" : [(1, 28, 7, 1)]', "unequal"),
        ('"ishape_normal" : [(1, 28, 28, 1)]', '"ishape_normal" : [(0, 28)]', "with 1 first"),
        ("['idma0']", "['idma7']", "no core idma7.*idma0"),
        ("['idma0']", "['idma0', 'idma1']", "must name 1 DMA"),
        ('"number_of_external_weights" : 0', '"number_of_external_weights" : 2', "2 external"),
        ("io_shape_dict = {", "io_shape_dict = {**{}, ", "no text"),
        ("}\n", "\n", "not Python"),
    ],
)
def test_damaged_finn_packages_are_refused(tmp_path: Path, old: str, new: str, words: str) -> None:
    edit_driver(finn(tmp_path), old, new)
    with pytest.raises(LoadError, match=words):
        probe(tmp_path)


def test_the_clock_is_that_of_the_handoff_or_else_of_the_settings(tmp_path: Path) -> None:
    finn(tmp_path, plus=True, clock_mhz=150.0)
    settings = tmp_path / "driver/settings.json"
    document = json.loads(settings.read_text())

    def told(clock: Any) -> float:
        document["driver_information"]["fclk_mhz"] = clock
        settings.write_text(json.dumps(document))
        return probe(tmp_path).clock_mhz

    assert told(200.0) == 150.0, "what timing was closed for"
    hwh = tmp_path / "bitfile/finn-accel.hwh"
    hwh.write_text(hwh.read_text().replace("PCW_ACT_FPGA0", "PCW_SAID_FPGA0"))
    assert told(200) == 200.0
    assert told(None) == 100.0, "what FINN builds for unless told otherwise"
    for wrong in ("fast", True, 0, 1e9, float("nan")):
        with pytest.raises(LoadError, match="fclk_mhz is"):
            told(wrong)


def test_settings_for_other_devices_are_refused(tmp_path: Path) -> None:
    path = finn(tmp_path, plus=True) / "driver/settings.json"
    document = json.loads(path.read_text())
    for key, value, words in (
        ("platform", "alveo", "platform 'alveo'"),
        ("driver_type", "FINNLiveFIFOOverlay", "FINNLiveFIFOOverlay"),
    ):
        changed = {**document["driver_information"], key: value}
        path.write_text(json.dumps({"driver_information": changed}))
        with pytest.raises(LoadError, match=words):
            probe(tmp_path)


@given(st.text(max_size=200))
def test_arbitrary_python_is_refused_or_read(tmp_path_factory: Any, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "driver.py"
    path.write_text(f"io_shape_dict = {text}", encoding="utf-8", errors="replace")
    with contextlib.suppress(LoadError):
        literal_assignment(path, "io_shape_dict")


def test_a_folder_of_something_else_gets_a_report(tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(NotAPackage) as caught:
        probe(tmp_path)
    assert {guess.kind for guess in caught.value.guesses} == set(KINDS) - {"gatelet-rtl"}
    write_bitstream(tmp_path / "x.bit", Z2, Container({}), StreamDesign("x", Z2, 100.0))
    (tmp_path / "net.xmodel").write_bytes(b"x")
    with pytest.raises(LoadError, match=r"x\.xclbin is missing"):
        probe(tmp_path)
    (tmp_path / "net.xmodel").unlink()
    assert main(["fpga", "inspect", str(tmp_path), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False
    assert {
        "kind": "hls4ml",
        "found": [".bit file", ".hwh file"],
        "missing": ["hls4ml_config.yml"],
    } in (report["kinds"])
    (tmp_path / "y.bit").write_bytes((tmp_path / "x.bit").read_bytes())
    (tmp_path / "hls4ml_config.yml").write_text("Backend: VivadoAccelerator\n")
    with pytest.raises(LoadError, match=r"several \.bit files \(x\.bit, y\.bit\)"):
        probe(tmp_path)
    (tmp_path / "x.bit").unlink()
    with pytest.raises(LoadError, match=r"y\.hwh is missing beside it; rename x\.hwh"):
        probe(tmp_path)


def test_inspect_prints_what_fits_and_what_does_not(tmp_path: Path, capsys: Any) -> None:
    finn(tmp_path)
    assert main(["fpga", "inspect", str(tmp_path), "--board", "pynq-z2"]) == 0
    text = capsys.readouterr().out
    for words in (
        "finn-accel: finn package for part 7z020clg400 at 100 MHz",
        "in0 UINT8[-1,28,28,1], on the wire UINT4, 784 bytes per item",
        "ok   part: 7z020clg400",
        "ok   core: idma0 at 0x43C00000",
        "note shutdown managers: none",
    ):
        assert words in text
    assert main(["fpga", "inspect", str(tmp_path), "--board", "zcu104", "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    (failed,) = [check for check in document["checks"] if check["ok"] is False]
    assert "7z020clg400" in failed["detail"]
    assert KNOWN_PARTS["zcu104"] in failed["detail"]
    assert main(["fpga", "inspect", str(tmp_path / "none")]) == 2
    assert main(["fpga", "inspect", str(tmp_path), "--board", "zx81"]) == 2
    edit_driver(tmp_path, "DataType['UINT4']", "DataType['FLOAT8']")
    assert main(["fpga", "inspect", str(tmp_path)]) == 1
    assert "FLOAT8" in capsys.readouterr().err


def test_checks_are_pure_over_what_was_found(tmp_path: Path) -> None:
    package = probe(finn(tmp_path))
    found = look(package)

    def outcome(device: Device, name: str) -> bool | None:
        (check,) = [c for c in examine(package, found, device) if c.name == name]
        return check.ok

    assert outcome(Device(), "part") is None
    assert outcome(Device(part=Z2), "part") is True
    assert outcome(Device(part=KNOWN_PARTS["zcu104"]), "part") is False
    assert outcome(Device(cma_bytes=128 << 20), "memory") is True
    assert outcome(Device(cma_bytes=1024), "memory") is False
    assert outcome(Device(loaded_sha256=package.sha256), "fabric") is True
    assert outcome(Device(loaded_sha256="0" * 64), "fabric") is None
    with pytest.raises(LoadError, match="cma="):
        preflight(package, Z2, 1024)


HOSTILE = {
    "entities": '<!DOCTYPE a [<!ENTITY x "xxxx"><!ENTITY y "&x;&x;">]><a>&y;</a>',
    "unknown encoding": '<?xml version="1.0" encoding="nope"?><a/>',
    "wide encoding": '<?xml version="1.0" encoding="big5"?><a/>',
    "external": '<!DOCTYPE a SYSTEM "file:///etc/passwd"><a/>',
    "deep": "<a>" * 5000 + "</a>" * 5000,
    "cut": "<EDKSYSTEM><MODULES>",
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_hostile_xml_is_refused(tmp_path: Path, kind: str, encoding: str) -> None:
    path = tmp_path / "x.hwh"
    path.write_bytes(HOSTILE[kind].encode(encoding))
    with pytest.raises(LoadError, match=r"DOCTYPE|deeper|not valid XML"):
        read_hardware(path)


def test_the_handoff_of_a_real_board_is_read() -> None:
    import pynqmetadata

    hardware = read_hardware(Path(pynqmetadata.__file__).parent / "tests/hwhs/resizer.hwh")
    assert hardware.dma_limit("axi_dma_0") > 1000
    cell = hardware.addressed("resize_accel_0")
    assert (cell.base, cell.size) == (0x43C00000, 0x10000)
    assert cell.registers["src_rows"] == 0x10
    assert hardware.clock_mhz == pytest.approx(100, rel=0.01)
    assert hardware.shutdown_managers == ()


def test_a_kernel_of_vitis_unified_is_known_by_its_registers(tmp_path: Path) -> None:
    registers = (
        ("CTRL", 0), ("GIER", 4), ("IP_IER", 8), ("IP_ISR", 12), ("gmem_in0_1", 0x10),
        ("gmem_in0_2", 0x14), ("gmem_out0_1", 0x1C), ("gmem_out0_2", 0x20), ("batch", 0x28),
    )  # fmt: skip
    core = LiteCore("net_0", "xilinx.com:hls:net:1.0", 0xA0000000, registers)
    part = KNOWN_PARTS["zcu104"]
    design = StreamDesign("system", part, 200.0, dma=None, lite=(core,))
    folder = tmp_path / "export"
    write_bitstream(folder / "system.bit", part, Container({}), design)
    (tmp_path / "hls4ml_config.yml").write_text(
        "Backend: VitisUnified\nProjectName: net\n"
        "InputShapes:\n  x:\n  - 4\nOutputShapes:\n  y:\n  - 2\n"
    )
    package = probe(tmp_path)
    assert package.clock_mhz == 200.0
    assert isinstance(package.transport, StartedCores)
    (started,) = package.transport.cores
    assert [(p.offset, p.role) for p in started.pointers] == [(0x10, "in"), (0x1C, "out")]
    assert started.count == 0x28
    assert [port.wire.item_bytes for port in (*package.inputs, *package.outputs)] == [16, 8]
    text = encode_handoff(design).replace('NAME="batch"', 'NAME="gmem_in1_1"')
    (folder / "system.hwh").write_text(text)
    cell = read_hardware(folder / "system.hwh").addressed("net_0")
    assert started_core(cell).count is None
    with pytest.raises(LoadError, match="no core with control"):
        probe(tmp_path)


def test_settings_of_hls4ml_are_read_as_text() -> None:
    settings = parse_mappings(
        "# comment\nA:\n  B:\n    Input: ap_fixed<16,6>  # here\n    Output: 'float'\n"
        '  C: "x: y"\n'
        "L:\n- 1\n- 2\nM:\n  n:\n  - 3\n  o: 4\nT: !!python/object/apply:os.system ['true']\n"
        "Long: |\n  A: no\nA: again\nLast: 1\n"
    )
    assert settings["A"] == {"B": {"Input": "ap_fixed<16,6>", "Output": "float"}, "C": "x: y"}
    assert settings["L"] == ["1", "2"]
    assert settings["M"] == {"n": ["3"], "o": "4"}
    assert settings["T"] == "!!python/object/apply:os.system ['true']"
    assert settings["Last"] == "1"


@given(st.text(max_size=300))
def test_arbitrary_settings_are_read_without_an_error(text: str) -> None:
    assert isinstance(parse_mappings(text), dict)


def test_the_backend_takes_every_kind_and_names_the_rest() -> None:
    backend = FpgaBackend("/none", "pynq-z2", Z2)
    for kind in KINDS:
        assert backend.accepts(Variant(kind, "p")) is None
    assert "stream, finn, hls4ml" in str(backend.accepts(Variant("tflite", "p")))
    backend.close()


def test_a_dpu_package_says_what_its_runtime_needs(tmp_path: Path) -> None:
    write_bitstream(tmp_path / "dpu.bit", Z2, Container({}), StreamDesign("dpu", Z2, 100.0))
    (tmp_path / "dpu.xclbin").write_bytes(b"x")
    (tmp_path / "resnet.xmodel").write_bytes(b"x")
    package = probe(tmp_path, Signature((TensorSpec("x", "FP32", (-1, 4)),), ()))
    assert (package.kind, package.name) == ("dpu", "resnet")
    assert package.inputs[0].wire.item_bytes == 16
    assert np.prod(package.inputs[0].spec.shape[1:]) == 4


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.just(10**400)
    | st.floats()
    | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2)
    ),
    max_leaves=4,
)


def replaced(document: Any, data: st.DataObject, depth: int = 0) -> Any:
    """`document` with one value somewhere inside replaced by anything JSON can hold."""
    if depth and (
        not isinstance(document, dict | list) or not document or data.draw(st.booleans())
    ):
        return data.draw(JUNK)
    if isinstance(document, dict):
        key = data.draw(st.sampled_from(sorted(document)))
        return {**document, key: replaced(document[key], data, depth + 1)}
    place = data.draw(st.integers(0, len(document) - 1))
    return [*document[:place], replaced(document[place], data, depth + 1), *document[place + 1 :]]


@pytest.fixture(scope="module")
def package_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finn(tmp_path_factory.mktemp("fuzz"), plus=True)


@settings(max_examples=300)
@given(st.data())
def test_damaged_settings_are_refused_or_read(package_folder: Path, data: st.DataObject) -> None:
    path = package_folder / "driver/settings.json"
    original = path.read_text()
    try:
        path.write_text(json.dumps(replaced(json.loads(original), data)))
        with contextlib.suppress(LoadError):
            probe(package_folder)
    finally:
        path.write_text(original)


@settings(max_examples=200)
@given(st.data())
def test_a_damaged_handoff_is_refused_or_read(package_folder: Path, data: st.DataObject) -> None:
    path = package_folder / "bitfile/finn-accel.hwh"
    original = path.read_bytes()
    start = data.draw(st.integers(0, len(original) - 1))
    end = data.draw(st.integers(start, min(len(original), start + 400)))
    try:
        path.write_bytes(original[:start] + data.draw(st.binary(max_size=20)) + original[end:])
        with contextlib.suppress(LoadError):
            package = probe(package_folder)
            examine(package, look(package), Device(Z2))
    finally:
        path.write_bytes(original)


@settings(max_examples=200)
@given(st.data())
def test_a_damaged_description_is_refused_or_read(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp() / "described"
    folder.mkdir(exist_ok=True)
    wire = {"dtype": "int8", "scale": 0.5, "zeroPoint": 0, "elements": 4}
    port = {"name": "x", "datatype": "FP32", "shape": [-1, 4], "wire": wire}
    document = {
        "schema": 1, "kind": "stream", "name": "n", "board": "pynq-z2", "part": Z2, "clockMhz": 1.0,
        "bitstream": "n.bit", "handoff": "n.hwh", "sha256": "0" * 64, "dma": "axi_dma_0",
        "maxBatch": 4, "inputs": [port], "outputs": [port],
    }  # fmt: skip
    (folder / "overlay.json").write_text(json.dumps(replaced(document, data)))
    with contextlib.suppress(LoadError):
        preflight(probe(folder), Z2)
