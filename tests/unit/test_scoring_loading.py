from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from gatelet.accelerators.backend import LoadOptions, Variant
from gatelet.accelerators.cpu import CpuBackend, CpuSession, automatic_threads
from gatelet.accelerators.errors import BackendUnavailable, LoadError
from gatelet.accelerators.tensors import Array, TensorSpec
from gatelet.agent.scoring.errors import InstanceRefused, InstanceUnavailable
from gatelet.agent.scoring.instances import State
from gatelet.agent.scoring.loading import InstanceOptions, Loaded, compare

from ..bench import onnx_models

OVERLAY = {"kind": "finn", "path": "overlays/pynq-z2", "board": "pynq-z2"}
FOREIGN = {"kind": "finn", "path": "overlays/zcu104", "board": "zcu104"}


class FakeFpga:
    """Runs a "finn" variant for pynq-z2 by asking onnxruntime, scaled by `distortion`."""

    name = "fpga"

    def __init__(self) -> None:
        self.away = False
        self.distortion = 1.0

    def accepts(self, variant: Variant) -> str | None:
        if variant.kind != "finn":
            return f"the fpga runs finn variants, not {variant.kind}"
        if variant.board != "pynq-z2":
            return f"overlay is for board {variant.board}, this device is pynq-z2"
        return None

    def load(self, directory: Path, variant: Variant, options: LoadOptions) -> FakeFpgaSession:
        if self.away:
            raise BackendUnavailable("the fabric process does not answer")
        real = CpuBackend().load(directory, Variant("onnx", "onnx/model.onnx"), options)
        return FakeFpgaSession(self, real)


class FakeFpgaSession:
    backend = "fpga"
    healthy = True

    def __init__(self, backend: FakeFpga, real: CpuSession) -> None:
        self._fpga = backend
        self._real = real
        self.inputs: tuple[TensorSpec, ...] = real.inputs
        self.outputs: tuple[TensorSpec, ...] = real.outputs

    def run(
        self,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
        deadline: float | None = None,
    ) -> dict[str, Array]:
        if self._fpga.away:
            raise BackendUnavailable("the fabric process does not answer")
        results = self._real.run(inputs, outputs, deadline)
        return {name: array * np.float32(self._fpga.distortion) for name, array in results.items()}  # type: ignore[operator]

    def close(self) -> None:
        self._real.close()


SAMPLE = {
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}],
    "outputs": [{"name": "y", "datatype": "FP32", "shape": [1, 4], "data": [2, 4, 6, 8]}],
}


def loaded(
    folder: Path, fpga: FakeFpga | None = None, options: InstanceOptions | None = None
) -> Loaded:
    backends = {"cpu": CpuBackend(), **({} if fpga is None else {"fpga": fpga})}
    return Loaded(folder, options or InstanceOptions(), backends, "i")  # type: ignore[arg-type]


def names(one: Loaded) -> list[str]:
    return [member.name for member in one.instance.members]


def test_every_fitting_backend_opens_its_variant_fpga_first(tmp_path: Path) -> None:
    folder = onnx_models.scale_folder(tmp_path, 2, more_variants=[OVERLAY])
    one = loaded(folder, FakeFpga())
    assert names(one) == ["fpga", "cpu"]
    assert one.notes == ()
    assert one.instance.platform == "fpga_finn"
    assert one.instance.state is State.LOADED
    only_cpu = loaded(folder)
    assert names(only_cpu) == ["cpu"]
    assert only_cpu.instance.platform == "onnxruntime_onnx"


def test_the_preference_decides_order_and_choice(tmp_path: Path) -> None:
    folder = onnx_models.scale_folder(tmp_path, 2, more_variants=[OVERLAY])
    assert names(loaded(folder, FakeFpga(), InstanceOptions(("cpu", "fpga")))) == ["cpu", "fpga"]
    only = loaded(folder, FakeFpga(), InstanceOptions(("cpu",)))
    assert names(only) == ["cpu"]
    absent = loaded(folder, None, InstanceOptions(("fpga", "cpu")))
    assert names(absent) == ["cpu"]
    assert "fpga: this device does not offer it (it offers cpu)" in absent.notes


def test_a_variant_for_another_board_is_left_out_with_a_note(tmp_path: Path) -> None:
    folder = onnx_models.scale_folder(tmp_path, 2, more_variants=[FOREIGN])
    one = loaded(folder, FakeFpga())
    assert names(one) == ["cpu"]
    assert any("overlay is for board zcu104, this device is pynq-z2" in note for note in one.notes)


