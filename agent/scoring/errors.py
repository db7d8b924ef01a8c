"""What can go wrong with a scoring request, in the words of every protocol served."""

from __future__ import annotations

from enum import Enum

DEFECT = "the scoring process hit a defect of its own; its log has the details"


class Code(Enum):
    """gRPC's names; REST maps them to 404, 400, 503, 504, 501, 500, 429, 401, 403 and 499.
    CANCELLED: whoever asked is gone, so nobody sees it."""

    NOT_FOUND = "NOT_FOUND"
    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    UNAVAILABLE = "UNAVAILABLE"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    UNIMPLEMENTED = "UNIMPLEMENTED"
    INTERNAL = "INTERNAL"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    CANCELLED = "CANCELLED"


class ScoringError(Exception):
    """A request that is answered with an error; `message` is for the client's developer.

    `retry_after`: seconds after which the same request may be answered, if that is known.
    """

    def __init__(self, code: Code, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_after = retry_after


class InstanceRefused(Exception):
    """A model cannot be loaded or used as asked; only another model or request will do."""


class InstanceUnavailable(Exception):
    """A model cannot be loaded or probed for now; the same call may succeed later."""
