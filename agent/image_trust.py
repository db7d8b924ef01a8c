"""Whether a device may use an image: its signature, checked before anything of it is used.

What was verified once is remembered by its digest, so that neither a reboot nor a deployment that
keeps the image needs the registry again. Blocking: for threads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..modules.errors import OlderGeneration, StorageFailed, Untrusted
from ..modules.oci.reference import ImageRef
from .store import StateStore
from .store_types import Proof, StoreError
from .trust import ImageRule, Trust

if TYPE_CHECKING:
    from ..modules.oci.client import RegistryClient
    from ..modules.oci.signatures import Signer


class ImageTrust:
    """`[trust]` applied to images. All checks raise ImageError when the image is refused."""

    def __init__(self, trust: Trust, store: StateStore) -> None:
        self._trust = trust
        self._store = store

    def check(self, client: RegistryClient, ref: ImageRef, digest: str) -> Signer | None:
        """Verify the image `digest` of `ref`; None where no signature is asked for or it is known.

        Raises Unsigned, Untrusted (OlderGeneration), StorageFailed, and what reading from the
        registry raises.
        """
        rule = self._trust.rule_for(ref)
        if rule is None or self._accepted(ref, digest, rule):
            return None
        from ..modules.oci.signatures import fetch_signatures, trusted_signer

        what = str(ref.pinned(digest))
        signer = trusted_signer(digest, fetch_signatures(client, ref, digest), rule.keys, what)
        self._check_generation(ref, digest, signer.generation, rule)
        proof = Proof(_scope(ref), digest, signer.fingerprint, signer.generation)
        try:
            self._store.note_proof(proof)
        except StoreError as error:  # a generation that is not remembered protects nothing
            raise StorageFailed(str(error)) from error
        return signer

    def check_stored(self, ref: ImageRef, digest: str) -> None:
        """The same for an image that is on the device, without asking anyone."""
        rule = self._trust.rule_for(ref)
        if rule is not None and not self._accepted(ref, digest, rule):
            raise Untrusted(
                f"{ref.pinned(digest)}: came here before signatures were asked for; "
                "set imagePullPolicy to on-create, so that its signature is fetched"
            )

    def _accepted(self, ref: ImageRef, digest: str, rule: ImageRule) -> bool:
        known = {key.fingerprint for key in rule.keys.values()}
        proofs = self._store.proofs(_scope(ref))
        found = [one for one in proofs if one.sha256 == digest and one.key in known]
        if not found:
            return False
        self._check_generation(ref, digest, max(one.generation for one in found), rule)
        return True

    def _check_generation(
        self, ref: ImageRef, digest: str, generation: int, rule: ImageRule
    ) -> None:
        known = {key.fingerprint for key in rule.keys.values()}
        # Only what proved itself counts: a newer image that never became good must not keep the
        # one before it away.
        newest = max(
            (
                one.generation
                for one in self._store.proofs(_scope(ref))
                if one.good and one.key in known
            ),
            default=0,
        )
        # And the device must be able to return to what worked.
        if generation < newest and digest not in self._store.kept_digests():
            raise OlderGeneration(
                f"{ref.pinned(digest)}: generation {generation} is older than {newest}, which was "
                "good on this device before; sign it with a higher generation"
            )


def _scope(ref: ImageRef) -> str:
    return f"image:{ref.registry}/{ref.repository}"
