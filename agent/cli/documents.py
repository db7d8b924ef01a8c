"""Manifests and their layers as files."""

from __future__ import annotations

import sys
from pathlib import Path

from .command import CommandError, wrong_use

MISFITS_SHOWN = 8


def document(file: str, layers: list[str]) -> bytes:
    """The manifest in `file` under `layers` (PRIORITY:FILE each), as one document.

    What would not fit a twin is said on standard error: here it does no harm. Raises CommandError.
    """
    from ..document import ManifestError
    from ..layers import layered_document
    from ..twin_fit import twin_misfits

    body = _read(file)
    try:
        if layers:
            body = layered_document(body, [_layer(option) for option in layers])
        misfits = twin_misfits(body)
    except ManifestError as error:
        if layers:
            raise CommandError(f"the manifest and its layers ({error.code}): {error}") from error
        return body  # the agent says what is wrong with it
    for misfit in misfits[:MISFITS_SHOWN]:
        print(f"gatelet: IoT Hub would not take this: {misfit}", file=sys.stderr)
    if len(misfits) > MISFITS_SHOWN:
        print(f"gatelet: ... and {len(misfits) - MISFITS_SHOWN} more", file=sys.stderr)
    return body


def _layer(option: str) -> tuple[int, str, bytes]:
    priority, colon, file = option.partition(":")
    if not colon or not priority.isdecimal() or not 0 < int(priority) < 2**31:
        wrong_use(f"--layer {option}: expected PRIORITY:FILE such as 10:site.json")
    return int(priority), Path(file).stem, _read(file)


def _read(file: str) -> bytes:
    if file == "-":
        return sys.stdin.buffer.read()
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise CommandError(f"cannot read {file}: {error.strerror}") from error
