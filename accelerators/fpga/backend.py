"""The FPGA backend: overlay packages run by the fabric process, with the scoring side's view.

Tensors are quantised and packed here, so that the fabric process only moves bytes. Nothing here
waits past a deadline, and the fabric process may come and go: sessions turn unhealthy at once and
heal by themselves.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..backend import LoadOptions, Session, Variant
from ..errors import (
    BackendError,
    BackendUnavailable,
    DeadlineExceeded,
    InvalidTensor,
    LoadError,
)
from ..tensors import NUMPY_DTYPES, Array, TensorSpec, shape_matches
from .board import same_part
from .client import FabricClient, FabricGone, Form, Prepared, prepare
from .codec import decode, encode, is_plain
from .keeper import Keeper
from .package import KINDS, Package, Port, Signature
from .packages import probe
from .preflight import preflight
from .protocol import PAYLOAD_LIMIT, FabricSick, UnknownHandle, signature_header
from .watch import FabricWatch

_LOG = logging.getLogger(__name__)

LOAD_SECONDS = 35.0
PROBE_SECONDS = 5.0
UNLOAD_SECONDS = 5.0
DEADLINE_MARGIN_SECONDS = 0.005
"""How much earlier the fabric gives up, so that its answer still arrives in time."""
TOLERATED_TIMEOUTS = 3
"""Missed deadlines in a row after which a session is probed before it is used again."""
KEPT_BATCHES = 64
"""Sizes of batches whose requests are kept prepared."""


class FpgaBackend:
    """Runs overlay packages of all kinds through the fabric process behind `socket_path`.

    `board` and `part` are this device's, None when it has no (known) FPGA board.
    """

    def __init__(self, socket_path: str | Path, board: str | None, part: str | None) -> None:
        self._board = board.lower() if board else None
        self._part = part
        self._client = FabricClient(Path(socket_path))
        self._keeper = Keeper(self._client)
        self._watch = FabricWatch(FabricClient(Path(socket_path)))

    @property
    def name(self) -> str:
        return "fpga"

    def accepts(self, variant: Variant) -> str | None:
        if variant.kind not in KINDS:
            return f"the FPGA backend runs variants of kind {', '.join(KINDS)}, not {variant.kind}"
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

    def load(self, directory: Path, variant: Variant, options: LoadOptions) -> Session:
        """Open the package in `directory / variant.path`.

        Raises LoadError when the package does not fit the board or the fabric refuses it. A
        fabric process that is away is no error: the session is unhealthy until it is back.
        """
        if reason := self.accepts(variant):
            raise LoadError(f"{variant.path}: {reason}")
        folder = (directory / variant.path).resolve()
        # The core of an offloaded model has tensors of its own, between those of the model.
        own = variant.kind == "gatelet-rtl"
        signature = Signature() if own else Signature(options.inputs, options.outputs)
        package = probe(folder, signature, variant.kind)
        if package.board is not None and package.board != self._board:
            raise LoadError(f"{folder}: built for board {package.board}, this is a {self._board}")
        if not (package.inputs and package.outputs):
            raise LoadError(f"{folder}: needs the inputs and outputs of model.json")
        preflight(package, self._part)
        session = FpgaSession(package, signature, self._client, self._keeper)
        try:
            session.revive()
        except LoadError:
            raise
        except BackendError as error:
            session.fail(str(error))
        self._keeper.add(session)
        if not own:
            return session
        from .offloaded import OffloadedSession

        try:
            return OffloadedSession(session, folder, options)
        except BackendError:
            session.close()
            raise

    def fabric_status(self) -> Mapping[str, Any] | None:
        """What the fabric process told of itself a moment ago (see `FabricServer.status`).

        None while it is away, empty before it was asked for the first time. Never waits.
        """
        return self._watch.read()

    def close(self) -> None:
        """Stop the background threads and drop the connections."""
        self._watch.close()
        self._keeper.close()
        self._client.close()


@dataclass(frozen=True, slots=True)
class _Lane:
    """A tensor and how it lies in shared memory: as it is where it is `plain`, else encoded."""

    name: str
    spec: TensorSpec
    port: Port
    plain: bool
    form: Form
    dtype: np.dtype[np.generic]
    rank: int
    tail: tuple[int, ...]
    """All sizes but the first, which is free; () makes for the slower check."""

    @classmethod
    def of(cls, port: Port) -> _Lane:
        spec, plain = port.spec, is_plain(port)
        form = (
            Form(NUMPY_DTYPES[spec.datatype], spec.shape[1:])
            if plain
            else Form(np.dtype(np.uint8), (port.wire.item_bytes,))
        )
        tail = spec.shape[1:] if spec.shape[:1] == (-1,) and -1 not in spec.shape[1:] else ()
        dtype = NUMPY_DTYPES[spec.datatype]
        return cls(spec.name, spec, port, plain, form, dtype, len(spec.shape), tail)


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A handle in the fabric process, and requests prepared with it, by number of items."""

    handle: str
    requests: dict[int, Prepared] = field(default_factory=dict)


