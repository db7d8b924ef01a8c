"""Our client against the simulated registry and against the distribution project's own."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import json
import os
import queue
import re
import socket
import ssl
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from gatelet.agent.main import main
from gatelet.modules.errors import (
    DigestMismatch,
    ImageNotFound,
    InvalidImage,
    NoSuitableVariant,
    NotAModelImage,
    PullCancelled,
    RegistryUnavailable,
    Unauthorized,
)
from gatelet.modules.oci.build import build_model_image
from gatelet.modules.oci.client import RegistryClient, RegistrySettings
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
from gatelet.modules.oci.reference import ImageRef
from gatelet.modules.oci.store import ContentStore
from gatelet.simulator.registry import Registry
from required import program

USER, PASSWORD = "device", "s3cret:pw"
# bcrypt of PASSWORD.
HTPASSWD = f"{USER}:$2y$05$abcdefghijklmnopqrstuugx1ANyULq/LMrIVpiIGARw82GmA9Dae\n"
WEIGHTS = bytes(range(256)) * 4096
OVERLAY = b"bitstream" * 50_000


class Simulated:
    def __init__(self, root, auth=False, tls=None):
        context = None
        if tls is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*tls)
        login = {"username": USER, "password": PASSWORD} if auth else {}
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.registry = Registry(root, tls=context, **login)
        self.start()

    def call(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(20)

    def tell(self, method, *arguments):
        async def run():
            return getattr(self.registry, method)(*arguments)

        return self.call(run())

    def start(self):
        self.call(self.registry.start())
        self.address = self.registry.address

    def stop(self):
        self.call(self.registry.stop())

    def flip(self, digest):
        self.tell("corrupt", digest)

    def truncate(self, digest, at):
        self.tell("truncate", digest, at)

    def heal(self):
        self.tell("heal")

    def close(self):
        self.stop()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        self.loop.close()


class Distribution:
    def __init__(self, root, auth=False, tls=None):
        root.mkdir(parents=True, exist_ok=True)
        self.root, self.port, self.saved = root, 0, {}
        self.extra = {}
        if auth:
            (root / "htpasswd").write_text(HTPASSWD)
            self.extra["auth"] = {"htpasswd": {"realm": "r", "path": str(root / "htpasswd")}}
        self.tls = {} if tls is None else {"certificate": str(tls[0]), "key": str(tls[1])}
        self.start()

    def start(self):
        config = {
            "version": "0.1",
            "storage": {"filesystem": {"rootdirectory": str(self.root / "data")}},
            "http": {"addr": f"127.0.0.1:{self.port}", **({"tls": self.tls} if self.tls else {})},
            **self.extra,
        }
        # JSON is YAML too.
        (self.root / "config.yml").write_text(json.dumps(config))
        self.process = subprocess.Popen(
            [program("docker-registry"), "serve", self.root / "config.yml"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={"PATH": os.environ["PATH"], "OTEL_TRACES_EXPORTER": "none"},
        )
        lines = queue.Queue()

        def read(stream):
            for line in stream:
                lines.put(line)
            lines.put(None)

        self.reader = threading.Thread(target=read, args=(self.process.stderr,))
        self.reader.start()
        said = []
        while (line := lines.get(timeout=20)) is not None:
            said.append(line)
            if match := re.search(r"listening on 127\.0\.0\.1:(\d+)", line):
                self.port = int(match[1])
                self.address = f"127.0.0.1:{self.port}"
                return
        raise AssertionError("".join(said))

    def stop(self):
        self.process.terminate()
        self.process.wait(10)
        self.reader.join(10)
        self.process.stderr.close()

    def data(self, digest):
        return (
            self.root / "data/docker/registry/v2/blobs/sha256" / digest[7:9] / digest[7:] / "data"
        )

    def write(self, digest, change):
        path = self.data(digest)
        raw = self.saved.setdefault(path, path.read_bytes())
        path.write_bytes(change(raw))

    def flip(self, digest):
        self.write(digest, lambda raw: raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:])

    def truncate(self, digest, at):
        self.write(digest, lambda raw: raw[:at])

    def heal(self):
        for path, raw in self.saved.items():
            path.write_bytes(raw)

    def close(self):
        self.stop()


KINDS = {"simulated": Simulated, "distribution": Distribution}


@pytest.fixture(params=KINDS)
def serve(request, tmp_path):
    if request.param == "distribution":
        program("docker-registry")
    running = []

    def serve(**options):
        registry = KINDS[request.param](tmp_path / f"registry{len(running)}", **options)
        running.append(registry)
        return registry

    yield serve
    for registry in running:
        registry.close()


@pytest.fixture
def simulated(tmp_path):
    registry = Simulated(tmp_path / "registry")
    yield registry
    registry.close()


@pytest.fixture
def registry(serve):
    return serve()


@pytest.fixture
def store(tmp_path):
    return ContentStore(tmp_path / "store")


def connect(registry, **settings):
    settings = {"read_timeout": 5.0, "connect_timeout": 5.0, **settings}
    return RegistryClient(
        RegistrySettings(registry.address, **settings), sleep=lambda seconds: None
    )


def named(registry, name="models/digits:v1"):
    return ImageRef.parse(f"{registry.address}/{name}")


def model_folder(tmp_path, variants=None, weights=WEIGHTS):
    folder = tmp_path / "model"
    model = {
        "name": "digits",
        "version": "3",
        "framework": "onnx",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}],
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1]}],
        "variants": variants
        or [
            {"kind": "onnx", "path": "onnx/model.onnx"},
            {
                "kind": "finn",
                "path": "overlays/z2",
                "board": "pynq-z2",
                "part": "xc7z020clg400-1",
            },
        ],
    }
    for name, data in {
        "model.json": json.dumps(model).encode(),
        "onnx/model.onnx": weights,
        "overlays/z2/a.bit": OVERLAY,
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def image(tmp_path):
    build_model_image(model_folder(tmp_path), tmp_path / "image")
    return open_layout(tmp_path / "image")


def push(registry, image, name="models/digits:v1", **settings):
    with connect(registry, **settings) as client:
        return push_image(client, named(registry, name), image)


def pull(registry, store, name="models/digits:v1", settings=None, **options):
    with connect(registry, **(settings or {})) as client:
        return pull_model_image(client, store, named(registry, name), **options)


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


def test_ranges(registry, image):
    push(registry, image)
    layer = image.manifest.layers[0]
    with image.open_blob(layer.digest) as blob:
        whole = blob.read()
    with connect(registry) as client:
        for offset in (0, 1, 700_000, layer.size - 1):
            with client.open_blob("models/digits", layer.digest, offset) as stream:
                assert stream.offset == offset
                assert b"".join(stream) == whole[offset:]
        for offset in (layer.size, layer.size + 5):
            with client.open_blob("models/digits", layer.digest, offset) as stream:
                assert stream.offset == 0
                assert b"".join(stream) == whole


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


def test_credentials(serve, image, store, monkeypatch, capsys, tmp_path):
    registry = serve(auth=True)
    right = {"username": USER, "password": PASSWORD}
    push(registry, image, **right)
    with connect(registry, **right) as client:
        client.ping()
    for wrong in ({}, {**right, "password": "wrong"}, {**right, "username": "other"}):
        with connect(registry, **wrong) as client, pytest.raises(Unauthorized) as caught:
            client.ping()
        with pytest.raises(Unauthorized) as caught:
            pull(registry, store, settings=wrong)
        assert registry.address in str(caught.value)
        assert wrong.get("password", "wrong") not in repr(caught.value)
    store.check(pull(registry, store, settings=right).digest)
    assert PASSWORD not in repr(RegistrySettings(registry.address, **right))

    monkeypatch.setenv("GATELET_REGISTRY_PASSWORD", PASSWORD)
    reference = str(named(registry, "models/cli:v1"))
    words = [str(tmp_path / "model"), reference, "--username", USER]
    assert main(["image", "push", *words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["digest"] == image.digest
    assert main(["image", "inspect", reference, "--username", USER]) == 0
    assert image.digest in capsys.readouterr().out


def certificate(folder):
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "registry")])
    start = datetime.datetime(2020, 1, 1, tzinfo=datetime.timezone.utc)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(start)
        .not_valid_after(start + datetime.timedelta(days=36500))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
        )
        .add_extension(x509.BasicConstraints(True, None), True)
        .sign(key, hashes.SHA256())
    )
    files = folder / "cert.pem", folder / "key.pem"
    files[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    files[1].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return files


def test_a_private_authority(serve, image, store, tmp_path):
    trusted, other = tmp_path / "trusted", tmp_path / "other"
    for folder in (trusted, other):
        folder.mkdir()
    files = certificate(trusted)
    registry = serve(tls=files)
    push(registry, image, ca_file=files[0])
    store.check(pull(registry, store, settings={"ca_file": files[0]}).digest)
    for ca_file, said in (
        (certificate(other)[0], "certificate is not trusted"),
        (files[1], "holds certificates in PEM form"),
    ):
        with (
            connect(registry, ca_file=ca_file) as client,
            pytest.raises(RegistryUnavailable, match=said),
        ):
            client.ping()
    plain = connect(registry)
    with plain, pytest.raises((RegistryUnavailable, InvalidImage)):
        plain.ping()


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


def replace_platform(descriptor, architecture):
    return Descriptor(
        descriptor.media_type,
        descriptor.digest,
        descriptor.size,
        platform=Platform(architecture, "linux"),
    )


def test_a_refusal_by_policy_comes_before_any_layer(registry, image, store):
    push(registry, image)

    def refuse(digest, manifest):
        assert (digest, digest_of(manifest)) == (image.digest, image.digest)
        raise InvalidImage("not signed")

    with pytest.raises(InvalidImage, match="not signed"):
        pull(registry, store, verify=refuse)
    assert not any(store.has_blob(layer.digest) for layer in image.manifest.layers)


def test_mounting_sends_nothing(registry, image):
    push(registry, image, "models/one:v1")
    layer = image.manifest.layers[0]

    def unwanted():
        raise AssertionError("uploaded")

    with connect(registry) as client:
        assert client.push_blob("models/two", layer, unwanted, mount_from="models/one") is False
        assert client.has_blob("models/two", layer.digest)
        assert not client.has_blob("models/two", digest_of(b"x"))


def test_a_wrong_upload_is_refused(registry):
    import io

    wrong = Descriptor("application/octet-stream", digest_of(b"right"), 5)
    with connect(registry) as client:
        with pytest.raises(InvalidImage, match="DIGEST_INVALID"):
            client.push_blob("models/a", wrong, lambda: io.BytesIO(b"wrong"))
        with pytest.raises((InvalidImage, ImageNotFound), match="MANIFEST"):
            client.put_manifest(
                "models/a", "v1", MANIFEST_TYPE, encode_json(Manifest(wrong, (wrong,)))
            )


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


def test_two_pulls_at_once(registry, image, store):
    push(registry, image)
    push(registry, image, "models/same:v1")
    names = ["models/digits:v1", "models/same:v1"] * 2
    with ThreadPoolExecutor(4) as threads:
        images = list(threads.map(lambda name: pull(registry, store, name), names))
    assert {found.digest for found in images} == {image.digest}
    store.check(image.digest)
    assert len(store.images()) == 1


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


def test_tags_chunks_and_deletion(simulated, image):
    """What `docker push` and registry tools use beyond our own client."""
    import urllib3

    push(simulated, image)
    push(simulated, image, "models/digits:v2")
    base = f"http://{simulated.address}"
    repository = f"{base}/v2/models/digits"
    with urllib3.PoolManager(retries=False) as http:
        assert http.request("GET", f"{base}/v2/").status == 200
        assert http.request("GET", f"{repository}/tags/list").json()["tags"] == ["v1", "v2"]
        assert http.request("GET", f"{repository}/tags/list?n=1&last=v1").json()["tags"] == ["v2"]
        assert http.request("GET", f"{base}/v2/none/tags/list").status == 404
        begun = http.request("POST", f"{repository}/blobs/uploads/")
        where = base + begun.headers["Location"]
        for start, chunk in ((0, b"one "), (4, b"two ")):
            span = {"Content-Range": f"{start}-{start + 3}"}
            sent = http.request("PATCH", where, body=chunk, headers=span)
            assert (sent.status, sent.headers["Range"]) == (202, f"0-{start + 3}")
        late = http.request("PATCH", where, body=b"x", headers={"Content-Range": "99-99"})
        assert (late.status, late.headers["Range"]) == (416, "0-7")
        assert http.request("GET", where).headers["Range"] == "0-7"
        digest = digest_of(b"one two three")
        done = http.request("PUT", f"{where}?digest={digest}", body=b"three")
        assert (done.status, done.headers["Docker-Content-Digest"]) == (201, digest)
        assert http.request("GET", f"{repository}/blobs/{digest}").data == b"one two three"
        assert http.request("PUT", where).status == 404
        begun = http.request("POST", f"{repository}/blobs/uploads/")
        where = base + begun.headers["Location"]
        assert http.request("DELETE", where).status == 204
        assert http.request("GET", where).status == 404
        for path in ("/v2/../../etc/passwd", "/v2/A/tags/list", "/v2/a/manifests/%2e%2e%2fx"):
            assert http.request("GET", base + path).status == 404
        assert http.request("POST", f"{repository}/tags/list").status == 405
        assert http.request("DELETE", f"{repository}/manifests/v2").status == 202
        assert http.request("GET", f"{repository}/tags/list").json()["tags"] == ["v1"]
        assert http.request("DELETE", f"{repository}/manifests/{image.digest}").status == 202
        gone = http.request("GET", f"{repository}/manifests/v1")
        assert gone.status == 404
        assert gone.json()["errors"][0]["code"] == "MANIFEST_UNKNOWN"


@pytest.mark.parametrize("turns", range(5))
async def test_a_registry_that_goes_away_leaves_no_connection_open(tmp_path, turns):
    registry = Registry(tmp_path)
    await registry.start()
    host, _, port = registry.address.partition(":")
    with socket.create_connection((host, int(port))) as client:
        # In the first turns of the loop the connection is not taken, or taken by half.
        for _ in range(turns):
            await asyncio.sleep(0)
        await registry.stop()
        client.setblocking(False)
        ended = asyncio.get_running_loop().sock_recv(client, 1)
        # One that nobody took is reset.
        with contextlib.suppress(ConnectionResetError):
            assert await asyncio.wait_for(ended, 10) == b""
