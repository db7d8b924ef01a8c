"""What clients see of a package's tensors: its own description, or model.json's where given."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ...errors import LoadError
from ...tensors import TensorSpec
from ..package import Port

_TEXT = ("BYTES", "BOOL")


def apply_signature(
    ports: Sequence[Port], promised: Sequence[TensorSpec], what: str, where: str
) -> tuple[Port, ...]:
    """`ports` under the names, datatypes and shapes that model.json promises.

    Tensors are matched by name where all names agree, by position otherwise; an item must have
    the same number of values on both sides. Raises LoadError; `what` is "input" or "output".
    """
    if not promised:
        return tuple(ports)
    if len(ports) != len(promised):
        raise LoadError(
            f"{where}: has {len(ports)} {what}s but model.json promises {len(promised)}"
        )
    by_name = {spec.name: spec for spec in promised}
    if set(by_name) == {port.spec.name for port in ports}:
        promised = [by_name[port.spec.name] for port in ports]
    return tuple(
        Port(check_spec(spec, port.wire.elements, what, where), port.wire)
        for port, spec in zip(ports, promised, strict=True)
    )


def check_spec(spec: TensorSpec, elements: int | None, what: str, where: str) -> TensorSpec:
    """`spec` when it can be a tensor of an overlay with that many values per item."""
    if spec.datatype in _TEXT:
        raise LoadError(f"{where}: {what} {spec}: an overlay has no {spec.datatype} tensors")
    if len(spec.shape) < 2 or spec.shape[0] != -1 or min(spec.shape[1:]) < 1:
        raise LoadError(f"{where}: {what} {spec}: the shape must be -1 followed by fixed sizes")
    count = math.prod(spec.shape[1:])
    if elements is not None and count != elements:
        raise LoadError(
            f"{where}: {what} {spec} has {count} values per item, the package has {elements}"
        )
    return spec
