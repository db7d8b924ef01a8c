"""The CPU backend: onnxruntime on ONNX files, imported when the first model is loaded."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .backend import Backend, LoadOptions, Variant
from .errors import BackendError, BackendUnavailable, InvalidTensor, LoadError
from .tensors import Array, TensorSpec

ONNX_KIND = "onnx"

_DATATYPES = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
}

# Below this size of model, splitting an operator over threads costs more than it saves: on two
# cores, two threads were slower than one for an MLP, a small CNN and a MobileNet.
_THREADED_BYTES = 32 * 1024 * 1024
_MOST_AUTOMATIC_THREADS = 4
_LOG_FATAL = 4


def onnxruntime_is_installed() -> bool:
    try:
        return importlib.util.find_spec("onnxruntime") is not None
    except ImportError:
        return False


def cpu_backend(threads: int = 0) -> Backend:
    """What is "cpu" here: onnxruntime, or numpy where that is not installed (armv7l)."""
    if onnxruntime_is_installed():
        return CpuBackend(threads)
    from .numpy_backend import NumpyBackend

    return NumpyBackend("cpu")


class CpuBackend:
    """Runs variants of kind "onnx". `threads`: intra-op threads where a model does not say."""

    name = "cpu"

    def __init__(self, threads: int = 0) -> None:
        self._threads = threads

    def accepts(self, variant: Variant) -> str | None:
        if variant.kind != ONNX_KIND:
            return f"the cpu runs {ONNX_KIND} variants, not {variant.kind}"
        if not onnxruntime_is_installed():
            return "onnxruntime is not installed here (it has no wheels for armv7l)"
        return None

    def load(self, directory: Path, variant: Variant, options: LoadOptions) -> CpuSession:
        """An onnxruntime session on the CPU provider. Raises LoadError."""
        reason = self.accepts(variant)
        path = directory / variant.path
        if reason is not None:
            raise LoadError(f"{path}: {reason}")
        if not path.is_file():
            raise LoadError(f"{path}: no such file; the variant must name an .onnx file")
        # Read by onnxruntime when its library is loaded.
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
        threads = options.threads or self._threads or automatic_threads(path.stat().st_size)
        try:
            try:
                session = _open(path, threads, exact=True)
            except _onnxruntime_errors() as error:
                # Some int8 operators have no kernel in the exact form: then as they are.
                if "find kernel" not in str(error).lower():
                    raise
                session = _open(path, threads, exact=False)
        except _onnxruntime_errors() as error:
            why = _reason(error).replace(str(path), path.name)
            if "protobuf parsing failed" in why.lower():
                why = "it is damaged or cut short; export the model and package it again"
            raise LoadError(f"onnxruntime cannot load {path.name}: {why}") from error
        return CpuSession(path, session)


def _open(path: Path, threads: int, *, exact: bool) -> Any:
    """An `InferenceSession`. Raises onnxruntime's errors."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.inter_op_num_threads = 1
    # Spinning helpers would take a core from the other models.
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Without it the int8 kernels for x86 CPUs that lack VNNI let 16-bit sums saturate, and the
    # CPU would answer other bits than the fabric it stands in for.
    settings.add_session_config_entry("session.x64quantprecision", "1" if exact else "0")
    # Its errors come back as exceptions; a client's bad input must not fill the log.
    settings.log_severity_level = _LOG_FATAL
    return onnxruntime.InferenceSession(
        str(path), sess_options=settings, providers=["CPUExecutionProvider"]
    )


class CpuSession:
    """One ONNX model in onnxruntime. Inputs may be read-only; outputs are fresh arrays."""

    backend = "cpu"

    def __init__(self, path: Path, session: Any) -> None:
        self._path = path
        self._session: Any = session
        self._inputs = tuple(_spec(path, "input", node) for node in session.get_inputs())
        self._outputs = tuple(_spec(path, "output", node) for node in session.get_outputs())
        self._optional = tuple(
            _spec(path, "input", node) for node in session.get_overridable_initializers()
        )
        self._names = [spec.name for spec in self._outputs]
        everything = (*self._inputs, *self._optional)
        self._bytes_inputs = [spec.name for spec in everything if spec.datatype == "BYTES"]
        self._errors = _onnxruntime_errors()

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._inputs

    @property
    def optional_inputs(self) -> tuple[TensorSpec, ...]:
        """Inputs that the graph has a default for: initializers that a request may override."""
        return self._optional

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """A shape of () also stands for a rank that the file leaves open."""
        return self._outputs

    @property
    def healthy(self) -> bool:
        return self._session is not None

    def run(
        self,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
        deadline: float | None = None,
    ) -> dict[str, Array]:
        """As `Session.run`. onnxruntime cannot be interrupted: `deadline` is the caller's to keep
        before the call."""
        session = self._session
        if session is None:
            raise BackendUnavailable(f"{self._path}: the model was closed")
        feed = dict(inputs)
        for name in self._bytes_inputs:
            if name in feed:
                feed[name] = _to_strings(name, feed[name])
        names = self._names if outputs is None else list(outputs)
        try:
            results = session.run(names, feed)
        except self._errors as error:
            kind = type(error).__name__
            # ValueError: an input is missing. InvalidArgument: a tensor that the graph refuses.
            fault = InvalidTensor if kind in ("InvalidArgument", "ValueError") else BackendError
            raise fault(f"{self._path.name}: {_reason(error)}") from error
        return {
            name: _to_bytes(result) if result.dtype == np.object_ else result
            for name, result in zip(names, results, strict=True)
        }

    def close(self) -> None:
        self._session = None


def automatic_threads(model_bytes: int) -> int:
    """Intra-op threads for a model of this file size on this machine."""
    if model_bytes < _THREADED_BYTES:
        return 1
    return max(1, min(_MOST_AUTOMATIC_THREADS, (os.cpu_count() or 1) // 2))


def _spec(path: Path, role: str, node: Any) -> TensorSpec:
    datatype = _DATATYPES.get(node.type)
    if datatype is None:
        raise LoadError(
            f"{path}: {role} {node.name!r} is a {node.type}, which cannot be served; export the "
            "model with plain tensors (scikit-learn: options zipmap=False)"
        )
    return TensorSpec(
        node.name, datatype, tuple(size if isinstance(size, int) else -1 for size in node.shape)
    )


def _to_strings(name: str, array: Array) -> Array:
    # onnxruntime would take str(element), which turns b"a" into "b'a'".
    strings = np.empty(array.size, np.object_)
    for index, element in enumerate(array.ravel().tolist()):
        try:
            strings[index] = element.decode("utf-8")
        except (AttributeError, UnicodeDecodeError) as error:
            raise InvalidTensor(
                f"{name}: element {index} is not UTF-8 text, which this model needs ({error})"
            ) from None
    return strings.reshape(array.shape)


def _to_bytes(array: Array) -> Array:
    encoded = np.empty(array.size, np.object_)
    for index, element in enumerate(array.ravel().tolist()):
        encoded[index] = element.encode("utf-8")
    return encoded.reshape(array.shape)


def _onnxruntime_errors() -> tuple[type[Exception], ...]:
    """What onnxruntime raises: its exceptions share no base class but Exception."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    own = (value for value in vars(state).values() if isinstance(value, type))
    return (
        *(kind for kind in own if issubclass(kind, Exception)),
        *(ValueError, TypeError, RuntimeError, MemoryError),
    )


def _reason(error: Exception) -> str:
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : ", "", str(error))
    # Source paths of onnxruntime's build say nothing to a user.
    text = re.sub(r"/onnxruntime_src/\S+ ", "", text)
    return " ".join(text.split()) or type(error).__name__
