"""`agent.toml`: everything that is fixed for a device, read once at start."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from .runtime.policy import DockerPolicy


class ConfigError(Exception):
    """The configuration cannot be used; the message names file, key and remedy."""


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    """Base of all sections: unknown keys are errors, because a typo must not be ignored."""


class DeviceConfig(_Section, frozen=True):
    """`board` is PYNQ's name in lower case ("pynq-z2"), "auto" to detect it, "none" for no FPGA."""

    id: str = ""
    state_dir: Path = Path("/var/lib/gatelet")
    run_dir: Path = Path("/run/gatelet")
    board: str = "auto"


class IotHubSasConfig(_Section, frozen=True):
    """An identity whose key is a file, or out of reach behind exactly one of the `sign-` hooks."""

    host_name: str
    device_id: str
    module_id: str = ""
    gateway_host_name: str = ""
    key_file: Path | None = None
    sign_command: tuple[str, ...] = ()
    sign_socket: Path | None = None
    sign_function: str = ""


class IotHubX509Config(_Section, frozen=True):
    """An identity proven by a client certificate (PEM files, the leaf first)."""

    host_name: str
    device_id: str
    cert_file: Path
    key_file: Path
    passphrase_file: Path | None = None
    module_id: str = ""
    gateway_host_name: str = ""


class IotHubDpsConfig(_Section, frozen=True):
    """A registration with the provisioning service: one kind of key, or a certificate."""

    id_scope: str
    registration_id: str
    host: str = ""
    symmetric_key: str = ""
    symmetric_key_file: Path | None = None
    group_key_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    passphrase_file: Path | None = None


class IotHubServiceConfig(_Section, frozen=True):
    """A module of IoT Edge's identity service on this host."""

    module_id: str = ""
    identity_socket: Path | None = None
    key_socket: Path | None = None


class IotHubConfig(_Section, frozen=True):
    """IoT Hub identity, from exactly one source; `agent.identity.configured` checks that.

    The twin is a module's where the source is a module's, or with `module-id`, which is looked up
    or created with the proof of the device that the source names.
    """

    connection_string: str = ""
    connection_string_file: Path | None = None
    sas: IotHubSasConfig | None = None
    x509: IotHubX509Config | None = None
    dps: IotHubDpsConfig | None = None
    edge_environment: bool = False
    identity_service: IotHubServiceConfig | None = None
    module_id: str = ""
    token_lifetime_seconds: int = 24 * 3600
    ca_file: Path | None = None
    proxy: str = ""
    websockets: bool = False


class MqttConfig(_Section, frozen=True):
    host: str
    port: int = 1883
    prefix: str = "gatelet/v1/{device}"
    username: str = ""
    password: str = ""
    password_file: Path | None = None
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    passphrase_file: Path | None = None
    tls: bool = False


class RegistryConfig(_Section, frozen=True):
    """Access to one registry; `address` is the host[:port] that image names begin with."""

    address: str
    username: str = ""
    password: str = ""
    password_file: Path | None = None
    ca_file: Path | None = None
    insecure: bool = False


class ScoringTlsConfig(_Section, frozen=True):
    """PEM files, read again when they change; the server's own certificate first."""

    cert_file: Path
    key_file: Path
    client_ca_file: Path | None = None
    require_client_certificate: bool = False


class ScoringTokensConfig(_Section, frozen=True):
    """JWTs that are taken: signed by a key of the JWKS file, from `issuer`, for `audience`."""

    jwks_file: Path
    issuer: str
    audience: str
    leeway_seconds: Annotated[float, msgspec.Meta(ge=0, le=600)] = 60.0


