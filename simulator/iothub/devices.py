"""Who may connect: device and module identities with their keys."""

from __future__ import annotations

import base64
import hashlib
import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from .errors import HubError, invalid
from .etags import accepts

_ID = re.compile(r"[A-Za-z0-9\-.%_*?!(),:=@$']{1,128}\Z", re.ASCII)


_THUMBPRINT = re.compile(r"(?:[0-9A-Fa-f]{40}|[0-9A-Fa-f]{64})\Z")


@dataclass(frozen=True, slots=True, order=True)
class ClientId:
    """A device (`module` empty) or one of its modules; its text is the MQTT client id."""

    device: str
    module: str = ""

    def __str__(self) -> str:
        return f"{self.device}/{self.module}" if self.module else self.device

    @classmethod
    def parse(cls, text: str) -> ClientId:
        """From an MQTT client id. Raises HubError 400."""
        device, slash, module = text.partition("/")
        if not _ID.match(device) or (slash and not _ID.match(module)):
            raise invalid(f"{text!r} is not a device id or device/module id")
        return cls(device, module)

    @property
    def path(self) -> str:
        """As in topics and in the resource of a shared access signature."""
        base = f"devices/{self.device}"
        return f"{base}/modules/{self.module}" if self.module else base


@dataclass(frozen=True, slots=True)
class Identity:
    """A registered device or module; keys are base64, 16 to 64 bytes."""

    client: ClientId
    primary_key: str
    secondary_key: str
    enabled: bool = True
    edge: bool = False
    generation: str = "1"
    managed_by: str = ""
    authentication: str = "sas"
    """How it must log in: "sas", "selfSigned" (by thumbprint) or "certificateAuthority"."""
    thumbprints: tuple[str, str] = ("", "")
    """SHA-1 or SHA-256 of certificates, upper-case hex; empty where there is none."""

    @property
    def keys(self) -> tuple[str, str]:
        return self.primary_key, self.secondary_key

    @property
    def etag(self) -> str:
        """Follows from what it describes, so that it survives restarts."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]

    def as_json(self) -> dict[str, Any]:
        """For the state file; `from_json` reads it back."""
        return {
            "client": str(self.client),
            "keys": list(self.keys),
            "enabled": self.enabled,
            "edge": self.edge,
            "generation": self.generation,
            "managed_by": self.managed_by,
            "authentication": self.authentication,
            "thumbprints": list(self.thumbprints),
        }

    def authentication_view(self) -> dict[str, Any]:
        """As the service side sees it."""
        keys: list[str | None] = list(self.keys) if self.authentication == "sas" else [None, None]
        return {
            "type": self.authentication,
            "symmetricKey": {"primaryKey": keys[0], "secondaryKey": keys[1]},
            "x509Thumbprint": {
                "primaryThumbprint": self.thumbprints[0] or None,
                "secondaryThumbprint": self.thumbprints[1] or None,
            },
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Identity:
        client = ClientId.parse(data["client"])
        rest: dict[str, Any] = {k: data[k] for k in ("enabled", "edge", "generation", "managed_by")}
        rest["authentication"] = data.get("authentication", "sas")
        primary, secondary = data.get("thumbprints", ("", ""))
        rest["thumbprints"] = (primary, secondary)
        return cls(client, *data["keys"], **rest)


class Registry:
    """The identities of one hub. Module identities go with their device."""

    def __init__(self, identities: Iterator[Identity] | None = None) -> None:
        self._identities = {identity.client: identity for identity in identities or ()}

    def __iter__(self) -> Iterator[Identity]:
        return iter(sorted(self._identities.values(), key=lambda identity: identity.client))

    def __contains__(self, client: ClientId) -> bool:
        return client in self._identities

    def get(self, client: ClientId) -> Identity:
        """Raises HubError 404."""
        identity = self._identities.get(client)
        if identity is None:
            code = "ModuleNotFound" if client.module else "DeviceNotFound"
            raise HubError(404, code, f"there is no {client} in this hub: create it first")
        return identity

    def modules(self, device: str) -> list[Identity]:
        """Raises HubError 404 for an unknown device."""
        self.get(ClientId(device))
        found = (i for i in self._identities.values() if i.client.device == device)
        return sorted((i for i in found if i.client.module), key=lambda one: one.client)

    def put(
        self, client: ClientId, description: Mapping[str, Any], if_match: str | None = None
    ) -> Identity:
        """Creates or updates an identity from the REST body of IoT Hub's registry.

        Read: `status`, `capabilities.iotEdge`, `managedBy`, and of `authentication` `type`,
        `symmetricKey` and `x509Thumbprint`; keys not given are generated, or kept. Raises HubError
        400 (bad body or id), 404 (a module's device is missing), 409 (exists and no If-Match), 412
        (stale If-Match).
        """
        ClientId.parse(str(client))
        old = self._identities.get(client)
        if client.module:
            self.get(ClientId(client.device))
        if old is not None and if_match is None:
            code = "ModuleAlreadyExistsOnDevice" if client.module else "DeviceAlreadyExists"
            raise HubError(409, code, f"{client} already exists: send If-Match to update it")
        if old is not None:
            self._check_match(old, if_match)
        identity = _described(client, description, old)
        self._identities[client] = identity
        if identity.edge and not client.module:
            for module in ("$edgeAgent", "$edgeHub"):
                self.ensure(ClientId(client.device, module))
        return identity

    def ensure(self, client: ClientId) -> Identity:
        """The identity, created with fresh keys where it is missing."""
        return self._identities.get(client) or self.put(client, {})

    def delete(self, client: ClientId, if_match: str | None = None) -> list[ClientId]:
        """Removes an identity, a device with its modules; returns all that went.

        Raises HubError 404 or 412.
        """
        self._check_match(self.get(client), if_match)
        gone = [
            other
            for other in self._identities
            if other == client or (not client.module and other.device == client.device)
        ]
        for other in gone:
            del self._identities[other]
        return gone

    @staticmethod
    def _check_match(identity: Identity, if_match: str | None) -> None:
        if not accepts(if_match, identity.etag):
            raise HubError(412, "PreconditionFailed", f"{identity.client} has changed: read again")


def _described(client: ClientId, description: Mapping[str, Any], old: Identity | None) -> Identity:
    authentication = _member(description, "authentication")
    kind, thumbprints = _x509(client, authentication, old)
    keys = _member(authentication, "symmetricKey")
    identity = old or Identity(client, _new_key(), _new_key(), generation=secrets.token_hex(8))
    status = description.get("status", "enabled" if identity.enabled else "disabled")
    if status not in ("enabled", "disabled"):
        raise invalid(f"{client}: status is enabled or disabled, not {status!r}")
    return replace(
        identity,
        primary_key=_key(keys.get("primaryKey"), client) or identity.primary_key,
        secondary_key=_key(keys.get("secondaryKey"), client) or identity.secondary_key,
        enabled=status == "enabled",
        edge=bool(_member(description, "capabilities").get("iotEdge", identity.edge)),
        managed_by=str(description.get("managedBy") or identity.managed_by),
        authentication=kind,
        thumbprints=thumbprints,
    )


def _x509(
    client: ClientId, authentication: Mapping[str, Any], old: Identity | None
) -> tuple[str, tuple[str, str]]:
    """The type of authentication and the thumbprints it needs."""
    kind = authentication.get("type") or (old.authentication if old else "sas")
    if kind in ("sas", "none"):
        return "sas", ("", "")
    if kind == "certificateAuthority":
        return kind, ("", "")
    if kind != "selfSigned":
        raise invalid(
            f"{client}: authentication type {kind!r} is not one of sas, selfSigned and "
            "certificateAuthority"
        )
    given = _member(authentication, "x509Thumbprint")
    before = old.thumbprints if old and not given else ("", "")
    primary = _thumbprint(given.get("primaryThumbprint"), client) or before[0]
    secondary = _thumbprint(given.get("secondaryThumbprint"), client) or before[1]
    if not primary and not secondary:
        raise invalid(f"{client}: selfSigned needs x509Thumbprint.primaryThumbprint")
    return kind, (primary, secondary or primary)


def _thumbprint(text: Any, client: ClientId) -> str:
    if text is None or text == "":
        return ""
    if not isinstance(text, str) or not _THUMBPRINT.match(text):
        raise invalid(f"{client}: a thumbprint is 40 (SHA-1) or 64 (SHA-256) hexadecimal digits")
    return text.upper()


def _member(value: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    member = value.get(name) or {}
    if not isinstance(member, dict):
        raise invalid(f"{name} must be a JSON object")
    return member


def _key(text: Any, client: ClientId) -> str | None:
    if not text:
        return None
    try:
        length = len(base64.b64decode(text, validate=True))
    except (ValueError, TypeError) as error:
        raise invalid(f"{client}: a symmetric key is base64 text") from error
    if not 16 <= length <= 64:
        raise invalid(f"{client}: a symmetric key has 16 to 64 bytes, not {length}")
    return str(text)


def _new_key() -> str:
    return base64.b64encode(secrets.token_bytes(32)).decode()
