"""Inference requests and answers whose bytes around the tensors are those of earlier ones: read
and written without building protobuf's objects."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from google.protobuf.message import DecodeError

from ...accelerators.tensors import NUMPY_DTYPES
from ...protos import open_inference_pb2 as oip
from .h2_grpc import framed
from .oip_messages import encode_response
from .types import InferenceRequest, InferenceResponse, Tensor

_MOST_PLANS = 128
_MOST_TENSORS = 8
_LONGEST_FIXED = 4096
_NAMED = 32
_PATIENCE = 16
_RAW_INPUT = b"\x3a"
_RAW_OUTPUT = b"\x32"
# Every pattern of bits is a value of these, and their raw form is numpy's.
_PLAIN = frozenset(NUMPY_DTYPES) - {"BOOL", "BYTES"}
_NOTHING: dict[str, int] = {}


@dataclass(frozen=True, slots=True)
class Plan:
    """`tensors`: name, datatype, dtype, shape, first byte and end of each; `fixed`: the bytes
    before each tensor's contents, with where they begin."""

    model: str
    version: str
    outputs: tuple[str, ...]
    tensors: tuple[tuple[str, str, np.dtype[np.generic], tuple[int, ...], int, int], ...]
    fixed: tuple[tuple[bytes, int], ...]


class RequestPlans:
    """By length of the message and how it begins, which is the model's name: the one seen first of
    each, until others have come in its place for a while."""

    def __init__(self) -> None:
        self._plans: dict[tuple[int, bytes], Plan] = {}
        self._others = 0

    def read(
        self, message: bytes, deadline: float | None, headers: dict[str, str]
    ) -> InferenceRequest | None:
        """None: no such request was planned."""
        plan = self._plans.get((len(message), message[:_NAMED]))
        if plan is None:
            return None
        for fixed, at in plan.fixed:
            if not message.startswith(fixed, at):
                return None
        return InferenceRequest(
            plan.model,
            tuple(
                [
                    # A copy, since the contents may lie where no such number may.
                    Tensor(name, datatype, np.frombuffer(message[at:end], dtype).reshape(shape))
                    for name, datatype, dtype, shape, at, end in plan.tensors
                ]
            ),
            plan.version,
            "",
            plan.outputs,
            deadline,
            0,
            _NOTHING,
            headers,
        )

    def learn(self, message: bytes, parsed: oip.ModelInferRequest) -> None:
        """From a request that was decoded without an error."""
        key = (len(message), message[:_NAMED])
        if key in self._plans:
            # Learning costs as much as reading: not for requests that take turns.
            self._others += 1
            if self._others % _PATIENCE:
                return
        plan = plan_of(message, parsed)
        if plan is not None:
            if len(self._plans) >= _MOST_PLANS:
                self._plans.clear()
            self._plans[key] = plan


def plan_of(message: bytes, parsed: oip.ModelInferRequest) -> Plan | None:
    """None where the contents are not all raw and last, or where anything else of a request
    depends on more than its tensors."""
    raw, inputs = parsed.raw_input_contents, parsed.inputs
    if (
        not 0 < len(raw) <= _MOST_TENSORS
        or len(raw) != len(inputs)
        or parsed.id
        or parsed.parameters
        or any(tensor.parameters or tensor.datatype not in _PLAIN for tensor in inputs)
        or any(output.parameters for output in parsed.outputs)
    ):
        return None
    tails = [_RAW_INPUT + varint(len(contents)) for contents in raw]
    size = sum(map(len, tails)) + sum(map(len, raw))
    first = len(message) - size
    if not 0 < first <= _LONGEST_FIXED:
        return None
    prefix = message[:first]
    fixed: list[tuple[bytes, int]] = []
    at, tensors = first, []
    for tensor, tail, contents in zip(inputs, tails, raw, strict=True):
        if not message.startswith(tail, at):
            return None
        fixed.append((prefix + tail, 0) if not fixed else (tail, at))
        at += len(tail)
        end = at + len(contents)
        dtype, shape = NUMPY_DTYPES[tensor.datatype], tuple(tensor.shape)
        tensors.append((tensor.name, tensor.datatype, dtype, shape, at, end))
        at = end
    # The tails may look like contents' tags without being them: only parsing tells.
    alone = oip.ModelInferRequest()
    alone.CopyFrom(parsed)
    del alone.raw_input_contents[:]
    try:
        if oip.ModelInferRequest.FromString(prefix) != alone:
            return None
    except DecodeError:
        return None
    outputs = tuple(output.name for output in parsed.outputs)
    return Plan(parsed.model_name, parsed.model_version, outputs, tuple(tensors), tuple(fixed))


class AnswerPlans:
    """The bytes before the contents of answers of one kind."""

    def __init__(self) -> None:
        self._known: dict[object, tuple[bytes, int]] = {}

    def write(self, answer: InferenceResponse) -> bytes:
        """Framed, with raw contents."""
        outputs = answer.outputs
        if len(outputs) != 1 or answer.id or outputs[0].datatype not in _PLAIN:
            return framed(encode_response(answer, True).SerializeToString())
        tensor = outputs[0]
        array = tensor.array
        key = (answer.model, answer.version, tensor.name, tensor.datatype, array.shape)
        known = self._known.get(key)
        data = array.tobytes()
        if known is None or known[1] != len(data):
            message = encode_response(answer, True)
            del message.raw_output_contents[:]
            body = message.SerializeToString() + _RAW_OUTPUT + varint(len(data))
            head = b"\0" + (len(body) + len(data)).to_bytes(4, "big") + body
            if len(self._known) >= _MOST_PLANS:
                self._known.clear()
            known = self._known[key] = (head, len(data))
        return known[0] + data


def varint(number: int) -> bytes:
    out = bytearray()
    while number >= 128:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)
