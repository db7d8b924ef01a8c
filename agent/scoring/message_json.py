"""Protobuf messages as the JSON that Triton's REST extensions answer with.

Unlike protobuf's own mapping, 64-bit numbers are numbers and nothing is left out for being zero.
"""

from __future__ import annotations

from typing import Any

from google.protobuf.message import Message


def to_json(message: Message) -> dict[str, Any]:
    made: dict[str, Any] = {}
    fields: Any = message.DESCRIPTOR.fields
    for field in fields:
        value = getattr(message, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            made[field.name] = {key: _value(field, one) for key, one in sorted(value.items())}
        elif field.label == field.LABEL_REPEATED:
            made[field.name] = [_value(field, one) for one in value]
        elif field.message_type is None or message.HasField(field.name):
            made[field.name] = _value(field, value)
    return made


def _value(field: Any, value: Any) -> Any:
    if isinstance(value, Message):
        return to_json(value)
    if field.enum_type is not None:
        return field.enum_type.values_by_number[value].name
    if isinstance(value, bytes):
        return value.decode("latin-1")
    return value
