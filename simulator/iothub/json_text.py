"""JSON as it travels: what a reader of another kind could not read is refused at the door."""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from .errors import invalid

DEPTH_LIMIT = 128
_STRINGS = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(body: bytes) -> Any:
    """Raises HubError 400: also for NaN, infinities, unpaired surrogates and deep nesting, which
    Python would take and could then not pass on.
    """
    try:
        text = body.decode("utf-8-sig")
        _check_depth(text)
        value = json.loads(text, parse_constant=_no_constant, parse_float=_finite)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except ValueError as error:
        raise invalid(f"the body is not JSON: {error}") from error


def json_bytes(value: Any) -> bytes:
    """Compact UTF-8. Raises HubError 400 for what is not JSON."""
    try:
        return json.dumps(
            value, ensure_ascii=False, allow_nan=False, separators=(",", ":")
        ).encode()
    except (ValueError, RecursionError) as error:
        raise invalid(f"this cannot be sent as JSON: {error}") from error


def _check_depth(text: str) -> None:
    if text.count("[") + text.count("{") <= DEPTH_LIMIT:
        return
    depth = 0
    for sign in re.findall(r"[][{}]", _STRINGS.sub("", text)):
        depth += 1 if sign in "[{" else -1
        if depth > DEPTH_LIMIT:
            raise ValueError(f"nested deeper than {DEPTH_LIMIT} levels")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text} is no number that can be passed on")
    return value
