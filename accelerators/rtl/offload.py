"""Choose the part of a model that runs on the core, and split the model there. Pure.

One unbroken chain of layers goes to the core: the one that saves most time by the cost model. What
comes before and after it stays ONNX, for the CPU.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from .config import CoreConfig
from .graph import Activation, Reading, Step, read_graph
from .layers import Conv, Layer, Shape, Window, multiply_accumulates, output_shape
from .program import Program, ProgramError, item_words, lower
from .quantisation import Unsupported, read_by


@dataclass(frozen=True, slots=True)
class CostModel:
    """What things take, for one request of `batch` items.

    Core: cycles at `clock_mhz`, `layer_cycles` more per layer and tile, `transfer_us` per request
    for the DMA and the process hop, one stream word per cycle, and `host_ns_per_byte` for packing.
    CPU: `cpu_ns_per_mac` and `cpu_us_per_node`. The defaults are those of one Cortex-A9 core with
    int8 kernels; measure and set your own.
    """

    batch: int = 1
    clock_mhz: float = 100.0
    layer_cycles: int = 35
    transfer_us: float = 70.0
    host_ns_per_byte: float = 1.0
    cpu_ns_per_mac: float = 0.5
    cpu_us_per_node: float = 5.0

    def core_us(self, program: Program) -> float:
        tiles = math.ceil(self.batch / program.tile)
        words = item_words(program.input, program.config) + item_words(
            program.output, program.config
        )
        per_item = sum(cost.cycles for cost in program.costs) + words
        cycles = self.batch * per_item + tiles * len(program.costs) * self.layer_cycles
        moved = self.batch * (program.in_bytes + program.out_bytes)
        return cycles / self.clock_mhz + self.transfer_us + moved * self.host_ns_per_byte / 1e3

    def cpu_us(self, macs: int, nodes: int) -> float:
        return self.batch * macs * self.cpu_ns_per_mac / 1e3 + nodes * self.cpu_us_per_node


@dataclass(frozen=True, eq=False)
class Offload:
    """A model split in three: `before` -> core -> `after`.

    `before` and `after` are ONNX files, or None when nothing is left there. The core takes the
    tensor `source` and gives `target`, both int8 in ONNX's layout; `pack` and `unpack` convert.
    `patches` is set when the host lays out the input of the first convolution (im2col).
    """

    program: Program
    source: str
    target: str
    source_shape: tuple[int, ...]
    target_shape: tuple[int, ...]
    before: bytes | None
    after: bytes | None
    core_us: float
    cpu_us: float
    patches: Patches | None = None

    @property
    def saved_us(self) -> float:
        return self.cpu_us - self.core_us

    def pack(self, tensor: npt.NDArray[np.int8]) -> npt.NDArray[np.int8]:
        """int8 [n, ...] as ONNX has it -> int8 [n, program.in_bytes]."""
        pixels = tensor.transpose(0, 2, 3, 1) if tensor.ndim == 4 else tensor
        if self.patches is not None:
            pixels = self.patches.take(pixels)
        return np.ascontiguousarray(pixels).reshape(len(tensor), -1)

    def unpack(self, items: npt.NDArray[np.int8]) -> npt.NDArray[np.int8]:
        """int8 [n, program.out_bytes] -> int8 [n, ...] as ONNX has it."""
        height, width, channels = self.program.output
        pixels = items.reshape(-1, height, width, channels).transpose(0, 3, 1, 2)
        return np.ascontiguousarray(pixels).reshape(len(items), *self.target_shape)


@dataclass(frozen=True, eq=False)
class Patches:
    """im2col: every output pixel's taps side by side, so that few channels fill whole words."""

    window: Window
    zero: int

    def take(self, images: npt.NDArray[np.int8]) -> npt.NDArray[np.int8]:
        """int8 [n, height, width, channels] -> int8 [n, out height, out width, taps]."""
        window = self.window
        count, height, width, channels = images.shape
        (kernel_h, kernel_w), (out_h, out_w) = window.kernel, window.output
        (stride_h, stride_w), (dilation_h, dilation_w) = window.stride, window.dilation
        need_h = (out_h - 1) * stride_h + (kernel_h - 1) * dilation_h + 1
        need_w = (out_w - 1) * stride_w + (kernel_w - 1) * dilation_w + 1
        framed = np.full(
            (
                count,
                max(need_h, window.pad[0] + height),
                max(need_w, window.pad[1] + width),
                channels,
            ),
            self.zero,
            np.int8,
        )
        top, left = window.pad
        framed[:, top : top + height, left : left + width] = images
        taps = [
            framed[
                :,
                ky * dilation_h : ky * dilation_h + (out_h - 1) * stride_h + 1 : stride_h,
                kx * dilation_w : kx * dilation_w + (out_w - 1) * stride_w + 1 : stride_w,
            ]
            for ky in range(kernel_h)
            for kx in range(kernel_w)
        ]
        return np.concatenate(taps, axis=3)


