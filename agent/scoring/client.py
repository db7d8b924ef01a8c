"""A small client of the Open Inference Protocol over gRPC, for the CLI, the demo and tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt

from ...accelerators.tensors import DATATYPES, Array
from ...protos import open_inference_pb2 as oip
from ...protos.inference import InferenceStub
from .errors import Code, ScoringError
from .oip_messages import decode_metadata, decode_response, encode_request
from .types import InferenceRequest, InferenceResponse, ModelMetadata, ServerMetadata, Tensor

_CODES = {grpc.StatusCode[code.value]: code for code in Code}
_UNLIMITED = -1


@dataclass(frozen=True, slots=True)
class ClientTls:
    """What to trust and, for mTLS, what to show; all PEM."""

    ca: bytes
    certificate: bytes | None = None
    key: bytes | None = None


class ScoringClient:
    """Blocking and thread-safe. Every call raises ScoringError; `timeout` is in seconds."""

    def __init__(
        self,
        url: str = "127.0.0.1:8001",
        timeout: float = 30.0,
        *,
        bearer: str = "",
        tls: ClientTls | None = None,
    ) -> None:
        """`url`: host:port or unix:path. Nothing is connected before the first call.

        `bearer`: a key or token of the endpoints.
        """
        self._url = url
        self._timeout = timeout
        self._metadata = (("authorization", f"Bearer {bearer}"),) if bearer else ()
        options = [
            ("grpc.max_receive_message_length", _UNLIMITED),
            ("grpc.max_send_message_length", _UNLIMITED),
        ]
        if tls is None:
            self._channel = grpc.insecure_channel(url, options)
        else:
            credentials = grpc.ssl_channel_credentials(tls.ca, tls.key, tls.certificate)
            self._channel = grpc.secure_channel(url, credentials, options)
        self._stub = InferenceStub(self._channel)

    def __enter__(self) -> ScoringClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    def infer(
        self, model: str, inputs: Mapping[str, npt.ArrayLike], version: str = ""
    ) -> dict[str, Array]:
        """Outputs by name. The datatype of an input is that of its array; text becomes BYTES."""
        return {t.name: t.array for t in self.request(model, inputs, version).outputs}

    def request(
        self,
        model: str,
        inputs: Mapping[str, npt.ArrayLike],
        version: str = "",
        outputs: Sequence[str] = (),
        request_id: str = "",
    ) -> InferenceResponse:
        """As `infer`, with the version that answered; `outputs` (): all of them."""
        request = InferenceRequest(
            model=model,
            version=version,
            id=request_id,
            inputs=tuple(make_tensor(name, values) for name, values in inputs.items()),
            outputs=tuple(outputs),
        )
        try:
            message = self._stub.model_infer(encode_request(request), self._timeout, self._metadata)
        except grpc.RpcError as error:
            raise self._error(error) from error
        return decode_response(message)

    def live(self) -> bool:
        """False also when nobody answers."""
        try:
            return self._stub.server_live(oip.ServerLiveRequest(), self._timeout).live
        except grpc.RpcError:
            return False

    def ready(self, model: str = "", version: str = "") -> bool:
        """Whether the server, or one model on it, can be scored; False when nobody answers."""
        try:
            if not model:
                return self._stub.server_ready(oip.ServerReadyRequest(), self._timeout).ready
            request = oip.ModelReadyRequest(name=model, version=version)
            return self._stub.model_ready(request, self._timeout, self._metadata).ready
        except grpc.RpcError:
            return False

    def server_metadata(self) -> ServerMetadata:
        try:
            answer = self._stub.server_metadata(
                oip.ServerMetadataRequest(), self._timeout, self._metadata
            )
        except grpc.RpcError as error:
            raise self._error(error) from error
        return ServerMetadata(answer.name, answer.version, tuple(answer.extensions))

    def metadata(self, model: str, version: str = "") -> ModelMetadata:
        request = oip.ModelMetadataRequest(name=model, version=version)
        try:
            return decode_metadata(
                self._stub.model_metadata(request, self._timeout, self._metadata)
            )
        except grpc.RpcError as error:
            raise self._error(error) from error

    def _error(self, error: grpc.RpcError) -> ScoringError:
        # What channels raise is a Call too.
        call: Any = error
        status, details = call.code(), call.details() or ""
        if status is grpc.StatusCode.UNAVAILABLE and "connect" in details.lower():
            return ScoringError(
                Code.UNAVAILABLE,
                f"nothing answers at {self._url} ({details}); is the scoring process running?",
            )
        return ScoringError(_CODES.get(status, Code.INTERNAL), details or status.name)


def make_tensor(name: str, values: npt.ArrayLike) -> Tensor:
    """A tensor of the datatype that fits the array's dtype. Raises ScoringError."""
    array = np.asarray(values)
    if array.dtype.kind in "SUO":
        array = _text(name, array)
    elif array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    datatype = DATATYPES.get(array.dtype)
    if datatype is None:
        raise ScoringError(
            Code.INVALID_ARGUMENT,
            f"input {name!r}: arrays of {array.dtype} cannot be sent; convert to one of "
            f"{', '.join(map(str, DATATYPES))}",
        )
    return Tensor(name, datatype, np.ascontiguousarray(array).reshape(array.shape))


def _text(name: str, array: Array) -> Array:
    encoded = np.empty(array.size, np.object_)
    for index, element in enumerate(array.ravel().tolist()):
        if not isinstance(element, str | bytes):
            raise ScoringError(
                Code.INVALID_ARGUMENT,
                f"input {name!r}: element {index} is {type(element).__name__}, not text or bytes",
            )
        encoded[index] = element.encode() if isinstance(element, str) else element
    return encoded.reshape(array.shape)