class ScoringConfig(_Section, frozen=True):
    """Addresses are host:port (port 0: any free one) or unix:/path; "" turns one off.

    `grpc_transport`: what speaks gRPC. `memory_budget_mb`: MiB that models may take before the one
    longest unused leaves memory until it is asked again; 0 for no limit. Other addresses than
    loopback and Unix sockets need `tls`, unless `allow_insecure`. `rate_per_second`: of one
    client's requests, 0 for no limit. `access_log_sample` and `trace_sample` are parts of 1;
    `otlp_url` takes OTLP over HTTP.
    """

    grpc_address: str = "127.0.0.1:8001"
    grpc_transport: Literal["http2", "grpcio"] = "http2"
    http_address: str = "127.0.0.1:8000"
    metrics_address: str = "127.0.0.1:8002"
    memory_budget_mb: Annotated[int, msgspec.Meta(ge=0)] = 0
    allow_insecure: bool = False
    cors_origins: tuple[str, ...] = ()
    rate_per_second: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    rate_burst: Annotated[int, msgspec.Meta(ge=1)] = 100
    access_log_sample: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    otlp_url: str = ""
    trace_sample: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    tls: ScoringTlsConfig | None = None
    tokens: ScoringTokensConfig | None = None


class FabricConfig(_Section, frozen=True):
    """The process that owns the FPGA.

    `python` is the interpreter of the board's own PYNQ environment; `device` is a module that
    registers a simulated pynq device.
    """

    python: Path | None = None
    device: str = ""


class DockerConfig(_Section, frozen=True):
    """The container engine. "auto": where its socket exists and the docker package is installed.

    `network` is the one modules join where their createOptions name none; it is made when missing.
    """

    enabled: bool | Literal["auto"] = "auto"
    socket: Path = Path("/var/run/docker.sock")
    network: str = ""
    policy: DockerPolicy = DockerPolicy()


_Seconds = Annotated[float, msgspec.Meta(ge=0)]


class DeploymentConfig(_Section, frozen=True):
    """`probation_seconds`: how long all modules must be healthy before a deployment is good.

    Under probation a container fails it that ended by itself `exits` times, or was not healthy
    `healthy_deadline_seconds` after it was made. `update_mode` counts where the manifest's
    edgeAgent has no ModuleUpdateMode; a start group waits at most `startup_wait_seconds` for the
    earlier ones, 0 for not at all. A container is restarted base * 2^n seconds after its end, up
    to cap, at most `restart_limit` times; it counts anew after `restart_reset_seconds` of running.

    A manifest by reference comes over HTTPS, whose authority `manifest_ca_file` (PEM) may name;
    over plain HTTP only from this machine and from the HOST[:PORT] in `manifest_http_hosts`.
    """

    probation_seconds: float = 10.0
    retry_base_seconds: float = 1.0
    retry_cap_seconds: float = 60.0
    update_mode: Literal["NonBlocking", "WaitForAllPulls"] = "NonBlocking"
    startup_wait_seconds: _Seconds = 60.0
    exits: Annotated[int, msgspec.Meta(ge=1)] = 3
    healthy_deadline_seconds: _Seconds = 300.0
    restart_base_seconds: _Seconds = 10.0
    restart_cap_seconds: _Seconds = 300.0
    restart_limit: Annotated[int, msgspec.Meta(ge=0)] = 20
    restart_reset_seconds: _Seconds = 600.0
    manifest_ca_file: Path | None = None
    manifest_http_hosts: tuple[str, ...] = ()


class ImagesConfig(_Section, frozen=True):
    """When images that nothing needs are removed: after `keep_days`, or at once, the longest unused
    first, while the disk has less free than `min_free_percent` or `min_free_bytes`."""

    keep_days: _Seconds = 7.0
    min_free_percent: Annotated[float, msgspec.Meta(ge=0, le=100)] = 10.0
    min_free_bytes: Annotated[int, msgspec.Meta(ge=0)] = 512 * 1024 * 1024


class TrustKeyConfig(_Section, frozen=True):
    """A public key (PEM, P-256) such as cosign.pub; `id` is what signatures and rules call it."""

    id: str
    file: Path


class TrustImagesConfig(_Section, frozen=True):
    """Of the rules whose `prefix` (REGISTRY[/PATH], "" for all) fits an image, the longest counts.

    `keys` are ids, all of them when empty.
    """

    prefix: str = ""
    require: bool = True
    keys: tuple[str, ...] = ()


