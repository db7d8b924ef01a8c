"""The engine that `agent.toml` asks for."""

from __future__ import annotations

import importlib.util
import stat

from ..config import AgentConfig, ConfigError, read_secret
from .docker import DockerRuntime
from .policy import protected_paths


def container_runtime(config: AgentConfig) -> DockerRuntime | None:
    """The runtime for containers, None for a device without. Connects to nothing.

    Raises ConfigError when `docker.enabled` is true and the docker package is missing.
    """
    docker = config.docker
    if docker.enabled is False:
        return None
    installed = importlib.util.find_spec("docker") is not None
    if docker.enabled == "auto" and not (installed and _is_socket(config)):
        return None
    if not installed:
        raise ConfigError(
            "docker.enabled is true, but the docker package is missing; "
            "install it with 'pip install gatelet[docker]'"
        )
    return DockerRuntime(
        docker.socket,
        config.device_id,
        logins=_logins(config),
        network=docker.network,
        policy=docker.policy,
        protected=protected(config),
    )


def protected(config: AgentConfig) -> tuple[str, ...]:
    """Host paths that no module may have unless the policy names them (`CreateFacts.protected`)."""
    return protected_paths(
        str(config.docker.socket),
        "/run/docker.sock",
        "/run/containerd",
        str(config.device.state_dir),
        str(config.device.run_dir),
    )


def _is_socket(config: AgentConfig) -> bool:
    try:
        return stat.S_ISSOCK(config.docker.socket.stat().st_mode)
    except OSError:
        return False


def _logins(config: AgentConfig) -> tuple[tuple[str, str, str], ...]:
    return tuple(
        (
            registry.address,
            registry.username,
            read_secret(registry.password, registry.password_file, "registry.password-file"),
        )
        for registry in config.registry
        if registry.username
    )