class FpgaSession:
    """One overlay package in the fabric process. Thread-safe."""

    def __init__(
        self, package: Package, signature: Signature, client: FabricClient, keeper: Keeper
    ) -> None:
        self._package = package
        # Not per request: a small one takes no longer than all that Python does around it.
        self._inputs = tuple(port.spec for port in package.inputs)
        self._outputs = tuple(port.spec for port in package.outputs)
        self._takes = tuple(_Lane.of(port) for port in package.inputs)
        self._gives = tuple(_Lane.of(port) for port in package.outputs)
        self._plain = tuple(
            all(lane.plain for lane in lanes) for lanes in (self._takes, self._gives)
        )
        item_bytes = (
            sum(p.wire.item_bytes for p in side) for side in (package.inputs, package.outputs)
        )
        self._largest = PAYLOAD_LIMIT // max(item_bytes)
        self._signature = signature
        self._client = client
        self._keeper = keeper
        self._loaded: _Loaded | None = None
        self._why: str | None = "not loaded into the fabric yet"
        self._timeouts = 0
        self._closed = False
        self._guard = threading.Lock()

    @property
    def backend(self) -> str:
        return "fpga"

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._outputs

    @property
    def max_batch(self) -> int:
        """Items of one DMA transfer; more than these are computed in several."""
        return min(self._package.max_batch, self._largest)

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
        why, loaded = self._why, self._loaded
        if why is not None or loaded is None:
            raise BackendUnavailable(f"{self._package.name}: {why}")
        tensors = self._checked(inputs, outputs)
        count = len(tensors[0])
        items = tensors
        if not self._plain[0]:
            items = [
                tensor if lane.plain else encode(tensor, lane.port)
                for lane, tensor in zip(self._takes, tensors, strict=True)
            ]
        margin = 0.0
        if deadline is not None:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise DeadlineExceeded(f"{self._package.name}: the deadline had passed on arrival")
            margin = min(DEADLINE_MARGIN_SECONDS, remaining / 10)
        request = loaded.requests.get(count) or self._prepared(loaded, count)
        try:
            results = self._client.infer(request, items, deadline, margin=margin)
        except DeadlineExceeded as error:
            self._timeouts += 1
            if self._timeouts >= TOLERATED_TIMEOUTS:
                self.fail(f"{self._timeouts} deadlines missed in a row, the last: {error}")
            raise
        except (FabricGone, FabricSick, UnknownHandle) as error:
            # Another thread may have seen the failure first, and the session may be back already.
            if self._loaded is loaded:
                self.fail(str(error))
            raise
        self._timeouts = 0
        if outputs is None and self._plain[1]:
            return {lane.name: result for lane, result in zip(self._gives, results)}  # noqa: B905
        return {
            lane.name: result if lane.plain else decode(result.view(np.uint8), lane.port)
            for lane, result in zip(self._gives, results, strict=True)
            if outputs is None or lane.name in outputs
        }

    def close(self) -> None:
        with self._guard:
            if self._closed:
                return
            self._closed, self._why = True, "closed"
            loaded, self._loaded = self._loaded, None
        self._unload(loaded)
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
            {
                "op": "load",
                "directory": str(self._package.directory),
                "kind": self._package.kind,
                **signature_header(self._signature),
            },
            deadline=time.monotonic() + LOAD_SECONDS,
        )
        loaded = _Loaded(str(answer.get("handle")))
        try:
            self._client.infer(
                self._prepared(loaded, 1),
                [np.zeros((1, *lane.form.shape), lane.form.dtype) for lane in self._takes],
                time.monotonic() + PROBE_SECONDS,
                margin=DEADLINE_MARGIN_SECONDS,
            )
        except BackendError:
            self._unload(loaded)
            raise
        with self._guard:
            if self._closed:
                unused: _Loaded | None = loaded
            else:
                unused, self._loaded = self._loaded, loaded
                self._why, self._timeouts = None, 0
        self._unload(unused)

    def _unload(self, loaded: _Loaded | None) -> None:
        if loaded is not None:
            # A fabric process that is away has forgotten the handle already.
            with contextlib.suppress(BackendError):
                self._client.call(
                    {"op": "unload", "handle": loaded.handle},
                    deadline=time.monotonic() + UNLOAD_SECONDS,
                )

    def _prepared(self, loaded: _Loaded, count: int) -> Prepared:
        request = prepare(
            loaded.handle,
            count,
            tuple([lane.form for lane in self._takes]),
            tuple([lane.form for lane in self._gives]),
        )
        if len(loaded.requests) >= KEPT_BATCHES:
            loaded.requests.clear()
        loaded.requests[count] = request
        return request

    def _checked(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None) -> list[Array]:
        """The tensors in the package's order. Raises InvalidTensor."""
        if len(inputs) != len(self._takes) or outputs:
            self._check_names(inputs, outputs)
        tensors = []
        for lane in self._takes:
            tensor = inputs.get(lane.name)
            if tensor is None:
                self._check_names(inputs, outputs)
                raise AssertionError
            shape = tensor.shape
            if tensor.dtype != lane.dtype or not (
                (shape[1:] == lane.tail and len(shape) == lane.rank > 1)
                or shape_matches(lane.spec.shape, shape)
            ):
                raise InvalidTensor(f"{lane.spec} expected, got {tensor.dtype} {list(shape)}")
            tensors.append(tensor)
        count = len(tensors[0])
        if len(tensors) > 1 and any(len(tensor) != count for tensor in tensors):
            raise InvalidTensor(f"{self._package.name}: the inputs have unequal batches")
        if count > self._largest:
            raise InvalidTensor(
                f"{self._package.name}: a batch of {count} is too large, send {self._largest} "
                "items at most"
            )
        return tensors

    def _check_names(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None) -> None:
        wanted = {spec.name for spec in self._inputs}
        if inputs.keys() != wanted:
            raise InvalidTensor(
                f"{self._package.name} takes {', '.join(sorted(wanted))}, not "
                f"{', '.join(sorted(inputs)) or 'nothing'}"
            )
        unknown = set(outputs or ()) - {spec.name for spec in self._outputs} if outputs else None
        if unknown:
            raise InvalidTensor(f"{self._package.name} has no output {', '.join(sorted(unknown))}")
