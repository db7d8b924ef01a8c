"""Where an identity comes from. Descriptions only: nothing here reads a file or a socket."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

EDGE_AGENT = "$edgeAgent"
DPS_HOST = "global.azure-devices-provisioning.net"
IDENTITY_SOCKET = Path("/run/aziot/identityd.sock")
KEY_SOCKET = Path("/run/aziot/keyd.sock")


class IdentityError(Exception):
    """No proof of the identity can be made now; the message names the source and the remedy."""


@dataclass(frozen=True, slots=True)
class KeyText:
    """A symmetric key as base64 text."""

    text: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class KeyFile:
    """A file that holds a symmetric key as base64 text; read for every signature, never kept."""

    path: Path


@dataclass(frozen=True, slots=True)
class SignCommand:
    """A program that gets the bytes to sign on stdin and writes the HMAC-SHA256 as base64."""

    argv: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SignSocket:
    """A Unix stream socket with the manners of a SignCommand: bytes until end of file, then the
    base64 text until end of file.
    """

    path: Path


@dataclass(frozen=True, slots=True)
class SignFunction:
    """`package.module:function`, called with the bytes to sign; returns the 32 bytes of the HMAC.

    For PKCS#11 and TPM libraries, whose keys cannot leave their device.
    """

    target: str


Signer = KeyText | KeyFile | SignCommand | SignSocket | SignFunction


@dataclass(frozen=True, slots=True)
class CertificateFiles:
    """PEM files; `certificate` holds the leaf first, then its intermediates."""

    certificate: Path
    key: Path
    passphrase: Path | None = None

    @property
    def paths(self) -> tuple[Path, ...]:
        extra = () if self.passphrase is None else (self.passphrase,)
        return (self.certificate, self.key, *extra)


Proof = Signer | CertificateFiles


@dataclass(frozen=True, slots=True)
class Registered:
    """An identity whose hub and name are known, with any proof; `module` is empty for a device.

    `gateway` is the name of the IoT Edge gateway to connect to instead of the hub.
    """

    host: str
    device: str
    proof: Proof
    module: str = ""
    gateway: str = ""


@dataclass(frozen=True, slots=True)
class Dps:
    """A registration with the device provisioning service, which says which hub and device id.

    With `group` the proof is a KeyText or KeyFile of an enrolment group's key, from which the
    registration's own key follows.
    """

    id_scope: str
    registration_id: str
    proof: KeyText | KeyFile | CertificateFiles
    group: bool = False
    host: str = DPS_HOST


@dataclass(frozen=True, slots=True)
class EdgeEnvironment:
    """A module that IoT Edge started: `IOTEDGE_*` variables and the workload socket, or the
    development pair `EdgeHubConnectionString` and `EdgeModuleCACertificateFile`.
    """

    variables: Mapping[str, str] = field(repr=False)


@dataclass(frozen=True, slots=True)
class IdentityService:
    """The sockets of Azure's identity service and key service on the same host.

    The identity service makes the module's identity; its key stays in the key service.
    """

    module: str = EDGE_AGENT
    identity_socket: Path = IDENTITY_SOCKET
    key_socket: Path = KEY_SOCKET


@dataclass(frozen=True, slots=True)
class ModuleOf:
    """A module of a device: looked up, or made where it is missing, with the device's proof."""

    device: Registered | Dps
    module: str


IdentitySource = Registered | Dps | EdgeEnvironment | IdentityService | ModuleOf


def parse_connection_string(text: str) -> Registered:
    """Of a device or a module. Raises ValueError, without the key in its text."""
    pairs = (part.partition("=") for part in text.strip().split(";"))
    parts = {name.strip(): value.strip() for name, _, value in pairs if name}
    missing = [n for n in ("HostName", "DeviceId", "SharedAccessKey") if not parts.get(n)]
    if missing:
        raise ValueError(f"the IoT Hub connection string lacks {', '.join(missing)}")
    return Registered(
        parts["HostName"],
        parts["DeviceId"],
        KeyText(parts["SharedAccessKey"]),
        parts.get("ModuleId", ""),
        parts.get("GatewayHostName", ""),
    )


def files_of(source: IdentitySource) -> tuple[Path, ...]:
    """The files whose change means that the identity is to be proven anew."""
    if isinstance(source, ModuleOf):
        return files_of(source.device)
    if isinstance(source, (Registered, Dps)):
        if isinstance(source.proof, CertificateFiles):
            return source.proof.paths
        if isinstance(source.proof, KeyFile):
            return (source.proof.path,)
    return ()


def certificate_of(source: IdentitySource) -> CertificateFiles | None:
    if isinstance(source, ModuleOf):
        return certificate_of(source.device)
    if isinstance(source, (Registered, Dps)) and isinstance(source.proof, CertificateFiles):
        return source.proof
    return None
