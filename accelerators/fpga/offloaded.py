"""A model whose middle runs on gatelet's core, and the rest on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from ..backend import BatchLimited, LoadOptions, Session, Variant
from ..cpu import cpu_backend
from ..errors import InvalidTensor
from ..rtl.package import read_offload
from ..tensors import Array, TensorSpec


class Core(Session, BatchLimited, Protocol):
    """What computes the middle: the core's own package, loaded into the fabric."""


class OffloadedSession:
    """before.onnx -> core -> after.onnx; see `rtl.package`. Thread-safe. Raises LoadError."""

    def __init__(self, core: Core, directory: Path, options: LoadOptions) -> None:
        halves = read_offload(directory)
        self._core = core
        self._offload = halves.offload
        cpu = cpu_backend(options.threads)
        self._before, self._after = (
            cpu.load(directory, Variant("onnx", part.name), options) if part is not None else None
            for part in (halves.before, halves.after)
        )
        offload = halves.offload
        self._source = TensorSpec(offload.source, "INT8", (-1, *offload.source_shape))
        self._target = TensorSpec(offload.target, "INT8", (-1, *offload.target_shape))
        self.inputs = _specs(self._before, self._after, self._source, self._target)
        self.outputs = self._after.outputs if self._after is not None else (self._target,)

    @property
    def backend(self) -> str:
        return "fpga"

    @property
    def max_batch(self) -> int:
        """Items of one transfer; more than these are computed in several."""
        return self._core.max_batch

    @property
    def healthy(self) -> bool:
        return self._core.healthy

    def run(
        self,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
        deadline: float | None = None,
    ) -> dict[str, Array]:
        """See `Session.run`."""
        wanted = {spec.name for spec in self.inputs}
        if set(inputs) != wanted:
            raise InvalidTensor(
                f"the model takes {', '.join(sorted(wanted))}, not "
                f"{', '.join(sorted(inputs)) or 'nothing'}"
            )
        source = self._source.name
        if self._before is not None:
            given = {spec.name: inputs[spec.name] for spec in self._before.inputs}
            tensor = self._before.run(given, [source], deadline)[source]
        else:
            tensor = inputs[source]
            if tensor.dtype != np.int8 or tensor.shape[1:] != self._source.shape[1:]:
                raise InvalidTensor(
                    f"{self._source} expected, got {tensor.dtype} {list(tensor.shape)}"
                )
        packed = self._offload.pack(tensor.view(np.int8))
        name, result = self._core.inputs[0].name, self._core.outputs[0].name
        items = self._core.run({name: packed}, None, deadline)[result]
        middle = self._offload.unpack(items.view(np.int8))
        if self._after is None:
            return {self._target.name: middle}
        needed = {self._target.name: middle, **inputs}
        feeds = {spec.name: needed[spec.name] for spec in self._after.inputs}
        return self._after.run(feeds, outputs, deadline)

    def close(self) -> None:
        """Give back the core and the sessions of the CPU. Idempotent."""
        self._core.close()
        for part in (self._before, self._after):
            if part is not None:
                part.close()


def _specs(
    before: Session | None, after: Session | None, source: TensorSpec, target: TensorSpec
) -> tuple[TensorSpec, ...]:
    found = {spec.name: spec for spec in (before.inputs if before is not None else (source,))}
    for spec in after.inputs if after is not None else ():
        if spec.name != target.name:
            found.setdefault(spec.name, spec)
    return tuple(found.values())
