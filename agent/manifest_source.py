"""Between whatever brings documents and the control loop: manifests by reference, and signatures.

The control loop sees whole manifests only. A reference is remembered until its manifest is here; a
newer document takes its place. What was accepted is stored, so that a reboot needs no network.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
import threading
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from .clock import Clock
from .daemon_thread import in_daemon_thread
from .document import ManifestError
from .manifest_fetch import Fetch, FetchFailed, HttpFetch
from .manifest_reference import (
    FORBIDDEN,
    OLDER,
    ManifestReference,
    check_hash,
    check_key_id,
    find_reference,
    signed_generation,
)
from .plan_types import attempts, attempts_told
from .preview import Preview
from .reconcile import Reconciler
from .store import StateStore
from .store_types import Pending, Proof, StoreError, document_hash
from .submissions import Verdict
from .trust import Trust, older_than_accepted
from .twin.backoff import full_jitter

log = logging.getLogger(__name__)

FETCHING, FAILED = 202, 500
SCOPE = "manifest"


@dataclass(frozen=True, slots=True)
class Awaited:
    """A manifest that is still to come. `retry_at` is on the monotonic clock, in seconds."""

    pending: Pending
    reference: ManifestReference
    always: bool = False
    attempts: int = 0
    retry_at: float = 0.0
    error: str = ""

    @property
    def description(self) -> str:
        """One sentence for reports."""
        if not self.error:
            return f"fetching the manifest from {self.reference.place}"
        return (
            f"the manifest cannot be fetched: {self.error} ({attempts(self.attempts)}, trying "
            "again)"
        )

    def desired_status(self) -> tuple[int, int, str]:
        """(version, code, description) for the report, as edgeAgent's lastDesiredStatus."""
        code = FAILED if self.error else FETCHING
        return self.pending.version, code, self.description

    def document(self) -> dict[str, Any]:
        """For `gatelet status --json`."""
        return {
            "source": self.pending.source,
            "version": self.pending.version,
            "url": self.reference.place,
            "attempts": self.attempts,
            "error": self.error,
        }

    def report(self) -> dict[str, Any]:
        """The same for the report's details."""
        return {**self.document(), "attempts": attempts_told(self.attempts)}


