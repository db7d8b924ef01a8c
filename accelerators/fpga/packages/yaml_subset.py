"""The part of YAML that tools dump their settings in: nested block mappings of scalars.

Everything is text; lists, tags, anchors and text over several lines are skipped, so that nothing
can be built or expanded. Pure.
"""

from __future__ import annotations

import re

_ENTRY = re.compile(
    r"(?P<indent> *)(?P<key>[A-Za-z_][\w .-]*|'[^']*'|\"[^\"]*\"):(?: +(?P<value>.*))?"
)
_DEPTH_LIMIT = 16

Mapping = dict[str, "str | Mapping"]


def parse_mappings(text: str) -> Mapping:
    """Key -> text, or a mapping one level deeper. A key given twice keeps its first value."""
    root: Mapping = {}
    # (indent, mapping) of what is open; a mapping's own indent is known with its first key.
    open_levels: list[tuple[int, Mapping]] = [(0, root)]
    pending: tuple[int, Mapping] | None = None
    skip_from: int | None = None
    for line in text.splitlines():
        if not line.strip() or line.lstrip().startswith(("#", "- ", "---", "%")):
            continue
        indent = len(line) - len(line.lstrip(" "))
        if skip_from is not None:
            if indent > skip_from:
                continue
            skip_from = None
        match = _ENTRY.fullmatch(line.rstrip())
        if match is None:
            continue
        if pending is not None:
            if indent > pending[0] and len(open_levels) < _DEPTH_LIMIT:
                open_levels.append((indent, pending[1]))
            pending = None
        while indent < open_levels[-1][0]:
            open_levels.pop()
        if indent != open_levels[-1][0]:
            continue
        level = open_levels[-1][1]
        key, value = _scalar(match["key"]), (match["value"] or "").strip()
        if value in ("|", ">", "|-", ">-"):
            skip_from = indent
        elif value:
            level.setdefault(key, _scalar(value))
        elif key not in level:
            inner: Mapping = {}
            level[key] = inner
            pending = (indent, inner)
    return root


def _scalar(text: str) -> str:
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1].replace("''", "'") if text[0] == "'" else text[1:-1]
    return text.split(" #")[0].strip()
