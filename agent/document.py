"""Strict reading of JSON from outside: every complaint names a path and what was found there."""

from __future__ import annotations

UNPARSABLE = 400
UNKNOWN_SCHEMA = 412
EMPTY = 417


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
