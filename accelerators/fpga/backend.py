"""The FPGA backend: overlay packages run by the fabric process, with the scoring side's view.

Tensors are quantised here, so that the fabric process only moves bytes. Nothing here waits past
a deadline, and the fabric process may come and go: sessions turn unhealthy at once and heal by
themselves.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..backend import LoadOptions, Variant
from ..errors import (
    BackendError,
    BackendUnavailable,
    DeadlineExceeded,
    InvalidTensor,
    LoadError,
)
from ..tensors import Array, TensorSpec, shape_matches
from .board import same_part
from .client import FabricClient, FabricGone
from .keeper import Keeper
from .package import OverlayPackage, preflight, read_package
from .protocol import PAYLOAD_LIMIT, FabricSick, UnknownHandle
from .wire import dequantise, quantise

_LOG = logging.getLogger(__name__)

KIND = "stream"
LOAD_SECONDS = 35.0
PROBE_SECONDS = 5.0
UNLOAD_SECONDS = 5.0
DEADLINE_MARGIN_SECONDS = 0.005
"""How much earlier the fabric gives up, so that its answer still arrives in time."""
TOLERATED_TIMEOUTS = 3
"""Missed deadlines in a row after which a session is probed before it is used again."""


class FpgaBackend:
    """Runs variants of kind "stream" through the fabric process behind `socket_path`.

    `board` and `part` are this device's, None when it has no (known) FPGA board.
    """

    def __init__(self, socket_path: str | Path, board: str | None, part: str | None) -> None:
        self._board = board.lower() if board else None
        self._part = part
        self._client = FabricClient(Path(socket_path))
        self._keeper = Keeper(self._client)

    @property
    def name(self) -> str:
        return "fpga"

    def accepts(self, variant: Variant) -> str | None:
        if variant.kind != KIND:
            return f"the FPGA backend runs variants of kind {KIND}, not {variant.kind}"
        if self._board is None:
            return "this device has no FPGA board"
        if variant.board is not None and variant.board.lower() != self._board:
            return f"built for board {variant.board}, this is a {self._board}"
        if (
            variant.part is not None
            and self._part is not None
            and not same_part(variant.part, self._part)
        ):
            return f"built for part {variant.part}, this board carries {self._part}"
        return None

    def load(self, directory: Path, variant: Variant, options: LoadOptions) -> FpgaSession:
        """Open the package in `directory / variant.path`.

        Raises LoadError when the package does not fit the board or the fabric refuses it. A
        fabric process that is away is no error: the session is unhealthy until it is back.
        """
        if reason := self.accepts(variant):
            raise LoadError(f"{variant.path}: {reason}")
        package = read_package((directory / variant.path).resolve())
        if package.board != self._board:
            raise LoadError(
                f"{package.directory}: built for board {package.board}, this is a {self._board}"
            )
        preflight(package, self._part)
        session = FpgaSession(package, self._client, self._keeper)
        try:
            session.revive()
        except LoadError:
            raise
        except BackendError as error:
            session.fail(str(error))
        self._keeper.add(session)
        return session

    def close(self) -> None:
        """Stop the background thread and drop the connections."""
        self._keeper.close()
        self._client.close()


class FpgaSession:
    """One overlay package in the fabric process. Thread-safe."""

    def __init__(self, package: OverlayPackage, client: FabricClient, keeper: Keeper) -> None:
        self._package = package
        self._client = client
        self._keeper = keeper
        self._handle: str | None = None
        self._why: str | None = "not loaded into the fabric yet"
        self._timeouts = 0
        self._closed = False
        self._guard = threading.Lock()

    @property
    def backend(self) -> str:
        return "fpga"

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return tuple(port.spec for port in self._package.inputs)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return tuple(port.spec for port in self._package.outputs)

    @property
    def max_batch(self) -> int:
        """Items of one DMA transfer; more than these are computed in several."""
        return min(self._package.max_batch, self._largest())

    @property
    def healthy(self) -> bool:
        return self._why is None

    def run(
        self,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
        deadline: float | None = None,
    ) -> dict[str, Array]:
        """See `Session.run`. Returns at the deadline at the latest, whatever the fabric does."""
        why, handle = self._why, self._handle
        if why is not None or handle is None:
            raise BackendUnavailable(f"{self._package.name}: {why}")
        source, target = self._package.inputs[0], self._package.outputs[0]
        self._check_names(inputs, outputs)
        tensor = _checked(inputs[source.spec.name], source.spec)
        largest = self._largest()
        if len(tensor) > largest:
            raise InvalidTensor(
                f"{self._package.name}: a batch of {len(tensor)} is too large, send {largest} "
                "items at most"
            )
        items = quantise(tensor, source.wire)
        if deadline is not None and time.monotonic() >= deadline:
            raise DeadlineExceeded(f"{self._package.name}: the deadline had passed on arrival")
        try:
            results = self._infer(handle, items, deadline)
        except DeadlineExceeded as error:
            self._timeouts += 1
            if self._timeouts >= TOLERATED_TIMEOUTS:
                self.fail(f"{self._timeouts} deadlines missed in a row, the last: {error}")
            raise
        except (FabricGone, FabricSick, UnknownHandle) as error:
            # Another thread may have seen the failure first, and the session may be back already.
            if self._handle == handle:
                self.fail(str(error))
            raise
        self._timeouts = 0
        if outputs is not None and not outputs:
            return {}
        return {target.spec.name: dequantise(results, target.wire, target.spec.shape)}

    def close(self) -> None:
        with self._guard:
            if self._closed:
                return
            self._closed, self._why = True, "closed"
            handle, self._handle = self._handle, None
        self._unload(handle)
        self._keeper.remove(self)

    def fail(self, why: str) -> None:
        """Take the session out of use until the background thread has revived it."""
        with self._guard:
            if self._closed:
                return
            was_healthy, self._why = self._why is None, why
        if was_healthy:
            _LOG.warning("%s: FPGA out of use: %s", self._package.name, why)
            self._keeper.wake()

    def revive(self) -> None:
        """Load into the fabric process and compute one item; healthy when both work.

        Raises BackendError.
        """
        answer = self._client.call(
            {"op": "load", "directory": str(self._package.directory)},
            deadline=time.monotonic() + LOAD_SECONDS,
        )
        handle = str(answer.header.get("handle"))
        try:
            probe = np.zeros((1, self._package.inputs[0].wire.elements), np.int8)
            self._infer(handle, probe, time.monotonic() + PROBE_SECONDS)
        except BackendError:
            self._unload(handle)
            raise
        with self._guard:
            if self._closed:
                unused: str | None = handle
            else:
                unused, self._handle = self._handle, handle
                self._why, self._timeouts = None, 0
        self._unload(unused)

    def _unload(self, handle: str | None) -> None:
        if handle is not None:
            # A fabric process that is away has forgotten the handle already.
            with contextlib.suppress(BackendError):
                self._client.call(
                    {"op": "unload", "handle": handle}, deadline=time.monotonic() + UNLOAD_SECONDS
                )

    def _infer(self, handle: str, items: Array, deadline: float | None) -> npt.NDArray[np.int8]:
        milliseconds = None
        if deadline is not None:
            remaining = max(0.0, deadline - time.monotonic())
            margin = min(DEADLINE_MARGIN_SECONDS, remaining / 10)
            milliseconds = round((remaining - margin) * 1000, 3)
        answer = self._client.call(
            {"op": "infer", "handle": handle, "deadlineMs": milliseconds},
            {self._package.inputs[0].spec.name: items},
            deadline,
        )
        port = self._package.outputs[0]
        results = answer.tensors.get(port.spec.name)
        if (
            results is None
            or results.dtype != np.int8
            or results.shape != (len(items), port.wire.elements)
        ):
            raise FabricSick(f"{self._package.name}: the fabric process gave no such output")
        return results.astype(np.int8, copy=False)

    def _largest(self) -> int:
        source, target = self._package.inputs[0], self._package.outputs[0]
        return PAYLOAD_LIMIT // max(source.wire.item_bytes, target.wire.item_bytes)

    def _check_names(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None) -> None:
        wanted = {spec.name for spec in self.inputs}
        if set(inputs) != wanted:
            raise InvalidTensor(
                f"{self._package.name} takes {', '.join(sorted(wanted))}, not "
                f"{', '.join(sorted(inputs)) or 'nothing'}"
            )
        unknown = set(outputs or ()) - {spec.name for spec in self.outputs}
        if unknown:
            raise InvalidTensor(f"{self._package.name} has no output {', '.join(sorted(unknown))}")


def _checked(tensor: Array, spec: TensorSpec) -> Array:
    if tensor.dtype != np.float32 or not shape_matches(spec.shape, tensor.shape):
        raise InvalidTensor(f"{spec} expected, got {tensor.dtype} {list(tensor.shape)}")
    return tensor
