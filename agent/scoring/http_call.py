"""A REST request on its way, and the conventions that its answer follows."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from .http_types import HttpRequest, HttpResponse, Refusal

_LONGEST_ID = 100
_AZURE = frozenset({"healthy", "score", "score_query", "swagger", ""})


@dataclass(slots=True)
class Call:
    """A request on its way; `headers` are added to its answer, whatever that is."""

    request: HttpRequest
    operation: str
    params: Mapping[str, str]
    started: float
    headers: list[tuple[str, str]] = field(default_factory=list)
    endpoint: str = ""
    version: str = ""
    on_loop: bool = True
    # Moments of time.monotonic(); 0: not reached.
    submitted: float = 0.0
    computed: float = 0.0
    # Bytes of the server's that the unpacked body takes.
    reserved: int = 0

    @property
    def azure(self) -> bool:
        """Whether Azure ML's conventions hold rather than OIP's."""
        return self.operation in _AZURE


def json_response(value: Any, status: int = 200) -> HttpResponse:
    return HttpResponse(status, msgspec.json.encode(value))


def azure_ids(headers: Mapping[str, str]) -> list[tuple[str, str]]:
    """What Azure ML's inference server answers for `x-request-id` and its own two.

    Raises Refusal 431 for ids that are too long.
    """
    request_id = headers.get("x-request-id")
    if request_id is not None and len(request_id) > _LONGEST_ID:
        raise Refusal(431, f"x-request-id must not exceed {_LONGEST_ID} characters")
    ours, theirs = headers.get("x-ms-request-id"), headers.get("x-ms-client-request-id")
    if max(len(ours or ""), len(theirs or "")) > _LONGEST_ID:
        raise Refusal(
            431,
            f"x-ms-request-id and x-ms-client-request-id must not exceed {_LONGEST_ID} characters",
        )
    request_id = request_id or str(uuid.uuid4())
    answered = [
        ("x-request-id", request_id),
        ("x-ms-request-id", ours or theirs or request_id),
    ]
    if theirs or ours:
        answered.append(("x-ms-client-request-id", theirs or ours or ""))
    return answered
