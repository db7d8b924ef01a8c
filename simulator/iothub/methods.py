"""Direct methods: a call that waits for its client, and for the answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

from ...agent.clock import Clock
from .devices import ClientId
from .errors import HubError
from .json_text import json_bytes, parse_json
from .links import Link

METHOD_PAYLOAD_LIMIT = 128 * 1024


class DirectMethods:
    """The calls of one hub. `link` gives the connected client, or None."""

    def __init__(self, link: Callable[[ClientId], Link | None], clock: Clock) -> None:
        self._link = link
        self._clock = clock
        self._answers: dict[tuple[ClientId, str], asyncio.Future[tuple[int, Any]]] = {}
        self._sent = 0
        self._link_changed = asyncio.Event()

    async def invoke(
        self,
        client: ClientId,
        name: str,
        payload: Any,
        response_timeout: float,
        connect_timeout: float,
    ) -> tuple[int, Any]:
        """See Hub.invoke_method."""
        body = json_bytes(payload)
        if len(body) > METHOD_PAYLOAD_LIMIT:
            raise HubError(
                413, "RequestEntityTooLarge", f"a payload has up to {METHOD_PAYLOAD_LIMIT} bytes"
            )
        self._sent += 1
        rid = f"{self._sent:x}"
        topic = f"$iothub/methods/POST/{quote(name, safe='')}/?$rid={rid}"
        link = await self._online(client, topic, connect_timeout)
        answer: asyncio.Future[tuple[int, Any]] = asyncio.get_running_loop().create_future()
        self._answers[client, rid] = answer
        try:
            link.deliver(topic, body)
            return await asyncio.wait_for(answer, response_timeout)
        except asyncio.TimeoutError:
            raise HubError(
                504, "GatewayTimeout", f"{client} did not answer {name} in {response_timeout:g} s"
            ) from None
        finally:
            del self._answers[client, rid]

    def answered(self, client: ClientId, rid: str, status: int, body: bytes) -> None:
        """See Hub.method_answered."""
        if len(body) > METHOD_PAYLOAD_LIMIT:
            raise HubError(413, "RequestEntityTooLarge", f"the answer has {len(body)} bytes")
        answer = self._answers.get((client, rid))
        if answer is not None and not answer.done():
            answer.set_result((status, parse_json(body) if body.strip() else None))

    def disconnected(self, client: ClientId) -> None:
        """What waits for this client's answer waits in vain."""
        for (other, rid), answer in list(self._answers.items()):
            if other == client and not answer.done():
                answer.set_exception(_not_online(client, f"disconnected during {rid}"))

    def changed(self) -> None:
        """A client came, or listens to more than before."""
        event, self._link_changed = self._link_changed, asyncio.Event()
        event.set()

    async def _online(self, client: ClientId, topic: str, timeout: float) -> Link:
        deadline = self._clock.monotonic() + timeout
        while True:
            link = self._link(client)
            if link is not None and link.subscribed(topic):
                return link
            left = deadline - self._clock.monotonic()
            if left <= 0:
                raise _not_online(client, "it is not connected, or not listening for methods")
            # Not `wait_for`: before Python 3.12 it can lose the cancellation of the caller.
            change = asyncio.ensure_future(self._link_changed.wait())
            try:
                await asyncio.wait({change}, timeout=left)
            finally:
                change.cancel()


def _not_online(client: ClientId, why: str) -> HubError:
    return HubError(404, "DeviceNotOnline", f"{client}: {why}")
