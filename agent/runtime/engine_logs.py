"""Logs of a container. Functions block: they run in the threads of `EngineLink`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from .container import LogFilter, LogLine, RuntimeFailed
from .engine_link import Client, inspected
from .log_frames import LogDecoder

_FOLLOW_PAUSE = 0.5


def read_logs(
    client: Client,
    name: str,
    wanted: LogFilter,
    follow: bool,
    doing: str,
    put: Callable[[LogLine], None],
) -> None:
    """Docker ends a followed log when the container stops; this one goes on when it runs again,
    until it is removed or replaced."""
    query: dict[str, Any] = {"stdout": 1, "stderr": 1, "timestamps": 1}
    query["follow"] = int(follow)
    query["tail"] = "all" if wanted.tail is None else str(wanted.tail)
    for key, at in (("since", wanted.since), ("until", wanted.until)):
        if at is not None:
            query[key] = _timestamp(at)
    identity = ""
    while (inspect := inspected(client, name)) is not None:
        if identity not in ("", inspect["Id"]):
            return
        identity = inspect["Id"]
        decoder = LogDecoder(bool(inspect["Config"].get("Tty")))
        _read(client, identity, query, decoder, put)
        if not follow:
            return
        if decoder.last:
            query |= {"since": _after(decoder.last), "tail": "all"}
        if not _runs_again(client, identity):
            return
    if not identity:
        raise RuntimeFailed(
            f"cannot {doing}: there is no such container; 'gatelet list' names all",
            retryable=False,
        )


def _read(
    client: Client,
    identity: str,
    query: Mapping[str, Any],
    decoder: LogDecoder,
    put: Callable[[LogLine], None],
) -> None:
    """The SDK's own `logs` does not say which stream a line came from."""
    from docker.errors import APIError

    url = f"{client.base_url}/v{client.api_version}/containers/{identity}/logs"
    with client.get(url, params=query, stream=True, timeout=None) as response:
        if not response.ok:
            raise APIError(
                f"{response.status_code}", response=response, explanation=response.text[:600]
            )
        for data in response.raw.stream(64 * 1024, decode_content=False):
            for line in decoder.feed(data):
                put(line)
        for line in decoder.end():
            put(line)


def _runs_again(client: Client, identity: str) -> bool:
    """Waits until a stopped container runs again; False when it is removed."""
    while (inspect := inspected(client, identity)) is not None:
        if inspect["State"].get("Running"):
            return True
        time.sleep(_FOLLOW_PAUSE)
    return False


def _timestamp(at: datetime) -> str:
    return f"{at.timestamp():.6f}"


def _after(stamp: str) -> str:
    """One nanosecond after `stamp`, as Docker writes times."""
    head, _, fraction = stamp.removesuffix("Z").partition(".")
    nanoseconds = int(fraction.ljust(9, "0")[:9] or 0) + 1
    whole = int(datetime.fromisoformat(f"{head}+00:00").timestamp())
    return f"{whole + nanoseconds // 10**9}.{nanoseconds % 10**9:09}"
