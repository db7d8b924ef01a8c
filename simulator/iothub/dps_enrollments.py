"""Enrolments of a device provisioning service: who may register, and as what."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from .errors import HubError, invalid

_ID = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9\-._:]{0,126}[A-Za-z0-9])?\Z", re.ASCII)
_POLICIES = ("hashed", "static", "geoLatency", "custom")


@dataclass(frozen=True, slots=True)
class Enrollment:
    """An individual enrolment or (`group`) an enrolment group, checked.

    `document` is the REST body as it is stored, with keys and thumbprints filled in. For symmetric
    keys `keys` holds two base64 keys, of the device or of the group; for X.509 `certificates` holds
    the device's own certificates, or those of the group's authorities.
    """

    id: str
    group: bool
    document: Mapping[str, Any]
    keys: tuple[str, ...] = ()
    certificates: tuple[x509.Certificate, ...] = ()
    authorities: tuple[str, ...] = ()
    """Names of authorities the service itself knows (`caReferences`)."""

    @property
    def enabled(self) -> bool:
        return bool(self.document["provisioningStatus"] == "enabled")

    @property
    def symmetric(self) -> bool:
        return bool(self.keys)

    @property
    def policy(self) -> tuple[bool, bool]:
        """Whether a device that registers again may move, and whether its data moves along."""
        policy = self.document["reprovisionPolicy"]
        return policy["updateHubAssignment"], policy["migrateDeviceData"]

    @property
    def hubs(self) -> tuple[str, ...]:
        """Host names it is limited to; none is all that are linked."""
        return tuple(self.document.get("iotHubs") or ())

    @property
    def etag(self) -> str:
        return str(self.document["etag"])

    def keys_for(self, registration: str) -> tuple[str, ...]:
        """The keys of a device: a group's are derived from the group's."""
        if not self.group:
            return self.keys
        return tuple(derive_key(key, registration) for key in self.keys)

    def thumbprints(self) -> tuple[str, ...]:
        return tuple(one.fingerprint(hashes.SHA256()).hex().upper() for one in self.certificates)


def derive_key(group_key: str, registration: str) -> str:
    """A device's key: base64 of HMAC-SHA256 of its registration id under the group's key."""
    digest = hmac.digest(base64.b64decode(group_key), registration.encode(), "sha256")
    return base64.b64encode(digest).decode()


def parse_enrollment(name: str, group: bool, body: Mapping[str, Any], now: str) -> Enrollment:
    """From the body of a PUT (API version 2021-10-01). Raises HubError 400."""
    id_field = "enrollmentGroupId" if group else "registrationId"
    if not _ID.match(name) or (not group and name != name.lower()):
        raise invalid(
            f"{id_field} {name!r}: 1 to 128 letters (in lower case for a registration), digits, "
            "and - . _ : inside"
        )
    if body.get(id_field, name) != name:
        raise invalid(f"the body is for {body[id_field]!r}, the address for {name!r}")
    status = body.get("provisioningStatus", "enabled")
    if status not in ("enabled", "disabled"):
        raise invalid(f"provisioningStatus is enabled or disabled, not {status!r}")
    allocation = body.get("allocationPolicy") or "hashed"
    if allocation not in _POLICIES:
        raise invalid(f"allocationPolicy is one of {', '.join(_POLICIES)}, not {allocation!r}")
    attestation = _member(body, "attestation")
    hubs = body.get("iotHubs") or ([body["iotHubHostName"]] if body.get("iotHubHostName") else [])
    if not isinstance(hubs, list) or not all(isinstance(hub, str) for hub in hubs):
        raise invalid("iotHubs is a list of host names")
    document: dict[str, Any] = {
        id_field: name,
        **({} if group else {"deviceId": body.get("deviceId") or name}),
        "iotHubs": hubs,
        "iotHubHostName": hubs[0] if hubs else None,
        "allocationPolicy": allocation,
        "provisioningStatus": status,
        "capabilities": {"iotEdge": bool(_member(body, "capabilities").get("iotEdge"))},
        "reprovisionPolicy": _policy(_member(body, "reprovisionPolicy")),
        "initialTwin": _initial_twin(body.get("initialTwin")),
        "createdDateTimeUtc": body.get("createdDateTimeUtc") or now,
        "lastUpdatedDateTimeUtc": now,
        "etag": secrets.token_hex(8),
    }
    kind = attestation.get("type")
    if kind == "symmetricKey":
        given = _member(attestation, "symmetricKey")
        keys = {
            field: _key(given.get(field), f"{name}: {field}")
            for field in ("primaryKey", "secondaryKey")
        }
        document["attestation"] = {"type": kind, "symmetricKey": keys}
        return Enrollment(name, group, document, keys=tuple(keys.values()))
    if kind == "x509":
        return _x509(name, group, document, _member(attestation, "x509"))
    raise invalid(f"{name}: attestation.type is symmetricKey or x509 here, not {kind!r}")


def _x509(name: str, group: bool, document: dict[str, Any], given: Mapping[str, Any]) -> Enrollment:
    references = _member(given, "caReferences")
    if references and group:
        names = tuple(str(n) for n in references.values() if n)
        document["attestation"] = {"type": "x509", "x509": {"caReferences": dict(references)}}
        return Enrollment(name, group, document, authorities=names)
    field = "signingCertificates" if group else "clientCertificates"
    shown: dict[str, Any] = {}
    certificates = []
    for which in ("primary", "secondary"):
        text = _member(_member(given, field), which).get("certificate")
        if text:
            certificate = _certificate(text, f"{name}: {field}.{which}")
            certificates.append(certificate)
            shown[which] = {"certificate": text, "info": _info(certificate)}
    if not certificates:
        raise invalid(f"{name}: attestation.x509.{field}.primary.certificate is missing")
    document["attestation"] = {"type": "x509", "x509": {field: shown}}
    return Enrollment(name, group, document, certificates=tuple(certificates))


def _certificate(text: Any, where: str) -> x509.Certificate:
    """PEM, that in base64, or DER in base64: all are in use."""
    try:
        data = str(text).encode()
        if b"-----BEGIN" not in data:
            data = base64.b64decode(data, validate=True)
        if b"-----BEGIN" in data:
            return x509.load_pem_x509_certificate(data)
        return x509.load_der_x509_certificate(data)
    except (ValueError, binascii.Error) as error:
        raise invalid(f"{where} is no certificate: {error}") from error


def _info(certificate: x509.Certificate) -> dict[str, Any]:
    der = certificate.public_bytes(serialization.Encoding.DER)
    return {
        "subjectName": certificate.subject.rfc4514_string(),
        "issuerName": certificate.issuer.rfc4514_string(),
        "sha1Thumbprint": hashlib.sha1(der, usedforsecurity=False).hexdigest().upper(),
        "sha256Thumbprint": hashlib.sha256(der).hexdigest().upper(),
        "notBeforeUtc": certificate.not_valid_before_utc.isoformat(),
        "notAfterUtc": certificate.not_valid_after_utc.isoformat(),
        "serialNumber": f"{certificate.serial_number:X}",
        "version": 3,
    }


def _policy(given: Mapping[str, Any]) -> dict[str, bool]:
    return {
        name: bool(given.get(name, True)) for name in ("updateHubAssignment", "migrateDeviceData")
    }


def _initial_twin(given: Any) -> dict[str, Any]:
    if given is None:
        return {"tags": {}, "properties": {"desired": {}}}
    if not isinstance(given, Mapping):
        raise invalid("initialTwin must be a JSON object")
    properties = _member(given, "properties")
    return {
        "tags": dict(_member(given, "tags")),
        "properties": {"desired": dict(_member(properties, "desired"))},
    }


def _key(text: Any, where: str) -> str:
    if not text:
        return base64.b64encode(secrets.token_bytes(32)).decode()
    try:
        length = len(base64.b64decode(text, validate=True))
    except (ValueError, TypeError) as error:
        raise invalid(f"{where} must be base64 text") from error
    if not 16 <= length <= 64:
        raise invalid(f"{where} has 16 to 64 bytes, not {length}")
    return str(text)


def _member(value: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    member = value.get(name) or {}
    if not isinstance(member, Mapping):
        raise HubError(400, "ArgumentInvalid", f"{name} must be a JSON object")
    return member
