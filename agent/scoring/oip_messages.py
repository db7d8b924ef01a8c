"""Open Inference Protocol messages to and from the data plane's types, for any gRPC transport."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ...accelerators.tensors import TensorSpec
from ...protos import open_inference_pb2 as oip
from .errors import Code, ScoringError
from .shared_memory import SharedMemory
from .tensor_codec import BF16, TYPED_FIELDS, decode_raw, decode_typed, encode_raw, typed_values
from .types import InferenceRequest, InferenceResponse, ModelMetadata, Tensor
from .validation import check_contents


@dataclass(frozen=True, slots=True)
class Placement:
    """Where in registered shared memory a client wants an output."""

    region: str
    byte_size: int
    offset: int


@dataclass(frozen=True, slots=True)
class Decoded:
    """`raw`: whether the tensors came raw, so that the answer is to be raw too."""

    request: InferenceRequest
    raw: bool
    placements: Mapping[str, Placement]


def decode_request(
    message: oip.ModelInferRequest,
    deadline: float | None,
    memory: SharedMemory | None = None,
    now: Callable[[], float] = time.monotonic,
    headers: Mapping[str, str] | None = None,
) -> Decoded:
    """Inputs in shared memory are read from `memory`. The parameter `timeout` (microseconds)
    shortens the deadline. Raises ScoringError."""
    inputs = message.inputs
    raw = message.raw_input_contents
    shared = {
        index: placement
        for index, tensor in enumerate(inputs)
        if tensor.parameters and (placement := _placement(tensor.parameters)) is not None
    }
    sent = [t for index, t in enumerate(inputs) if index not in shared] if shared else inputs
    typed = [tensor.HasField("contents") for tensor in sent]
    is_raw = check_contents([tensor.name for tensor in sent], typed, len(raw))
    contents = iter(raw)
    tensors = tuple(
        _decode_shared(tensor, shared[index], memory)
        if index in shared
        else decode_raw(tensor.name, tensor.datatype, tensor.shape, next(contents))
        if is_raw
        else _decode_contents(tensor)
        for index, tensor in enumerate(inputs)
    )
    priority = 0
    if message.parameters:
        priority = _whole(message.parameters, "priority")
        microseconds = _whole(message.parameters, "timeout")
        if microseconds:
            own = now() + microseconds / 1e6
            deadline = own if deadline is None else min(deadline, own)
    classes: dict[str, int] = {}
    placements: dict[str, Placement] = {}
    for output in message.outputs:
        if output.parameters:
            count = _whole(output.parameters, "classification")
            if count:
                classes[output.name] = count
            placement = _placement(output.parameters)
            if placement is not None:
                placements[output.name] = placement
    request = InferenceRequest(
        model=message.model_name,
        version=message.model_version,
        id=message.id,
        inputs=tensors,
        outputs=tuple(output.name for output in message.outputs),
        deadline=deadline,
        priority=priority,
        classes=classes,
        headers=headers or {},
    )
    return Decoded(request, is_raw or bool(shared), placements)


def encode_response(
    response: InferenceResponse,
    raw: bool,
    placements: Mapping[str, Placement] | None = None,
    memory: SharedMemory | None = None,
) -> oip.ModelInferResponse:
    """With raw contents if `raw`, or where an output has no typed form (FP16).

    Outputs in `placements` go into `memory`, with nothing in their place in the raw contents.
    Raises ScoringError when they do not fit.
    """
    raw = (
        raw
        or bool(placements)
        or any(tensor.datatype not in TYPED_FIELDS for tensor in response.outputs)
    )
    message = oip.ModelInferResponse(
        model_name=response.model, model_version=response.version, id=response.id
    )
    for tensor in response.outputs:
        output = message.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        if placements and tensor.name in placements:
            _place(output, encode_raw(tensor), placements[tensor.name], memory)
            message.raw_output_contents.append(b"")
        elif raw:
            message.raw_output_contents.append(encode_raw(tensor))
        else:
            values = typed_values(tensor)
            getattr(output.contents, TYPED_FIELDS[tensor.datatype]).extend(values)
    return message


def _place(
    output: oip.ModelInferResponse.InferOutputTensor,
    data: bytes,
    placement: Placement,
    memory: SharedMemory | None,
) -> None:
    _memory(memory).write(placement.region, placement.offset, placement.byte_size, data)
    output.parameters["shared_memory_region"].string_param = placement.region
    output.parameters["shared_memory_byte_size"].int64_param = len(data)
    if placement.offset:
        output.parameters["shared_memory_offset"].int64_param = placement.offset


def _decode_shared(
    tensor: oip.ModelInferRequest.InferInputTensor,
    placement: Placement,
    memory: SharedMemory | None,
) -> Tensor:
    if tensor.HasField("contents"):
        raise ScoringError(
            Code.INVALID_ARGUMENT,
            f"tensor {tensor.name!r}: has contents and lies in shared memory; send it once",
        )
    data = _memory(memory).read(placement.region, placement.offset, placement.byte_size)
    return decode_raw(tensor.name, tensor.datatype, tensor.shape, data)


def _memory(memory: SharedMemory | None) -> SharedMemory:
    if memory is None:
        raise ScoringError(Code.UNIMPLEMENTED, "shared memory is not served here")
    return memory


def _placement(parameters: Mapping[str, oip.InferParameter]) -> Placement | None:
    if "shared_memory_region" not in parameters:
        return None
    region = parameters["shared_memory_region"].string_param
    size = _whole(parameters, "shared_memory_byte_size")
    return Placement(region, size, _whole(parameters, "shared_memory_offset"))


def _whole(parameters: Mapping[str, oip.InferParameter], key: str) -> int:
    """A parameter that is a whole number of 0 or more; 0 when it is not there."""
    if key not in parameters:
        return 0
    parameter = parameters[key]
    chosen = parameter.WhichOneof("parameter_choice")
    value = getattr(parameter, chosen) if chosen else None
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 20:
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ScoringError(
            Code.INVALID_ARGUMENT, f"parameter {key!r} must be a whole number of 0 or more"
        )
    return value


def encode_request(request: InferenceRequest) -> oip.ModelInferRequest:
    """With raw contents; the deadline is the transport's to send."""
    return oip.ModelInferRequest(
        model_name=request.model,
        model_version=request.version,
        id=request.id,
        inputs=[
            oip.ModelInferRequest.InferInputTensor(
                name=tensor.name, datatype=tensor.datatype, shape=tensor.shape
            )
            for tensor in request.inputs
        ],
        outputs=[
            oip.ModelInferRequest.InferRequestedOutputTensor(name=name) for name in request.outputs
        ],
        raw_input_contents=[encode_raw(tensor) for tensor in request.inputs],
    )


