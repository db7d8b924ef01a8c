"""Bring the parts of a model image that this device can run into the content store."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ...accelerators.backend import Variant
from ..errors import (
    DigestMismatch,
    ImageNotFound,
    InvalidImage,
    NoSuitableVariant,
    PullCancelled,
    RegistryUnavailable,
)
from ..model_json import Model
from .client import RegistryClient
from .manifest import (
    MAX_CONFIG_BYTES,
    MAX_MANIFEST_BYTES,
    Descriptor,
    Index,
    Manifest,
    VariantLayer,
    choose_platform,
    model_variants,
    parse_config,
    parse_manifest,
)
from .reference import ImageRef
from .store import ContentStore, ImageContents, Layer, StoredImage

Phase = Literal["resolve", "manifest", "download", "unpack", "done"]

_GO_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "armv6l": "arm"}
_SPEED_GRADE = re.compile(r"(-[0-9][a-z]*(?:-[a-z]+)?)$")
_BROKEN_STREAMS = 3
_WORTHWHILE = 64 * 1024


@dataclass(frozen=True, slots=True)
class PullProgress:
    """How far a pull is. Layers are those this device needs; bytes are of compressed blobs.

    `digest` is what the name was resolved to, None before that.
    """

    phase: Phase
    digest: str | None = None
    layers_total: int = 0
    layers_done: int = 0
    bytes_total: int = 0
    bytes_done: int = 0


def _ignore(progress: PullProgress) -> None:
    pass


def _never() -> bool:
    return False


def resolve(client: RegistryClient, ref: ImageRef) -> str:
    """The digest `ref` stands for now (its own, when it has one: then nothing is asked).

    Raises ImageNotFound, Unauthorized, RegistryUnavailable, InvalidImage, DigestMismatch.
    """
    if ref.digest is not None:
        return ref.digest
    return (
        client.head_manifest(ref.repository, ref.target)
        or client.get_manifest(ref.repository, ref.target).digest
    )


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What an image is, without its layers: the digest of its name, and its config's labels."""

    digest: str
    labels: Mapping[str, str]


def image_facts(client: RegistryClient, ref: ImageRef) -> ImageFacts:
    """Ask the registry what `ref` is for this machine. Raises what `resolve` raises."""
    digest = resolve(client, ref)
    what = str(ref.pinned(digest))
    manifest = parse_manifest(client.get_manifest(ref.repository, digest).raw, what)
    if isinstance(manifest, Index):
        machine = platform.machine()
        chosen = choose_platform(manifest, _GO_ARCHITECTURES.get(machine, machine), what)
        raw = client.get_manifest(ref.repository, chosen.digest).raw
        manifest = parse_manifest(raw, what)
        if not isinstance(manifest, Manifest):
            raise InvalidImage(f"{what}: an index inside an index; push an image")
    raw = client.read_blob(ref.repository, manifest.config, MAX_CONFIG_BYTES)
    return ImageFacts(digest, parse_config(raw, what, len(manifest.layers)).labels)


def pull_model_image(
    client: RegistryClient,
    store: ContentStore,
    ref: ImageRef,
    *,
    board: str | None = None,
    part: str | None = None,
    progress: Callable[[PullProgress], None] = _ignore,
    cancelled: Callable[[], bool] = _never,
    verify: Callable[[str, bytes], None] | None = None,
) -> StoredImage:
    """Download, verify and unpack the model of `ref`; what the store has is not downloaded again.

    `board` and `part` name this device's FPGA, None where it has none. A download that breaks is
    continued, by this call a few times and otherwise by the next one. `progress` is called often:
    about every 256 KiB. `verify(digest, manifest)` may refuse the image by raising an ImageError
    before any layer is downloaded. With a digest in `ref` whose image is in the store already, the
    registry is not asked at all.

    Raises NotAModelImage, NoSuitableVariant, InvalidImage, DigestMismatch, ImageNotFound,
    Unauthorized, RegistryUnavailable, PullCancelled, StorageFull, StorageFailed.
    """
    return _Pull(client, store, ref, board, part, progress, cancelled, verify).run()


