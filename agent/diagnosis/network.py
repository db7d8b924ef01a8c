"""Checks of what the device reaches over the network: names, TLS, hub, broker, registries, time."""

from __future__ import annotations

import email.utils
import http.client
import os
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..clock import Clock
from ..config import AgentConfig, ConfigError, IotHubConfig, RegistryConfig, read_secret
from ..identity.configured import identity_source
from ..identity.sources import Dps, EdgeEnvironment, ModuleOf, Registered
from .findings import Check, Outcome, error, ok, skipped, warning

CONNECT_SECONDS = 5.0
CLOCK_WARNING, CLOCK_ERROR = 30.0, 240.0
"""Seconds; hubs take tokens of clocks that are up to five minutes off."""
EXPIRY_WARNING_DAYS = 14

Status = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A TLS server. `proxy` is HOST:PORT of a CONNECT proxy, `ca_file` what is trusted."""

    host: str
    port: int
    proxy: str = ""
    ca_file: Path | None = None


def network_checks(config: AgentConfig, status: Status | None, clock: Clock) -> list[Check]:
    """`status` is the running agent's own document, None when it does not answer."""
    checks: list[Check] = []
    web: Endpoint | None = None
    hub, mqtt = config.iothub, config.mqtt
    if hub is not None:
        host = hub_host(hub)
        if host:
            port = 443 if hub.websockets else 8883
            link = Endpoint(host, port, hub.proxy, hub.ca_file)
            web = Endpoint(host, 443, hub.proxy, hub.ca_file)
            checks += [
                Check("hub name", lambda: name(link)),
                Check("hub TLS", lambda: tls(link, clock)),
            ]
        checks.append(Check("hub link", lambda: link_state("iothub", status)))
    if mqtt is not None:
        broker = Endpoint(mqtt.host, mqtt.port, "", mqtt.ca_file)
        encrypted = mqtt.tls or mqtt.ca_file is not None or mqtt.cert_file is not None
        checks += [
            Check("broker name", lambda: name(broker)),
            Check("broker", lambda: tls(broker, clock) if encrypted else reachable(broker)),
            Check("broker link", lambda: link_state("mqtt", status)),
        ]
    for registry in config.registry:
        checks.append(Check(f"registry {registry.address}", lambda r=registry: answers(r)))  # type: ignore[misc]
    for address in foreign_registries(config, status):
        other = RegistryConfig(address)
        checks.append(Check(f"registry {address}", lambda r=other: answers(r, known=False)))  # type: ignore[misc]
    checks.append(Check("clock", lambda: clock_right(web, clock)))
    return checks


def hub_host(hub: IotHubConfig) -> str:
    """The host that the configuration names: hub, gateway or provisioning service; or empty."""
    try:
        source = identity_source(hub, os.environ)
    except ConfigError:
        return ""
    if isinstance(source, ModuleOf):
        source = source.device
    if isinstance(source, Registered):
        return source.gateway or source.host
    if isinstance(source, Dps):
        return source.host
    if isinstance(source, EdgeEnvironment):
        return source.variables.get("IOTEDGE_GATEWAYHOSTNAME", "")
    return ""


def name(end: Endpoint) -> Outcome:
    host = end.proxy.rpartition(":")[0] if end.proxy else end.host
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as failure:
        return error(
            f"{host} has no address: {failure.strerror or failure}",
            "check the network and /etc/resolv.conf",
        )
    addresses = sorted({str(entry[4][0]) for entry in found})
    by = " (the proxy looks up the rest)" if end.proxy else ""
    return ok(f"{host} is {', '.join(addresses[:3])}{by}")


def reachable(end: Endpoint) -> Outcome:
    try:
        with socket.create_connection((end.host, end.port), CONNECT_SECONDS):
            return ok(f"{end.host}:{end.port} answers")
    except OSError as failure:
        return error(
            f"{end.host}:{end.port}: {failure.strerror or failure}",
            "check the address, the network and the firewall",
        )


def tls(end: Endpoint, clock: Clock) -> Outcome:
    where = f"{end.host}:{end.port}"
    try:
        context = trusted(end.ca_file)
    except (OSError, ssl.SSLError) as failure:
        return error(f"cannot use {end.ca_file}: {failure}", "correct ca-file")
    try:
        with connected(end) as plain, context.wrap_socket(plain, server_hostname=end.host) as link:
            certificate: dict[str, Any] = dict(link.getpeercert() or {})
            version = link.version()
    except ssl.SSLCertVerificationError as failure:
        return error(
            f"{where}: its certificate is not trusted: {failure.verify_message}",
            "set ca-file to the authority that signed it, and check the device's clock",
        )
    except (OSError, ValueError, http.client.HTTPException) as failure:
        through = f" through the proxy {end.proxy}" if end.proxy else ""
        return error(
            f"{where}{through}: {getattr(failure, 'strerror', None) or failure}",
            "check the network, the firewall (ports 8883 or 443 outwards) and the proxy",
        )
    ends = certificate.get("notAfter")
    if isinstance(ends, str):
        until = datetime.fromtimestamp(ssl.cert_time_to_seconds(ends), timezone.utc)
        left = (until - clock.now()).days
        if left < EXPIRY_WARNING_DAYS:
            return warning(f"{where}: its certificate ends in {left} days", "tell who runs it")
    return ok(f"{where}, {version}")


