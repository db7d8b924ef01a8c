"""A server of manifests, devices that fetch from it, and a key to sign with."""

from __future__ import annotations

import asyncio
import hashlib
import http.server
import json
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization as ser
from cryptography.hazmat.primitives.asymmetric import ec
from gatelet.agent.clock import Clock, SystemClock
from gatelet.agent.manifest_source import ManifestSource
from gatelet.agent.reconcile import Reconciler, ReconcileSettings
from gatelet.agent.store import StateStore
from gatelet.agent.trust import Trust
from gatelet.modules.signing import PrivateKey, read_private_key

AGENT = {"type": "docker", "settings": {"image": "agent:1"}}


def manifest(image: str = "m:1", generation: int | None = None) -> bytes:
    document: dict[str, Any] = {
        "schemaVersion": "1.1",
        "runtime": {"type": "docker", "settings": {}},
        "systemModules": {"edgeAgent": AGENT},
        "modules": {"m": {"type": "docker", "status": "running", "settings": {"image": image}}},
    }
    if generation is not None:
        document["signed"] = {"generation": generation}
    return json.dumps(document).encode()


def new_key() -> PrivateKey:
    key = ec.generate_private_key(ec.SECP256R1())
    form = ser.PrivateFormat.PKCS8
    pem = key.private_bytes(ser.Encoding.PEM, form, ser.NoEncryption())
    return read_private_key(pem, None, "key")


KEY, OTHER = new_key(), new_key()


class Server:
    """`answers` maps paths to bodies, statuses, or functions of the handler."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        outer = self
        self.answers: dict[str, Any] = {}
        self.asked: list[str] = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(self.path)
                answer = outer.answers.get(self.path.partition("?")[0], 404)
                if callable(answer):
                    answer(self)
                elif isinstance(answer, int):
                    self.send_error(answer)
                else:
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(answer)))
                    self.end_headers()
                    self.wfile.write(answer)

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = False
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
            self._server.handle_error = lambda *_: None  # type: ignore[method-assign]
        self.address = f"127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)

    def reference(self, body: bytes, path: str = "/m.json", key: PrivateKey | None = None) -> bytes:
        inside = {
            "url": f"http://{self.address}{path}",
            "sha256": hashlib.sha256(body).hexdigest(),
        }
        if key is not None:
            inside["signature"] = key.sign(body)
        return json.dumps({"manifest": inside}).encode()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


class Device:
    def __init__(
        self, folder: Path, trust: Trust | None = None, clock: Clock | None = None, **options: Any
    ) -> None:
        clock = clock or SystemClock()
        self.store = StateStore(folder / "state.db", clock)

        reconciler = Reconciler(
            self.store,
            None,  # type: ignore[arg-type]  # nothing is carried out here
            clock,
            ReconcileSettings(),
            lambda snapshot: None,
        )
        self.source = ManifestSource(
            self.store,
            reconciler,
            clock,
            trust=trust,
            jitter=Random(1),
            **{"retry_seconds": (0.01, 0.02), **options},
        )
        self._job: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Device:
        self._job = asyncio.create_task(self.source.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._job is not None
        assert not self._job.done()
        self._job.cancel()
        await asyncio.gather(self._job, return_exceptions=True)
        self.store.close()

    async def until(self, condition: Callable[[], bool]) -> None:
        deadline = asyncio.get_running_loop().time() + 10
        while not condition():
            assert asyncio.get_running_loop().time() < deadline, self.source.awaited
            await asyncio.sleep(0.005)

    async def settled(self) -> tuple[int, str]:
        await self.until(lambda: self.source.awaited is None)
        seen = self.store.seen()[0]
        return seen.code, seen.description


REQUIRE = Trust(True, {"release": KEY.public})


def inline(body: bytes, signature: str, key_id: str = "") -> bytes:
    inside = {"body": [body[:100].decode(), body[100:].decode()], "signature": signature}
    return json.dumps({"manifest": inside | ({"keyId": key_id} if key_id else {})}).encode()


SIX = manifest("m:6", 6)
