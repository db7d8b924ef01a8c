"""The seam between the scoring process and whatever computes a model.

A `Backend` turns one variant of a model (an ONNX file, an overlay package) into a `Session`; a
`Session` answers requests. Both are used from several threads: `run` must be thread-safe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from .signature import TensorSpec

if TYPE_CHECKING:
    from .tensors import Array


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to run a model: `kind` names the format ("onnx", "stream", "finn", ...).

    `path` is relative to the model directory. `board` and `part` are set for FPGA variants
    (board name as PYNQ reports it, in lower case; part as in the .bit header).
    """

    kind: str
    path: str
    board: str | None = None
    part: str | None = None


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How a session may use the device. `threads` is the intra-op thread count, 0 for automatic.

    `inputs` and `outputs` are the model's signature, for variants that do not hold their own.
    """

    threads: int = 0
    extra: Mapping[str, str] = field(default_factory=dict)
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()


class Session(Protocol):
    """A loaded model on one backend."""

    @property
    def backend(self) -> str:
        """ "cpu" or "fpga"."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]: ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]: ...

    @property
    def healthy(self) -> bool:
        """Whether `run` is worth calling now; False while an accelerator is sick or away."""

    def run(
        self,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
        deadline: float | None = None,
    ) -> dict[str, Array]:
        """Compute `outputs` (all when None) from `inputs`, keyed by tensor name.

        Inputs are arrays of the spec's dtype and shape (BYTES: object arrays of `bytes`).
        `deadline` is a value of `time.monotonic()`.

        Raises InvalidTensor, BackendUnavailable or DeadlineExceeded; any other BackendError means
        that the model itself failed on this input.
        """

    def close(self) -> None:
        """Give back what the session holds. Idempotent."""


@runtime_checkable
class BatchLimited(Protocol):
    """A session that computes a bounded number of items in one go."""

    @property
    def max_batch(self) -> int: ...


@runtime_checkable
class Concurrent(Protocol):
    """A session whose `run` mostly waits for somebody else: `concurrency` calls at a time are as
    good as one per core elsewhere."""

    @property
    def concurrency(self) -> int: ...


@runtime_checkable
class Waiting(Protocol):
    """A session whose `run` may have to wait before it computes, for memory say: never to be called
    from an event loop."""

    @property
    def may_wait(self) -> bool: ...


@runtime_checkable
class WithOptionalInputs(Protocol):
    """A session whose model has defaults for some more inputs."""

    @property
    def optional_inputs(self) -> tuple[TensorSpec, ...]: ...


@runtime_checkable
class Remarked(Protocol):
    """A backend that stands in for another one of its name, and says why; "" when it does not."""

    @property
    def note(self) -> str: ...


class Backend(Protocol):
    """A kind of compute device that can host models."""

    @property
    def name(self) -> str:
        """ "cpu" or "fpga": the word used in `SCORING_BACKENDS`."""

    def accepts(self, variant: Variant) -> str | None:
        """None when this backend can run `variant` on this device, else the reason why not."""

    def load(self, directory: Path, variant: Variant, options: LoadOptions) -> Session:
        """Open `directory / variant.path`. Raises LoadError or BackendUnavailable."""