class ManifestSource:
    """Takes documents of all sources; all but `run` returns at once. Lives on one event loop."""

    def __init__(
        self,
        store: StateStore,
        reconciler: Reconciler,
        clock: Clock,
        *,
        trust: Trust | None = None,
        fetch: Fetch | None = None,
        http_hosts: Collection[str] = (),
        retry_seconds: tuple[float, float] = (1.0, 60.0),
        jitter: random.Random | None = None,
    ) -> None:
        """`retry_seconds` are base and cap of the back-off."""
        self._store = store
        self._reconciler = reconciler
        self._clock = clock
        self._trust = trust or Trust()
        self._fetch = fetch or HttpFetch()
        self._http_hosts = http_hosts
        self._retry_seconds = retry_seconds
        self._jitter = jitter or random.Random()
        self._changed = asyncio.Event()
        self._awaited = self._remembered()

    @property
    def awaited(self) -> Awaited | None:
        return self._awaited

    def submit(self, source: str, version: int, body: bytes, *, always: bool = False) -> Verdict:
        """Take a desired document: a manifest, or a reference to one.

        202 says that the manifest is being fetched. Otherwise as Reconciler.submit; in addition
        403 refuses a manifest without a trusted signature, 409 one older than accepted before.
        """
        awaited = self._awaited
        own = awaited is not None and awaited.pending.source == source
        if awaited is not None and own and awaited.pending.document == body and not always:
            if awaited.pending.version != version:
                self._await(replace(awaited, pending=Pending(source, version, body)))
            return Verdict(FETCHING, awaited.description)
        seen = {entry.source: entry for entry in self._store.seen()}.get(source)
        if seen is not None and seen.sha256 == document_hash(body) and not always:
            if own:
                self._await(None)
            return self._reconciler.submit(source, version, body)
        try:
            reference = find_reference(body, self._http_hosts)
            if reference is None:
                self._check_unsigned()
                verdict = self._reconciler.submit(source, version, body, always=always)
            else:
                known = self._known(reference)
                if known is None:
                    pending = Pending(source, version, body)
                    self._await(Awaited(pending, reference, always))
                    return Verdict(FETCHING, f"fetching the manifest from {reference.place}")
                verdict = self._accept(source, version, body, reference, known, always)
        except ManifestError as error:
            try:
                verdict = self._reconciler.refuse(source, version, body, error)
            except StoreError as full:
                # Nothing that runs changes by it; the next time it comes it is judged again.
                log.error("%s", full)
                return Verdict(error.code, str(error))
        # What another source is refused does not end what this one waits for.
        if own or verdict.code == 200:
            self._await(None)
        return verdict

    def preview(self, body: bytes = b"") -> Preview:
        """What this document would change: see Reconciler.preview. Nothing is fetched for it."""
        if not body:
            return self._reconciler.preview()
        try:
            reference = find_reference(body, self._http_hosts)
            if reference is None:
                self._check_unsigned()
                return self._reconciler.preview(body)
            known = self._known(reference)
            if known is None:
                return Preview(
                    FETCHING,
                    f"the manifest at {reference.place} is not here yet: name the file itself to "
                    "see what it changes",
                )
            if self._trust.manifests_required:
                self._proof(reference, known)
            return self._reconciler.preview(known)
        except ManifestError as error:
            return Preview(error.code, str(error))

    def rollback(self, generation: int = 0) -> Verdict:
        """See Reconciler.rollback; what is being fetched is not wanted any more then."""
        try:
            verdict = self._reconciler.rollback(generation)
        except StoreError as error:
            return Verdict(FAILED, str(error))
        if verdict.code == 200:
            self._await(None)
        return verdict

    def restart(self, module: str) -> Verdict:
        """See Reconciler.restart."""
        try:
            return self._reconciler.restart(module)
        except StoreError as error:
            return Verdict(FAILED, str(error))

    def retry_now(self) -> None:
        """The network may be back: do not wait out the pause."""
        if self._awaited is not None and self._awaited.error:
            self._awaited = replace(self._awaited, retry_at=0.0)
            self._changed.set()

    async def run(self) -> None:
        """Fetch what is awaited, until cancelled."""
        while True:
            self._changed.clear()
            awaited = self._awaited
            pause = None if awaited is None else awaited.retry_at - self._clock.monotonic()
            if awaited is None or (pause is not None and pause > 0):
                await _wait(self._changed, pause)
                continue
            await self._attempt(awaited)

    # -- inside --------------------------------------------------------------------------------

    def _remembered(self) -> Awaited | None:
        """What was awaited when the process ended."""
        pending = self._store.pending()
        if pending is None:
            return None
        seen = {entry.source: entry for entry in self._store.seen()}.get(pending.source)
        try:
            reference = find_reference(pending.document, self._http_hosts)
        except ManifestError:  # the configuration permits it no more
            reference = None
        settled = seen is not None and seen.sha256 == document_hash(pending.document)
        if reference is None or not reference.url or settled:
            self._store.wait_for(None)
            return None
        return Awaited(pending, reference)

    def _await(self, awaited: Awaited | None) -> None:
        self._awaited = awaited
        self._changed.set()
        self._reconciler.wake()
        self._remember()

    def _remember(self) -> None:
        """Store what is awaited; a full disk delays that, and not the fetch."""
        pending = None if self._awaited is None else self._awaited.pending
        try:
            if pending != self._store.pending():
                self._store.wait_for(pending)
        except StoreError as error:
            log.error("%s", error)

    def _check_unsigned(self) -> None:
        if self._trust.manifests_required:
            raise ManifestError(
                FORBIDDEN,
                "",
                "the manifest is not signed, and this device takes signed ones only: "
                "`gatelet manifest sign`",
            )

    def _known(self, reference: ManifestReference) -> bytes | None:
        """The manifest where it came along or is stored. Raises ManifestError."""
        if self._trust.manifests_required:
            check_key_id(reference, self._trust.keys)
        if not reference.url:
            return reference.body
        bodies = (deployment.body for deployment in self._store.deployments())
        return next((b for b in bodies if hashlib.sha256(b).hexdigest() == reference.sha256), None)

    def _accept(
        self,
        source: str,
        version: int,
        document: bytes,
        reference: ManifestReference,
        body: bytes,
        always: bool,
    ) -> Verdict:
        """Raises ManifestError 403 and 409; what else may be wrong is in the verdict."""
        proof = None
        if self._trust.manifests_required:
            proof = self._proof(reference, body)
        return self._reconciler.submit(
            source, version, body, always=always, document=document, proof=proof
        )

    def _proof(self, reference: ManifestReference, body: bytes) -> Proof:
        check_key_id(reference, self._trust.keys)
        keys = self._trust.keys
        chosen = {reference.key_id: keys[reference.key_id]} if reference.key_id else keys
        by = next((k for k in chosen.values() if k.verifies(reference.signature, body)), None)
        if by is None:
            raise ManifestError(
                FORBIDDEN,
                "manifest.signature",
                f"not made with the key {' or '.join(sorted(chosen))} over these bytes: sign the "
                "manifest again, and change nothing in it afterwards",
            )
        generation = signed_generation(body)
        accepted = self._store.proofs(SCOPE)
        newer = older_than_accepted(generation, reference.sha256, accepted, keys.values())
        if newer is not None and newer.generation > generation:
            raise ManifestError(
                OLDER,
                "signed.generation",
                f"generation {generation} is older than {newer.generation}, which this device "
                "accepted before: sign it again with a higher one",
            )
        if newer is not None:
            raise ManifestError(
                OLDER,
                "signed.generation",
                f"generation {generation} was another manifest: sign this one with a higher one",
            )
        return Proof(SCOPE, reference.sha256, by.fingerprint, generation)

    async def _attempt(self, awaited: Awaited) -> None:
        stop = threading.Event()
        url = awaited.reference.url
        job = asyncio.ensure_future(in_daemon_thread(lambda: self._fetch(url, stop.is_set)))
        changed = asyncio.ensure_future(self._changed.wait())
        try:
            await asyncio.wait({job, changed}, return_when=asyncio.FIRST_COMPLETED)
            while not job.done() and self._awaited is not None and _same(self._awaited, awaited):
                self._changed.clear()
                changed = asyncio.ensure_future(self._changed.wait())
                await asyncio.wait({job, changed}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            # The thread ends at its next block; nobody waits for it.
            stop.set()
            changed.cancel()
            job.add_done_callback(_forget)
        now = self._awaited
        if job.done() and now is not None and _same(now, awaited):
            self._arrived(now, job)

    def _arrived(self, awaited: Awaited, job: asyncio.Future[bytes]) -> None:
        pending, reference = awaited.pending, awaited.reference
        source, version, document = pending.source, pending.version, pending.document
        try:
            body = job.result()
            check_hash(body, reference)
        except (FetchFailed, ManifestError) as error:
            # A wrong hash too: a cache in between may still hold the file before this one.
            self._failed(awaited, str(error))
            return
        try:
            try:
                verdict = self._accept(source, version, document, reference, body, awaited.always)
            except ManifestError as error:
                verdict = self._reconciler.refuse(source, version, document, error)
        except StoreError as error:
            self._failed(awaited, str(error))
            return
        if verdict.code == FAILED:
            # The control loop keeps it until it can be stored; until then a crash begins anew.
            self._awaited = None
            self._changed.set()
            return
        self._await(None)

    def _failed(self, awaited: Awaited, error: str) -> None:
        base, cap = self._retry_seconds
        pause = full_jitter(awaited.attempts, base, cap, self._jitter)
        if awaited.error != error:
            log.warning("%s", error)
        self._awaited = replace(
            awaited,
            attempts=awaited.attempts + 1,
            retry_at=self._clock.monotonic() + pause,
            error=error,
        )
        self._remember()
        self._reconciler.wake()


def _same(one: Awaited, other: Awaited) -> bool:
    return one.reference == other.reference and one.pending.source == other.pending.source


def _forget(job: asyncio.Future[bytes]) -> None:
    if not job.cancelled():
        job.exception()


async def _wait(event: asyncio.Event, seconds: float | None) -> None:
    # Not wait_for: before Python 3.12 it can swallow a cancellation.
    timer = None
    if seconds is not None:
        timer = asyncio.get_running_loop().call_later(seconds, event.set)
    try:
        await event.wait()
    finally:
        if timer is not None:
            timer.cancel()
