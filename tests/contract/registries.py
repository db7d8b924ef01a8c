"""The simulated registry and the distribution project's own, and an image to push to them."""

from __future__ import annotations

import asyncio
import json
import os
import queue
import re
import ssl
import subprocess
import threading

import pytest
from engine_fixture import HTPASSWD, PASSWORD, USER
from gatelet.modules.oci.build import build_model_image
from gatelet.modules.oci.client import RegistryClient, RegistrySettings
from gatelet.modules.oci.layout import open_layout
from gatelet.modules.oci.pull import pull_model_image
from gatelet.modules.oci.push import push_image
from gatelet.modules.oci.reference import ImageRef
from gatelet.modules.oci.store import ContentStore
from gatelet.simulator.registry import Registry
from required import program

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
