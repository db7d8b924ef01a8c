"""What our client pulls from the simulated registry and from the distribution project's own."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from gatelet.modules.errors import (
    ImageNotFound,
    InvalidImage,
    NoSuitableVariant,
    NotAModelImage,
    RegistryUnavailable,
)
from gatelet.modules.oci.build import build_model_image
from gatelet.modules.oci.layout import open_layout
from gatelet.modules.oci.manifest import (
    CONFIG_TYPE,
    INDEX_TYPE,
    MANIFEST_TYPE,
    Descriptor,
    Index,
    Manifest,
    Platform,
    digest_of,
    encode_json,
    image_config,
)
from gatelet.modules.oci.pull import pull_model_image, resolve
from gatelet.modules.oci.push import push_image
from registries import OVERLAY, WEIGHTS, connect, model_folder, named, pull, push
from registries import image as image
from registries import registry as registry
from registries import serve as serve
from registries import store as store


def test_what_is_pushed_is_pulled_and_pushed_once(registry, image, store):
    said = []
    pushed = push(registry, image)
    assert pushed.digest == image.digest
    with connect(registry) as client:
        client.ping()
        assert resolve(client, named(registry)) == image.digest
        again = []
        push_image(client, named(registry, "models/digits:v2"), image, progress=again.append)
        assert (again[-1].total, again[-1].sent, again[-1].present) == (4, 0, 4)
    stored = pull(registry, store, board="PYNQ-Z2", part="7z020clg400", progress=said.append)
    assert stored.digest == image.digest
    assert (stored.model_dir / "onnx/model.onnx").read_bytes() == WEIGHTS
    assert (stored.model_dir / "overlays/z2/a.bit").read_bytes() == OVERLAY
    store.check(image.digest)
    assert [p.phase for p in said if p.phase != "download"] == [
        "resolve",
        "manifest",
        "manifest",
        "unpack",
        "done",
    ]
    last = said[-1]
    assert last.layers_done == last.layers_total == 3
    assert last.bytes_done == last.bytes_total == sum(x.size for x in image.manifest.layers)
    done = [p.bytes_done for p in said]
    assert done == sorted(done)


def test_a_device_downloads_only_what_it_can_run(registry, image, store):
    push(registry, image)
    stored = pull(registry, store, board="kria", part=None)
    assert not (stored.model_dir / "overlays").exists()
    overlay = image.manifest.layers[1].digest
    assert not store.has_blob(overlay)
    more = pull(registry, store, board="pynq-z2", part=None)
    assert (more.model_dir / "overlays/z2/a.bit").exists()
    assert store.images() == (more,)
    assert pull(registry, store, board=None, part=None) == more


def test_nothing_to_run_is_said_before_anything_is_downloaded(registry, tmp_path, store):
    variants = [{"kind": "finn", "path": "overlays/z2", "board": "pynq-z2"}]
    build_model_image(model_folder(tmp_path, variants), tmp_path / "image")
    image = open_layout(tmp_path / "image")
    push(registry, image)
    with pytest.raises(NoSuitableVariant, match="finn for pynq-z2"):
        pull(registry, store, board="kv260", part=None)
    assert not any(store.has_blob(layer.digest) for layer in image.manifest.layers)


def test_a_pinned_image_in_the_store_needs_no_registry(registry, image, store):
    push(registry, image)
    stored = pull(registry, store)
    registry.stop()
    with connect(registry) as client:
        ref = named(registry).pinned(image.digest)
        assert pull_model_image(client, store, ref) == stored
        with pytest.raises(RegistryUnavailable) as caught:
            pull_model_image(client, store, named(registry))
    assert registry.address in str(caught.value)
    assert "models/digits" in str(caught.value)
    assert caught.value.retryable
    registry.start()
    assert pull(registry, store) == stored


def test_names_that_are_not_there(registry, image, store):
    push(registry, image)
    for name in ("models/none:v1", "models/digits:none"):
        with pytest.raises(ImageNotFound, match="check the name"):
            pull(registry, store, name)
    with connect(registry) as client:
        with (
            pytest.raises(ImageNotFound),
            client.open_blob("models/digits", digest_of(b"none")),
        ):
            pass
        with pytest.raises(ImageNotFound):
            client.get_manifest("models/digits", digest_of(b"none"))
        assert not client.has_blob("models/digits", digest_of(b"none"))


def put_image(client, repository, target, layers, labels, diff_ids=None):
    import io

    config = encode_json(image_config("amd64", diff_ids or list(map(digest_of, layers)), labels))
    parts = [Descriptor(CONFIG_TYPE, digest_of(config), len(config))]
    parts += [
        Descriptor("application/vnd.oci.image.layer.v1.tar", digest_of(data), len(data))
        for data in layers
    ]
    for part, data in zip(parts, (config, *layers), strict=True):
        client.push_blob(repository, part, lambda data=data: io.BytesIO(data))
    raw = encode_json(Manifest(parts[0], tuple(parts[1:])))
    return Descriptor(
        MANIFEST_TYPE, client.put_manifest(repository, target, MANIFEST_TYPE, raw), len(raw)
    )


def layer_bytes(image):
    found = []
    for layer in image.manifest.layers:
        with image.open_blob(layer.digest) as blob:
            found.append(blob.read())
    return found


def replace_platform(descriptor, architecture):
    return Descriptor(
        descriptor.media_type,
        descriptor.digest,
        descriptor.size,
        platform=Platform(architecture, "linux"),
    )


def test_other_images(registry, image, store):
    layers = layer_bytes(image)
    with connect(registry) as client:
        put_image(client, "models/plain", "v1", layers, {})
        with pytest.raises(NotAModelImage, match=r"io\.gatelet\.model"):
            pull(registry, store, "models/plain:v1")
        # As `docker build` makes it: labelled, but silent about layers.
        put_image(client, "models/built", "v1", layers, {"io.gatelet.model": "digits:3"})
        built = pull(registry, store, "models/built:v1")
        assert (built.model_dir / "overlays/z2/a.bit").exists()
        lies = {
            "io.gatelet.model": "digits:3",
            "io.gatelet.variants": '[{"kind":"onnx","path":"other","layer":1}]',
        }
        put_image(client, "models/lies", "v1", layers, lies)
        with pytest.raises(InvalidImage, match="labels and its model"):
            pull(registry, store, "models/lies:v1")
        put_image(client, "models/bad", "v1", layers, lies | {"io.gatelet.variants": "[1]"})
        with pytest.raises(InvalidImage, match=r"label io\.gatelet\.variants"):
            pull(registry, store, "models/bad:v1")
        one = put_image(
            client, "models/many", "arm64", layers, {"io.gatelet.model": "digits:3", "a": "1"}
        )
        two = put_image(client, "models/many", "amd64", layers, {"io.gatelet.model": "digits:3"})
        index = encode_json(
            Index(
                (
                    replace_platform(one, "riscv64"),
                    replace_platform(two, "s390x"),
                )
            )
        )
        digest = client.put_manifest("models/many", "v1", INDEX_TYPE, index)
    many = pull(registry, store, "models/many:v1")
    assert many.digest == digest
    assert many.blobs[:2] == (digest, one.digest)
    store.check(digest)


def test_a_refusal_by_policy_comes_before_any_layer(registry, image, store):
    push(registry, image)

    def refuse(digest, manifest):
        assert (digest, digest_of(manifest)) == (image.digest, image.digest)
        raise InvalidImage("not signed")

    with pytest.raises(InvalidImage, match="not signed"):
        pull(registry, store, verify=refuse)
    assert not any(store.has_blob(layer.digest) for layer in image.manifest.layers)


def test_two_pulls_at_once(registry, image, store):
    push(registry, image)
    push(registry, image, "models/same:v1")
    names = ["models/digits:v1", "models/same:v1"] * 2
    with ThreadPoolExecutor(4) as threads:
        images = list(threads.map(lambda name: pull(registry, store, name), names))
    assert {found.digest for found in images} == {image.digest}
    store.check(image.digest)
    assert len(store.images()) == 1