def suits(variant: Variant, board: str | None, part: str | None) -> bool:
    """Whether a device with this FPGA (or with none) can run `variant`.

    A variant that names neither board nor part runs on the CPU, so anywhere. Of the others, all
    that the variant states and the device knows must agree, and there must be something.
    """
    if variant.board is None and variant.part is None:
        return True
    known = []
    if variant.board is not None and board is not None:
        known.append(variant.board.lower() == board.lower())
    if variant.part is not None and part is not None:
        known.append(_same_part(variant.part, part))
    return bool(known) and all(known)


def choose_layers(
    layers: int,
    variants: Sequence[VariantLayer] | None,
    board: str | None,
    part: str | None,
    what: str,
) -> tuple[int, ...]:
    """Which of an image's layers this device needs: all but those of foreign variants only.

    All of them when the image does not say (`variants` is None). Raises NoSuitableVariant.
    """
    if variants is None:
        return tuple(range(layers))
    wanted = {entry.layer for entry in variants if suits(entry.variant, board, part)}
    if not wanted:
        raise _nothing_suits(what, [entry.variant for entry in variants], board, part)
    foreign = {entry.layer for entry in variants} - wanted
    return tuple(index for index in range(layers) if index not in foreign)


def _same_part(one: str, other: str) -> bool:
    # A .bit header says 7z020clg400 or xczu3eg-sbva484-1-e where tools say xc7z020clg400-1:
    # the speed grade counts only where both have one.
    bases, grades = [], []
    for name in (one, other):
        name = name.lower().removeprefix("xc")
        match = _SPEED_GRADE.search(name)
        bases.append(name[: match.start()] if match else name)
        grades.append(match[1] if match else None)
    return bases[0] == bases[1] and (None in grades or grades[0] == grades[1])


def _nothing_suits(
    what: str, variants: Sequence[Variant], board: str | None, part: str | None
) -> NoSuitableVariant:
    have = ", ".join(
        f"{variant.kind} for {variant.board or variant.part or 'any CPU'}" for variant in variants
    )
    here = f"board {board or 'none'}, part {part or 'none'}"
    return NoSuitableVariant(
        f"{what}: none of its variants ({have or 'none'}) runs on this device ({here}); "
        "add a variant for it, or an ONNX variant for the CPU"
    )


