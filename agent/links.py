"""The links to the cloud that a configuration asks for."""

from __future__ import annotations

import os

from .config import AgentConfig, ConfigError, read_secret
from .hub_names import KnownHub
from .twin.transport import TwinTransport


def transports(config: AgentConfig, known: KnownHub | None = None) -> tuple[TwinTransport, ...]:
    """The transports that the configuration asks for; `known` learns the hub's name.

    Raises ConfigError.
    """
    links: list[TwinTransport] = []
    if config.iothub is not None:
        from .identity.configured import identity_source
        from .twin.iothub import IotHubSettings, IotHubTransport
        from .twin.iothub_client import ignore

        hub = config.iothub
        try:
            source = identity_source(hub, os.environ)
            if known is not None:
                known.begin(source)
            settings = IotHubSettings(
                source,
                ca_file=hub.ca_file,
                proxy=hub.proxy or None,
                websockets=hub.websockets,
                state_dir=config.device.state_dir,
                token_lifetime=hub.token_lifetime_seconds,
                logged_in=ignore if known is None else known.note,
            )
        except ValueError as error:
            raise ConfigError(f"[iothub]: {error}") from error
        links.append(IotHubTransport(settings))
    if config.mqtt is not None:
        from .twin.mqtt import MqttSettings, MqttTransport

        mqtt = config.mqtt
        links.append(
            MqttTransport(
                MqttSettings(
                    host=mqtt.host,
                    port=mqtt.port,
                    prefix=mqtt.prefix,
                    device_id=config.device_id,
                    username=mqtt.username or None,
                    password=read_secret(mqtt.password, mqtt.password_file, "mqtt.password-file")
                    or None,
                    ca_file=mqtt.ca_file,
                    cert_file=mqtt.cert_file,
                    key_file=mqtt.key_file,
                    passphrase_file=mqtt.passphrase_file,
                    tls=mqtt.tls,
                )
            )
        )
    return tuple(links)


def upstream(config: AgentConfig, links: tuple[TwinTransport, ...]) -> TwinTransport | None:
    """The link that telemetry goes over. Raises ConfigError."""
    wanted = config.telemetry.to
    for link in links:
        if wanted in ("", link.name):
            return link
    if wanted:
        raise ConfigError(
            f"telemetry.to is {wanted}, but there is no [{wanted}] section: add it, or leave "
            "telemetry.to out"
        )
    return None