@dataclass(frozen=True, eq=False)
class Compilation:
    """`offload` is None when the CPU should do everything; `report` says why, line by line."""

    offload: Offload | None
    report: tuple[str, ...]


def compile_model(model: Any, config: CoreConfig, costs: CostModel | None = None) -> Compilation:
    """Split an int8 model (an onnx.ModelProto, a path or a file's bytes) between CPU and core.

    Raises ValueError when `model` is no ONNX.
    """
    costs = costs or CostModel()
    model = _load(model)
    reading = read_graph(model)
    report = [f"{name}: on the CPU, {reason}" for name, reason in reading.rejected.items()]
    best: Offload | None = None
    for chain in chains(reading, model):
        for start in range(len(chain)):
            for found in _candidates(chain[start:], model, reading, config, costs, report):
                if best is None or found.saved_us > best.saved_us:
                    best = found
    if best is None or best.saved_us <= 0:
        if best is not None:
            report.append(
                f"all on the CPU: {best.source} to {best.target} would take "
                f"{best.core_us:.0f} us on the core and {best.cpu_us:.0f} us on the CPU"
            )
        elif not reading.steps:
            report.append("all on the CPU: no int8 layer that the core could compute")
        return Compilation(None, tuple(dict.fromkeys(report)))
    chosen = _split(model, best)
    layers = ", ".join(cost.name for cost in chosen.program.costs)
    report.append(
        f"on the core: {layers}; {chosen.core_us:.0f} us instead of {chosen.cpu_us:.0f} us per "
        f"request of {costs.batch}" + (", im2col on the host" if chosen.patches else "")
    )
    return Compilation(chosen, tuple(dict.fromkeys(report)))


def chains(reading: Reading, model: Any) -> list[list[Step]]:
    """The steps that follow each other with nothing else looking at what is between them."""
    uses: dict[str, int] = defaultdict(int)
    for node in model.graph.node:
        for name in read_by(node):
            uses[name] += 1
    for value in model.graph.output:
        uses[value.name] += 1
    by_source = {step.source: step for step in reading.steps if uses[step.source] == 1}
    inner = {step.target for step in reading.steps if step.target in by_source}
    found = []
    for step in reading.steps:
        if step.source in inner:
            continue
        chain = [step]
        while (following := by_source.get(chain[-1].target)) is not None:
            chain.append(following)
        found.append(chain)
    return found