class TrustConfig(_Section, frozen=True):
    """Whose manifests and images this device takes; removing a key withdraws the trust in it."""

    manifests: Literal["off", "require"] = "off"
    keys: tuple[TrustKeyConfig, ...] = ()
    images: tuple[TrustImagesConfig, ...] = ()


class TelemetryConfig(_Section, frozen=True):
    """`to` names the link that telemetry goes over, the first one when empty.

    `ttl_seconds` counts where the manifest has no `$edgeHub` section, 0 keeps messages for ever;
    `max_size_bytes` is the most that a manifest may ask for.
    """

    to: Literal["", "iothub", "mqtt"] = ""
    max_size_bytes: Annotated[int, msgspec.Meta(ge=64 * 1024)] = 64 * 1024 * 1024
    ttl_seconds: Annotated[float, msgspec.Meta(ge=0)] = 7 * 24 * 3600.0


class LogConfig(_Section, frozen=True):
    """Each process keeps `files` files of up to `max_bytes` in `state-dir/logs`."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    max_bytes: Annotated[int, msgspec.Meta(ge=16 * 1024)] = 1024 * 1024
    files: Annotated[int, msgspec.Meta(ge=2, le=100)] = 4


class AgentConfig(_Section, frozen=True):
    device: DeviceConfig = DeviceConfig()
    iothub: IotHubConfig | None = None
    mqtt: MqttConfig | None = None
    registry: tuple[RegistryConfig, ...] = ()
    scoring: ScoringConfig = ScoringConfig()
    fabric: FabricConfig = FabricConfig()
    docker: DockerConfig = DockerConfig()
    images: ImagesConfig = ImagesConfig()
    deployment: DeploymentConfig = DeploymentConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    trust: TrustConfig = TrustConfig()
    log: LogConfig = LogConfig()

    @property
    def device_id(self) -> str:
        return self.device.id or platform.node() or "gatelet"

    @property
    def scoring_keys_dir(self) -> Path:
        return self.device.state_dir / "scoring-keys"

    @property
    def logs_dir(self) -> Path:
        return self.device.state_dir / "logs"

    @property
    def agent_socket(self) -> Path:
        return self.device.run_dir / "agent.sock"

    @property
    def scoring_socket(self) -> Path:
        return self.device.run_dir / "scoring.sock"

    @property
    def fabric_socket(self) -> Path:
        return self.device.run_dir / "fabric.sock"

    @property
    def fabric_lock(self) -> Path:
        return self.device.run_dir / "fabric.lock"

    @property
    def processes_file(self) -> Path:
        return self.device.run_dir / "processes.json"


SOCKET_PATH_LIMIT = 100
"""Bytes; sun_path holds 108 (unix(7)), and the longest socket name is shorter than the rest."""


def parse_config(text: str, origin: str) -> AgentConfig:
    """Parse TOML `text`; `origin` is named in errors. Raises ConfigError."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{origin} is not valid TOML: {error}") from error
    try:
        config = msgspec.convert(raw, AgentConfig, strict=True, dec_hook=_decode)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{origin}: {error}") from error
    if len(os.fsencode(config.agent_socket)) > SOCKET_PATH_LIMIT:
        raise ConfigError(
            f"{origin}: device.run-dir {config.device.run_dir} is too long for Unix sockets "
            f"({SOCKET_PATH_LIMIT} bytes with the socket's name); choose a shorter folder"
        )
    return config


def load_config(path: Path) -> AgentConfig:
    """Read and parse `path`. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(
            f"no configuration at {path}; write one, or start a simulated site with "
            "`gatelet sim up`, which makes one"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    return parse_config(text, str(path))


def read_secret(value: str, file: Path | None, key: str) -> str:
    """`value`, or the first line of `file` when it is given. Raises ConfigError."""
    if file is None:
        return value
    try:
        return file.read_text(encoding="utf-8").split("\n", 1)[0].strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{key}: cannot read {file}: {error}") from error


def _decode(kind: type[Any], value: Any) -> Any:
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise TypeError(f"expected {kind.__name__}, got {type(value).__name__}")
