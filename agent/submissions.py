"""Documents become deployments: taken, refused, or made of an earlier one again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .canaries import Canaries
from .deployments import inherited_pins
from .manifest import Manifest, ManifestError, parse_manifest
from .store import StateStore
from .store_types import Deployment, Pin, Proof, StoreError, document_hash
from .wanted import WantedModules

log = logging.getLogger(__name__)

ROLLBACK = "rollback"
"""The source of a deployment that was made of an earlier one."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a document: edgeAgent's code, and the deployment it is (0 when refused)."""

    code: int
    description: str
    generation: int = 0


class Submissions:
    """Every call returns at once."""

    def __init__(
        self,
        store: StateStore,
        wanted: WantedModules,
        canaries: Canaries,
        changed: Callable[[], None],
    ) -> None:
        """`changed` is called when there is something new to do or to report."""
        self._store = store
        self._wanted = wanted
        self._canaries = canaries
        self._changed = changed
        self._unstored: dict[str, tuple[int, bytes, bool, bytes | None, Proof | None]] = {}

    def submit(
        self,
        source: str,
        version: int,
        body: bytes,
        *,
        always: bool = False,
        document: bytes | None = None,
        proof: Proof | None = None,
    ) -> Verdict:
        """Take a manifest. A document that its source sent before changes nothing.

        With `always` the same document starts a new deployment (a person asked for it again).
        `document` is what the source sent where it only led to the manifest `body`.
        """
        try:
            verdict = self._submit(source, version, body, always, document, proof)
        except StoreError as error:
            # A source sends a document once: it is kept in memory until it can be stored.
            log.error("%s", error)
            self._unstored[source] = (version, body, always, document, proof)
            return Verdict(500, f"{error}; it will be tried again")
        self._unstored.pop(source, None)
        return verdict

    def again(self) -> None:
        """Take what could not be stored. Raises StoreError."""
        for source, given in list(self._unstored.items()):
            self._submit(source, *given)
            del self._unstored[source]

    def _submit(
        self,
        source: str,
        version: int,
        body: bytes,
        always: bool,
        document: bytes | None,
        proof: Proof | None,
    ) -> Verdict:
        sent = body if document is None else document
        before = {seen.source: seen for seen in self._store.seen()}.get(source)
        if before is not None and before.sha256 == document_hash(sent) and not always:
            if before.version != version:
                self._store.note_version(source, version)
                self._changed()
            return Verdict(before.code, before.description)
        try:
            manifest = parse_manifest(body)
        except ManifestError as error:
            return self.refuse(source, version, sent, error)
        pins = self.inherited(manifest)
        previous = self._store.last_good()
        deployment = self._store.accept(
            source, version, body, document=document, proof=proof, pins=pins
        )
        return self._accepted(deployment, pins, previous)

    def inherited(self, manifest: Manifest) -> dict[str, Pin]:
        """The pins of the modules that are as they were in the last good deployment."""
        previous = self._store.last_good()
        if previous is None:
            return {}
        pins = self._store.pinned(previous.generation)
        return inherited_pins(manifest, self._wanted.manifest(previous), pins)

    def _accepted(
        self, deployment: Deployment, pins: Mapping[str, Pin], origin: Deployment | None
    ) -> Verdict:
        """`pins`: of the modules that are as they were in `origin`."""
        if origin is not None:
            self._canaries.inherit(origin.generation, deployment.generation, pins)
        log.info("deployment %d from %s accepted", deployment.generation, deployment.source)
        self._changed()
        return Verdict(200, "", deployment.generation)

    def refuse(self, source: str, version: int, document: bytes, error: ManifestError) -> Verdict:
        """Remember that this document is no deployment, and why; what runs goes on."""
        log.warning("manifest from %s refused (%d): %s", source, error.code, error)
        self._store.refuse(source, version, document, error.code, str(error))
        self._changed()
        return Verdict(error.code, str(error))

    def rollback(self, generation: int = 0) -> Verdict:
        """Deploy an earlier good deployment again, with the very images it had.

        `generation` 0: the good one before the present one. 400 when there is no such deployment.
        """
        deployments = self._store.deployments()
        latest, last_good = self._store.latest(), self._store.last_good()
        if latest is None or last_good is None:
            return Verdict(400, "there is no good deployment to return to")
        # After a failure the last good one runs already.
        present = last_good if latest.phase == "failed" else latest
        good = [
            one
            for one in deployments
            if one.phase == "good"
            and (one.generation == generation if generation else one.body != present.body)
            and (bool(generation) or one.generation < present.generation)
        ]
        if not good:
            which = f"deployment {generation} is not" if generation else "there is no earlier one"
            known = ", ".join(str(one.generation) for one in deployments if one.phase == "good")
            return Verdict(400, f"{which} among the good deployments of this device: {known}")
        target = good[0]
        pins = self._store.pinned(target.generation)
        accepted = self._store.accept(ROLLBACK, target.generation, target.body, pins=pins)
        return self._accepted(accepted, pins, target)
