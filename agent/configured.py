"""What the parts of an agent are given, as its configuration says."""

from __future__ import annotations

from .clock import Clock
from .config import AgentConfig
from .image_retention import RetentionRules
from .outbox import Limits, Outbox
from .reconcile_settings import ReconcileSettings
from .restarts import RestartRules


def reconcile_settings(config: AgentConfig) -> ReconcileSettings:
    deployment = config.deployment
    return ReconcileSettings(
        deployment.probation_seconds,
        deployment.retry_base_seconds,
        deployment.retry_cap_seconds,
        update_mode=deployment.update_mode,
        startup_wait_seconds=deployment.startup_wait_seconds,
        exits=deployment.exits,
        healthy_deadline_seconds=deployment.healthy_deadline_seconds,
        restarts=RestartRules(
            deployment.restart_base_seconds,
            deployment.restart_cap_seconds,
            deployment.restart_limit,
            deployment.restart_reset_seconds,
        ),
    )


def retention_rules(config: AgentConfig) -> RetentionRules:
    images = config.images
    return RetentionRules(images.keep_days, images.min_free_percent, images.min_free_bytes)


def outbox_limits(config: AgentConfig) -> Limits:
    """The device's own limits, where no manifest sets others."""
    telemetry = config.telemetry
    return Limits(telemetry.max_size_bytes, telemetry.ttl_seconds or None)


def open_outbox(config: AgentConfig, clock: Clock) -> Outbox:
    return Outbox(config.device.state_dir / "outbox.db", clock, outbox_limits(config))
