"""A module's identity, looked up or made with the proof of its device, as IoT Edge does it.

Source: IoT Hub REST, `GET|PUT /devices/{id}/modules/{mid}` (2021-04-12), which a hub grants to a
device for its own modules.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

from .certificates import passphrase
from .local_http import HttpRefused, https_request
from .login import Login
from .signing import derived_key, key_signer, shared_access_signature
from .sources import IdentityError

_TOKEN_LIFETIME = timedelta(minutes=10)
_NOT_FOUND = 404
_FORBIDDEN = (401, 403)


def module_login(
    device: Login, module: str, *, ca_file: Path | None, proxy: str | None, now: datetime
) -> Login:
    """The module's login, with a key that the hub holds too. Raises IdentityError.

    Where the hub does not show the module's key to its device, the module gets one that follows
    from the device's key and the module's generation, so that it is the same at every start.
    """
    target = "/devices/{}/modules/{}?api-version=2021-04-12".format(
        quote(device.device, safe=""), quote(module, safe="")
    )

    def ask(method: str, body: Mapping[str, Any] | None = None, match: str = "") -> dict[str, Any]:
        headers = {"If-Match": match} if match else {}
        if device.sign is not None:
            expiry = int((now + _TOKEN_LIFETIME).timestamp())
            headers["Authorization"] = shared_access_signature(device.resource, expiry, device.sign)
        return https_request(
            device.host,
            method,
            target,
            body=body,
            headers=headers,
            context=_context(device, ca_file),
            proxy=proxy,
        )

    names = {"deviceId": device.device, "moduleId": module}
    try:
        try:
            found = ask("GET")
        except HttpRefused as error:
            if error.status != _NOT_FOUND:
                raise
            found = ask("PUT", {**names, "authentication": {"type": "sas"}})
        key = _primary_key(found)
        if key is None:
            if device.sign is None:
                raise IdentityError(
                    f"the hub does not show the key of {device.device}/{module} to its device, and "
                    "no key follows from a certificate: give the module its own certificate with "
                    "iothub.x509.module-id, or its connection string"
                )
            generation = str(found.get("generationId") or "")
            key = derived_key(device.sign, f"{module}{generation}primary")
            other = derived_key(device.sign, f"{module}{generation}secondary")
            keys = {"primaryKey": key, "secondaryKey": other}
            described = {
                **names,
                "managedBy": found.get("managedBy") or "",
                "generationId": generation,
                "authentication": {"type": "sas", "symmetricKey": keys},
            }
            ask("PUT", described, match="*")
    except HttpRefused as error:
        if error.status in _FORBIDDEN:
            raise IdentityError(
                f"the hub does not let the device make its module {module}: {error}; create the "
                "module in the hub (or mark the device as an IoT Edge device) and configure the "
                "module's own connection string"
            ) from error
        raise
    return Login(
        device.host,
        device.device,
        module,
        device.gateway,
        sign=key_signer(key, f"the key of {device.device}/{module}"),
        ca_pem=device.ca_pem,
    )


def _primary_key(identity: Mapping[str, Any]) -> str | None:
    authentication = identity.get("authentication")
    keys = authentication.get("symmetricKey") if isinstance(authentication, dict) else None
    key = keys.get("primaryKey") if isinstance(keys, dict) else None
    return key if isinstance(key, str) and key else None


def _context(device: Login, ca_file: Path | None) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=None if ca_file is None else str(ca_file))
        if device.certificate is not None:
            files = device.certificate
            context.load_cert_chain(files.certificate, files.key, passphrase(files))
    except OSError as error:
        raise IdentityError(f"TLS to {device.host} cannot be set up: {error}") from error
    return context
