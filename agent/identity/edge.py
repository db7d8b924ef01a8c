"""Identities that services of IoT Edge on the same host hand out.

Sources: IoT Edge module environment and workload API (api-version 2018-06-28); identity service
and key service of iot-identity-service (api-versions 2020-09-01).
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from .local_http import HttpRefused, unix_request
from .login import Login
from .signing import Sign, sign_with
from .sources import IdentityError, IdentityService, parse_connection_string

_SERVICE_VERSION = "api-version=2020-09-01"
_NOT_FOUND = 404


def login_from_environment(variables: Mapping[str, str]) -> Login:
    """The module that IoT Edge started. Asks the workload socket for the trust bundle.

    Raises IdentityError.
    """
    names = ("IOTHUBHOSTNAME", "DEVICEID", "MODULEID", "MODULEGENERATIONID", "WORKLOADURI")
    missing = [f"IOTEDGE_{name}" for name in names if not variables.get(f"IOTEDGE_{name}")]
    if not missing:
        return _edge_module({name: variables[f"IOTEDGE_{name}"] for name in names}, variables)
    text = variables.get("EdgeHubConnectionString")
    ca_file = variables.get("EdgeModuleCACertificateFile")
    if not text or not ca_file:
        raise IdentityError(
            f"this is not the environment of an IoT Edge module: {', '.join(missing)} not set; "
            "start the agent as a module of IoT Edge, or choose another source under [iothub]"
        )
    try:
        module = parse_connection_string(text)
        ca_pem = Path(ca_file).read_text(encoding="ascii")
    except (OSError, ValueError) as error:
        raise IdentityError(
            f"EdgeHubConnectionString and EdgeModuleCACertificateFile cannot be used: {error}"
        ) from error
    return Login(
        module.host,
        module.device,
        module.module,
        module.gateway,
        sign=sign_with(module.proof),  # type: ignore[arg-type]  # of a connection string: a key
        ca_pem=ca_pem,
    )


def _edge_module(found: Mapping[str, str], variables: Mapping[str, str]) -> Login:
    socket = _socket_path(found["WORKLOADURI"])
    query = f"api-version={quote(variables.get('IOTEDGE_APIVERSION') or '2018-06-28')}"
    bundle = unix_request(socket, "GET", f"/trust-bundle?{query}")
    target = "/modules/{}/genid/{}/sign?{}".format(
        quote(found["MODULEID"], safe=""), quote(found["MODULEGENERATIONID"], safe=""), query
    )

    def sign(message: bytes) -> bytes:
        data = base64.b64encode(message).decode()
        body = {"keyId": "primary", "algo": "HMACSHA256", "data": data}
        return _signature(unix_request(socket, "POST", target, body), "digest", socket)

    return Login(
        found["IOTHUBHOSTNAME"],
        found["DEVICEID"],
        found["MODULEID"],
        variables.get("IOTEDGE_GATEWAYHOSTNAME", ""),
        sign=sign,
        ca_pem=_text(bundle, "certificate", socket),
    )


def login_from_identity_service(source: IdentityService) -> Login:
    """The module's identity, made by the identity service where it is missing.

    Raises IdentityError.
    """
    socket = source.identity_socket
    target = f"/identities/modules/{quote(source.module, safe='')}?{_SERVICE_VERSION}&type=aziot"
    try:
        found = unix_request(socket, "GET", target)
    except HttpRefused as error:
        if error.status != _NOT_FOUND:
            raise
        body = {"type": "aziot", "moduleId": source.module}
        found = unix_request(socket, "POST", f"/identities/modules?{_SERVICE_VERSION}", body)
    spec = _object(found, "spec", socket)
    auth = _object(spec, "auth", socket)
    if auth.get("type") != "sas":
        raise IdentityError(
            f"the identity service at {socket} proves {source.module} by {auth.get('type')!r}, "
            "whose key only OpenSSL engines can use; configure [iothub.x509], or SAS there"
        )
    gateway = spec.get("gatewayHost") or ""
    login = Login(
        _text(spec, "hubName", socket),
        _text(spec, "deviceId", socket),
        spec.get("moduleId") or source.module,
        gateway if gateway != spec["hubName"] else "",
    )
    return replace(login, sign=_key_service(source.key_socket, _text(auth, "keyHandle", socket)))


def _key_service(socket: Path, handle: str) -> Sign:
    def sign(message: bytes) -> bytes:
        body = {
            "keyHandle": handle,
            "algorithm": "HMAC-SHA256",
            "parameters": {"message": base64.b64encode(message).decode()},
        }
        answer = unix_request(socket, "POST", f"/sign?{_SERVICE_VERSION}", body)
        return _signature(answer, "signature", socket)

    return sign


def _socket_path(uri: str) -> Path:
    if not uri.startswith("unix://"):
        raise IdentityError(f"IOTEDGE_WORKLOADURI is {uri!r}; it must be unix:///path/of/the.sock")
    return Path(uri[len("unix://") :].rstrip("/"))


def _signature(answer: Mapping[str, Any], name: str, socket: Path) -> bytes:
    try:
        return base64.b64decode(_text(answer, name, socket), validate=True)
    except ValueError as error:
        raise IdentityError(f"the service at {socket} answered no base64 as {name!r}") from error


def _text(answer: Mapping[str, Any], name: str, socket: Path) -> str:
    value = answer.get(name)
    if not isinstance(value, str) or not value:
        raise IdentityError(f"the answer of the service at {socket} lacks {name!r}")
    return value


def _object(answer: Mapping[str, Any], name: str, socket: Path) -> Mapping[str, Any]:
    value = answer.get(name)
    if not isinstance(value, dict):
        raise IdentityError(f"the answer of the service at {socket} lacks {name!r}")
    return value
