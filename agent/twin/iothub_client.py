"""One azure-iot-device client made safe to use: bounded, on our event loop, for one connection.

The SDK never subscribes again, has no time limits, blocks in constructors and setters, and may
wedge in its own reconnecting. So a client here lives as long as its connection: what broke is
thrown away, and the next connection starts from a state that is known.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from ..clock import Clock
from ..identity.certificates import Stamp, passphrase
from ..identity.login import Login
from ..identity.provisioning import Network
from ..identity.resolver import IdentityResolver
from ..identity.signing import shared_access_signature
from ..identity.sources import IdentityError, IdentitySource, parse_connection_string
from .transport import MethodResult, TransportUnavailable

_log = logging.getLogger(__name__)
_SHUTDOWN_TRIES = 3
_RENEWAL_MARGIN = 120.0


def ignore(login: Login) -> None:
    """In place of somebody who wants to know of logins."""


@dataclass(frozen=True, slots=True)
class IotHubSettings:
    """How to reach the hub. Times in seconds.

    `source` says who we are; text is the connection string of a device or a module. `ca_file` (PEM)
    replaces the system's trusted certificates; `proxy` is "host:port" of an HTTP CONNECT proxy.
    Renewing a token costs a new connection, so tokens last a day (`token_lifetime`, renewed 120 s
    before their end). The files of an identity are looked at every `watch_interval`; `state_dir`
    keeps what a provisioning service answered. `logged_in` is told what the hub took.
    """

    source: IdentitySource | str = field(repr=False)
    ca_file: Path | None = None
    proxy: str | None = None
    websockets: bool = False
    state_dir: Path | None = None
    token_lifetime: int = 24 * 3600
    retry_base: float = 1.0
    retry_cap: float = 60.0
    connect_timeout: float = 60.0
    request_timeout: float = 30.0
    close_timeout: float = 10.0
    resync_interval: float = 900.0
    stable_after: float = 30.0
    watch_interval: float = 5.0
    logged_in: Callable[[Login], None] = field(default=ignore, repr=False)

    def __post_init__(self) -> None:
        """Raises ValueError, without the key in its text."""
        if isinstance(self.source, str):
            parse_connection_string(self.source)
        if self.proxy is not None:
            host, _, port = self.proxy.rpartition(":")
            if not host or not port.isdigit():
                raise ValueError(f"the proxy {self.proxy!r} is not host:port")

    @property
    def identity(self) -> IdentitySource:
        return parse_connection_string(self.source) if isinstance(self.source, str) else self.source

    @property
    def network(self) -> Network:
        return Network(self.ca_file, self.proxy, self.websockets, self.connect_timeout)


class CallFailed(TransportUnavailable):
    """The SDK or the hub refused a call; the connection may still be good."""


class Refused(CallFailed):
    """The hub did not take the credentials."""


class ConnectionEnded(TransportUnavailable):
    """The connection is of no more use: lost, or silent for too long."""


OnPatch = Callable[[Mapping[str, Any]], None]
OnMethod = Callable[[str, str, Any], None]


class HubConnection:
    """From connect to close; callbacks and results arrive on the event loop that made it.

    `on_patch` gets desired patches; `on_method` request id, name and payload.
    """

    def __init__(
        self,
        settings: IotHubSettings,
        resolver: IdentityResolver,
        clock: Clock,
        on_patch: OnPatch,
        on_method: OnMethod,
    ) -> None:
        self._settings = settings
        self._resolver = resolver
        self._clock = clock
        self._on_patch = on_patch
        self._on_method = on_method
        self._loop = asyncio.get_running_loop()
        self._client: Any = None
        self._announced = False
        self._connecting = False
        self._shut_down = False
        self._calls: set[asyncio.Future[Any]] = set()
        self.lost: asyncio.Future[str] = self._loop.create_future()
        self.module = False
        """Whether the identity is a module's; known once open."""
        self.stamp: Stamp = ()
        """Of the identity's files that this connection was opened with."""
        self.renew_at = math.inf
        """When a newer token is due (time.monotonic)."""

    async def open(self) -> None:
        """Connect, then subscribe. Raises ConnectionEnded, CallFailed or Refused."""
        settings = self._settings
        timeout = settings.connect_timeout
        # Before the files are read: a change meanwhile is then seen as one.
        self.stamp = self._resolver.stamp()
        # Provisioning has its own time limit, of the same length.
        login: Login = await self._call(self._resolver.login(), 2 * timeout)
        self.module = bool(login.module)
        self._client = await self._call(asyncio.to_thread(self._make_client, login), timeout)
        client = self._client
        # The setters subscribe and block until the hub has answered.
        await self._set("on_connection_state_change", self._state_handler())
        self._connecting = True
        try:
            await self._call(client.connect(), timeout)
        except Refused:
            self._resolver.refused()
            raise
        except TransportUnavailable:
            self._resolver.unreachable()
            raise
        finally:
            self._connecting = False
        if not client.connected:
            self._state_changed(False)
        self._resolver.connected()
        settings.logged_in(login)
        await self._set("on_twin_desired_properties_patch_received", self._patch_handler())
        await self._set("on_method_request_received", self._method_handler())

    async def get_twin(self) -> Mapping[str, Any]:
        """`{"desired": .., "reported": ..}`. Raises ConnectionEnded or CallFailed."""
        twin: Mapping[str, Any] = await self._call(self._client.get_twin())
        return twin

    async def report(self, patch: Mapping[str, Any]) -> None:
        """Raises ConnectionEnded or CallFailed."""
        await self._call(self._client.patch_twin_reported_properties(dict(patch)))

    async def send(self, message: Any) -> None:
        """An azure.iot.device.Message. Raises ConnectionEnded or CallFailed."""
        await self._call(self._client.send_message(message))

    async def respond(self, request_id: str, result: MethodResult) -> None:
        """Raises ConnectionEnded or CallFailed."""
        from azure.iot.device import MethodResponse

        response = MethodResponse(request_id, result.status, result.payload)
        await self._call(self._client.send_method_response(response))

    async def pause(self, seconds: float) -> None:
        """Sleep, unless the connection ends. Raises ConnectionEnded."""
        await asyncio.wait({self.lost}, timeout=seconds)
        if self.lost.done():
            raise ConnectionEnded(self.lost.result())

    def end(self, reason: str) -> None:
        """Give the connection up; whoever waits for it gets ConnectionEnded."""
        if not self.lost.done():
            self.lost.set_result(reason)

    @property
    def closed(self) -> bool:
        """Whether nothing of the client is left running."""
        return self._shut_down or (self._client is None and not self._calls)

    async def close(self) -> bool:
        """Shut the client down. False when it did not end in time: it goes on trying by itself."""
        self.end("closed")
        if self._client is None:
            # What is still under way is ours, not the SDK's: it ends when it is told to.
            for call in self._calls:
                call.cancel()
            if self._calls:
                await asyncio.wait(self._calls, timeout=self._settings.close_timeout)
            return self.closed
        # In a thread with its own event loop, because shutting down blocks on the SDK's threads.
        closing = asyncio.ensure_future(asyncio.to_thread(_shut_down, self._client))
        closing.add_done_callback(self._closed)
        await asyncio.wait({closing}, timeout=self._settings.close_timeout)
        return self.closed

    def _closed(self, closing: asyncio.Future[None]) -> None:
        self._shut_down = True
        # Only now can no answer come any more that would find its call cancelled.
        for call in self._calls:
            call.cancel()
        if not closing.cancelled() and (error := closing.exception()) is not None:
            _log.warning("the IoT Hub client did not shut down cleanly: %s", describe(error))

    async def _set(self, name: str, handler: Any) -> None:
        await self._call(asyncio.to_thread(setattr, self._client, name, handler))

    async def _call(self, operation: Coroutine[Any, Any, Any], timeout: float | None = None) -> Any:
        """The result of an SDK call, which is left alone (not cancelled) when it takes too long.

        A cancelled call's late answer would raise inside the SDK's callbacks.
        """
        if self.lost.done():
            operation.close()
            raise ConnectionEnded(self.lost.result())
        seconds = self._settings.request_timeout if timeout is None else timeout
        call = asyncio.ensure_future(operation)
        self._calls.add(call)
        call.add_done_callback(self._forget)
        await asyncio.wait({call, self.lost}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if not call.done():
            self.end(f"no answer within {seconds:g} s")
            raise ConnectionEnded(self.lost.result())
        error = call.exception()
        if error is not None:
            kind = Refused if type(error).__name__ == "CredentialError" else CallFailed
            raise kind(describe(error)) from error
        return call.result()

    def _forget(self, call: asyncio.Future[Any]) -> None:
        self._calls.discard(call)
        if not call.cancelled():
            call.exception()  # seen, also when nobody waits for it any more

    def _make_client(self, login: Login) -> Any:
        """Blocks: reads files, asks for a signature.

        Raises IdentityError, OSError or ValueError.
        """
        from azure.iot.device import X509
        from azure.iot.device.aio import IoTHubDeviceClient, IoTHubModuleClient

        options = _options(self._settings, login)
        kind = IoTHubModuleClient if login.module else IoTHubDeviceClient
        if login.certificate is not None:
            files = login.certificate
            x509 = X509(str(files.certificate), str(files.key), passphrase(files))  # type: ignore[no-untyped-call]
            names = {"hostname": login.host, "device_id": login.device}
            if login.module:
                names["module_id"] = login.module
            return kind.create_from_x509_certificate(x509, **names, **options)
        if login.sign is None:
            raise IdentityError("the identity has neither a certificate nor a key")
        # A token of our own making, whatever signs it: the SDK would keep the key, and would renew
        # the token by disconnecting.
        lifetime = float(self._settings.token_lifetime)
        expiry = int((self._clock.now() + timedelta(seconds=lifetime)).timestamp())
        token = shared_access_signature(login.resource, expiry, login.sign)
        margin = _RENEWAL_MARGIN if lifetime > _RENEWAL_MARGIN else lifetime / 2
        self.renew_at = time.monotonic() + lifetime - margin
        return kind.create_from_sastoken(token, **options)

    # Handlers run on a thread of the SDK: coroutine functions in the order of the messages, plain
    # functions on four threads in any order.

    def _state_handler(self) -> Any:
        async def changed() -> None:
            self._post(self._state_changed, self._client.connected)

        return changed

    def _patch_handler(self) -> Any:
        async def patched(patch: Mapping[str, Any]) -> None:
            self._post(self._on_patch, patch)

        return patched

    def _method_handler(self) -> Any:
        async def called(request: Any) -> None:
            self._post(self._on_method, request.request_id, request.name, request.payload)

        return called

    def _post(self, function: Callable[..., None], *arguments: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            _log.debug("the event loop has ended before the IoT Hub client")

    def _state_changed(self, connected: bool) -> None:
        if connected and not self._announced:
            self._announced = True
        elif not self._connecting:  # else connect() ends as well, and knows why
            # Also when it is up again (a renewed token): the session may be another one.
            self.end("the connection to the IoT Hub was lost")


def describe(error: BaseException) -> str:
    """An SDK error with what really happened, which is in its causes."""
    texts: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        text = str(cause) or type(cause).__name__
        if text not in texts:
            texts.append(text)
        cause = cause.__cause__
    return ": ".join(texts)


def _options(settings: IotHubSettings, login: Login) -> dict[str, Any]:
    from azure.iot.device import ProxyOptions

    # It warns of every broken connection as of an exception nobody handles; we handle and tell it.
    logging.getLogger("azure.iot.device.common.handle_exceptions").setLevel(logging.ERROR)
    options: dict[str, Any] = {
        "auto_connect": False,
        "connection_retry": False,
        "ensure_desired_properties": False,
        "websockets": settings.websockets,
    }
    if login.gateway:
        options["gateway_hostname"] = login.gateway
    if login.ca_pem:
        options["server_verification_cert"] = login.ca_pem
    elif settings.ca_file is not None:
        options["server_verification_cert"] = Path(settings.ca_file).read_text()
    if settings.proxy is not None:
        host, _, port = settings.proxy.rpartition(":")
        options["proxy_options"] = ProxyOptions("HTTP", host, int(port))  # type: ignore[no-untyped-call]
    return options


def _shut_down(client: Any) -> None:
    asyncio.run(_shut_down_here(client))


async def _shut_down_here(client: Any) -> None:
    """`shutdown` fails when the connection breaks under it, and then has to be called again."""
    from azure.iot.device.exceptions import ClientError

    for left in reversed(range(_SHUTDOWN_TRIES)):
        try:
            await client.shutdown()
        except ClientError:
            if not left:
                raise
        else:
            return
