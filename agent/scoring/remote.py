"""A model in a container, over the Open Inference Protocol on a Unix socket."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc
import numpy as np

from ...accelerators.errors import (
    BackendError,
    BackendUnavailable,
    DeadlineExceeded,
    InvalidTensor,
)
from ...accelerators.tensors import NUMPY_DTYPES, Array, TensorSpec, shape_matches
from ...protos import open_inference_pb2 as oip
from ...protos.inference import InferenceStub
from .errors import InstanceRefused, InstanceUnavailable, ScoringError
from .oip_messages import decode_metadata, decode_response, encode_request
from .types import InferenceRequest, ModelMetadata, Tensor

log = logging.getLogger(__name__)

T = TypeVar("T")

CALL_SECONDS = 2.0
"""For everything but inference."""

CHECK_SECONDS = 1.0
AWAY_CHECK_SECONDS = 0.2

_SILENT_CHECKS = 2
_LONGEST_SECONDS = 300.0
_CONCURRENCY = 8
_MAX_ANSWER_BYTES = 64 * 1024 * 1024
_OPTIONS = [
    ("grpc.max_receive_message_length", _MAX_ANSWER_BYTES),
    ("grpc.max_send_message_length", -1),
    # A container is back within a second; grpc's own pause grows to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    # Not the connection of an earlier instance at the same path.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
]
_AWAY = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.CANCELLED,
)


@dataclass(frozen=True, slots=True)
class Served:
    """Where a container serves a model: the socket, and its name there ("": its only one)."""

    socket: Path
    model: str

    def __str__(self) -> str:
        return f"{self.model or 'the model'} behind {self.socket}"


class RemoteSession:
    """`Session` of a served model. Thread-safe; connects again by itself, for as long as it lives.

    `otherwise`: the model's name where none is given and the server does not list its models.
    Raises InstanceUnavailable when nothing answers yet or the model is not there yet, and
    InstanceRefused for a signature that cannot be served.
    """

    backend = "container"
    concurrency = _CONCURRENCY

    def __init__(self, served: Served, otherwise: str) -> None:
        self._where = str(served)
        self._channel = grpc.insecure_channel(f"unix:{served.socket}", options=_OPTIONS)
        self._stub = InferenceStub(self._channel)
        self._closing = threading.Event()
        self._ready = True
        self._silent = 0
        self._watch: threading.Thread | None = None
        try:
            self.model = served.model or self._only_model(otherwise)
            self.metadata = self._describe()
            _check_datatypes(self.metadata, self._where)
        except BaseException:
            # Nobody gets this object, so nobody else would close it. It is raised again.
            self._channel.close()
            raise
        self._outputs = {spec.name: spec for spec in self.metadata.outputs}

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self.metadata.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self.metadata.outputs

    @property
    def healthy(self) -> bool:
        """What the container said of itself a second ago, once `watch` was called."""
        return self._ready and not self._closing.is_set()

    def check(self) -> str | None:
        """Why the model cannot be asked now (not ready, or another than it was); None when it can.

        Blocks for CALL_SECONDS at most.
        """
        try:
            request = oip.ModelReadyRequest(name=self.model)
            if not self._call(self._stub.model_ready, request).ready:
                return f"{self._where} is not ready"
            # A new container at the same socket may serve something else.
            if not self._ready and not _same_signature(self._describe(), self.metadata):
                return f"{self._where} has another signature than when it was loaded"
        except InstanceUnavailable as error:
            return str(error)
        return None

    def watch(self) -> None:
        """Keep `healthy` true to what the container says, from now on. Idempotent."""
        if self._watch is None:
            self._watch = threading.Thread(target=self._look, name="container check", daemon=True)
            self._watch.start()

    def run(
        self,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
        deadline: float | None = None,
    ) -> dict[str, Array]:
        """As `Session.run`. A call without a deadline ends after five minutes."""
        left = _LONGEST_SECONDS if deadline is None else deadline - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded(f"no time was left to ask {self._where}")
        datatypes = {spec.name: spec.datatype for spec in self.metadata.inputs}
        request = InferenceRequest(
            model=self.model,
            inputs=tuple(
                Tensor(name, datatypes[name], np.ascontiguousarray(array).reshape(array.shape))
                for name, array in inputs.items()
            ),
            outputs=tuple(outputs or ()),
        )
        try:
            message = self._stub.model_infer(encode_request(request), min(left, _LONGEST_SECONDS))
        except (grpc.RpcError, ValueError) as error:
            raise self._failure(error) from error
        try:
            answer = {tensor.name: tensor for tensor in decode_response(message).outputs}
        except ScoringError as error:
            raise BackendError(f"{self._where} answered what is no answer: {error}") from error
        names = [spec.name for spec in self.metadata.outputs] if outputs is None else outputs
        return {name: self._checked(name, answer.get(name)) for name in names}

    def close(self) -> None:
        """Also ends calls that are under way."""
        self._closing.set()
        self._channel.close()
        if self._watch is not None and self._watch is not threading.current_thread():
            self._watch.join(CALL_SECONDS + 1)

    def _look(self) -> None:
        while not self._closing.wait(CHECK_SECONDS if self._ready else AWAY_CHECK_SECONDS):
            reason = self.check()
            if self._closing.is_set():
                return
            self._silent = 0 if reason is None else self._silent + 1
            # A busy container may be late once.
            ready = self._silent < (_SILENT_CHECKS if self._ready else 1)
            if ready != self._ready:
                log.warning("%s", reason) if reason else log.info("%s answers again", self._where)
            self._ready = ready

    def _only_model(self, otherwise: str) -> str:
        try:
            index = self._call(self._stub.repository_index, oip.RepositoryIndexRequest(ready=True))
        except InstanceUnavailable as error:
            cause: Any = error.__cause__
            # An extension of Triton's, which other servers of the protocol do not have.
            if isinstance(cause, grpc.Call) and cause.code() is grpc.StatusCode.UNIMPLEMENTED:
                return otherwise
            raise
        names = sorted({model.name for model in index.models})
        if not names:
            raise InstanceUnavailable(f"{self._where} serves no model yet")
        if len(names) > 1:
            if otherwise in names:
                return otherwise
            raise InstanceRefused(
                f"{self._where}: there are {', '.join(names)}; "
                f"serve one, or name one like the module, {otherwise}"
            )
        return names[0]

    def _describe(self) -> ModelMetadata:
        request = oip.ModelMetadataRequest(name=self.model)
        return decode_metadata(self._call(self._stub.model_metadata, request))

    def _call(self, method: Callable[..., T], request: Any) -> T:
        """Raises InstanceUnavailable for every failure."""
        try:
            return method(request, CALL_SECONDS)
        except grpc.RpcError as error:
            call: Any = error
            raise InstanceUnavailable(
                f"{self._where} does not answer: {call.details() or call.code().name}"
            ) from error
        except ValueError as error:
            # The channel was closed meanwhile.
            raise InstanceUnavailable(f"{self._where} was given up") from error

    def _failure(self, error: grpc.RpcError | ValueError) -> BackendError:
        if isinstance(error, ValueError):
            return BackendUnavailable(f"{self._where} was given up")
        call: Any = error
        code, details = call.code(), call.details() or call.code().name
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlineExceeded(f"{self._where} did not answer in time")
        if code in _AWAY:
            return BackendUnavailable(f"{self._where}: {details}")
        if code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OUT_OF_RANGE):
            return InvalidTensor(f"{self._where}: {details}")
        return BackendError(f"{self._where}: {details}")

    def _checked(self, name: str, tensor: Tensor | None) -> Array:
        spec = self._outputs.get(name)
        if tensor is None or spec is None:
            raise BackendError(f"{self._where} did not answer with output {name!r}")
        if tensor.datatype != spec.datatype or not shape_matches(spec.shape, tensor.shape):
            raise BackendError(
                f"{self._where}: output {spec} came as {tensor.datatype} {list(tensor.shape)}"
            )
        return tensor.array


def _check_datatypes(metadata: ModelMetadata, where: str) -> None:
    if not metadata.inputs or not metadata.outputs:
        raise InstanceRefused(f"{where} tells no inputs or no outputs of its model")
    for spec in (*metadata.inputs, *metadata.outputs):
        if spec.datatype not in NUMPY_DTYPES:
            raise InstanceRefused(f"{where}: tensor {spec} is of a datatype that is not served")


def _same_signature(one: ModelMetadata, other: ModelMetadata) -> bool:
    return (one.inputs, one.outputs) == (other.inputs, other.outputs)
