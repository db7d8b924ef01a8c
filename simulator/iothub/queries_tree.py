"""The query language as trees: what `queries` parses and `queries_evaluation` runs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Literal:
    value: str | float | int | bool | None


@dataclass(frozen=True, slots=True)
class Attribute:
    """A member of a twin, such as ("tags", "site")."""

    path: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    sign: str
    left: Expression
    right: Expression


@dataclass(frozen=True, slots=True)
class Membership:
    left: Expression
    items: tuple[Expression, ...]
    negated: bool


@dataclass(frozen=True, slots=True)
class Logic:
    """`word` is AND or OR."""

    word: str
    parts: tuple[Expression, ...]


@dataclass(frozen=True, slots=True)
class Not:
    part: Expression


@dataclass(frozen=True, slots=True)
class Call:
    name: str
    arguments: tuple[Expression, ...]


@dataclass(frozen=True, slots=True)
class Aggregate:
    """`argument` is None for COUNT() and COUNT(*)."""

    name: str
    argument: Attribute | None


Expression = Literal | Attribute | Comparison | Membership | Logic | Not | Call


@dataclass(frozen=True, slots=True)
class Column:
    name: str
    value: Attribute | Aggregate


@dataclass(frozen=True, slots=True)
class Statement:
    """`columns` is empty for `SELECT *`."""

    source: str
    columns: tuple[Column, ...] = ()
    condition: Expression | None = None
    group_by: tuple[Attribute, ...] = ()
    top: int | None = None

    @property
    def whole_twins(self) -> bool:
        return not self.columns
