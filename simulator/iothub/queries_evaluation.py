"""Queries run over twins as the service side sees them.

Logic has three values, as in the hub: a comparison with a member that is missing, or between two
kinds of value, is undefined, and so is its negation; only what is true is selected.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

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

UNDEFINED: Any = type("Undefined", (), {"__repr__": lambda _: "undefined", "__slots__": ()})()


def matches(condition: Expression | None, twin: Mapping[str, Any]) -> bool:
    """Whether a condition is true of a twin; None is true of all."""
    return condition is None or _value(condition, twin) is True


def run(statement: Statement, twins: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows in the order of `twins`; groups in the order of their first member."""
    found = [twin for twin in twins if matches(statement.condition, twin)]
    aggregated = any(isinstance(column.value, Aggregate) for column in statement.columns)
    if statement.whole_twins:
        rows = [dict(twin) for twin in found]
    elif aggregated or statement.group_by:
        rows = [_group_row(statement.columns, group) for group in _groups(statement, found)]
    else:
        rows = [_row(statement.columns, twin) for twin in found]
    return rows[: statement.top]


def _row(columns: Iterable[Column], twin: Mapping[str, Any]) -> dict[str, Any]:
    values = ((column.name, _value(column.value, twin)) for column in columns)  # type: ignore[arg-type]
    return {name: value for name, value in values if value is not UNDEFINED}


def _groups(statement: Statement, twins: list[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    if not statement.group_by:
        return [twins]
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for twin in twins:
        groups.setdefault(repr([_value(a, twin) for a in statement.group_by]), []).append(twin)
    return list(groups.values())


def _group_row(columns: Iterable[Column], twins: list[Mapping[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for column in columns:
        if isinstance(column.value, Aggregate):
            value = _aggregate(column.value, twins)
        else:
            value = _value(column.value, twins[0])
        if value is not UNDEFINED:
            row[column.name] = value
    return row


def _aggregate(aggregate: Aggregate, twins: list[Mapping[str, Any]]) -> Any:
    if aggregate.argument is None:
        return len(twins)
    values = [_value(aggregate.argument, twin) for twin in twins]
    if aggregate.name == "COUNT":
        return sum(value is not UNDEFINED for value in values)
    numbers = [value for value in values if _kind(value) == "number"]
    if not numbers:
        return UNDEFINED
    if aggregate.name == "AVG":
        return sum(numbers) / len(numbers)
    return {"SUM": sum, "MIN": min, "MAX": max}[aggregate.name](numbers)  # type: ignore[operator]


def _value(expression: Expression, twin: Mapping[str, Any]) -> Any:
    if isinstance(expression, Literal):
        return expression.value
    if isinstance(expression, Attribute):
        return _member(twin, expression.path)
    evaluate = partial(_value, twin=twin)
    if isinstance(expression, Comparison):
        return _compare(expression.sign, evaluate(expression.left), evaluate(expression.right))
    if isinstance(expression, Membership):
        left = evaluate(expression.left)
        if left is UNDEFINED:
            return UNDEFINED
        found = any(_compare("=", left, evaluate(item)) is True for item in expression.items)
        return found is not expression.negated
    if isinstance(expression, Not):
        value = evaluate(expression.part)
        return not value if isinstance(value, bool) else UNDEFINED
    if isinstance(expression, Logic):
        return _logic(expression.word, [evaluate(part) for part in expression.parts])
    return _call(expression, [evaluate(argument) for argument in expression.arguments])


def _logic(word: str, values: list[Any]) -> Any:
    decisive = word == "OR"
    if any(value is decisive for value in values):
        return decisive
    return (not decisive) if all(isinstance(value, bool) for value in values) else UNDEFINED


def _member(value: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        if not isinstance(value, Mapping) or name not in value:
            return UNDEFINED
        value = value[name]
    return value


def _compare(sign: str, left: Any, right: Any) -> Any:
    if left is UNDEFINED or right is UNDEFINED or _kind(left) != _kind(right):
        return UNDEFINED
    if sign in ("=", "!="):
        return (left == right) is (sign == "=")
    if _kind(left) not in ("number", "string"):
        return UNDEFINED
    below, above = left < right, left > right
    return {"<": below, "<=": not above, ">": above, ">=": not below}[sign]


def _call(call: Call, values: list[Any]) -> Any:
    first = values[0]
    kind = _kind(first)
    if call.name == "IS_DEFINED":
        return first is not UNDEFINED
    if call.name == "IS_PRIMITIVE":
        return kind in ("string", "number", "bool", "null")
    if call.name.startswith("IS_"):
        return kind == call.name[3:].lower()
    if kind != "string" or _kind(values[1]) != "string":
        return UNDEFINED
    if call.name == "CONTAINS":
        return values[1] in first
    return first.startswith(values[1]) if call.name.startswith("S") else first.endswith(values[1])


def _kind(value: Any) -> str:
    if value is UNDEFINED:
        return "undefined"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, (int, float)):
        return "number"
    if isinstance(value, str):
        return "string"
    return "object" if isinstance(value, Mapping) else "array"
