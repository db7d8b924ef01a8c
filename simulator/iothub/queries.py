"""The IoT Hub query language, parsed: what `POST /devices/query` and target conditions hold.

Served is what the IoT Hub developer guide ("Queries for device and module twins") names for twins:
SELECT (with TOP, aliases, COUNT/AVG/SUM/MIN/MAX) FROM devices or devices.modules, WHERE, GROUP BY;
no joins and no jobs. Parsing is pure and gives frozen trees; `queries_evaluation` runs them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from .errors import HubError
from .queries_tree import (
    Aggregate,
    Attribute,
    Call,
    Column,
    Comparison,
    Expression,
    Literal,
    Logic,
    Membership,
    Not,
    Statement,
)

_Item = TypeVar("_Item")

SOURCES = ("devices", "devices.modules")
AGGREGATES = ("COUNT", "AVG", "SUM", "MIN", "MAX")
FUNCTIONS = {
    "IS_DEFINED": 1,
    "IS_NULL": 1,
    "IS_BOOL": 1,
    "IS_NUMBER": 1,
    "IS_STRING": 1,
    "IS_OBJECT": 1,
    "IS_ARRAY": 1,
    "IS_PRIMITIVE": 1,
    "STARTS_WITH": 2,
    "STARTSWITH": 2,
    "ENDS_WITH": 2,
    "ENDSWITH": 2,
    "CONTAINS": 2,
}
LENGTH_LIMIT = 8 * 1024
DEPTH_LIMIT = 64
_LONGEST_NUMBER = 300
_KEYWORDS = frozenset(
    word
    for line in (
        "SELECT TOP FROM WHERE GROUP BY ORDER JOIN AS",
        "AND OR NOT IN NIN TRUE FALSE NULL",
    )
    for word in line.split()
)
_TOKENS = re.compile(
    r"""\s*(?:
      (?P<number>-?(?:\d+\.\d*|\.\d+|\d+)(?:[eE][+-]?\d+)?)
    | (?P<text>'(?:[^']|'')*'|"(?:[^"\\]|\\.)*")
    | \[\[(?P<quoted>[^\]]+)\]\]
    | (?P<name>[$A-Za-z_][$\w\-]*)
    | (?P<sign><=|>=|!=|<>|[=<>(),.\[\]*])
    )""",
    re.VERBOSE,
)
_COMPARISONS = {"=": "=", "!=": "!=", "<>": "!=", "<": "<", "<=": "<=", ">": ">", ">=": ">="}


class QuerySyntaxError(HubError):
    """A query or target condition is not the language; the message shows where."""

    def __init__(self, message: str) -> None:
        super().__init__(400, "QueryInvalid", message)


def parse_condition(text: str) -> Expression:
    """A WHERE expression on its own, as in a configuration's target condition.

    Raises QuerySyntaxError.
    """
    parser = _Parser(text)
    condition = parser.condition()
    parser.end()
    return condition


def parse_query(text: str) -> Statement:
    """Raises QuerySyntaxError."""
    parser = _Parser(text)
    statement = parser.statement()
    parser.end()
    return statement


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str  # number, text, quoted, name, sign, end
    text: str
    at: int


class _Parser:
    def __init__(self, text: str) -> None:
        if len(text) > LENGTH_LIMIT:
            raise QuerySyntaxError(f"a query has up to {LENGTH_LIMIT} characters")
        self._source = text
        self._tokens = self._scan(text)
        self._next = 0
        self._depth = 0

    def _scan(self, text: str) -> list[_Token]:
        tokens, at, end = [], 0, len(text.rstrip())
        while at < end:
            match = _TOKENS.match(text, at)
            if match is None or match.lastgroup is None:
                at += len(text[at:]) - len(text[at:].lstrip())
                raise self._error(at, f"{text[at]!r} does not belong here")
            tokens.append(
                _Token(match.lastgroup, match[match.lastgroup], match.start(match.lastgroup))
            )
            at = match.end()
        return [*tokens, _Token("end", "", end)]

    # Statements.

    def statement(self) -> Statement:
        self._expect_word("SELECT")
        top = self._whole_number() if self._word("TOP") else None
        columns = () if self._sign("*") else self._columns()
        self._expect_word("FROM")
        at = self._peek().at
        source = ".".join(self._path())
        if source.lower() not in SOURCES:
            raise self._error(at, f"FROM {source}: this hub has {' and '.join(SOURCES)}")
        condition = self.condition() if self._word("WHERE") else None
        group_by: tuple[Attribute, ...] = ()
        if self._word("GROUP"):
            self._expect_word("BY")
            group_by = self._separated(self._attribute)
        aggregated = any(isinstance(column.value, Aggregate) for column in columns)
        for column in columns:
            bare = isinstance(column.value, Attribute) and column.value not in group_by
            if bare and (group_by or aggregated):
                raise self._error(0, f"{column.name} is neither aggregated nor in GROUP BY")
        return Statement(source.lower(), columns, condition, group_by, top)

    def _columns(self) -> tuple[Column, ...]:
        found: list[Column] = []
        while True:
            value = self._column_value()
            name = value.path[-1] if isinstance(value, Attribute) else f"${len(found) + 1}"
            if self._word("AS"):
                name = self._name("an alias")
            found.append(Column(name, value))
            if not self._sign(","):
                return tuple(found)

    def _column_value(self) -> Attribute | Aggregate:
        token = self._peek()
        if token.kind == "name" and token.text.upper() in AGGREGATES and self._peek(1).text == "(":
            self._next += 2
            argument = None
            if not self._sign("*") and self._peek().text != ")":
                argument = self._attribute()
            self._expect_sign(")")
            name = token.text.upper()
            if argument is None and name != "COUNT":
                raise self._error(token.at, f"{name} needs an attribute")
            return Aggregate(name, argument)
        return self._attribute()

    # Conditions, from the weakest binding to the strongest.

    def condition(self) -> Expression:
        self._depth += 1
        if self._depth > DEPTH_LIMIT:
            raise self._error(self._peek().at, f"nested deeper than {DEPTH_LIMIT} levels")
        parts = [self._conjunction()]
        while self._word("OR"):
            parts.append(self._conjunction())
        self._depth -= 1
        return parts[0] if len(parts) == 1 else Logic("OR", tuple(parts))

    def _conjunction(self) -> Expression:
        parts = [self._negation()]
        while self._word("AND"):
            parts.append(self._negation())
        return parts[0] if len(parts) == 1 else Logic("AND", tuple(parts))

    def _negation(self) -> Expression:
        times = 0
        while self._word("NOT"):
            times += 1
        part = self._comparison()
        return Not(part) if times % 2 else part

    def _comparison(self) -> Expression:
        if self._sign("("):
            inner = self.condition()
            self._expect_sign(")")
            return inner
        left = self._operand()
        token = self._peek()
        if token.kind == "sign" and token.text in _COMPARISONS:
            self._next += 1
            return Comparison(_COMPARISONS[token.text], left, self._operand())
        negated = token.text.upper() in ("NOT", "NIN") and token.kind == "name"
        if self._word("IN") or self._word("NIN") or (self._word("NOT") and self._expect_word("IN")):
            closing = ")" if self._peek().text == "(" else "]"
            self._expect_sign("(" if closing == ")" else "[")
            items = self._separated(self._operand)
            self._expect_sign(closing)
            return Membership(left, items, negated)
        if isinstance(left, (Call, Literal)) and not (
            isinstance(left, Literal) and not isinstance(left.value, bool)
        ):
            return left
        raise self._error(token.at, "a comparison such as = or IN is missing here")

    def _operand(self) -> Expression:
        token = self._peek()
        if token.kind == "number":
            self._next += 1
            if len(token.text) > _LONGEST_NUMBER:
                raise self._error(token.at, "this number is too long")
            number = float(token.text)
            return Literal(int(token.text) if re.fullmatch(r"-?\d+", token.text) else number)
        if token.kind == "text":
            self._next += 1
            return Literal(_unquoted(token.text))
        if token.kind == "name":
            word = token.text.upper()
            if word in ("TRUE", "FALSE", "NULL"):
                self._next += 1
                return Literal({"TRUE": True, "FALSE": False, "NULL": None}[word])
            if self._peek(1).text == "(" and self._peek(1).kind == "sign":
                return self._call(token, word)
        return self._attribute()

    def _call(self, token: _Token, name: str) -> Call:
        if name not in FUNCTIONS:
            known = ", ".join(sorted(FUNCTIONS))
            raise self._error(token.at, f"there is no function {token.text}; there are {known}")
        self._next += 2
        arguments = self._separated(self._operand)
        self._expect_sign(")")
        if len(arguments) != FUNCTIONS[name]:
            raise self._error(token.at, f"{name} takes {FUNCTIONS[name]} arguments")
        return Call(name, arguments)

    # Names.

    def _attribute(self) -> Attribute:
        return Attribute(self._path())

    def _path(self) -> tuple[str, ...]:
        parts = [self._name("an attribute")]
        while True:
            if self._sign("."):
                parts.append(self._name("a name", keywords=True))
            elif self._peek().text == "[" and self._peek(1).kind == "text":
                self._next += 1
                parts.append(_unquoted(self._take().text))
                self._expect_sign("]")
            else:
                return tuple(parts)

    def _name(self, what: str, *, keywords: bool = False) -> str:
        token = self._peek()
        is_keyword = token.kind == "name" and token.text.upper() in _KEYWORDS
        if token.kind not in ("name", "quoted") or (is_keyword and not keywords):
            raise self._error(token.at, f"{what} is missing here")
        self._next += 1
        return token.text

    # Tokens.

    def end(self) -> None:
        token = self._peek()
        if token.kind != "end":
            raise self._error(token.at, f"{token.text!r} is more than this hub understands")

    def _separated(self, read: Callable[[], _Item]) -> tuple[_Item, ...]:
        found = [read()]
        while self._sign(","):
            found.append(read())
        return tuple(found)

    def _peek(self, ahead: int = 0) -> _Token:
        return self._tokens[min(self._next + ahead, len(self._tokens) - 1)]

    def _take(self) -> _Token:
        token = self._peek()
        self._next += 1
        return token

    def _word(self, word: str) -> bool:
        token = self._peek()
        found = token.kind == "name" and token.text.upper() == word
        self._next += found
        return found

    def _sign(self, sign: str) -> bool:
        token = self._peek()
        found = token.kind == "sign" and token.text == sign
        self._next += found
        return found

    def _expect_word(self, word: str) -> bool:
        if not self._word(word):
            raise self._error(self._peek().at, f"{word} is missing here")
        return True

    def _expect_sign(self, sign: str) -> None:
        if not self._sign(sign):
            raise self._error(self._peek().at, f"{sign!r} is missing here")

    def _whole_number(self) -> int:
        token = self._take()
        if not (token.text.isascii() and token.text.isdigit()) or len(token.text) > _LONGEST_NUMBER:
            raise self._error(token.at, "TOP takes a whole number")
        return int(token.text)

    def _error(self, at: int, why: str) -> QuerySyntaxError:
        shown = self._source[at : at + 30] or "the end"
        return QuerySyntaxError(f"column {at + 1}, at {shown!r}: {why}")


def _unquoted(text: str) -> str:
    if text[0] == "'":
        return text[1:-1].replace("''", "'")
    return re.sub(r"\\(.)", r"\1", text[1:-1])
