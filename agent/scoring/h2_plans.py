"""Inference requests and answers whose bytes around the tensors are those of earlier ones: read
and written without building protobuf's objects."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from google.protobuf.message import DecodeError

from ...accelerators.tensors import NUMPY_DTYPES
from ...protos import open_inference_pb2 as oip
from .h2_grpc import framed
from .types import InferenceRequest, InferenceResponse, Tensor

_MOST_PLANS = 128
_MOST_TENSORS = 8
_LONGEST_FIXED = 4096
_MODEL_NAME = b"\x0a"
_PATIENCE = 16
_RAW_INPUT = b"\x3a"
_RAW_OUTPUT = b"\x32"
# Every pattern of bits is a value of these, and their raw form is numpy's.
_PLAIN = frozenset(NUMPY_DTYPES) - {"BOOL", "BYTES"}
_NOTHING: dict[str, int] = {}


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """`tensors`: name, datatype, dtype, shape, first byte and end of each; `fixed`: the bytes
    before each tensor's contents, with where they begin. `rows`: the first dimension of all the
    tensors; 0 where they have none in common or a version is asked for, so that nothing is
    stacked."""

    model: str
    version: str
    outputs: tuple[str, ...]
    tensors: tuple[tuple[str, str, np.dtype[np.generic], tuple[int, ...], int, int], ...]
    fixed: tuple[tuple[bytes, int], ...]
    rows: int

    def request(
        self, message: bytes, deadline: float | None, headers: Mapping[str, str]
    ) -> InferenceRequest:
        tensors = [
            # A copy, since the contents may lie where no such number may.
            Tensor(name, datatype, np.frombuffer(message[at:end], dtype).reshape(shape))
            for name, datatype, dtype, shape, at, end in self.tensors
        ]
        return InferenceRequest(
            self.model,
            tuple(tensors),
            self.version,
            "",
            self.outputs,
            deadline,
            0,
            _NOTHING,
            headers,
        )

    def stacked(self, messages: Sequence[bytes]) -> InferenceRequest:
        """The requests of several messages, one behind the other along the first dimension."""
        rows = self.rows * len(messages)
        tensors = []
        for name, datatype, dtype, shape, at, end in self.tensors:
            contents = b"".join([message[at:end] for message in messages])
            array = np.frombuffer(contents, dtype).reshape((rows, *shape[1:]))
            tensors.append(Tensor(name, datatype, array))
        return InferenceRequest(self.model, tuple(tensors), self.version, "", self.outputs)


class RequestPlans:
    """By length of the message and how it begins, which is the model's name: the one seen first of
    each, until others have come in its place for a while."""

    def __init__(self) -> None:
        self._plans: dict[tuple[int, bytes], Plan] = {}
        self._others = 0

    def match(self, message: bytes) -> Plan | None:
        """None: no such request was planned."""
        plan = self._plans.get((len(message), _beginning(message)))
        if plan is None:
            return None
        for fixed, at in plan.fixed:
            if not message.startswith(fixed, at):
                return None
        return plan

    def learn(self, message: bytes, parsed: oip.ModelInferRequest) -> None:
        """From a request that was decoded without an error."""
        key = (len(message), _beginning(message))
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


def _beginning(message: bytes) -> bytes:
    """Up to the end of the model's name, if that comes first."""
    named = message[:1] == _MODEL_NAME and len(message) > 1 and message[1] < 128
    return message[: 2 + message[1]] if named else b""


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
    leading = {tuple(tensor.shape)[:1] for tensor in inputs}
    stacks = len(leading) == 1 and () not in leading and not parsed.model_version
    rows = leading.pop()[0] if stacks else 0
    return Plan(
        parsed.model_name, parsed.model_version, outputs, tuple(tensors), tuple(fixed), rows
    )


class AnswerPlans:
    """The bytes before the contents of answers of one kind."""

    def __init__(self, encode: Callable[[InferenceResponse], oip.ModelInferResponse]) -> None:
        """`encode` makes a message with raw contents."""
        self._encode = encode
        self._known: dict[object, tuple[bytes, int]] = {}

    def write(self, answer: InferenceResponse) -> bytes:
        """Framed, with raw contents."""
        outputs = answer.outputs
        if len(outputs) != 1 or answer.id or outputs[0].datatype not in _PLAIN:
            return framed(self._encode(answer).SerializeToString())
        data = outputs[0].array.tobytes()
        return self._head(answer, outputs[0], outputs[0].array.shape, len(data)) + data

    def parts(self, answer: InferenceResponse, number: int) -> list[bytes]:
        """`write` for each of so many answers that are stacked along the first dimension."""
        if number == 1:
            # Perhaps without a batch: then outputs have first dimensions of their own, or none.
            return [self.write(answer)]
        outputs = answer.outputs
        rows = outputs[0].array.shape[0] // number
        if len(outputs) != 1 or outputs[0].datatype not in _PLAIN:
            return [
                self.write(_part(answer, start, start + rows))
                for start in range(0, rows * number, rows)
            ]
        tensor = outputs[0]
        data = tensor.array.tobytes()
        size = len(data) // number
        head = self._head(answer, tensor, (rows, *tensor.array.shape[1:]), size)
        return [head + data[start : start + size] for start in range(0, size * number, size or 1)]

    def _head(
        self, answer: InferenceResponse, tensor: Tensor, shape: tuple[int, ...], size: int
    ) -> bytes:
        key = (answer.model, answer.version, tensor.name, tensor.datatype, shape)
        known = self._known.get(key)
        if known is None or known[1] != size:
            empty = Tensor(tensor.name, tensor.datatype, np.zeros(shape, tensor.array.dtype))
            message = self._encode(InferenceResponse(answer.model, answer.version, (empty,)))
            del message.raw_output_contents[:]
            body = message.SerializeToString() + _RAW_OUTPUT + varint(size)
            head = b"\0" + (len(body) + size).to_bytes(4, "big") + body
            if len(self._known) >= _MOST_PLANS:
                self._known.clear()
            known = self._known[key] = (head, size)
        return known[0]


def _part(answer: InferenceResponse, start: int, end: int) -> InferenceResponse:
    tensors = [Tensor(one.name, one.datatype, one.array[start:end]) for one in answer.outputs]
    return InferenceResponse(answer.model, answer.version, tuple(tensors))


def varint(number: int) -> bytes:
    out = bytearray()
    while number >= 128:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)
