"""A DPU through Vitis AI's runtime: create_runner, execute_async, wait.

Tensors on the wire are float32; the runner's are int8 with 2 ** fix_point steps per unit. Written
from the documentation of VART (UG1414, "Programming with VART") and tried with neither a DPU nor
the runtime.
"""

from __future__ import annotations

import importlib
import threading
from typing import Any

import numpy as np

from ...errors import LoadError
from ..package import VartRunner
from ..protocol import FabricSick
from . import Workplace

_OWN_ERRORS = (RuntimeError, ValueError, TypeError, OSError)


class VartEngine:
    """The .xmodel's one DPU subgraph, an item at a time. See `Engine`."""

    warm_up = False

    def __init__(self, place: Workplace, transport: VartRunner) -> None:
        self._place = place
        self._transport = transport
        self._runner: Any = None
        self._done = threading.Event()
        self._failure: str | None = None

    def prepare(self) -> None:
        vart, xir = (importlib.import_module(name) for name in ("vart", "xir"))
        path = self._transport.xmodel
        try:
            graph = xir.Graph.deserialize(str(path))
            parts = [
                part
                for part in graph.get_root_subgraph().toposort_child_subgraph()
                if part.has_attr("device") and part.get_attr("device").upper() == "DPU"
            ]
            if len(parts) != 1:
                raise LoadError(f"{path}: {len(parts)} parts for the DPU, only one can be served")
            self._runner = vart.Runner.create_runner(parts[0], "run")
            tensors = (self._runner.get_input_tensors(), self._runner.get_output_tensors())
        except _OWN_ERRORS as error:
            raise LoadError(f"{path}: the runtime refuses it ({error})") from error
        package = self._place.package
        for ours, theirs in zip((package.inputs, package.outputs), tensors, strict=True):
            sizes = [int(np.prod(tuple(tensor.dims))) for tensor in theirs]
            if sizes != [port.wire.item_bytes // 4 for port in ours]:
                raise LoadError(f"{path}: tensors of {sizes} values, model.json has others")
        self._tensors = tensors

    def begin(self, count: int) -> None:
        self._done.clear()
        self._failure = None
        threading.Thread(target=self._run, args=(count,), name="vart", daemon=True).start()

    def finished(self) -> bool:
        if not self._done.is_set():
            return False
        if self._failure is not None:
            raise FabricSick(f"{self._transport.xmodel.name}: {self._failure}")
        return True

    def check(self, count: int) -> None:
        """The runtime gives whole tensors or an error."""

    def drained(self) -> bool:
        return True

    def stop(self) -> bool:
        return self._done.is_set()

    def diagnosis(self) -> str:
        return "the runtime does not return"

    def _run(self, count: int) -> None:
        try:
            for item in range(count):
                self._one(item)
        except _OWN_ERRORS as error:
            self._failure = str(error)
        self._done.set()

    def _one(self, item: int) -> None:
        inputs, outputs = self._tensors
        given = []
        for slot, tensor in zip(self._place.sends, inputs, strict=True):
            values = _item(slot.view, slot.item_bytes, item)
            scaled = np.rint(np.ldexp(values, tensor.get_attr("fix_point")))
            given.append(np.clip(scaled, -128, 127).astype(np.int8).reshape(tuple(tensor.dims)))
        taken = [np.empty(tuple(tensor.dims), np.int8) for tensor in outputs]
        self._runner.wait(self._runner.execute_async(given, taken))
        for slot, tensor, codes in zip(self._place.receives, outputs, taken, strict=True):
            values = np.ldexp(codes.astype(np.float32), -tensor.get_attr("fix_point"))
            _item(slot.view, slot.item_bytes, item)[:] = values.reshape(-1)
            # The result is read back from memory, as every other engine's is.
            slot.flush((item + 1) * slot.item_bytes)


def _item(view: np.ndarray[Any, np.dtype[np.uint8]], size: int, item: int) -> Any:
    return view[item * size : (item + 1) * size].view(np.float32)
