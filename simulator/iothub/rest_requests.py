"""What every route of the service side reads from its request, and the end of its connections."""

from __future__ import annotations

import asyncio
import hmac
from typing import Any

from aiohttp import web

from .devices import ClientId
from .errors import invalid
from .json_text import parse_json

_MOST_DIGITS = 18


def client_of(request: web.Request) -> ClientId:
    """From `{device}` and `{module}` of the path. Raises HubError 400."""
    device, module = request.match_info["device"], request.match_info.get("module")
    return ClientId.parse(device if module is None else f"{device}/{module}")


def same_text(shown: str, expected: str) -> bool:
    """Compared in any case, so that time tells nothing; headers may hold any bytes."""
    return hmac.compare_digest(shown.encode("utf-8", "surrogateescape"), expected.encode())


async def json_body(request: web.Request) -> Any:
    """Raises HubError 400."""
    return parse_json(await request.read())


async def object_body(request: web.Request) -> dict[str, Any]:
    """Raises HubError 400."""
    body = await json_body(request)
    if not isinstance(body, dict):
        raise invalid("the body must be a JSON object")
    return body


def number_of(text: str, name: str) -> int:
    """A whole number from 0. Raises HubError 400."""
    digits = text.strip()
    if not (digits.isascii() and digits.isdigit()) or len(digits) > _MOST_DIGITS:
        raise invalid(f"{name} is a whole number, not {text[:40]!r}")
    return int(digits)


def count_of(text: str | None, name: str, default: int, most: int) -> int:
    """A whole number from 1. Raises HubError 400."""
    if text is None or not text.strip():
        return default
    if (count := number_of(text, name)) < 1:
        raise invalid(f"{name} is a whole number from 1, not {text!r}")
    return min(count, most)


def seconds_of(call: dict[str, Any], name: str, least: float, most: float, default: float) -> float:
    """Raises HubError 400."""
    value = call.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise invalid(f"{name} is a number of seconds from {least:g} to {most:g}")
    return float(value)


async def end_connections(runner: web.AppRunner) -> None:
    """Stops the runner and leaves nothing open.

    A client that keeps its idle connection and never reads again would hold a TLS connection open
    for half a minute.
    """
    server = runner.server
    connections = [] if server is None else server.connections
    transports = [one.transport for one in connections if one.transport is not None]
    await runner.cleanup()
    for transport in transports:
        if isinstance(transport, asyncio.WriteTransport):
            transport.abort()
    for _ in range(3):
        await asyncio.sleep(0)
