"""ONNX models in numpy, for boards that have no onnxruntime (armv7l: PYNQ-Z1 and PYNQ-Z2).

For small dense, convolutional and int8 networks and scikit-learn's linear models; any other
operator is refused when the model is loaded. No threads of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import numpy_operators, numpy_quantised, numpy_windows
from .backend import LoadOptions, Variant
from .errors import (
    BackendError,
    BackendUnavailable,
    DeadlineExceeded,
    InvalidTensor,
    LoadError,
)
from .numpy_operators import Call, Kernel, Value
from .numpy_quantised import Fused, Fusion
from .onnx_file import ELEMENTS, Graph, Node, ValueInfo, read_onnx
from .tensors import NUMPY_DTYPES, Array, TensorSpec, shape_matches

NUMPY = "numpy"
_KIND = "onnx"
_KERNELS: Mapping[tuple[str, str], Kernel] = {
    **numpy_operators.KERNELS,
    **numpy_windows.KERNELS,
    **numpy_quantised.KERNELS,
}
OPERATORS = tuple(sorted(name for _, name in _KERNELS))
"""What can be run, for documents and messages."""

_OLDEST_OPSET = 7
# Results of constants alone are kept up to this many bytes per model.
_FOLDED_BYTES = 64 * 1024 * 1024
# Whatever numpy raises for arrays that do not fit an operator.
_NUMPY_ERRORS = (
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    AttributeError,
    ArithmeticError,
    MemoryError,
)


class NumpyBackend:
    """Runs variants of kind "onnx". As "cpu" it takes onnxruntime's place, and says so in `note`;
    as "numpy" it may be asked for anywhere."""

    def __init__(self, name: str = NUMPY) -> None:
        self.name = name
        self.note = "" if name == NUMPY else "numpy: onnxruntime is not installed"

    def accepts(self, variant: Variant) -> str | None:
        if variant.kind != _KIND:
            return f"numpy runs {_KIND} variants, not {variant.kind}"
        return None

    def load(self, directory: Path, variant: Variant, options: LoadOptions) -> NumpySession:
        """A session of the file. Raises LoadError, for an operator that numpy does not run too."""
        path = directory / variant.path
        reason = self.accepts(variant)
        if reason is not None:
            raise LoadError(f"{path}: {reason}")
        if not path.is_file():
            raise LoadError(f"{path}: no such file; the variant must name an .onnx file")
        return NumpySession(path.name, read_onnx(path), self.name)


@dataclass(frozen=True)
class _Step:
    """`frees`: values that no later step reads."""

    node: Node
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    run: Callable[..., Value]
    frees: tuple[str, ...] = ()


class NumpySession:
    """One ONNX model in numpy. Inputs may be read-only; outputs are fresh arrays."""

    def __init__(self, name: str, graph: Graph, backend: str = NUMPY) -> None:
        """Raises LoadError; `name` is for messages."""
        self.backend = backend
        self._name = name
        if not graph.outputs:
            raise LoadError(f"{name}: the graph has no output; export the model again")
        # Before IR version 4 every constant is listed among the inputs, and is one all the same.
        free = {info.name for info in graph.inputs} if graph.ir_version >= 4 else set()
        specs = tuple(_spec(name, "input", info) for info in graph.inputs)
        self.inputs = tuple(spec for spec in specs if spec.name not in graph.constants)
        self.optional_inputs = tuple(
            spec for spec in specs if spec.name in graph.constants and spec.name in free
        )
        self.outputs = tuple(_spec(name, "output", info) for info in graph.outputs)
        self._specs = {spec.name: spec for spec in (*self.inputs, *self.optional_inputs)}
        self._defaults = {spec.name: graph.constants[spec.name] for spec in self.optional_inputs}
        constants = {key: a for key, a in graph.constants.items() if key not in self._defaults}
        # A damaged file may hold scales that are infinite.
        with np.errstate(all="ignore"):
            self._constants, steps = _plan(name, graph, constants, self._specs, self.outputs)
        self._steps: tuple[_Step, ...] | None = steps

    @property
    def healthy(self) -> bool:
        return self._steps is not None

    def run(
        self,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
        deadline: float | None = None,
    ) -> dict[str, Array]:
        """As `Session.run`; `deadline` is looked at between operators."""
        steps = self._steps
        if steps is None:
            raise BackendUnavailable(f"{self._name}: the model was closed")
        self._check(inputs)
        known = [spec.name for spec in self.outputs]
        names = known if outputs is None else list(outputs)
        for name in names:
            if name not in known:
                raise InvalidTensor(f"{self._name}: no output {name!r}; it has {', '.join(known)}")
        values: dict[str, Value] = {**self._constants, **self._defaults, **inputs}
        # Overflow to infinity and NaN are answers here, not warnings.
        with np.errstate(all="ignore"):
            for step in steps:
                if deadline is not None and time.monotonic() > deadline:
                    raise DeadlineExceeded(
                        f"{self._name}: the time was over before {step.node} was computed"
                    )
                _compute(self._name, step, values)
                for name in step.frees:
                    del values[name]
        mine = {id(array) for array in (*inputs.values(), *self._defaults.values())}
        mine.update(id(array) for array in self._constants.values())
        return {name: _fresh(values[name], mine) for name in names}

    def _check(self, inputs: Mapping[str, Array]) -> None:
        for name, array in inputs.items():
            spec = self._specs.get(name)
            if spec is None:
                raise InvalidTensor(
                    f"{self._name}: no input {name!r}; it has {', '.join(map(str, self.inputs))}"
                )
            if array.dtype != NUMPY_DTYPES[spec.datatype]:
                raise InvalidTensor(f"{self._name}: {spec} came as {array.dtype}")
            if spec.shape and not shape_matches(spec.shape, array.shape):
                raise InvalidTensor(f"{self._name}: {spec} came with shape {list(array.shape)}")
        missing = [str(spec) for spec in self.inputs if spec.name not in inputs]
        if missing:
            raise InvalidTensor(f"{self._name}: the input {', '.join(missing)} is missing")

    def close(self) -> None:
        self._steps = None
        self._constants = {}


def _fresh(array: Value, mine: set[int]) -> Array:
    owned = array.flags.owndata and array.flags.c_contiguous and array.flags.writeable
    return array if owned and id(array) not in mine else np.array(array, order="C")


def _compute(name: str, step: _Step, values: dict[str, Value]) -> None:
    """Raises BackendError."""
    arrays = [values[one] if one else None for one in step.inputs]
    try:
        results = step.run(*arrays)
    except BackendError as error:
        raise BackendError(f"{name}: {step.node}: {error}") from error
    except _NUMPY_ERRORS as error:
        shapes = ", ".join("-" if a is None else f"{a.dtype}{list(a.shape)}" for a in arrays)
        why = " ".join(str(error).split()) or type(error).__name__
        raise BackendError(f"{name}: {step.node} failed on {shapes}: {why}") from error
    if not isinstance(results, tuple):
        results = (results,)
    for output, result in zip(step.outputs, results):  # noqa: B905
        if output:
            values[output] = np.asarray(result)


def _spec(name: str, role: str, info: ValueInfo) -> TensorSpec:
    if info.kind != "tensor":
        raise LoadError(
            f"{name}: {role} {info.name!r} is a {info.kind}, which cannot be served; export the "
            "model with plain tensors (scikit-learn: options zipmap=False)"
        )
    if not info.datatype:
        raise LoadError(f"{name}: {role} {info.name!r} has an element type that numpy has not")
    # A rank that the file leaves open is told as (), as onnxruntime tells it.
    return TensorSpec(info.name, info.datatype, info.shape or ())


def _plan(
    name: str,
    graph: Graph,
    constants: dict[str, Array],
    inputs: Mapping[str, TensorSpec],
    outputs: Sequence[TensorSpec],
) -> tuple[dict[str, Array], tuple[_Step, ...]]:
    """The constants and steps that the outputs need. Raises LoadError."""
    for node in graph.nodes:
        _check_node(name, node, graph)
    wanted = [spec.name for spec in outputs]

    def call(node: Node) -> Call:
        return Call(node, graph.opsets.get(node.domain, 1))

    constants, nodes = _folded(graph.nodes, constants, call, names={"Constant", "Identity"})
    fusion = Fusion(nodes, constants, wanted, call)
    fused = {}
    for node in nodes:
        one = fusion.fuse(node)
        if one is not None:
            fused[one.output] = one
    steps = _needed([_step(node, fused, call) for node in nodes], wanted)
    # What is left of the constants' own arithmetic is done once.
    alive = [step for step in steps if step.node.outputs and step.outputs[0] not in fused]
    more, _ = _folded([step.node for step in alive], constants, call)
    steps = _needed([step for step in steps if step.outputs[0] not in more], wanted)
    known = {*more, *inputs}
    for step in steps:
        for value in step.inputs:
            if value and value not in known:
                raise LoadError(
                    f"{name}: {step.node} reads {value!r}, which nothing before it gives; "
                    "export the model again"
                )
        known.update(step.outputs)
    for value in wanted:
        if value not in known:
            raise LoadError(f"{name}: nothing gives the output {value!r}; export the model again")
    used = {value for step in steps for value in step.inputs} | set(wanted)
    kept = {value: array for value, array in more.items() if value in used}
    return kept, _with_frees(steps, {*kept, *inputs, *wanted})


def _check_node(name: str, node: Node, graph: Graph) -> None:
    advice = "score the model where onnxruntime is installed, or export it without this operator"
    if (node.domain, node.operator) not in _KERNELS:
        if node.operator == "ZipMap":
            advice = "export the model with plain tensors (scikit-learn: options zipmap=False)"
        raise LoadError(
            f"{name}: the operator {node} is not among those that run without onnxruntime; {advice}"
        )
    opset = graph.opsets.get(node.domain, 1)
    if not node.domain and opset < _OLDEST_OPSET:
        raise LoadError(
            f"{name}: it uses operator set {opset}; without onnxruntime {_OLDEST_OPSET} and newer "
            "run: convert the model (onnx.version_converter)"
        )
    reason = _unsupported(Call(node, opset))
    if reason or node.unread:
        reason = reason or f"the attribute {', '.join(node.unread)}"
        raise LoadError(f"{name}: {node}: {reason} does not run without onnxruntime; {advice}")
    if not node.outputs or not node.outputs[0]:
        raise LoadError(f"{name}: {node} gives nothing; export the model again")


def _unsupported(call: Call) -> str:
    """What of this node has no kernel, "" for nothing."""
    node = call.node
    operator, attributes = node.operator, node.attributes
    for name, what in (("block_size", "quantisation in blocks"), ("training_mode", "training")):
        value = attributes.get(name, 0)
        if not isinstance(value, int) or value:
            return what
    most = 2 if operator == "LinearClassifier" else 1
    if any(node.outputs[most:]):
        return "the second output" if most == 1 else "the third output"
    if operator == "Cast" and call.integer("to", 0) not in ELEMENTS.keys() - {8}:
        return f"a cast to ONNX's element type {attributes.get('to')!r}"
    if operator == "Constant" and not {
        *("value", "value_float", "value_floats", "value_int", "value_ints")
    } & set(attributes):
        return "a constant of this kind"
    allowed = ("NONE", "LOGISTIC", "SOFTMAX")
    transform = attributes.get("post_transform", b"NONE")
    if not isinstance(transform, bytes) or transform.decode("latin-1") not in allowed:
        return f"post_transform {transform!r}"
    if operator == "LinearClassifier":
        names = ("classlabels_strings", "classlabels_ints", "intercepts")
        strings, integers, rows = (attributes.get(name, ()) for name in names)
        labels = strings if isinstance(strings, tuple) and strings else integers
        if not (isinstance(labels, tuple) and isinstance(rows, tuple) and labels):
            return "a classifier without labels"
        if rows and len(rows) != len(labels):
            return "a classifier with fewer scores than classes"
    return ""


def _step(node: Node, fused: Mapping[str, Fused], call: Callable[[Node], Call]) -> _Step:
    one = fused.get(node.outputs[0])
    if one is not None:
        # In the place of the last node of the pattern: its own inputs are there by then.
        return _Step(one.node, (one.source,), (one.output,), one.run)
    kernel, context = _KERNELS[node.domain, node.operator], call(node)
    return _Step(node, node.inputs, node.outputs, lambda *arrays: kernel(context, *arrays))


def _folded(
    nodes: Sequence[Node],
    constants: Mapping[str, Array],
    call: Callable[[Node], Call],
    names: set[str] | None = None,
) -> tuple[dict[str, Array], list[Node]]:
    """`constants` with the results of the nodes (of these `names`) that read nothing else, and the
    nodes that are left. A result that fails or is too large stays a node."""
    found, left, size = dict(constants), [], 0
    for node in nodes:
        chosen = names is None or node.operator in names
        if chosen and all(not value or value in found for value in node.inputs):
            values: dict[str, Value] = dict(found)
            try:
                with np.errstate(all="ignore"):
                    _compute("", _step(node, {}, call), values)
            except BackendError:
                left.append(node)
                continue
            results = {value: values[value] for value in node.outputs if value in values}
            size += sum(array.nbytes for array in results.values())
            if results and size <= _FOLDED_BYTES:
                found.update(results)
                continue
        left.append(node)
    return found, left


def _needed(steps: Sequence[_Step], outputs: Sequence[str]) -> list[_Step]:
    """Without the steps that no output depends on."""
    wanted, kept = set(outputs), []
    for step in reversed(steps):
        if wanted.intersection(step.outputs):
            wanted.update(step.inputs)
            kept.append(step)
    return kept[::-1]


def _with_frees(steps: Sequence[_Step], stay: set[str]) -> tuple[_Step, ...]:
    seen, planned = set(stay), []
    for step in reversed(steps):
        frees = []
        for value in (*step.inputs, *step.outputs):
            if value and value not in seen:
                seen.add(value)
                frees.append(value)
        planned.append(_Step(step.node, step.inputs, step.outputs, step.run, tuple(frees)))
    return tuple(planned[::-1])
