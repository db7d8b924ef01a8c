"""Asking the device provisioning service for a hub, and remembering the answer."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .certificates import passphrase
from .login import Login
from .signing import Sign, derived_key, key_signer, sign_with
from .sources import CertificateFiles, Dps, IdentityError, KeyText

_log = logging.getLogger(__name__)
_SDK_TIMERS = "azure.iot.device.provisioning."


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a registration was answered."""

    hub: str
    device: str


@dataclass(frozen=True, slots=True)
class Network:
    """How the service is reached; as in IotHubSettings. Seconds."""

    ca_file: Path | None = None
    proxy: str | None = None
    websockets: bool = False
    timeout: float = 60.0


def login_with(source: Dps, assignment: Assignment) -> Login:
    """The device at its hub, with the proof that the service took. Raises IdentityError."""
    if isinstance(source.proof, CertificateFiles):
        return Login(assignment.hub, assignment.device, certificate=source.proof)
    return Login(assignment.hub, assignment.device, sign=_key_of(source)[1])


async def register(source: Dps, network: Network) -> Assignment:
    """Ask the service. Raises IdentityError."""
    client = await asyncio.to_thread(_make_client, source, network)
    asked = asyncio.ensure_future(client.register())
    asked.add_done_callback(_seen)
    try:
        await asyncio.wait({asked}, timeout=network.timeout)
        if not asked.done():
            raise IdentityError(f"{source.host} did not answer within {network.timeout:g} s")
        error = asked.exception()
        if error is not None:
            raise IdentityError(
                f"{source.host} did not take registration {source.registration_id!r} in scope "
                f"{source.id_scope!r}: {_story(error)}"
            ) from error
        state, status = asked.result().registration_state, asked.result().status
        if status != "assigned" or not state.assigned_hub or not state.device_id:
            raise IdentityError(
                f"{source.host} left registration {source.registration_id!r} {status!r}: see the "
                "enrolment and the service's linked hubs"
            )
    except BaseException:
        # Also a cancellation: the SDK's timers would keep the process alive. It is raised again.
        _abandon(client)
        raise
    _log.info("provisioned as %s at %s", state.device_id, state.assigned_hub)
    return Assignment(state.assigned_hub, state.device_id)


def read_assignment(file: Path, source: Dps) -> Assignment | None:
    """The remembered answer, if it is this registration's."""
    try:
        found = json.loads(file.read_bytes())
        if found["registration"] == _registration(source):
            return Assignment(found["hub"], found["device"])
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError) as error:
        _log.warning("the remembered hub in %s is unreadable, asking again: %r", file, error)
    return None


def write_assignment(file: Path, source: Dps, assignment: Assignment) -> None:
    """Survives a crash at any point: the file is the old one or the new one.

    Without it the service is asked at every start, so that failing to write is only a warning.
    """
    new = file.with_name(file.name + ".new")
    content = {
        "registration": _registration(source),
        "hub": assignment.hub,
        "device": assignment.device,
    }
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(new, "w", encoding="utf-8") as out:
            json.dump(content, out)
            out.flush()
            os.fsync(out.fileno())
        new.replace(file)
    except OSError as error:
        _log.warning("the assigned hub is not remembered in %s: %s", file, error)


def _registration(source: Dps) -> list[str]:
    return [source.host, source.id_scope, source.registration_id]


def _key_of(source: Dps) -> tuple[str, Sign]:
    if isinstance(source.proof, CertificateFiles):
        raise IdentityError("a registration by certificate has no key")
    if source.group:
        text = derived_key(sign_with(source.proof), source.registration_id)
    elif isinstance(source.proof, KeyText):
        text = source.proof.text
    else:
        try:
            text = source.proof.path.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise IdentityError(f"cannot read the key file {source.proof.path}: {error}") from error
    return text, key_signer(text, "the registration's key")


def _make_client(source: Dps, network: Network) -> Any:
    from azure.iot.device import X509, ProxyOptions
    from azure.iot.device.aio import ProvisioningDeviceClient

    options: dict[str, Any] = {"websockets": network.websockets}
    try:
        if network.ca_file is not None:
            options["server_verification_cert"] = network.ca_file.read_text(encoding="ascii")
        if network.proxy is not None:
            host, _, port = network.proxy.rpartition(":")
            options["proxy_options"] = ProxyOptions("HTTP", host, int(port))  # type: ignore[no-untyped-call]
        names = (source.host, source.registration_id, source.id_scope)
        if isinstance(source.proof, CertificateFiles):
            files = source.proof
            x509 = X509(str(files.certificate), str(files.key), passphrase(files))  # type: ignore[no-untyped-call]
            return ProvisioningDeviceClient.create_from_x509_certificate(*names, x509, **options)
        return ProvisioningDeviceClient.create_from_symmetric_key(
            *names, _key_of(source)[0], **options
        )
    except (OSError, ValueError) as error:
        raise IdentityError(f"no registration with {source.host} can be tried: {error}") from error


def _abandon(client: Any) -> None:
    """The SDK shuts its client down after success only, and offers no way to do it.

    Its timers would keep the process from ending for half a minute. A process provisions one
    device at a time, so that all of them are this client's.
    """
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer):
            function = getattr(thread, "function", None)
            if getattr(function, "__module__", "").startswith(_SDK_TIMERS):
                thread.cancel()
    pipeline = getattr(client, "_pipeline", None)
    try:
        if pipeline is not None:
            pipeline.shutdown(callback=lambda **_: None)
    except Exception as error:  # noqa: BLE001 - of an SDK's inside: all that is lost is tidiness
        _log.info("the provisioning client was not shut down: %r", error)


def _seen(asked: asyncio.Future[Any]) -> None:
    if not asked.cancelled():
        asked.exception()


def _story(error: BaseException) -> str:
    texts: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        text = str(cause) or type(cause).__name__
        if text not in texts:
            texts.append(text)
        cause = cause.__cause__
    return ": ".join(texts)