def decode_response(message: oip.ModelInferResponse) -> InferenceResponse:
    """Raises ScoringError INVALID_ARGUMENT when the contents do not fit their description."""
    outputs = message.outputs
    raw = message.raw_output_contents
    typed = [tensor.HasField("contents") for tensor in outputs]
    is_raw = check_contents([tensor.name for tensor in outputs], typed, len(raw))
    return InferenceResponse(
        model=message.model_name,
        version=message.model_version,
        id=message.id,
        outputs=tuple(
            decode_raw(tensor.name, tensor.datatype, tensor.shape, raw[index])
            if is_raw
            else _decode_contents(tensor)
            for index, tensor in enumerate(outputs)
        ),
    )


def encode_metadata(metadata: ModelMetadata) -> oip.ModelMetadataResponse:
    return oip.ModelMetadataResponse(
        name=metadata.name,
        versions=metadata.versions,
        platform=metadata.platform,
        inputs=[_encode_spec(spec) for spec in metadata.inputs],
        outputs=[_encode_spec(spec) for spec in metadata.outputs],
        properties=metadata.properties,
    )


def decode_metadata(message: oip.ModelMetadataResponse) -> ModelMetadata:
    return ModelMetadata(
        name=message.name,
        versions=tuple(message.versions),
        platform=message.platform,
        inputs=tuple(TensorSpec(t.name, t.datatype, tuple(t.shape)) for t in message.inputs),
        outputs=tuple(TensorSpec(t.name, t.datatype, tuple(t.shape)) for t in message.outputs),
        properties=dict(message.properties),
    )


def _encode_spec(spec: TensorSpec) -> oip.ModelMetadataResponse.TensorMetadata:
    return oip.ModelMetadataResponse.TensorMetadata(
        name=spec.name, datatype=spec.datatype, shape=spec.shape
    )


def _decode_contents(
    tensor: oip.ModelInferRequest.InferInputTensor | oip.ModelInferResponse.InferOutputTensor,
) -> Tensor:
    contents = tensor.contents
    field = TYPED_FIELDS.get(tensor.datatype, "")
    for descriptor, _ in contents.ListFields():
        # Of a datatype nobody knows, that is what to tell.
        if descriptor.name != field and tensor.datatype in (*TYPED_FIELDS, "FP16", BF16):
            raise ScoringError(
                Code.INVALID_ARGUMENT,
                f"tensor {tensor.name!r}: contents are in {descriptor.name}, expected "
                f"{field or 'raw contents'} for {tensor.datatype}",
            )
    values = getattr(contents, field) if field else ()
    return decode_typed(tensor.name, tensor.datatype, tensor.shape, values)
