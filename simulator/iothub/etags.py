"""Optimistic concurrency by ETag, as IoT Hub's clients write it."""

from __future__ import annotations


def accepts(if_match: str | None, etag: str) -> bool:
    """Whether an If-Match header lets a change through: absent, any (`*`), or this ETag.

    azure-iot-hub and `az iot` put every ETag in quotes, the asterisk too.
    """
    if if_match is None:
        return True
    wanted = {part.strip().removeprefix("W/").strip('"') for part in if_match.split(",")}
    return "*" in wanted or etag in wanted
