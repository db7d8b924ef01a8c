"""What direct methods are asked for: edgeAgent's payloads, read as it reads them.

Keys have no case and unknown ones are ignored, as there; whatever else is wrong is said with its
place. (Azure/iotedge, edge-agent: requests and logs.)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from ..log_lines import LineFilter
from ..runtime.container import LogFilter
from .moments import parse_moment

ALL = "all"
PATTERN_LIMIT = 512
TAIL_LIMIT = 2**31 - 1
ITEMS_LIMIT = 256

Encoding = Literal["none", "gzip"]
ContentType = Literal["text", "json"]


class BadRequest(Exception):
    """The payload cannot be used; the message says where and why (status 400)."""


@dataclass(frozen=True, slots=True)
class LogItem:
    """`modules` is None for all."""

    modules: re.Pattern[str] | None
    lines: LineFilter


@dataclass(frozen=True, slots=True)
class LogsRequest:
    items: tuple[LogItem, ...]
    encoding: Encoding
    content: ContentType


@dataclass(frozen=True, slots=True)
class BundleRequest:
    since: datetime | None
    until: datetime | None
    runtime_only: bool


class _Fields:
    """The members of a JSON object, found without regard to case. `where` is named in errors."""

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, Mapping):
            found = "nothing" if value is None else type(value).__name__
            raise BadRequest(f"{where}: expected a JSON object, found {found}")
        self._values = {str(key).lower(): item for key, item in value.items()}
        self._where = where

    def get(self, name: str) -> Any:
        return self._values.get(name.lower())

    def where(self, name: str) -> str:
        return f"{self._where}.{name}"

    def text(self, name: str) -> str:
        value = self.get(name)
        if not isinstance(value, str) or not value.strip():
            raise BadRequest(f"{self.where(name)}: expected a text, found {_shown(value)}")
        return value

    def integer(self, name: str, least: int, most: int) -> int | None:
        value = self.get(name)
        if value is None:
            return None
        if isinstance(value, str) and re.fullmatch(r"\d{1,10}", value, re.ASCII):
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise BadRequest(
                f"{self.where(name)}: expected a whole number from {least} to {most}, "
                f"found {_shown(value)}"
            )
        return value

    def pattern(self, name: str) -> re.Pattern[str]:
        text = self.text(name)
        if len(text) > PATTERN_LIMIT:
            raise BadRequest(f"{self.where(name)}: longer than {PATTERN_LIMIT} characters")
        try:
            return re.compile(text, re.IGNORECASE)
        except (re.error, RecursionError, OverflowError) as error:
            raise BadRequest(f"{self.where(name)}: not a regular expression: {error}") from error

    def moment(self, name: str, now: datetime) -> datetime | None:
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, (str, int, float)):
            raise BadRequest(f"{self.where(name)}: expected a time, found {_shown(value)}")
        try:
            return parse_moment(value, now)
        except ValueError as error:
            raise BadRequest(f"{self.where(name)}: {error}") from error

    def word(self, name: str, words: tuple[str, ...]) -> str:
        value = self.get(name)
        if value is None:
            return words[0]
        if not isinstance(value, str) or value.lower() not in words:
            raise BadRequest(
                f"{self.where(name)}: expected one of {', '.join(words)}, found {_shown(value)}"
            )
        return value.lower()


def _fields(payload: Any) -> _Fields:
    """The payload's members. Raises BadRequest, also for another major schema version."""
    fields = _Fields(payload, "payload")
    version = fields.get("schemaVersion")
    if version is not None and not re.fullmatch(r"1(\.\d+)*", str(version), re.ASCII):
        raise BadRequest(f"payload.schemaVersion: expected 1.0, found {_shown(version)}")
    return fields


def module_to_restart(payload: Any) -> str:
    """Raises BadRequest."""
    return _fields(payload).text("id")


def task_asked_for(payload: Any) -> str:
    """The correlation id. Raises BadRequest."""
    return _fields(payload).text("correlationId")


def logs_request(payload: Any, now: datetime) -> LogsRequest:
    """Raises BadRequest."""
    fields = _fields(payload)
    items = fields.get("items")
    if not isinstance(items, list) or not 0 < len(items) <= ITEMS_LIMIT:
        raise BadRequest(
            'payload.items: expected a list such as [{"id": "all", "filter": {"tail": 100}}], '
            f"found {_shown(items)}"
        )
    encoding: Encoding = "gzip" if fields.word("encoding", ("none", "gzip")) == "gzip" else "none"
    content: ContentType = (
        "json" if fields.word("contentType", ("text", "json")) == "json" else "text"
    )
    return LogsRequest(
        tuple(_item(item, f"payload.items[{index}]", now) for index, item in enumerate(items)),
        encoding,
        content,
    )


def bundle_request(payload: Any, now: datetime) -> BundleRequest:
    """Raises BadRequest."""
    fields = _fields(payload)
    only = fields.get("edgeRuntimeOnly")
    if only not in (None, True, False):
        raise BadRequest(f"payload.edgeRuntimeOnly: expected true or false, found {_shown(only)}")
    since, until = fields.moment("since", now), fields.moment("until", now)
    return BundleRequest(since, until, bool(only))


def sas_url(payload: Any) -> str:
    """Raises BadRequest, which never repeats the URL."""
    value = _fields(payload).get("sasUrl")
    if not isinstance(value, str) or not value:
        raise BadRequest("payload.sasUrl: expected the URL of a blob container with a signature")
    return value


def _item(value: Any, where: str, now: datetime) -> LogItem:
    fields = _Fields(value, where)
    everything = fields.text("id").lower() == ALL
    given = fields.get("filter")
    chosen = _Fields({} if given is None else given, f"{where}.filter")
    return LogItem(
        None if everything else fields.pattern("id"),
        LineFilter(
            LogFilter(
                chosen.integer("tail", 0, TAIL_LIMIT),
                chosen.moment("since", now),
                chosen.moment("until", now),
            ),
            chosen.integer("loglevel", 0, 7),
            None if chosen.get("regex") is None else chosen.pattern("regex"),
        ),
    )


def _shown(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
