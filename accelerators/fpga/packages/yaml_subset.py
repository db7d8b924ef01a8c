"""The part of YAML that tools dump their settings in: block mappings and lists of scalars.

Everything is text; tags, anchors and text over several lines are skipped, so that nothing can be
built or expanded. Pure.
"""

from __future__ import annotations

import re
from typing import Any

_ENTRY = re.compile(
    r"(?P<indent> *)(?P<key>[A-Za-z_][\w .-]*|'[^']*'|\"[^\"]*\"):(?: +(?P<value>.*))?"
)
_DEPTH_LIMIT = 16

Mapping = dict[str, Any]
"""Values are texts, lists of texts, or mappings."""


def parse_mappings(text: str) -> Mapping:
    """Key -> text, a list of texts, or a mapping one level deeper.

    A key given twice keeps its first value.
    """
    root: Mapping = {}
    # (indent, mapping) of what is open; a mapping's own indent is known with its first key.
    levels: list[tuple[int, Mapping]] = [(0, root)]
    pending: tuple[int, Mapping, str] | None = None
    block_from: int | None = None
    for line in text.splitlines():
        stripped = line.strip()
        if not stripped or stripped.startswith(("#", "---", "%")):
            continue
        indent = len(line) - len(line.lstrip(" "))
        if block_from is not None:
            if indent > block_from:
                continue
            block_from = None
        if stripped.startswith("- "):
            if pending is not None and indent >= pending[0]:
                _append(pending[1], pending[2], _scalar(stripped[2:].strip()))
            continue
        match = _ENTRY.fullmatch(line.rstrip())
        if match is None:
            continue
        if pending is not None:
            above, parent, name = pending
            inner = parent[name]
            if indent > above and isinstance(inner, dict) and len(levels) < _DEPTH_LIMIT:
                levels.append((indent, inner))
            pending = None
        while indent < levels[-1][0]:
            levels.pop()
        if indent != levels[-1][0]:
            continue
        level = levels[-1][1]
        key, value = _scalar(match["key"]), (match["value"] or "").strip()
        if value in ("|", ">", "|-", ">-"):
            block_from = indent
        elif value:
            level.setdefault(key, _scalar(value))
        elif key not in level:
            level[key] = {}
            pending = (indent, level, key)
    return root


def _append(parent: Mapping, key: str, text: str) -> None:
    value = parent[key]
    if isinstance(value, list):
        value.append(text)
    elif not value:
        parent[key] = [text]


def _scalar(text: str) -> str:
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1].replace("''", "'") if text[0] == "'" else text[1:-1]
    return text.split(" #")[0].strip()
