"""Open Inference Protocol messages to and from the data plane's types, for any gRPC transport."""

from __future__ import annotations

from ...accelerators.tensors import TensorSpec
from ...protos import open_inference_pb2 as oip
from .errors import Code, ScoringError
from .tensor_codec import TYPED_FIELDS, decode_raw, decode_typed, encode_raw, typed_values
from .types import InferenceRequest, InferenceResponse, ModelMetadata, Tensor
from .validation import check_contents


def decode_request(
    message: oip.ModelInferRequest, deadline: float | None
) -> tuple[InferenceRequest, bool]:
    """The request, and whether its tensors came raw. Raises ScoringError INVALID_ARGUMENT."""
    inputs = message.inputs
    raw = message.raw_input_contents
    typed = [tensor.HasField("contents") for tensor in inputs]
    is_raw = check_contents([tensor.name for tensor in inputs], typed, len(raw))
    tensors = tuple(
        decode_raw(tensor.name, tensor.datatype, tensor.shape, raw[index])
        if is_raw
        else _decode_contents(tensor)
        for index, tensor in enumerate(inputs)
    )
    request = InferenceRequest(
        model=message.model_name,
        version=message.model_version,
        id=message.id,
        inputs=tensors,
        outputs=tuple(output.name for output in message.outputs),
        deadline=deadline,
    )
    return request, is_raw


def encode_response(response: InferenceResponse, raw: bool) -> oip.ModelInferResponse:
    """With raw contents if `raw`, or where an output has no typed form (FP16)."""
    raw = raw or any(tensor.datatype not in TYPED_FIELDS for tensor in response.outputs)
    message = oip.ModelInferResponse(
        model_name=response.model, model_version=response.version, id=response.id
    )
    for tensor in response.outputs:
        output = message.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        if raw:
            message.raw_output_contents.append(encode_raw(tensor))
        else:
            values = typed_values(tensor)
            getattr(output.contents, TYPED_FIELDS[tensor.datatype]).extend(values)
    return message


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
        if descriptor.name != field:
            raise ScoringError(
                Code.INVALID_ARGUMENT,
                f"tensor {tensor.name!r}: contents are in {descriptor.name}, expected "
                f"{field or 'raw contents'} for {tensor.datatype}",
            )
    values = getattr(contents, field) if field else ()
    return decode_typed(tensor.name, tensor.datatype, tensor.shape, values)