class _Pull:
    def __init__(
        self,
        client: RegistryClient,
        store: ContentStore,
        ref: ImageRef,
        board: str | None,
        part: str | None,
        progress: Callable[[PullProgress], None],
        cancelled: Callable[[], bool],
        verify: Callable[[str, bytes], None] | None,
    ) -> None:
        self._client = client
        self._store = store
        self._ref = ref
        self._board = board
        self._part = part
        self._progress = progress
        self._cancelled = cancelled
        self._verify = verify
        self._state = PullProgress("resolve")

    def run(self) -> StoredImage:
        self._say()
        digest = resolve(self._client, self._ref)
        ref = self._ref.pinned(digest)
        with self._store.lease([digest]):
            self._say(phase="manifest", digest=digest)
            raw = self._manifest(digest)
            documents = [digest]
            manifest = parse_manifest(raw, str(ref))
            if self._verify is not None:
                self._verify(digest, raw)
            if isinstance(manifest, Index):
                machine = platform.machine()
                chosen = choose_platform(
                    manifest, _GO_ARCHITECTURES.get(machine, machine), str(ref)
                )
                documents.append(chosen.digest)
                manifest = parse_manifest(self._manifest(chosen.digest), str(ref))
                if not isinstance(manifest, Manifest):
                    raise InvalidImage(f"{ref}: an index inside an index; push an image")
            documents.append(manifest.config.digest)
            with self._store.lease([*documents, *(layer.digest for layer in manifest.layers)]):
                return self._image(ref, digest, manifest, tuple(documents))

    def _image(
        self, ref: ImageRef, digest: str, manifest: Manifest, documents: tuple[str, ...]
    ) -> StoredImage:
        what = str(ref)
        count = len(manifest.layers)
        if manifest.config.size > MAX_CONFIG_BYTES:
            raise InvalidImage(f"{what}: a config of {manifest.config.size} bytes")
        self._download(manifest.config)
        config = parse_config(
            self._store.read_blob(manifest.config.digest, MAX_CONFIG_BYTES), what, count
        )
        variants = model_variants(config, what, count)
        needed = choose_layers(count, variants, self._board, self._part, what)
        layers = tuple(Layer(manifest.layers[i], config.rootfs.diff_ids[i]) for i in needed)
        total = sum(layer.blob.size for layer in layers)
        self._say(layers_total=len(layers), bytes_total=total)

        stored = self._store.get(digest)
        if stored is not None and {layer.blob.digest for layer in layers} <= set(stored.layers):
            self._say(phase="done", layers_done=len(layers), bytes_done=total)
            return stored
        self._say(phase="download")
        # Unpacked, a layer takes about as much again; a compressed one more, found out then.
        missing = [layer.blob for layer in layers if not self._store.has_blob(layer.blob.digest)]
        here = sum(self._store.ingested(blob.digest) for blob in missing)
        self._store.require_space(max(0, sum(blob.size for blob in missing) - here) + total)
        for layer in layers:
            before = self._state.bytes_done
            self._download(layer.blob, counted=True)
            self._say(layers_done=self._state.layers_done + 1, bytes_done=before + layer.blob.size)
        self._stop_if_cancelled()
        self._say(phase="unpack")

        def accept(model: Model, model_dir: Path) -> None:
            _accept(model, model_dir, variants, self._board, self._part, what)

        image = self._store.commit(ImageContents(digest, str(self._ref), documents, layers), accept)
        self._say(phase="done")
        return image

    def _manifest(self, digest: str) -> bytes:
        if self._store.has_blob(digest):
            try:
                return self._store.read_blob(digest, MAX_MANIFEST_BYTES)
            except (ImageNotFound, DigestMismatch):
                pass
        raw = self._client.get_manifest(self._ref.repository, digest).raw
        self._store.put_blob(raw)
        return raw

    def _download(self, blob: Descriptor, counted: bool = False) -> None:
        resumed = self._store.ingested(blob.digest) > 0
        before = self._state.bytes_done
        try:
            self._fetch(blob, counted)
        except DigestMismatch:
            # A power loss may have damaged what an earlier attempt left: once more, from nothing.
            if not resumed:
                raise
            self._state = replace(self._state, bytes_done=before)
            self._fetch(blob, counted)

    def _fetch(self, blob: Descriptor, counted: bool) -> None:
        with self._store.ingest(blob.digest, blob.size) as ingest:
            if ingest is None:
                return
            before = self._state.bytes_done
            broken = 0
            while ingest.offset < blob.size:
                self._stop_if_cancelled()
                with self._client.open_blob(
                    self._ref.repository, blob.digest, ingest.offset
                ) as stream:
                    if stream.offset != ingest.offset:
                        ingest.restart()
                    start = ingest.offset
                    try:
                        for chunk in stream:
                            ingest.write(chunk)
                            if counted:
                                self._say(bytes_done=before + ingest.offset)
                            self._stop_if_cancelled()
                        break
                    except RegistryUnavailable:
                        # A link that breaks often still gets there while it brings something.
                        broken = 0 if ingest.offset - start >= _WORTHWHILE else broken + 1
                        if broken == _BROKEN_STREAMS:
                            raise
            ingest.commit()

    def _stop_if_cancelled(self) -> None:
        if self._cancelled():
            raise PullCancelled(
                f"{self._ref}: stopped; what was downloaded stays, and the next pull continues"
            )

    def _say(self, **changes: Any) -> None:
        self._state = replace(self._state, **changes)
        self._progress(self._state)


def _accept(
    model: Model,
    model_dir: Path,
    labelled: Sequence[VariantLayer] | None,
    board: str | None,
    part: str | None,
    what: str,
) -> None:
    """Refuse an image whose labels and model.json disagree, or that lacks what it promises."""
    if labelled is not None and {entry.variant for entry in labelled} != set(model.variants):
        raise InvalidImage(
            f"{what}: its labels and its model.json list different variants; build it again"
        )
    wanted = [variant for variant in model.variants if suits(variant, board, part)]
    if not wanted:
        raise _nothing_suits(what, model.variants, board, part)
    for path in [variant.path for variant in wanted] + ([model.sample] if model.sample else []):
        if not (model_dir / path).exists():
            raise InvalidImage(f"{what}: model.json names {path!r}, which is not in the image")