def trusted(ca_file: Path | None) -> ssl.SSLContext:
    """Raises OSError or ssl.SSLError."""
    return ssl.create_default_context(cafile=None if ca_file is None else str(ca_file))


def connected(end: Endpoint) -> socket.socket:
    """A connection, through the proxy where there is one. Raises OSError, ValueError."""
    if not end.proxy:
        return socket.create_connection((end.host, end.port), CONNECT_SECONDS)
    proxy, _, port = end.proxy.rpartition(":")
    if not port.isdecimal():
        raise ValueError(f"the proxy {end.proxy} is not HOST:PORT")
    link = socket.create_connection((proxy, int(port)), CONNECT_SECONDS)
    try:
        asked = f"{end.host}:{end.port}"
        link.sendall(f"CONNECT {asked} HTTP/1.1\r\nHost: {asked}\r\n\r\n".encode())
        head = b""
        while b"\r\n\r\n" not in head:
            # One byte at a time: what follows belongs to TLS.
            piece = link.recv(1)
            if not piece or len(head) > 16384:
                raise OSError(f"the proxy {end.proxy} hung up")
            head += piece
        status = head.split(b"\r\n", 1)[0].decode("latin-1")
        if " 200" not in status:
            raise OSError(f"the proxy {end.proxy} answered {status}")
    except BaseException:  # whatever happens, the connection must not stay open
        link.close()
        raise
    return link


def link_state(source: str, status: Status | None) -> Outcome:
    if status is None:
        return skipped("the agent does not answer")
    link = next((one for one in status["links"] if one["source"] == source), None)
    if link is None:
        return warning("the running agent has no such link", "restart it: agent.toml was changed")
    if not link["connected"]:
        return error(f"not connected: {link['reason']}", "see `gatelet logs edgeHub`")
    if link["warnings"]:
        return warning("; ".join(link["warnings"]), "renew it")
    return ok("connected")


def foreign_registries(config: AgentConfig, status: Status | None) -> list[str]:
    """Those that the deployment's images come from without an entry in agent.toml."""
    from ...modules.errors import ImageError
    from ...modules.oci.reference import ImageRef

    known = {registry.address for registry in config.registry}
    found = set()
    for module in status["modules"] if status is not None else ():
        try:
            found.add(ImageRef.parse(module["image"]).registry)
        except ImageError:
            continue
    return sorted(found - known)


def answers(registry: RegistryConfig, *, known: bool = True) -> Outcome:
    from ...modules.errors import ImageError, Unauthorized
    from ...modules.oci.client import RegistryClient, RegistrySettings

    try:
        password = read_secret(
            registry.password, registry.password_file, "registry[].password-file"
        )
    except ConfigError as failure:
        return error(str(failure), "correct the path, or the permissions of the file")
    settings = RegistrySettings(
        registry.address,
        registry.username or None,
        password or None,
        registry.ca_file,
        registry.insecure,
        connect_timeout=CONNECT_SECONDS,
        read_timeout=CONNECT_SECONDS,
        attempts=1,
    )
    try:
        with RegistryClient(settings) as client:
            client.ping()
    except Unauthorized as failure:
        if not known:
            return ok("answers, and asks for a login: the deployment brings it, or agent.toml")
        return error(str(failure), "correct username and password of this [[registry]]")
    except ImageError as failure:
        return error(str(failure), "check the address, the network and ca-file")
    return ok("answers")


def clock_right(end: Endpoint | None, clock: Clock) -> Outcome:
    if end is not None:
        told = served_date(end)
        if told is not None:
            return clock_offset((clock.now() - told).total_seconds(), end.host)
    # Without a server to ask: a clock that starts anew at each boot is before this program.
    made = datetime.fromtimestamp(Path(__file__).stat().st_mtime, timezone.utc)
    now = clock.now()
    if now < made:
        return error(
            f"it is {now:%Y-%m-%d %H:%M} UTC here, before this program was installed",
            "set the clock: timedatectl set-ntp true",
        )
    return ok(f"{now:%Y-%m-%d %H:%M} UTC; no server was there to compare with")


def clock_offset(seconds: float, host: str) -> Outcome:
    """`seconds` is this clock less the server's."""
    text = f"{abs(seconds):.0f} s {'ahead of' if seconds > 0 else 'behind'} {host}"
    fix = "set the clock: timedatectl set-ntp true"
    if abs(seconds) > CLOCK_ERROR:
        return error(f"{text}: tokens are refused, certificates may be", fix)
    return warning(text, fix) if abs(seconds) > CLOCK_WARNING else ok(f"within {CLOCK_WARNING:g} s")


def served_date(end: Endpoint) -> datetime | None:
    """The time that an HTTPS server tells in its Date header, None when it does not."""
    try:
        # A wrong clock must not hide itself by making every certificate invalid.
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        with connected(end) as plain, context.wrap_socket(plain, server_hostname=end.host) as link:
            request = f"HEAD / HTTP/1.1\r\nHost: {end.host}\r\nConnection: close\r\n\r\n"
            link.sendall(request.encode())
            answer = http.client.HTTPResponse(link, method="HEAD")
            answer.begin()
            date = answer.getheader("Date", "")
        return email.utils.parsedate_to_datetime(date).astimezone(timezone.utc)
    except (OSError, ValueError, TypeError, http.client.HTTPException):
        return None
