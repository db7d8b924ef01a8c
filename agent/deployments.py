"""Pure rules about deployments: what a manifest wants, and which deployment is the goal."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import msgspec

from .manifest import Manifest
from .module_env import module_update_mode, probation_seconds
from .module_spec import MAX_STARTUP_ORDER, ModuleSpec
from .plan import Kind, UpdateMode, Wanted, WantedModule
from .runtime.container import SCORING_LABEL, ContainerSpec
from .runtime.scoring_module import is_scoring
from .scoring_env import ScoringOptions, given_labels, scoring_options
from .store_types import Deployment, Pin


@dataclass(frozen=True, slots=True)
class Goal:
    """What to converge to. `rolled_back` when it is not the newest deployment."""

    wanted: Deployment
    fallback: Deployment | None
    rolled_back: bool


def choose_goal(latest: Deployment, last_good: Deployment | None) -> Goal:
    """The newest deployment, or the last good one once the newest failed.

    A failed deployment without a last good one stays the goal: its healthy modules go on.
    """
    if latest.phase == "failed" and last_good is not None:
        return Goal(last_good, None, rolled_back=True)
    return Goal(latest, last_good, rolled_back=False)


class ContainerRefused(Exception):
    """This device does not let a container run with these createOptions; the message has the
    path and the remedy."""


class ContainerMaker(Protocol):
    """Says what a module's container shall be on this device."""

    @property
    def device(self) -> object:
        """What of the device goes into its containers and may change while the agent runs."""
        ...

    def container(
        self,
        spec: ModuleSpec,
        digest: str,
        *,
        scoring: bool,
        model: str = "",
        logging_options: str,
    ) -> ContainerSpec:
        """`scoring`: its image serves the Open Inference Protocol, and `model` is the one that its
        label names. Raises ContainerRefused."""
        ...

    def socket(self, module: str) -> str:
        """Where, on the host, a container serves the Open Inference Protocol."""
        ...


def wanted_modules(
    generation: int,
    manifest: Manifest,
    pins: Mapping[str, Pin],
    maker: ContainerMaker | None = None,
    *,
    update_mode: UpdateMode = "NonBlocking",
    reloads: Mapping[str, int] | None = None,
) -> Wanted:
    """The modules of `manifest` with the digests and kinds that `pins` (by module) hold.

    `update_mode` counts where the manifest's edgeAgent does not say; `reloads` tells how often a
    module's model was to be loaded anew.
    """
    modules = [
        _wanted_module(
            spec,
            pins.get(spec.name),
            maker,
            manifest.runtime.logging_options,
            (reloads or {}).get(spec.name, 0),
        )
        for spec in manifest.modules
    ]
    return Wanted(
        generation, tuple(modules), module_update_mode(manifest.system_modules) or update_mode
    )


def _wanted_module(
    spec: ModuleSpec,
    pin: Pin | None,
    maker: ContainerMaker | None,
    logging_options: str,
    reloads: int,
) -> WantedModule:
    options = scoring_options(spec)
    module = WantedModule(
        name=spec.name,
        image=spec.image,
        digest=None,
        instance=None,
        options=options,
        running=spec.status == "running",
        may_pull=spec.image_pull_policy != "never",
        kind="",
        policy=spec.restart_policy,
        order=spec.startup_order,
        probation_seconds=probation_seconds(spec),
    )
    if pin is None or not pin.kind:
        return module
    if pin.kind == "model":
        instance = instance_name(spec.name, pin.digest, options, str(reloads) if reloads else "")
        return replace(module, kind="model", digest=pin.digest, instance=instance)
    labels = given_labels(spec)
    kind: Kind = pin.kind
    if SCORING_LABEL in labels:
        kind = "scoring" if is_scoring(labels) else "container"
    elif pin.model:
        options = msgspec.structs.replace(options, model=pin.model)
    module = replace(module, kind=kind, digest=pin.digest, options=options)
    if maker is None:
        return module
    try:
        container = maker.container(
            spec,
            pin.digest,
            scoring=pin.kind == "scoring",
            model=pin.model,
            logging_options=logging_options,
        )
    except ContainerRefused as error:
        return replace(module, refused=str(error))
    if kind == "scoring":
        instance = instance_name(spec.name, pin.digest, options, container.fingerprint())
        module = replace(module, instance=instance, socket=maker.socket(spec.name))
    return replace(module, container=container)


def instance_name(module: str, digest: str, options: ScoringOptions, made: str = "") -> str:
    """Names a loaded model by everything that would need a new load when it changes.

    `made`: what else it depends on, such as its container's fingerprint.
    """
    load: tuple[object, ...] = (
        options.backends,
        options.max_batch,
        options.max_delay_us,
        options.timeout_ms,
        options.priority,
        options.instances,
        options.threads,
    )
    if options.auth != "none":
        load = (*load, options.auth)
    if options.isolate:
        load = (*load, "isolate")
    if options.clients:
        load = (*load, options.clients)
    if made:
        load = (*load, made)
    tail = hashlib.sha256(repr(load).encode()).hexdigest()[:6]
    return f"{module}@{digest.removeprefix('sha256:')[:12]}.{tail}"


def inherited_pins(
    manifest: Manifest, previous: Manifest | None, pins: Mapping[str, Pin]
) -> dict[str, Pin]:
    """Pins of modules whose image the new manifest leaves as it was: their tag is not resolved
    again.

    This is edgeAgent's "on-create" pull policy: an unchanged module is not pulled.
    """
    if previous is None:
        return {}
    before = {spec.name: _what_runs(spec) for spec in previous.modules}
    return {
        spec.name: pins[spec.name]
        for spec in manifest.modules
        if spec.name in pins and before.get(spec.name) == _what_runs(spec)
    }


def _what_runs(spec: ModuleSpec) -> ModuleSpec:
    """Without what says when it runs."""
    return msgspec.structs.replace(
        spec, status="running", restart_policy="always", startup_order=MAX_STARTUP_ORDER
    )
