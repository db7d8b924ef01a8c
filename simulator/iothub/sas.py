"""Shared access signatures: who may act as which device, module or service.

`SharedAccessSignature sr={url-encoded resource}&sig={url-encoded base64 HMAC}&se={epoch}[&skn=..]`
where the HMAC-SHA256 under the base64-decoded key covers `sr` as sent, a newline and `se`
(IoT Hub developer guide, "Control access to IoT Hub with shared access signatures").
"""

from __future__ import annotations

import base64
import binascii
import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote, unquote

from ...agent.clock import Clock
from .errors import HubError, unauthorized

_SCHEME = "SharedAccessSignature "
_LONGEST_EXPIRY = 15


@dataclass(frozen=True, slots=True)
class Signature:
    """A parsed token. `signed` is the very text the HMAC covers; `resource` is decoded."""

    resource: str
    signature: bytes
    expiry: int
    policy: str | None
    signed: bytes


def make(resource: str, key: str, expiry: int, policy: str | None = None) -> str:
    """A token for a resource such as `hub.example/devices/d1`, valid until `expiry` (epoch s)."""
    encoded = quote(resource, safe="")
    signature = quote(base64.b64encode(_sign(key, f"{encoded}\n{expiry}".encode())), safe="")
    token = f"{_SCHEME}sr={encoded}&sig={signature}&se={expiry}"
    return token if policy is None else f"{token}&skn={quote(policy, safe='')}"


def parse(token: str) -> Signature:
    """Raises HubError 401 for anything that is not a complete token."""
    if not token.startswith(_SCHEME):
        raise unauthorized("the credential is not a SharedAccessSignature")
    fields: dict[str, str] = {}
    for pair in token[len(_SCHEME) :].split("&"):
        name, _, value = pair.partition("=")
        fields[name.strip()] = value
    try:
        return Signature(
            resource=unquote(fields["sr"]),
            signature=base64.b64decode(unquote(fields["sig"]), validate=True),
            expiry=_expiry(fields["se"]),
            policy=unquote(fields["skn"]) if fields.get("skn") else None,
            signed=f"{fields['sr']}\n{fields['se']}".encode(),
        )
    except (KeyError, ValueError, binascii.Error) as error:
        raise unauthorized(f"the SharedAccessSignature is malformed: {error!r}") from error


def _expiry(text: str) -> int:
    if len(text) > _LONGEST_EXPIRY:
        raise ValueError("se is no time")
    return int(text)


def verify(token: Signature, resource: str, keys: Sequence[str], clock: Clock) -> None:
    """Checks that the token covers `resource` under one of the keys and has not expired.

    A token for a parent resource (`hub` or `hub/devices/d` for `hub/devices/d/modules/m`) covers
    it. Host names compare without case. Raises HubError 401.
    """
    if not _covers(token.resource, resource):
        raise unauthorized(f"the signature is for {token.resource!r}, not for {resource!r}")
    if not any(hmac.compare_digest(_sign(key, token.signed), token.signature) for key in keys):
        raise unauthorized(f"the signature for {resource!r} does not match its key")
    if token.expiry <= clock.now().timestamp():
        raise unauthorized(f"the signature for {resource!r} expired at {token.expiry}")


def _covers(granted: str, wanted: str) -> bool:
    granted_parts, wanted_parts = granted.rstrip("/").split("/"), wanted.split("/")
    return (
        granted_parts[0].lower() == wanted_parts[0].lower()
        and granted_parts[1:] == wanted_parts[1 : len(granted_parts)]
    )


def _sign(key: str, text: bytes) -> bytes:
    try:
        secret = base64.b64decode(key, validate=True)
    except binascii.Error as error:
        raise HubError(400, "ArgumentInvalid", "a symmetric key must be base64") from error
    return hmac.new(secret, text, "sha256").digest()
