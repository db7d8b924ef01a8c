"""A request against the signature of the model that is to answer it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ...accelerators.tensors import TensorSpec, shape_matches
from .errors import Code, ScoringError
from .types import InferenceRequest, Tensor

_WIDENED = ("BF16", "FP32")


def check_request(
    request: InferenceRequest,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    optional: Collection[str] = (),
) -> tuple[str, ...]:
    """The names of the outputs to compute, in the order to answer in.

    `optional`: inputs that may be missing. BF16 is taken for FP32, which holds each of its values.
    Raises ScoringError INVALID_ARGUMENT when a tensor is missing, unknown, given twice, or of
    another datatype or shape than the model's.
    """
    # One input that fits, as nearly always, is known to without more ado.
    if not _is_the_one(request.inputs, inputs):
        _check_inputs(request, inputs, optional)
    known = [spec.name for spec in outputs]
    if not request.outputs:
        return tuple(known)
    for index, name in enumerate(request.outputs):
        if name not in known:
            raise _invalid(
                f"model {request.model!r} has no output {name!r}, it has {_names(known)}"
            )
        if name in request.outputs[:index]:
            raise _invalid(f"output {name!r} is requested twice; name it once")
    return request.outputs


def check_contents(names: Sequence[str], typed: Sequence[bool], raw: int) -> bool:
    """Whether a message carries its tensors raw; `typed` says which of them have typed contents.

    A tensor without elements may come with neither. Raises ScoringError INVALID_ARGUMENT when both
    forms are mixed or the number of raw contents is not that of the tensors.
    """
    if raw == 0:
        return False
    for name, has_contents in zip(names, typed, strict=True):
        if has_contents:
            raise _invalid(
                f"tensor {name!r}: has typed contents although raw contents are given; "
                "send all tensors of a request in one form"
            )
    if raw != len(names):
        raise _invalid(
            f"{raw} raw contents for {len(names)} tensors ({_names(names)}); send one per tensor"
        )
    return True


def _is_the_one(given: Sequence[Tensor], wanted: Sequence[TensorSpec]) -> bool:
    if len(given) != 1 or len(wanted) != 1:
        return False
    tensor, spec = given[0], wanted[0]
    return (
        tensor.name == spec.name
        and tensor.datatype == spec.datatype
        and shape_matches(spec.shape, tensor.array.shape)
    )


def _check_inputs(
    request: InferenceRequest, inputs: Sequence[TensorSpec], optional: Collection[str]
) -> None:
    specs = {spec.name: spec for spec in inputs}
    seen = set()
    for tensor in request.inputs:
        spec = specs.get(tensor.name)
        if spec is None:
            raise _invalid(
                f"model {request.model!r} has no input {tensor.name!r}, it has {_names(specs)}"
            )
        if tensor.name in seen:
            raise _invalid(f"input {tensor.name!r} is given twice; send it once")
        seen.add(tensor.name)
        if tensor.datatype != spec.datatype and (tensor.datatype, spec.datatype) != _WIDENED:
            raise _invalid(
                f"input {tensor.name!r}: datatype {tensor.datatype}, expected {spec.datatype}"
            )
        if not shape_matches(spec.shape, tensor.shape):
            raise _invalid(
                f"input {tensor.name!r}: shape {list(tensor.shape)}, expected {list(spec.shape)}"
                + (" where -1 stands for any size" if -1 in spec.shape else "")
            )
    if len(seen) != len(specs):
        missing = [name for name in specs if name not in seen and name not in optional]
        if missing:
            raise _invalid(
                f"model {request.model!r} needs {len(specs) - len(optional)} inputs, found "
                f"{len(seen)}; missing: {_names(missing)}"
            )


def _names(names: Sequence[str] | dict[str, TensorSpec]) -> str:
    return ", ".join(repr(name) for name in names)


def _invalid(message: str) -> ScoringError:
    return ScoringError(Code.INVALID_ARGUMENT, message)