def test_no_variant_at_all_lists_each_and_why(tmp_path: Path) -> None:
    folder = onnx_models.scale_folder(tmp_path, 2, more_variants=[FOREIGN])
    (folder / "onnx/model.onnx").write_bytes(b"not onnx")
    with pytest.raises(InstanceRefused) as caught:
        loaded(folder, FakeFpga())
    message = str(caught.value)
    assert "no variant can run on this device" in message
    assert "overlay is for board zcu104, this device is pynq-z2" in message
    assert "cpu: onnxruntime cannot load model.onnx: it is damaged" in message
    with pytest.raises(InstanceRefused, match="does not offer it"):
        loaded(folder, None, InstanceOptions(("fpga",)))


def test_an_absent_accelerator_is_not_the_models_fault(tmp_path: Path) -> None:
    folder = onnx_models.scale_folder(tmp_path, 2, more_variants=[OVERLAY])
    fpga = FakeFpga()
    fpga.away = True
    with pytest.raises(InstanceUnavailable, match="does not answer"):
        loaded(folder, fpga, InstanceOptions(("fpga",)))


def test_a_backend_that_was_away_joins_later_in_its_place(tmp_path: Path) -> None:
    folder = onnx_models.scale_folder(tmp_path, 2, more_variants=[OVERLAY], sample=SAMPLE)
    fpga = FakeFpga()
    fpga.away = True
    one = loaded(folder, fpga)
    assert names(one) == ["cpu"]
    assert one.notes == ("fpga: the fabric process does not answer",)
    one.probe()
    assert one.retry_missing() == []
    assert one.missing
    fpga.away = False
    assert one.retry_missing() == ["fpga"]
    assert names(one) == ["fpga", "cpu"]
    assert one.notes == ()
    assert not one.missing


def test_a_late_backend_with_wrong_answers_does_not_join(tmp_path: Path) -> None:
    folder = onnx_models.scale_folder(tmp_path, 2, more_variants=[OVERLAY], sample=SAMPLE)
    fpga = FakeFpga()
    fpga.away = True
    one = loaded(folder, fpga)
    one.probe()
    fpga.away, fpga.distortion = False, 3.0
    assert one.retry_missing() == []
    assert names(one) == ["cpu"]
    assert "output 'y' of the sample" in one.notes[0]
    assert one.instance.state is State.READY
    assert not one.missing


def test_the_probe_compares_with_the_sample(tmp_path: Path) -> None:
    good = loaded(onnx_models.scale_folder(tmp_path / "good", 2, sample=SAMPLE))
    good.probe()
    assert (good.instance.state, good.instance.error) == (State.READY, "")
    bad = loaded(onnx_models.scale_folder(tmp_path / "bad", 2.01, sample=SAMPLE))
    bad.probe()
    assert bad.instance.state is State.FAILED
    assert "cpu (onnx onnx/model.onnx): output 'y' of the sample: off by up to 0.04" in (
        bad.instance.error
    )


def test_one_backend_with_wrong_answers_fails_the_probe(tmp_path: Path) -> None:
    folder = onnx_models.scale_folder(tmp_path, 2, more_variants=[OVERLAY], sample=SAMPLE)
    fpga = FakeFpga()
    fpga.distortion = 1.5
    one = loaded(folder, fpga)
    one.probe()
    assert one.instance.state is State.FAILED
    assert one.instance.error.startswith("fpga (finn overlays/pynq-z2): output 'y'")


def test_a_backend_that_is_away_does_not_fail_the_probe_of_the_others(tmp_path: Path) -> None:
    folder = onnx_models.scale_folder(tmp_path, 2, more_variants=[OVERLAY])
    fpga = FakeFpga()
    one = loaded(folder, fpga)
    fpga.away = True
    one.probe()
    assert one.instance.state is State.READY
    # It is back, but nothing is known of its answers: it waits for its own probe.
    fpga.away = False
    assert not one.instance.members[0].allowed()
    assert one.instance.members[0].report().detail == "not probed yet"
    assert one.missing
    assert one.retry_missing() == ["fpga"]
    assert one.instance.members[0].allowed()
    assert not one.missing
    alone = loaded(onnx_models.scale_folder(tmp_path, 2, more_variants=[OVERLAY]))
    alone.instance.members[0].session.close()
    with pytest.raises(InstanceUnavailable, match="no backend could be probed"):
        alone.probe()
    assert alone.instance.state is State.LOADED


