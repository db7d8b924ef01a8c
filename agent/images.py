"""The agent's hold on model images: pulls into the content store, off the event loop."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ..modules.errors import ImageError, RegistryUnavailable, StorageFull
from ..modules.oci.reference import ImageRef
from ..modules.oci.store import ContentStore
from .clock import Clock, SystemClock
from .config import ConfigError, RegistryConfig, read_secret
from .daemon_thread import in_daemon_thread
from .image_trust import ImageTrust
from .seams import DISK_FULL, Credentials, Progress, Resolved, StepFailed, StoredView
from .steps import resolved_as

if TYPE_CHECKING:
    from ..modules.oci.client import RegistryClient
    from ..modules.oci.pull import PullProgress

T = TypeVar("T")
log = logging.getLogger(__name__)

LEFT_SECONDS = 14 * 24 * 3600.0
LEFT_SECONDS_WHEN_FULL = 3600.0
"""What a pull left is kept so long for the next attempt to go on with."""


class RegistryImages:
    """`Images` on OCI registries and a folder. `board` and `part` choose the overlay variants."""

    def __init__(
        self,
        folder: Path,
        registries: tuple[RegistryConfig, ...],
        board: str | None,
        part: str | None,
        trust: ImageTrust | None = None,
        clock: Clock | None = None,
    ) -> None:
        """`trust` decides which images may be used; all of them when None."""
        self._store = ContentStore(folder)
        self._clock = clock or SystemClock()
        self._collect(LEFT_SECONDS)
        self._registries = {registry.address: registry for registry in registries}
        self._board = board
        self._part = part
        self._trust = trust

    async def stored(self) -> frozenset[str]:
        return frozenset(image.digest for image in self._store.images())

    async def resolve(self, image: str, credentials: Credentials) -> Resolved:
        def work() -> Resolved:
            from ..modules.oci.pull import image_facts

            ref = ImageRef.parse(image)
            with self._registry(ref.registry, credentials) as client:
                facts = image_facts(client, ref)
            return resolved_as(facts.digest, facts.labels)

        return await _in_thread(work)

    async def pull(
        self,
        image: str,
        digest: str,
        credentials: Credentials,
        on_progress: Callable[[Progress], None],
    ) -> None:
        loop = asyncio.get_running_loop()
        cancelled = threading.Event()

        def progress(now: PullProgress) -> None:
            loop.call_soon_threadsafe(
                on_progress,
                Progress(
                    now.phase, now.bytes_done, now.bytes_total, now.layers_done, now.layers_total
                ),
            )

        def work() -> None:
            from ..modules.oci.pull import pull_model_image

            ref = ImageRef.parse(image)
            with self._registry(ref.registry, credentials) as client:
                try:
                    pull_model_image(
                        client,
                        self._store,
                        ref.pinned(digest),
                        board=self._board,
                        part=self._part,
                        progress=progress,
                        cancelled=cancelled.is_set,
                        verify=lambda digest, _: self._verify(client, ref, digest),
                    )
                except StorageFull:
                    self._collect(LEFT_SECONDS_WHEN_FULL)
                    raise
            self._collect(LEFT_SECONDS)

        try:
            await _in_thread(work)
        finally:
            # The thread of a cancelled pull ends at its next block.
            cancelled.set()

    async def verify_image(
        self, image: str, digest: str, credentials: Credentials, local: bool = False
    ) -> None:
        """Whether the device may use the image, for its store or for an engine.

        Returns at once where the policy asks for no signature, or when it was verified before.
        With `local` no registry is asked. Raises StepFailed.
        """

        def work() -> None:
            ref = ImageRef.parse(image)
            if local and self._trust is not None:
                self._trust.check_stored(ref, digest)
                return
            with self._registry(ref.registry, credentials) as client:
                self._verify(client, ref, digest)

        if self._trust is not None:
            await _in_thread(work)

    def _verify(self, client: RegistryClient, ref: ImageRef, digest: str) -> None:
        if self._trust is not None:
            self._trust.check(client, ref, digest)

    async def find(self, image: str) -> str | None:
        try:
            wanted = ImageRef.parse(image)
        except ImageError as error:
            raise StepFailed(str(error), retryable=error.retryable) from error
        for stored in self._store.images():
            known = ImageRef.parse(stored.reference)
            if stored.digest == wanted.digest or wanted == replace(known, digest=None):
                return stored.digest
        return None

    async def model_directory(self, digest: str) -> Path:
        image = self._store.get(digest)
        if image is None:
            raise StepFailed(f"image {digest} is no longer in the store", retryable=True)
        return image.model_dir

    async def remove(self, digest: str) -> None:
        await _in_thread(lambda: self._store.remove(digest))

    def views(self) -> tuple[StoredView, ...]:
        return tuple(
            StoredView(image.digest, image.reference, image.size) for image in self._store.images()
        )

    def _collect(self, seconds: float) -> None:
        """Remove what pulls that came to nothing left, once nobody went on with it for so long."""
        try:
            freed = self._store.collect(before=self._clock.now().timestamp() - seconds)
        except ImageError as error:
            log.warning("what unfinished pulls left stays: %s", error)
        else:
            if freed:
                log.info("removed %d bytes that unfinished pulls left", freed)

    def _registry(self, address: str, credentials: Credentials) -> RegistryClient:
        """With the device's settings for `address`, and the manifest's login when it brings one.

        What talks to registries is loaded here: a device at rest keeps no memory for it.
        """
        from ..modules.oci.client import RegistryClient
        from ..modules.oci.transport import RegistrySettings

        known = self._registries.get(address, RegistryConfig(address))
        username = known.username
        password = read_secret(known.password, known.password_file, "registry.password-file")
        for login, name, secret in credentials:
            if login == address:
                username, password = name, secret
                break
        return RegistryClient(
            RegistrySettings(
                address,
                username=username or None,
                password=password or None,
                ca_file=known.ca_file,
                insecure=known.insecure,
            )
        )


async def _in_thread(work: Callable[[], T]) -> T:
    try:
        return await in_daemon_thread(work)
    except ImageError as error:
        raise StepFailed(
            str(error),
            retryable=error.retryable,
            unreachable=isinstance(error, RegistryUnavailable),
            code=DISK_FULL if isinstance(error, StorageFull) else "",
        ) from error
    except ConfigError as error:
        raise StepFailed(str(error), retryable=True) from error
