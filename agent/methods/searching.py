"""Regular expressions from afar: some take ages on the wrong text, and while one does, nothing else
in the process runs. Those that could are tried in a process of their own, with a time limit."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence

from ..log_lines import MATCHED_CHARACTERS, LineFilter, parse_line
from ..runtime.container import LogLine
from .requests import BadRequest, LogItem

SEARCH_SECONDS = 5.0
_BACKTRACKS = re.compile(r"[*+?{]")
_WORKER = """
import json, re, sys
pattern, flags, texts = json.load(sys.stdin)
search = re.compile(pattern, flags).search
json.dump([search(text) is not None for text in texts], sys.stdout)
"""


def search_all(
    pattern: re.Pattern[str], texts: Sequence[str], seconds: float = SEARCH_SECONDS
) -> list[bool]:
    """Which of `texts` the pattern is found in. Blocking.

    Raises BadRequest when it takes longer than `seconds`, OSError when no process can be started.
    """
    if not texts or _BACKTRACKS.search(pattern.pattern) is None:
        return [pattern.search(text) is not None for text in texts]
    question = json.dumps([pattern.pattern, pattern.flags & ~re.UNICODE, list(texts)])
    try:
        worker = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _WORKER],
            input=question.encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=seconds,
            check=True,
        )
    except subprocess.TimeoutExpired:
        raise BadRequest(
            f"the regular expression {pattern.pattern[:60]!r} takes longer than {seconds:g} s: "
            "avoid repetitions inside repetitions"
        ) from None
    except subprocess.CalledProcessError as error:
        raise OSError(f"searching ended with {error.returncode}") from error
    return [bool(found) for found in json.loads(worker.stdout)]


def matching(items: Sequence[LogItem], names: Sequence[str]) -> dict[str, LineFilter]:
    """Log name -> filter, for the names that an item asks for; the first item that does counts.

    Blocking. Raises BadRequest, OSError.
    """
    found: dict[str, LineFilter] = {}
    for item in items:
        hits = [True] * len(names) if item.modules is None else search_all(item.modules, names)
        for name, hit in zip(names, hits, strict=True):
            if hit:
                found.setdefault(name, item.lines)
    return found


def filtered(lines: Sequence[LogLine], wanted: LineFilter) -> list[LogLine]:
    """The lines that the filter's pattern and tail leave of those it took otherwise.

    Blocking. Raises BadRequest, OSError.
    """
    kept = list(lines)
    if wanted.pattern is not None:
        texts = [parse_line(line.text).text[:MATCHED_CHARACTERS] for line in lines]
        hits = search_all(wanted.pattern, texts)
        kept = [line for line, hit in zip(lines, hits, strict=True) if hit]
    tail = wanted.where.tail
    return kept if tail is None else kept[len(kept) - min(tail, len(kept)) :]
