"""The simulated registry and the distribution project's own, and an image to push to them."""

from __future__ import annotations

import asyncio
import json
import ssl
import threading

import pytest
from distribution_server import PASSWORD, USER, DistributionServer
from gatelet.modules.oci.build import build_model_image
from gatelet.modules.oci.client import RegistryClient, RegistrySettings
from gatelet.modules.oci.layout import open_layout
from gatelet.modules.oci.pull import pull_model_image
from gatelet.modules.oci.push import push_image
from gatelet.modules.oci.reference import ImageRef
from gatelet.modules.oci.store import ContentStore
from gatelet.simulator.registry import Registry

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


class Distribution(DistributionServer):
    def __init__(self, root, auth=False, tls=None):
        self.saved = {}
        super().__init__(root, login=auth, tls=tls)

    def write(self, digest, change):
        path = self.blob_file(digest)
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
    settings = {"read_timeout": 20.0, "connect_timeout": 20.0, **settings}
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
