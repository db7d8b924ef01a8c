"""What deployments want, read once: their manifests, and the modules that follow from them."""

from __future__ import annotations

from collections.abc import Mapping

from .canaries import Canaries
from .deployments import ContainerMaker, wanted_modules
from .manifest import Manifest, parse_manifest
from .plan import UpdateMode, Wanted
from .restart_memory import RestartMemory
from .store import StateStore
from .store_types import Deployment, Pin

KEPT_WANTED = 8


class WantedModules:
    """Follows from the store, the restarts on request and the automatic rollouts."""

    def __init__(
        self,
        store: StateStore,
        maker: ContainerMaker | None,
        update_mode: UpdateMode,
        restarts: RestartMemory,
        canaries: Canaries,
    ) -> None:
        self._store = store
        self._maker = maker
        self._update_mode: UpdateMode = update_mode
        self._restarts = restarts
        self._canaries = canaries
        self._manifests: dict[int, Manifest] = {}
        self._wanteds: dict[object, tuple[Manifest, Wanted]] = {}

    def of(self, deployment: Deployment) -> Wanted:
        generation = deployment.generation
        return self._canaries.shares(
            self.with_pins(generation, self.manifest(deployment), self._store.pinned(generation))
        )

    def with_pins(self, generation: int, manifest: Manifest, pins: Mapping[str, Pin]) -> Wanted:
        reloads = self._restarts.reloads()
        key = (
            generation,
            tuple(sorted((m, pin.digest, pin.kind, pin.model) for m, pin in pins.items())),
            tuple(sorted(reloads.items())),
            None if self._maker is None else self._maker.device,
        )
        known = self._wanteds.get(key)
        # A preview's manifest has no generation of its own.
        if known is None or known[0] is not manifest:
            if len(self._wanteds) >= KEPT_WANTED:
                self._wanteds.clear()
            wanted = wanted_modules(
                generation,
                manifest,
                pins,
                self._maker,
                update_mode=self._update_mode,
                reloads=reloads,
            )
            known = self._wanteds[key] = (manifest, wanted)
        return known[1]

    def manifest(self, deployment: Deployment) -> Manifest:
        # Only manifests that parsed are stored, and a generation's body never changes.
        if deployment.generation not in self._manifests:
            if len(self._manifests) >= KEPT_WANTED:
                self._manifests.clear()
            self._manifests[deployment.generation] = parse_manifest(deployment.body)
        return self._manifests[deployment.generation]
