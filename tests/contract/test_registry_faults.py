"""Pulls that are interrupted, and registries that break, damage or withhold what they have."""

from __future__ import annotations

import pytest
from gatelet.modules.errors import DigestMismatch, PullCancelled, RegistryUnavailable
from gatelet.modules.oci.pull import pull_model_image
from registries import Simulated, connect, named, pull, push
from registries import image as image
from registries import registry as registry
from registries import serve as serve
from registries import simulated as simulated
from registries import store as store


@pytest.mark.parametrize("kept", [1, 1_000_000])
def test_a_download_continues_where_it_stopped(registry, image, store, kept):
    push(registry, image)
    layer = image.manifest.layers[0]
    with image.open_blob(layer.digest) as blob:
        beginning = blob.read(kept)
    with store.ingest(layer.digest, layer.size) as ingest:
        ingest.write(beginning)
    said = []
    stored = pull(registry, store, progress=said.append)
    store.check(stored.digest)
    first = next(p for p in said if p.layers_done == 1 and p.bytes_done > said[4].bytes_done)
    assert first.bytes_done >= kept
    if isinstance(registry, Simulated):
        total = sum(x.size for x in (image.manifest.config, *image.manifest.layers[::2]))
        assert registry.registry.blob_bytes_sent == total - kept


def test_a_damaged_beginning_costs_one_more_download(registry, image, store):
    push(registry, image)
    layer = image.manifest.layers[0]
    with store.ingest(layer.digest, layer.size) as ingest:
        ingest.write(b"never was in this layer")
    store.check(pull(registry, store).digest)


def test_stopping_keeps_what_came(registry, image, store):
    push(registry, image)
    said = []
    with pytest.raises(PullCancelled, match="continues"):
        pull(
            registry,
            store,
            progress=said.append,
            cancelled=lambda: bool(said) and said[-1].bytes_done > 500_000,
        )
    layer = image.manifest.layers[0]
    assert 0 < store.ingested(layer.digest) < layer.size
    store.check(pull(registry, store).digest)


@pytest.mark.parametrize("part", [0, 2])
def test_a_flipped_byte_is_never_stored(registry, image, store, part):
    push(registry, image)
    layer = image.manifest.layers[part]
    registry.flip(layer.digest)
    with pytest.raises(DigestMismatch, match=layer.digest):
        pull(registry, store)
    assert not store.has_blob(layer.digest)
    assert store.images() == ()
    registry.heal()
    store.check(pull(registry, store).digest)


def test_flipped_documents_are_never_stored(registry, image, store):
    push(registry, image)
    for digest in (image.digest, image.manifest.config.digest):
        registry.flip(digest)
        with connect(registry) as client, pytest.raises((DigestMismatch, RegistryUnavailable)):
            pull_model_image(client, store, named(registry).pinned(image.digest))
        assert not store.has_blob(digest)
        registry.heal()
    store.check(pull(registry, store).digest)


@pytest.mark.parametrize("at", [0, 900_000])
def test_a_layer_that_is_too_short_in_the_registry(registry, image, store, at):
    push(registry, image)
    layer = image.manifest.layers[0]
    registry.truncate(layer.digest, at)
    for _ in range(2):
        with pytest.raises(DigestMismatch, match=f"{at} of {layer.size} bytes"):
            pull(registry, store)
    with store.ingest(layer.digest, layer.size) as ingest, image.open_blob(layer.digest) as blob:
        ingest.write(blob.read(950_000))
    with pytest.raises(DigestMismatch):
        pull(registry, store)
    registry.heal()
    store.check(pull(registry, store).digest)


# Faults that only the simulated registry can be told to have


def test_a_link_that_breaks_again_and_again(simulated, image, store):
    push(simulated, image)
    simulated.tell("drop_after", 100_000)
    store.check(pull(simulated, store).digest)
    sent = simulated.registry.blob_bytes_sent
    total = sum(x.size for x in (image.manifest.config, *image.manifest.layers[::2]))
    # What was on its way when the connection broke is lost, no more.
    assert total <= sent < 2 * total
    gets = [path for method, path in simulated.registry.requests if method == "GET"]
    assert len(gets) > 10


def test_a_link_that_brings_nothing_gives_up_and_continues_later(simulated, image, store):
    push(simulated, image)
    simulated.tell("drop_after", 10)
    for _ in range(2):
        with pytest.raises(RegistryUnavailable):
            pull(simulated, store)
    simulated.heal()
    store.check(pull(simulated, store).digest)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_short_failures_are_waited_out(simulated, image, store, status):
    push(simulated, image)
    simulated.tell("fail_next", 2, status)
    store.check(pull(simulated, store).digest)
    simulated.tell("fail_next", 50, status)
    store.remove(image.digest)
    with pytest.raises(RegistryUnavailable, match=f"answered with {status}"):
        pull(simulated, store)


def test_a_registry_that_falls_silent(simulated, image, store):
    push(simulated, image)
    simulated.tell("pause")
    with pytest.raises(RegistryUnavailable, match="not reachable"):
        pull(simulated, store, settings={"read_timeout": 0.2, "attempts": 2})
    simulated.heal()
    store.check(pull(simulated, store).digest)
