"""The identity that `[iothub]` of agent.toml asks for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..config import (
    ConfigError,
    IotHubConfig,
    IotHubDpsConfig,
    IotHubSasConfig,
    read_secret,
)
from .sources import (
    DPS_HOST,
    EDGE_AGENT,
    IDENTITY_SOCKET,
    KEY_SOCKET,
    CertificateFiles,
    Dps,
    EdgeEnvironment,
    IdentityService,
    IdentitySource,
    KeyFile,
    KeyText,
    ModuleOf,
    Registered,
    SignCommand,
    Signer,
    SignFunction,
    SignSocket,
    parse_connection_string,
)

_STRING = "iothub.connection-string"
_SECTIONS = "[iothub.sas], [iothub.x509], [iothub.dps], [iothub.identity-service]"
_SHORTEST_TOKEN = 60


def identity_source(hub: IotHubConfig, environment: Mapping[str, str]) -> IdentitySource:
    """Exactly one source, made from `[iothub]`. Raises ConfigError naming the key and the remedy.

    Reads the connection string's file; all other files are read when they are needed, so that
    they may be replaced.
    """
    if hub.token_lifetime_seconds < _SHORTEST_TOKEN:
        raise ConfigError(
            f"iothub.token-lifetime-seconds is {hub.token_lifetime_seconds}; "
            f"it must be at least {_SHORTEST_TOKEN}"
        )
    given = {
        _STRING: bool(hub.connection_string),
        "iothub.connection-string-file": hub.connection_string_file is not None,
        "[iothub.sas]": hub.sas is not None,
        "[iothub.x509]": hub.x509 is not None,
        "[iothub.dps]": hub.dps is not None,
        "iothub.edge-environment": hub.edge_environment,
        "[iothub.identity-service]": hub.identity_service is not None,
    }
    sources = [name for name, there in given.items() if there]
    if not sources:
        raise ConfigError(
            f"[iothub] names no identity: give exactly one of {_STRING}, {_STRING}-file, "
            f"{_SECTIONS}, or iothub.edge-environment = true"
        )
    if len(sources) > 1:
        raise ConfigError(f"{' and '.join(sources)} exclude each other: keep one of them")
    source = _source(hub, environment)
    if not hub.module_id:
        return source
    if isinstance(source, Dps) or (isinstance(source, Registered) and not source.module):
        return ModuleOf(source, hub.module_id)
    raise ConfigError(
        f"iothub.module-id is for identities of devices, and {sources[0]} is a module's already: "
        "remove iothub.module-id"
    )


def _source(hub: IotHubConfig, environment: Mapping[str, str]) -> IdentitySource:
    if hub.sas is not None:
        return _sas(hub.sas)
    if hub.x509 is not None:
        x509 = hub.x509
        return Registered(
            _said(x509.host_name, "iothub.x509.host-name"),
            _said(x509.device_id, "iothub.x509.device-id"),
            CertificateFiles(x509.cert_file, x509.key_file, x509.passphrase_file),
            x509.module_id,
            x509.gateway_host_name,
        )
    if hub.dps is not None:
        return _dps(hub.dps)
    if hub.edge_environment:
        return EdgeEnvironment(dict(environment))
    if hub.identity_service is not None:
        service = hub.identity_service
        return IdentityService(
            service.module_id or EDGE_AGENT,
            service.identity_socket or IDENTITY_SOCKET,
            service.key_socket or KEY_SOCKET,
        )
    text = read_secret(hub.connection_string, hub.connection_string_file, f"{_STRING}-file")
    try:
        return parse_connection_string(text)
    except ValueError as error:
        key = _STRING if hub.connection_string_file is None else f"{_STRING}-file"
        raise ConfigError(
            f"{key}: {error}; copy it as the hub shows it for a device or module"
        ) from error


def _sas(sas: IotHubSasConfig) -> Registered:
    signers: dict[str, Signer | None] = {
        "key-file": KeyFile(sas.key_file) if sas.key_file else None,
        "sign-command": SignCommand(sas.sign_command) if sas.sign_command else None,
        "sign-socket": SignSocket(sas.sign_socket) if sas.sign_socket else None,
        "sign-function": SignFunction(sas.sign_function) if sas.sign_function else None,
    }
    given = [signer for signer in signers.values() if signer is not None]
    if len(given) != 1:
        raise ConfigError(f"[iothub.sas] needs exactly one of {', '.join(signers)}")
    module, colon, function = sas.sign_function.partition(":")
    if sas.sign_function and not (module and colon and function):
        raise ConfigError(
            f"iothub.sas.sign-function is {sas.sign_function!r}; it must be package.module:function"
        )
    return Registered(
        _said(sas.host_name, "iothub.sas.host-name"),
        _said(sas.device_id, "iothub.sas.device-id"),
        given[0],
        sas.module_id,
        sas.gateway_host_name,
    )


def _dps(dps: IotHubDpsConfig) -> Dps:
    certificate: CertificateFiles | None = None
    if dps.cert_file is not None or dps.key_file is not None:
        if dps.cert_file is None or dps.key_file is None:
            raise ConfigError("[iothub.dps] with a certificate needs cert-file and key-file")
        certificate = CertificateFiles(dps.cert_file, dps.key_file, dps.passphrase_file)
    proofs: dict[str, KeyText | KeyFile | CertificateFiles | None] = {
        "symmetric-key": KeyText(dps.symmetric_key) if dps.symmetric_key else None,
        "symmetric-key-file": _key_file(dps.symmetric_key_file),
        "group-key-file": _key_file(dps.group_key_file),
        "cert-file": certificate,
    }
    given = [proof for proof in proofs.values() if proof is not None]
    if len(given) != 1:
        raise ConfigError(f"[iothub.dps] needs exactly one of {', '.join(proofs)}")
    return Dps(
        _said(dps.id_scope, "iothub.dps.id-scope"),
        _said(dps.registration_id, "iothub.dps.registration-id"),
        given[0],
        group=dps.group_key_file is not None,
        host=dps.host or DPS_HOST,
    )


def _key_file(path: Path | None) -> KeyFile | None:
    return None if path is None else KeyFile(path)


def _said(value: str, key: str) -> str:
    if not value.strip():
        raise ConfigError(f"{key} is empty: fill it in")
    return value.strip()
