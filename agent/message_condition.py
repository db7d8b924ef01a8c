"""Conditions of message routes: `temperature > 21 AND $body.room = 'hall'`.

Comparisons (= != <> < <= > >=), AND, OR, NOT, parentheses, IS_DEFINED; texts, numbers, booleans
and null; application properties by name, `$body.<path>` in JSON bodies, and the system properties
below. As in IoT Hub a comparison with something that is not there, or of another type, is
undefined, and a message is taken only where the whole is true.
Source: "IoT Hub message routing query syntax".
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

MAX_CHARACTERS = 4096
MAX_DEPTH = 32

_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d+(?:\.\d+)?(?:[eE][+-]?\d+)?(?![\w.]))"
    r"|(?P<text>'[^']*'|\"[^\"]*\")"
    r"|(?P<name>\$?[A-Za-z_][\w-]*(?:(?:\.[A-Za-z_][\w-]*)|\[\d{1,4}\])*)"
    r"|\{(?P<braced>[^{}]{1,256})\}"
    r"|(?P<sign><>|!=|<=|>=|[=<>()+*/%,|-]))",
    re.ASCII,
)
_COMPARE: Mapping[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<>": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_UNDEFINED: Any = object()
_STEP = re.compile(r"\.?([A-Za-z_][\w-]*)|\[(\d+)\]", re.ASCII)


class UnsupportedCondition(Exception):
    """The route cannot be applied here; the message says what of it."""


@dataclass(slots=True)
class Message:
    """`source` such as "/messages/modules/digits/outputs/events". The body is read when asked for.

    `system` holds system properties by their names in conditions, without the '$'.
    """

    source: str
    body: bytes
    properties: Mapping[str, str]
    system: Mapping[str, str]
    _json: Any = None

    def json(self) -> Any:
        """The body as JSON, _UNDEFINED where it is none."""
        if self._json is None:
            try:
                self._json = [json.loads(self.body)]
            except (ValueError, RecursionError):
                self._json = [_UNDEFINED]
        return self._json[0]


Condition = Callable[[Message], Any]
"""True, False, or None where it is undefined."""

SYSTEM_PROPERTIES = frozenset(
    {"messageId", "contentType", "contentEncoding", "connectionDeviceId", "connectionModuleId"}
)


def parse_condition(text: str) -> Condition:
    """The condition after WHERE; "" is always true. Raises UnsupportedCondition."""
    if not text:
        return lambda message: True
    if len(text) > MAX_CHARACTERS:
        raise UnsupportedCondition(
            f"a condition of {len(text)} characters; {MAX_CHARACTERS} at most"
        )
    parser = _Parser(text)
    condition = parser.either(0)
    if parser.kind:
        raise parser.unsupported()
    return condition


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self.kind = self.word = ""
        self._next()

    def _next(self) -> None:
        match = _TOKEN.match(self._text, self._at)
        if match is None:
            rest = self._text[self._at :].strip()
            if rest:
                raise UnsupportedCondition(f"the condition cannot be read at {rest[:32]!r}")
            self.kind = self.word = ""
            return
        self._at = match.end()
        self.kind = match.lastgroup or ""
        self.word = match[self.kind]
        if self.kind == "name" and self.word.upper() in ("AND", "OR", "NOT"):
            self.kind = self.word.upper()

    def unsupported(self) -> UnsupportedCondition:
        found = repr(self.word[:32]) if self.kind else "its end"
        return UnsupportedCondition(f"the condition has {found} where that is not supported")

    def _take(self, sign: str) -> None:
        if self.kind != "sign" or self.word != sign:
            raise self.unsupported()
        self._next()

    def either(self, depth: int) -> Condition:
        parts = [self._both(depth)]
        while self.kind == "OR":
            self._next()
            parts.append(self._both(depth))
        return parts[0] if len(parts) == 1 else lambda message: _any(p(message) for p in parts)

    def _both(self, depth: int) -> Condition:
        parts = [self._not(depth)]
        while self.kind == "AND":
            self._next()
            parts.append(self._not(depth))
        return parts[0] if len(parts) == 1 else lambda message: _all(p(message) for p in parts)

    def _not(self, depth: int) -> Condition:
        if depth > MAX_DEPTH:
            raise UnsupportedCondition(f"the condition is nested deeper than {MAX_DEPTH} levels")
        if self.kind == "NOT":
            self._next()
            inner = self._not(depth + 1)
            return lambda message: None if (v := inner(message)) is None else not v
        if self.kind == "sign" and self.word == "(":
            self._next()
            inner = self.either(depth + 1)
            self._take(")")
            return inner
        return self._comparison()

    def _comparison(self) -> Condition:
        if self.kind == "name" and self.word.upper() == "IS_DEFINED":
            self._next()
            self._take("(")
            value = self._operand()
            self._take(")")
            return lambda message: value(message) is not _UNDEFINED
        left = self._operand()
        if self.kind != "sign" or self.word not in _COMPARE:
            # A property alone: true where it is the value true.
            return lambda message: v if isinstance(v := left(message), bool) else None
        compare = _COMPARE[self.word]
        equality = self.word in ("=", "!=", "<>")
        self._next()
        right = self._operand()

        def compared(message: Message) -> bool | None:
            one, other = left(message), right(message)
            kind = _kind(one)
            if kind is None or kind != _kind(other):
                return None
            if not equality and kind not in ("text", "number"):
                return None
            return compare(one, other)

        return compared

    def _operand(self) -> Callable[[Message], Any]:
        kind, word = self.kind, self.word
        sign = 1.0
        if kind == "sign" and word == "-":
            self._next()
            sign, kind, word = -1.0, self.kind, self.word
            if kind != "number":
                raise self.unsupported()
        if kind == "number":
            number = sign * float(word)
            self._next()
            return lambda message: number
        if kind == "text":
            self._next()
            return lambda message: word[1:-1]
        if kind == "braced":
            self._next()
            return lambda message: message.properties.get(word, _UNDEFINED)
        if kind != "name":
            raise self.unsupported()
        self._next()
        if self.kind == "sign" and self.word == "(":
            raise UnsupportedCondition(f"the function {word[:32]} is not supported in conditions")
        constant: Any = {"true": True, "false": False, "null": None}.get(word.lower(), _UNDEFINED)
        if constant is not _UNDEFINED:
            return lambda message: constant
        if not word.startswith("$"):
            return lambda message: message.properties.get(word, _UNDEFINED)
        if word[1:] in SYSTEM_PROPERTIES:
            return lambda message: message.system.get(word[1:], _UNDEFINED)
        first = re.split(r"[.\[]", word, maxsplit=1)[0]
        if first != "$body":
            raise UnsupportedCondition(f"{word[:64]} is not known in conditions here")
        steps = [int(index) if index else name for name, index in _STEP.findall(word[len(first) :])]
        return lambda message: _at(message.json(), steps)


def _at(value: Any, steps: list[str | int]) -> Any:
    for step in steps:
        if isinstance(step, int):
            value = value[step] if isinstance(value, list) and step < len(value) else _UNDEFINED
        else:
            value = value.get(step, _UNDEFINED) if isinstance(value, dict) else _UNDEFINED
    return value


_KINDS = {str: "text", int: "number", float: "number", bool: "boolean", type(None): "null"}


def _kind(value: Any) -> str | None:
    return _KINDS.get(type(value))


def _all(values: Iterable[Any]) -> bool | None:
    result: bool | None = True
    for value in values:
        if value is False:
            return False
        if value is None:
            result = None
    return result


def _any(values: Iterable[Any]) -> bool | None:
    result: bool | None = False
    for value in values:
        if value is True:
            return True
        if value is None:
            result = None
    return result