def _candidates(
    steps: Sequence[Step],
    model: Any,
    reading: Reading,
    config: CoreConfig,
    costs: CostModel,
    report: list[str],
) -> Iterator[Offload]:
    """One for every prefix of `steps` that fits the core, shortest first."""
    shape = reading.shapes.get(steps[0].source, ())
    if len(shape) not in (2, 4) or min(shape[1:]) < 1:
        report.append(f"{steps[0].name}: on the CPU, {steps[0].source} has no fixed size per item")
        return
    item: Shape = (shape[2], shape[3], shape[1]) if len(shape) == 4 else (1, 1, shape[1])
    activation = Activation(item, flat=len(shape) == 2)
    layers: list[Layer] = []
    macs = nodes = 0
    for step in steps:
        try:
            layer = step.make(activation)
            nodes += 1
            if layer is None:
                activation = Activation(activation.shape, flat=True)
                continue
            macs += multiply_accumulates(layer, activation.shape)
            activation = Activation(output_shape(layer, activation.shape), activation.flat)
            layers.append(layer)
            options = list(_programs(layers, item, config))
        except (Unsupported, ProgramError, ValueError) as error:
            report.append(f"{step.name}: chain ends here, {error}")
            return
        target = tuple(reading.shapes.get(step.target, ())[1:])
        if math.prod(target) != math.prod(activation.shape) or min(target, default=0) < 1:
            report.append(f"{step.name}: on the CPU, {step.target} has no fixed size per item")
            return
        program, patches = min(options, key=lambda option: costs.core_us(option[0]))
        yield Offload(
            program=program,
            source=steps[0].source,
            target=step.target,
            source_shape=tuple(shape[1:]),
            target_shape=target,
            before=None,
            after=None,
            core_us=costs.core_us(program),
            cpu_us=costs.cpu_us(macs, nodes),
            patches=patches,
        )


def _programs(
    layers: Sequence[Layer], item: Shape, config: CoreConfig
) -> Iterator[tuple[Program, Patches | None]]:
    first = layers[0]
    if isinstance(first, Conv) and math.prod(first.window.kernel) > 1 and item[2] < config.simd:
        out_h, out_w = first.window.output
        taps = math.prod(first.window.kernel) * item[2]
        arranged = first.weights.reshape(len(first.weights), 1, 1, taps)
        flat = Conv(
            first.name,
            Window((1, 1), (out_h, out_w)),
            arranged,
            first.bias,
            first.rescale,
            first.zero_in,
        )
        try:
            program = lower([flat, *layers[1:]], (out_h, out_w, taps), config)
        except ProgramError:
            pass
        else:
            yield program, Patches(first.window, first.zero_in)
    yield lower(layers, item, config), None


def _split(model: Any, offload: Offload) -> Offload:
    from onnx import TensorProto, helper

    def port(name: str, shape: tuple[int, ...]) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.INT8, ["batch", *shape])

    inputs = {value.name: value for value in model.graph.input}
    source, target = (
        port(offload.source, offload.source_shape),
        port(offload.target, offload.target_shape),
    )
    before = after = None
    if offload.source not in inputs:
        before = _extract(model, inputs, [source])
    outputs = list(model.graph.output)
    if [value.name for value in outputs] != [offload.target]:
        after = _extract(model, {**inputs, offload.target: target}, outputs)
    return replace(offload, before=before, after=after)


def _extract(model: Any, inputs: Mapping[str, Any], outputs: Sequence[Any]) -> bytes:
    """The part of `model` that makes `outputs` from `inputs`, as an ONNX file."""
    from onnx import helper

    initializers = {value.name: value for value in model.graph.initializer}
    producer = {name: node for node in model.graph.node for name in node.output}
    wanted = [value.name for value in outputs]
    needed: set[str] = set()
    while wanted:
        name = wanted.pop()
        if name in needed or not name:
            continue
        needed.add(name)
        if name not in inputs and name in producer:
            wanted += read_by(producer[name])
    nodes = [
        node
        for node in model.graph.node
        if any(name in needed and name not in inputs for name in node.output)
    ]
    graph = helper.make_graph(
        nodes,
        f"{model.graph.name}-part",
        [value for name, value in inputs.items() if name in needed],
        list(outputs),
        [value for name, value in initializers.items() if name in needed],
    )
    part = helper.make_model(
        graph,
        opset_imports=list(model.opset_import),
        ir_version=model.ir_version,
        functions=list(model.functions),
    )
    content: bytes = part.SerializeToString()
    return content


def _load(model: Any) -> Any:
    import onnx

    if isinstance(model, onnx.ModelProto):
        return model
    try:
        if isinstance(model, bytes):
            return onnx.load_model_from_string(model)
        return onnx.load(str(model))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{model if not isinstance(model, bytes) else 'model'}: {error}"
        ) from error
    except Exception as error:
        # protobuf's DecodeError shares no base class with anything but Exception.
        if type(error).__name__ != "DecodeError":
            raise
        raise ValueError("not an ONNX file") from error
