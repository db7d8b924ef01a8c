"""One MQTT connection of the paho-mqtt package on the event loop; made, used once, thrown away.

paho is driven through its interface for external event loops: once the socket is connected,
everything runs on the loop and no thread is left. Only connecting (name look-up, TCP and TLS
handshake) blocks inside paho and gets a short-lived thread. Works with paho 1.6.1 and 2.x.
"""

from __future__ import annotations

import asyncio
import importlib
import socket as sockets
import ssl
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from .mqtt_login import V5, V311, ConnectFailed, Login, Message
from .transport import TransportUnavailable

_UNSUPPORTED_VERSION: Final = 0x84
_TICK_SECONDS: Final = 1.0


class _HandshakeSocket(ssl.SSLSocket):
    """paho forgets a socket whose handshake fails; this one closes itself."""

    def do_handshake(self, block: bool = False) -> None:
        try:
            super().do_handshake(block)
        except OSError:
            self.close()
            raise


class PahoConnection:
    """`lost` is done, with the reason as text, as soon as the connection is over."""

    def __init__(self, login: Login, on_message: Callable[[Message], None]) -> None:
        self._login = login
        self._on_message = on_message
        self._loop = asyncio.get_running_loop()
        self.lost: asyncio.Future[str] = self._loop.create_future()
        self._connected: asyncio.Future[None] = self._loop.create_future()
        self._acknowledgements: dict[int, asyncio.Future[Any]] = {}
        self._attached: sockets.socket | None = None
        self._tick: asyncio.TimerHandle | None = None
        self._packet_limit: int | None = None
        self._mqtt: Any = importlib.import_module("paho.mqtt.client")
        self._client = self._make_client()

    async def open(self, timeout: float) -> None:
        """Connect and wait for CONNACK. Raises ConnectFailed; cleans up when cancelled."""
        opening = self._loop.create_task(self._open())
        try:
            # Not wait_for: before Python 3.12 it loses a cancellation that meets the result.
            await asyncio.wait({opening}, timeout=timeout)
            if not opening.done():
                where = f"{self._login.host}:{self._login.port}"
                raise ConnectFailed(f"{where} did not answer within {timeout:g} s")
            opening.result()
        except BaseException:
            # Also a cancellation: the attempt must not end in a connection that nobody knows.
            opening.cancel()
            await asyncio.wait({opening})
            self.drop("gave up connecting")
            raise

    async def subscribe(self, topic_filters: Sequence[str], timeout: float) -> list[int]:
        """With QoS 1; a reason code per filter, 0x80 and above is a refusal."""
        self._check()
        rc, mid = self._client.subscribe([(name, 1) for name in topic_filters])
        if rc != 0:
            raise TransportUnavailable(self._mqtt.error_string(rc))
        codes: Sequence[Any] = await self._acknowledged(mid, timeout, "SUBSCRIBE")
        return [_number(code) for code in codes]

    def unsubscribe(self, topic_filter: str) -> None:
        """Without waiting for the answer."""
        if not self.lost.done():
            self._client.unsubscribe(topic_filter)

    async def publish(
        self,
        topic: str,
        payload: bytes,
        timeout: float,
        retain: bool = False,
        correlation_data: bytes | None = None,
        user_properties: Mapping[str, str] | None = None,
    ) -> None:
        """With QoS 1; returns when acknowledged. Properties are left out with 3.1.1.

        Raises TransportUnavailable, also when an MQTT 5 broker says no (paho 1.6.1 hides that).
        """
        self._check()
        properties = self._properties(correlation_data, user_properties)
        size = len(payload) + len(topic.encode()) + 9  # fixed header, lengths, packet identifier
        size += len(properties.pack()) if properties is not None else 1
        if self._packet_limit is not None and size > self._packet_limit:
            # The broker would answer by cutting the connection, every time.
            raise TransportUnavailable(
                f"a message of {size} bytes to {topic}; the broker takes {self._packet_limit}"
            )
        info = self._client.publish(topic, payload, 1, retain, properties)
        code = _number(await self._acknowledged(info.mid, timeout, f"PUBLISH to {topic}"))
        if code >= 0x80:
            raise TransportUnavailable(
                f"the broker refuses messages to {topic} (reason code 0x{code:02X})"
            )

    async def close(self, timeout: float = 1.0) -> None:
        """DISCONNECT, so that the broker drops the will; never raises for a dead connection."""
        if not self.lost.done():
            self._client.disconnect()
            await asyncio.wait({self.lost}, timeout=timeout)
        self.drop("closed")

    def drop(self, reason: str) -> None:
        """Close the socket without a word; everybody who waits gets TransportUnavailable."""
        sock = self._attached
        if sock is not None:
            self._detach()
            sock.close()
        self._ended(reason)

    # Connecting

    def _make_client(self) -> Any:
        mqtt, login = self._mqtt, self._login
        arguments: dict[str, Any] = {
            "client_id": login.client_id,
            "protocol": login.version,
            "reconnect_on_failure": False,
        }
        if login.version == V311:
            arguments["clean_session"] = False
        if hasattr(mqtt, "CallbackAPIVersion"):
            arguments["callback_api_version"] = mqtt.CallbackAPIVersion.VERSION2
        client = mqtt.Client(**arguments)
        client.will_set(login.will_topic, login.will_payload, 1, True)
        if login.username is not None:
            client.username_pw_set(login.username, login.password)
        if login.tls is not None:
            login.tls.sslsocket_class = _HandshakeSocket
            client.tls_set_context(login.tls)
        client.on_connect = self._on_connack
        client.on_disconnect = self._on_disconnect
        client.on_subscribe = lambda c, u, mid, codes, *more: self._settle(mid, codes)
        client.on_publish = lambda c, u, mid, *more: self._settle(mid, more[0] if more else 0)
        client.on_message = self._on_paho_message
        client.on_socket_register_write = self._want_write
        client.on_socket_unregister_write = self._no_write
        client.on_socket_close = lambda c, u, sock: self._detach()
        return client

    async def _open(self) -> None:
        await self._connect_in_thread()
        sock = self._client.socket()
        if sock is None:
            raise ConnectFailed("the connection broke while it was made")
        sock.setblocking(False)
        # paho leaves Nagle on: with delayed acknowledgements that made 44 ms of every report.
        sock.setsockopt(sockets.IPPROTO_TCP, sockets.TCP_NODELAY, 1)
        self._attached = sock
        self._loop.add_reader(sock.fileno(), self._readable)
        self._loop.add_writer(sock.fileno(), self._writable)
        self._tick = self._loop.call_later(_TICK_SECONDS, self._on_tick)
        either: set[asyncio.Future[Any]] = {self._connected, self.lost}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not self._connected.done():
            # Brokers that know only 3.1.1 may close without a word.
            raise ConnectFailed(
                f"the broker closed the connection before CONNACK ({self.lost.result()})",
                version_refused=True,
            )
        self._connected.result()

    async def _connect_in_thread(self) -> None:
        login, client = self._login, self._client
        done: asyncio.Future[None] = self._loop.create_future()
        lock = threading.Lock()
        abandoned = False
        arguments: dict[str, Any] = {}
        if login.version == V5:
            arguments["clean_start"] = False
            arguments["properties"] = self._connect_properties()

        def settle(error: Exception | None) -> None:
            if done.done():
                return
            if error is None:
                done.set_result(None)
            else:
                done.set_exception(error)

        def work() -> None:
            error: Exception | None = None
            try:
                client.connect(login.host, login.port, login.keepalive, **arguments)
            except (OSError, ValueError) as failure:
                text = f"cannot connect to {login.host}:{login.port}: {failure}"
                error = ConnectFailed(text)
            with lock:
                if not abandoned:
                    self._loop.call_soon_threadsafe(settle, error)
                elif (sock := client.socket()) is not None:
                    sock.close()

        threading.Thread(target=work, name=f"mqtt-connect-{login.host}", daemon=True).start()
        try:
            await done
        except BaseException:
            # Nobody waits for the thread any more. Whatever it was is raised again.
            with lock:
                abandoned = True
                # The thread may have finished just before: then the socket is ours to close.
                if (sock := client.socket()) is not None:
                    sock.close()
            raise

    def _connect_properties(self) -> Any:
        properties = self._new_properties("CONNECT")
        properties.SessionExpiryInterval = self._login.session_expiry
        properties.MaximumPacketSize = self._login.max_packet_size
        return properties

    def _new_properties(self, packet: str) -> Any:
        types: Any = importlib.import_module("paho.mqtt.packettypes").PacketTypes
        made: Any = importlib.import_module("paho.mqtt.properties").Properties(
            getattr(types, packet)
        )
        return made

    def _properties(
        self, correlation_data: bytes | None, user_properties: Mapping[str, str] | None
    ) -> Any:
        if self._login.version != V5 or (correlation_data is None and not user_properties):
            return None
        properties = self._new_properties("PUBLISH")
        if correlation_data is not None:
            properties.CorrelationData = correlation_data
        if user_properties:
            properties.UserProperty = list(user_properties.items())
        return properties

    # What the event loop calls

    def _readable(self) -> None:
        try:
            self._client.loop_read()
            # TLS may hold decrypted packets that the socket will never announce.
            while (sock := self._attached) is not None and getattr(sock, "pending", int)():
                self._client.loop_read()
        except Exception as error:  # noqa: BLE001 - paho's parser trips over bad packets in any way
            self.drop(f"the broker sent what paho cannot read: {error!r}")

    def _writable(self) -> None:
        try:
            self._client.loop_write()
        except OSError as error:
            # paho 1.6.1 knows of connections reset, not of hosts and networks that went away; the
            # packet is lost, so nothing else would end this.
            self.drop(f"cannot send: {error}")
            return
        if self._attached is not None and not self._client.want_write():
            self._loop.remove_writer(self._attached.fileno())

    def _on_tick(self) -> None:
        self._tick = self._loop.call_later(_TICK_SECONDS, self._on_tick)
        self._client.loop_misc()

    # What paho calls

    def _want_write(self, client: Any, userdata: Any, sock: Any) -> None:
        # Also called by the connecting thread, before the socket belongs to the loop.
        if self._attached is not None:
            self._loop.add_writer(self._attached.fileno(), self._writable)

    def _no_write(self, client: Any, userdata: Any, sock: Any) -> None:
        if self._attached is not None:
            self._loop.remove_writer(self._attached.fileno())

    def _on_connack(self, client: Any, userdata: Any, flags: Any, code: Any, *more: Any) -> None:
        if self._connected.done():
            return
        number = _number(code)
        if number == 0:
            properties = more[0] if more else None
            self._packet_limit = getattr(properties, "MaximumPacketSize", None)
            keepalive = getattr(properties, "ServerKeepAlive", self._login.keepalive)
            if keepalive < self._login.keepalive:
                # paho 1.6.1 does not heed it and would be cut off whenever it is idle.
                text = f"the broker demands a keep alive of {keepalive} s"
                self._connected.set_exception(ConnectFailed(text, keepalive=keepalive))
            else:
                self._connected.set_result(None)
            return
        text = str(code) if hasattr(code, "value") else f"return code {number}"
        refused = number == _UNSUPPORTED_VERSION or (self._login.version == V311 and number == 1)
        self._connected.set_exception(ConnectFailed(f"the broker refuses: {text}", refused))

    def _on_disconnect(self, client: Any, userdata: Any, *more: Any) -> None:
        """paho 1.6: (code[, properties]); paho 2: (flags, code, properties)."""
        code = more[1] if len(more) == 3 else more[0]
        known = isinstance(code, int) and code
        self._ended(self._mqtt.error_string(code) if known else str(code or "disconnected"))

    def _on_paho_message(self, client: Any, userdata: Any, message: Any) -> None:
        if len(message.payload) > self._login.max_packet_size:
            return  # 3.1.1 cannot tell the broker its limit
        properties = getattr(message, "properties", None)
        self._on_message(
            Message(
                message.topic,
                bytes(message.payload),
                bool(message.retain),
                getattr(properties, "ResponseTopic", None),
                getattr(properties, "CorrelationData", None),
            )
        )

    # Waiting for acknowledgements

    def _check(self) -> None:
        if self.lost.done():
            raise TransportUnavailable(self.lost.result())

    async def _acknowledged(self, mid: int, timeout: float, what: str) -> Any:
        # The packet leaves with the next turn of the loop, so its answer cannot be here yet.
        waiting = self._acknowledgements[mid] = self._loop.create_future()
        try:
            await asyncio.wait({waiting}, timeout=timeout)
            if waiting.done():
                return waiting.result()
            reason = f"{what} was not acknowledged within {timeout:g} s"
            self.drop(reason)
            raise TransportUnavailable(reason)
        finally:
            self._acknowledgements.pop(mid, None)
            if waiting.done() and not waiting.cancelled():
                waiting.exception()  # taken notice of, also when we were cancelled

    def _settle(self, mid: int, result: Any) -> None:
        waiting = self._acknowledgements.get(mid)
        if waiting is not None and not waiting.done():
            waiting.set_result(result)

    def _ended(self, reason: str) -> None:
        if not self.lost.done():
            self.lost.set_result(reason)
        for waiting in self._acknowledgements.values():
            if not waiting.done():
                waiting.set_exception(TransportUnavailable(reason))

    def _detach(self) -> None:
        if self._tick is not None:
            self._tick.cancel()
            self._tick = None
        if self._attached is not None and self._attached.fileno() >= 0:
            self._loop.remove_reader(self._attached.fileno())
            self._loop.remove_writer(self._attached.fileno())
        self._attached = None


def _number(code: Any) -> int:
    """paho's reason code objects and plain return codes alike."""
    return int(getattr(code, "value", code))