def test_a_backend_that_comes_back_with_wrong_answers_is_dropped(tmp_path: Path) -> None:
    folder = onnx_models.scale_folder(tmp_path, 2, more_variants=[OVERLAY], sample=SAMPLE)
    fpga = FakeFpga()
    one = loaded(folder, fpga)
    fpga.away = True
    one.probe()
    fpga.away, fpga.distortion = False, 3.0
    assert one.retry_missing() == []
    assert names(one) == ["cpu"]
    assert one.notes[0].startswith("fpga (finn overlays/pynq-z2): output 'y'")
    assert not one.missing


def test_without_a_sample_zeros_are_run_and_shapes_are_checked(tmp_path: Path) -> None:
    one = loaded(onnx_models.identity_folder(tmp_path / "text", "BYTES"))
    one.probe()
    assert one.instance.state is State.READY
    # The file cannot tell the width of y, model.json promises another one.
    from onnx import helper

    content = onnx_models.build(
        [helper.make_node("NonZero", ["x"], ["y"])],
        [("x", "FP32", (-1, 2))],
        [("y", "INT64", (-1, -1))],
    )
    folder = onnx_models.write_folder(
        tmp_path / "wide", content, [("x", "FP32", (-1, 2))], [("y", "INT64", (-1, 3))]
    )
    wide = loaded(folder)
    wide.probe()
    assert wide.instance.state is State.FAILED
    assert "output y INT64[-1,3] came as int64 [2, 0]" in wide.instance.error


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        ([("q", "FP32", (-1, 4))], None, r"lacks the input x FP32\[-1,4\]"),
        ([("x", "FP64", (-1, 4))], None, r"input x FP64\[-1,4\] is x FP32\[-1,4\] there"),
        ([("x", "FP32", (-1, 5))], None, r"input x FP32\[-1,5\] is x FP32\[-1,4\] there"),
        ([("x", "FP32", (4,))], None, r"input x FP32\[4\] is x FP32\[-1,4\] there"),
        (None, [("w", "FP32", (-1, 4))], r"output w FP32\[-1,4\] is not among y FP32\[-1,4\], tot"),
    ],
)
def test_a_signature_that_does_not_fit_names_both(
    tmp_path: Path,
    inputs: list[onnx_models.Spec] | None,
    outputs: list[onnx_models.Spec] | None,
    message: str,
) -> None:
    folder = onnx_models.write_folder(
        tmp_path,
        onnx_models.scale(2),
        inputs or [("x", "FP32", (-1, 4))],
        outputs or [("y", "FP32", (-1, 4))],
    )
    with pytest.raises(InstanceRefused, match=message):
        loaded(folder)


def test_model_json_may_hide_outputs_and_fix_sizes(tmp_path: Path) -> None:
    folder = onnx_models.write_folder(
        tmp_path, onnx_models.scale(2), [("x", "FP32", (1, 4))], [("total", "FP32", (1, 1))]
    )
    one = loaded(folder)
    one.probe()
    assert one.instance.state is State.READY


@pytest.mark.parametrize("damage", ["no model.json", "no sample", "bad sample"])
def test_a_broken_folder_is_refused(tmp_path: Path, damage: str) -> None:
    folder = onnx_models.scale_folder(tmp_path, 2, sample=SAMPLE)
    if damage == "no model.json":
        (folder / "model.json").unlink()
    elif damage == "no sample":
        (folder / "sample.json").unlink()
    else:
        (folder / "sample.json").write_text(json.dumps({"inputs": []}))
    with pytest.raises(InstanceRefused):
        loaded(folder)


def test_compare_allows_quantised_answers_on_the_fabric_only() -> None:
    want = np.array([1.0, 2.0], np.float32)
    near = want * np.float32(1.03)
    assert compare(near, want, "fpga") is None
    assert compare(near, want, "cpu") is not None
    assert compare(want[:1], want, "cpu") == "shape [1], expected [2]"
    whole = np.array([1, 2])
    assert compare(np.array([1, 3]), whole, "fpga") == "1 of 2 elements differ"
    half = np.array([1.0], np.float16)
    assert compare(half * np.float16(1.005), half, "cpu") is None


def test_the_cpu_says_why_it_cannot_load(tmp_path: Path) -> None:
    cpu = CpuBackend()
    variant = Variant("onnx", "onnx/model.onnx")
    with pytest.raises(LoadError, match=r"onnx/model\.onnx: no such file"):
        cpu.load(tmp_path, variant, LoadOptions())
    assert cpu.accepts(Variant("finn", "o")) == "the cpu runs onnx variants, not finn"


def test_small_models_run_on_one_thread() -> None:
    assert automatic_threads(1_000_000) == 1
    assert automatic_threads(1_000_000_000) >= 1
