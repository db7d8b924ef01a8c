"""Where the device's configuration and its container engine meet the rest of the agent."""

from __future__ import annotations

import importlib.util
import logging
import random
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from .clock import Clock
from .config import AgentConfig, ConfigError, read_secret
from .deployments import ContainerRefused
from .engine import Engine
from .hub_names import HubNames
from .manifest import ManifestError
from .module_spec import ModuleSpec
from .runtime.container import SCORING_LABEL, ContainerRuntime, ContainerSpec
from .runtime.create_body import CreateFacts, create_body
from .runtime.policy import protected_paths
from .runtime.scoring_module import scoring_socket
from .seams import NoEngine
from .store import StateStore
from .store_types import StoreError

log = logging.getLogger(__name__)

_ENGINES_OWN = "engines-own"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class DeviceContainers:
    """`ContainerMaker` under this device's policy. `hub` says by which names modules find it."""

    def __init__(self, config: AgentConfig, hub: Callable[[], HubNames] = HubNames) -> None:
        self._config = config
        self._hub = hub
        self._run_dir = PurePosixPath(config.device.run_dir.absolute())
        self._protected = _protected(config)

    @property
    def device(self) -> HubNames:
        return self._hub()

    def container(
        self,
        spec: ModuleSpec,
        digest: str,
        *,
        scoring: bool,
        model: str = "",
        logging_options: str,
    ) -> ContainerSpec:
        docker, hub = self._config.docker, self._hub()
        facts = CreateFacts(
            digest=digest,
            run_dir=self._run_dir,
            image_labels={SCORING_LABEL: model or "true"} if scoring else {},
            protected=self._protected,
            logging_options=logging_options,
            network=docker.network,
            hub_host=hub.host,
            hub_device=hub.device,
            gateway_host=hub.gateway,
        )
        try:
            return create_body(spec, self._config.device_id, docker.policy, facts)
        except ManifestError as error:
            raise ContainerRefused(str(error)) from error

    def socket(self, module: str) -> str:
        return str(scoring_socket(self._run_dir, module))


def open_engine(
    config: AgentConfig,
    clock: Clock,
    on_change: Callable[[], None],
    *,
    runtime: ContainerRuntime | None = None,
    seen_before: bool = False,
    store: StateStore | None = None,
    jitter: random.Random | None = None,
) -> Engine | NoEngine:
    """The engine that the configuration asks for; `runtime` in place of Docker for simulations.

    With "auto", a socket that is missing means that there is no engine, unless one was
    `seen_before`. `store` keeps what is known of its ways. Raises ConfigError.
    """
    if runtime is not None:
        return Engine(runtime, clock, on_change, jitter=jitter)
    docker = config.docker
    if docker.enabled is False:
        return NoEngine("docker.enabled is false in its configuration")
    if importlib.util.find_spec("docker") is None:
        if docker.enabled is True:
            raise ConfigError(
                "docker.enabled is true, but the Python package docker is missing: install "
                "gatelet[docker]"
            )
        return NoEngine("the Python package docker is missing; install gatelet[docker]")
    return Engine(
        _docker(config, store),
        clock,
        on_change,
        socket=docker.socket,
        expected=docker.enabled is True or seen_before,
        jitter=jitter,
    )


def boot_id() -> str:
    """Differs after each start of this host; empty where the host does not say."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


def _docker(config: AgentConfig, store: StateStore | None) -> ContainerRuntime:
    from .runtime.docker import DockerRuntime
    from .runtime.engine_own import EnginesOwn

    def save(text: str) -> None:
        try:
            if store is not None:
                store.note_fact(_ENGINES_OWN, text)
        except StoreError as error:
            # Known as long as this agent runs.
            log.error("%s", error)

    docker = config.docker
    logins = tuple(
        (
            registry.address,
            registry.username,
            read_secret(registry.password, registry.password_file, "registry.password-file"),
        )
        for registry in config.registry
        if registry.username
    )
    return DockerRuntime(
        docker.socket,
        config.device_id,
        logins=logins,
        network=docker.network,
        policy=docker.policy,
        protected=_protected(config),
        engines_own=EnginesOwn("" if store is None else store.fact(_ENGINES_OWN), save),
    )


def _protected(config: AgentConfig) -> tuple[str, ...]:
    """Host paths that no module may have unless the policy names them."""
    device = config.device
    return protected_paths(
        str(config.docker.socket),
        "/run/docker.sock",
        "/run/containerd",
        str(device.state_dir.absolute()),
        str(device.run_dir.absolute()),
    )
