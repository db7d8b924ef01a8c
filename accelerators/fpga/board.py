"""Which board this is, and which FPGA part it carries."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

KNOWN_PARTS: dict[str, str] = {
    "pynq-z1": "xc7z020clg400-1",
    "pynq-z2": "xc7z020clg400-1",
    "arty-z7-20": "xc7z020clg400-1",
    "zcu102": "xczu9eg-ffvb1156-2-e",
    "zcu104": "xczu7ev-ffvc1156-2-e",
    "zcu111": "xczu28dr-ffvg1517-2-e",
    "zcu208": "xczu48dr-fsvg1517-2-e",
    "rfsoc2x2": "xczu28dr-ffvg1517-2-e",
    "rfsoc4x2": "xczu48dr-ffvg1517-2-e",
    "kv260": "xck26-sfvc784-2LV-c",
    "kr260": "xck26-sfvc784-2LV-c",
    "kd240": "xck24-ubva530-2LV-c",
    "ultra96": "xczu3eg-sbva484-1-e",
    "ultra96v2": "xczu3eg-sbva484-1-i",
    "aup-zu3": "xczu3eg-sfvc784-2-e",
}
"""Board name in lower case -> part, for boards whose name PYNQ images report."""

_DEVICE_TREE_BOARD = Path("proc/device-tree/chosen/pynq_board")
_ENVIRONMENT_FILES = (Path("etc/environment"), Path("etc/profile.d/boardname.sh"))
_ASSIGNMENT = re.compile(r"^\s*(?:export\s+)?BOARD\s*=\s*[\"']?([^\"'\s]+)", re.MULTILINE)
_PART = re.compile(r"(?:xc)?(?P<device>[0-9a-z]+?)-?(?P<package>[a-z]{3,4}\d{3,4})(?:-.*)?")


@dataclass(frozen=True, slots=True)
class Board:
    """A board: `name` in lower case, and its `part` where known."""

    name: str
    part: str | None


def board_named(name: str) -> Board:
    """The board PYNQ calls `name` (upper or lower case)."""
    lower = name.strip().lower()
    return Board(lower, KNOWN_PARTS.get(lower))


def detect_board(environ: Mapping[str, str] = os.environ, root: Path = Path("/")) -> Board | None:
    """The board this machine is, or None when nothing says so.

    Source: PYNQ images put the name into the device tree (chosen/pynq_board), and into BOARD in
    the environment through /etc/environment or /etc/profile.d/boardname.sh.
    """
    if name := environ.get("BOARD", "").strip():
        return board_named(name)
    try:
        name = (root / _DEVICE_TREE_BOARD).read_bytes().rstrip(b"\0").decode("utf-8", "replace")
    except OSError:
        name = ""
    if name.strip():
        return board_named(name)
    for path in _ENVIRONMENT_FILES:
        try:
            text = (root / path).read_text("utf-8", "replace")
        except OSError:
            continue
        if match := _ASSIGNMENT.search(text):
            return board_named(match[1])
    return None


def same_part(one: str, other: str) -> bool:
    """Whether a bitstream for part `one` can be loaded into part `other`.

    Vivado writes "7z020clg400" into the header of a 7-series .bit file and the full name
    ("xczu7ev-ffvc1156-2-e") for later families. Die and package have to agree; the speed and
    temperature grades say nothing about whether the configuration loads.
    """
    parsed = [_PART.fullmatch(part.strip().lower()) for part in (one, other)]
    if parsed[0] is None or parsed[1] is None:
        return one.strip().lower() == other.strip().lower()
    return parsed[0].groups() == parsed[1].groups()
