"""Strict reading of JSON from outside: every complaint names a path and what was found there."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import Any, NoReturn

UNPARSABLE = 400
UNKNOWN_SCHEMA = 412
EMPTY = 417

MAX_DOCUMENT_BYTES = 1024 * 1024
"""A twin section is at most 32 KB; files and brokers may bring more, but not without end."""

MAX_DEPTH = 32
"""A twin allows 10 levels; createOptions given as an object add some of their own."""

MAX_INTEGER_DIGITS = 20

# Never fails to match once it saw a quote, so that hostile input costs linear time.
_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)', re.DOTALL)
_NOT_BRACKETS = re.compile(r"[^\[\]{}]+")
_STEPS = {"[": 1, "{": 1, "]": -1, "}": -1}
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_PLAIN_KEY = re.compile(r"[\w$-]{1,64}(\.[\w$-]{1,64}){0,8}\Z", re.ASCII)


class ManifestError(Exception):
    """A deployment manifest that cannot be used.

    `code` is edgeAgent's `lastDesiredStatus.code`: 400 invalid, 412 unknown schema version, 417
    empty. `path` names the place inside the `$edgeAgent` desired properties (or inside the outer
    document), "" for the document as a whole. The message carries both and never a secret.
    """

    def __init__(self, code: int, path: str, message: str) -> None:
        super().__init__(f"{path}: {message}" if path else message)
        self.code = code
        self.path = path


def parse_json(text: str, path: str, max_depth: int = MAX_DEPTH) -> Any:
    """The value of one JSON text; stricter than the standard library where readers disagree.

    Raises ManifestError 400, under `path`, for syntax errors, repeated keys, NaN and infinities,
    lone surrogates, absurd numbers and nesting deeper than `max_depth`.
    """
    _check_depth(text, path, max_depth)
    repeated: list[tuple[dict[str, Any], str]] = []

    def integer(digits: str) -> int:
        if len(digits.lstrip("-")) > MAX_INTEGER_DIGITS:
            raise ManifestError(UNPARSABLE, path, f"the number {shown(digits)} is too long")
        return int(digits)

    def real(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            raise ManifestError(UNPARSABLE, path, f"the number {shown(digits)} is out of range")
        return value

    def constant(word: str) -> NoReturn:
        raise ManifestError(UNPARSABLE, path, f"{word} is not a JSON value")

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(items)
        if len(result) != len(items):
            seen: set[str] = set()
            for name, _ in items:
                if name in seen:
                    repeated.append((result, name))
                    break
                seen.add(name)
        return result

    try:
        value = json.loads(
            text,
            object_pairs_hook=pairs,
            parse_int=integer,
            parse_float=real,
            parse_constant=constant,
        )
    except json.JSONDecodeError as error:
        raise ManifestError(
            UNPARSABLE,
            path,
            f"not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}",
        ) from None
    if _SURROGATE_ESCAPE.search(text):
        _check_strings(value, path)
    if repeated:
        owner, name = repeated[0]
        # An object that a second use of its own key displaced is not found.
        where = _find(value, owner, path)
        raise ManifestError(
            UNPARSABLE,
            joined(path if where is None else where, name),
            "the key is given twice; remove one, because readers disagree which one counts",
        )
    return value


def decoded(body: bytes) -> str:
    """`body` as text. Raises ManifestError: 417 when blank, 400 when too long or not UTF-8."""
    if len(body) > MAX_DOCUMENT_BYTES:
        raise ManifestError(
            UNPARSABLE,
            "",
            f"the document has {len(body):,} bytes; at most {MAX_DOCUMENT_BYTES:,} are accepted",
        )
    try:
        # Editors on Windows put a byte order mark in front.
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ManifestError(
            UNPARSABLE, "", f"not UTF-8: {error.reason} at byte {error.start}; save it as UTF-8"
        ) from None
    if not text.strip():
        raise ManifestError(EMPTY, "", "the document is empty; set a deployment manifest")
    return text


def without_nulls(value: Any) -> Any:
    """`value` with null members of objects removed, which is what a twin does with them."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def canonical(value: Any) -> str:
    """The one JSON text of `value`: keys sorted, no blanks, not escaped more than needed."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def joined(path: str, key: str) -> str:
    shown_key = key if _PLAIN_KEY.match(key) else shown(key)
    return f"{path}.{shown_key}" if path else shown_key


def shown(value: Any) -> str:
    """`value` for a message: short, on one line, printable."""
    if isinstance(value, dict):
        return "an object" if value else "an empty object"
    if isinstance(value, list):
        return "a list"
    text = json.dumps(value)
    return text if len(text) <= 64 else f"{text[:60]}..."


def hint(word: str, known: Iterable[str]) -> str:
    """ " (did you mean ...?)" when `word` resembles one of `known`, else nothing."""
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word[:64].lower(), by_lower, n=1, cutoff=0.7)
    return f" (did you mean {by_lower[close[0]]}?)" if close else ""


class Node:
    """A value of a parsed document and its path; the methods check and unwrap it.

    Each raises ManifestError 400 that names the path, what is expected and what was found.
    """

    __slots__ = ("path", "secret", "value")

    def __init__(self, value: Any, path: str = "", *, secret: bool = False) -> None:
        self.value = value
        self.path = path
        self.secret = secret

    def fail(self, message: str, code: int = UNPARSABLE) -> ManifestError:
        return ManifestError(code, self.path, message)

    def expected(self, what: str) -> ManifestError:
        found = _kind(self.value) if self.secret else shown(self.value)
        return self.fail(f"expected {what}, found {found}")

    def members(self) -> dict[str, Node]:
        """The members of an object with free keys."""
        if not isinstance(self.value, dict):
            raise self.expected("an object")
        return {key: Node(item, joined(self.path, key)) for key, item in self.value.items()}

    def fields(
        self, required: tuple[str, ...], optional: tuple[str, ...] = (), extra: str = ""
    ) -> Mapping[str, Node]:
        """The members of an object with fixed keys; keys matching the regex `extra` pass too."""
        members = self.members()
        known = required + optional
        for name, node in members.items():
            if name not in known and not (extra and re.fullmatch(extra, name)):
                raise node.fail(
                    f"unknown key{hint(name, known)}; known here: {', '.join(sorted(known))}"
                )
        for name in required:
            if name not in members:
                raise Node(None, joined(self.path, name)).fail("missing; this key is required")
        return members

    def text(self) -> str:
        if not isinstance(self.value, str):
            raise self.expected("a string")
        if "\0" in self.value:
            raise self.fail("the text contains a NUL character, which no container accepts")
        return self.value

    def word(self) -> str:
        """A string that is not blank."""
        value = self.text()
        if not value.strip():
            raise self.expected("a text that is not blank")
        return value

    def choice(self, options: tuple[str, ...]) -> str:
        if not isinstance(self.value, str) or self.value not in options:
            guess = hint(self.value, options) if isinstance(self.value, str) else ""
            listing = ", ".join(options[:-1]) + " or " + options[-1] if options[1:] else options[0]
            raise self.fail(f"expected {listing}, found {shown(self.value)}{guess}")
        return self.value

    def integer(self, low: int, high: int) -> int:
        value = self.value
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.expected(f"an integer from {low} to {high}")
        return value


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, (int, float)):
        return "a number"
    return "a string" if isinstance(value, str) else shown(value)


def _check_depth(text: str, path: str, max_depth: int) -> None:
    # The parser recurses, so the depth is known before it starts. No loop in Python: a megabyte
    # of brackets must not stop the agent for a second.
    brackets = _NOT_BRACKETS.sub("", _STRING.sub("", text))
    if max(accumulate(map(_STEPS.__getitem__, brackets)), default=0) > max_depth:
        raise ManifestError(UNPARSABLE, path, f"nested deeper than {max_depth} levels; flatten it")


def _check_strings(value: Any, path: str) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _check_strings(key, path)
            _check_strings(item, joined(path, key))
    elif isinstance(value, list):
        for item in value:
            _check_strings(item, path)
    elif isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ManifestError(
                UNPARSABLE, path, "a \\u escape names half a character (a lone surrogate)"
            ) from None


def _find(value: Any, wanted: object, path: str) -> str | None:
    """The path of the object `wanted` (by identity) inside `value`, None when it is not there."""
    if value is wanted:
        return path
    children: Iterable[tuple[str, Any]] = ()
    if isinstance(value, dict):
        children = ((joined(path, key), item) for key, item in value.items())
    elif isinstance(value, list):
        children = ((path, item) for item in value)
    found = (_find(item, wanted, child_path) for child_path, item in children)
    return next((where for where in found if where is not None), None)
