"""What an agent at rest has in memory: each library here costs megabytes that a device lacks.

Memory itself depends on the machine and on what else runs there; what is loaded does not.
"""

from __future__ import annotations

import asyncio
import json
import re
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingMixIn, UnixStreamServer

import pytest
from gatelet.agent.cli.agent_client import AgentClient
from gatelet.agent.cli.command import CommandError
from gatelet.agent.config import load_config
from gatelet.simulator.site import Site, SiteSettings

SECONDS = 30.0
AGENT = """
import os, signal, sys

def tell(*_):
    with open(sys.argv[0] + ".tmp", "w") as file:
        file.write("\\n".join(sys.modules))
    os.replace(sys.argv[0] + ".tmp", sys.argv[0])

signal.signal(signal.SIGUSR1, tell)
from gatelet.agent.main import main
sys.exit(main())
"""
NEVER = {
    "aiohttp",
    "cryptography",
    "docker",
    "gatelet.agent.cli.apply",
    "gatelet.agent.cli.image",
    "gatelet.agent.scoring.process",
    "gatelet.modules.oci.client",
    "gatelet.protos.open_inference_pb2",
    "gatelet.simulator",
    "multiprocessing",
    "numpy",
    "onnxruntime",
    "psutil",
    "pynq",
    "rich",
    "yaml",
}
EDGE = {"type": "docker", "settings": {"image": "gatelet", "createOptions": ""}}
MANIFEST = {
    "modulesContent": {
        "$edgeAgent": {
            "properties.desired": {
                "schemaVersion": "1.1",
                "runtime": {"type": "docker", "settings": {}},
                "systemModules": {
                    "edgeAgent": EDGE,
                    "edgeHub": {**EDGE, "status": "running", "restartPolicy": "always"},
                },
                "modules": {},
            }
        }
    }
}
WITHOUT_HUB = {"azure", "charset_normalizer", "importlib.metadata", "requests", "urllib3"}


class _Engine(BaseHTTPRequestHandler):
    """An engine without containers, where nothing happens."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        what = re.sub(r"^/v1\.\d+|\?.*", "", self.path)
        events = what == "/events"
        body = {"/containers/json": [], "/images/json": []}.get(what, {"ApiVersion": "1.41"})
        data = b"" if events else json.dumps(body).encode()
        self.send_response(200)
        self.send_header(*(("Connection", "close") if events else ("Content-Length", len(data))))
        self.end_headers()
        self.wfile.write(data)
        self.server.asked.add(what)
        if events:
            self.server.ended.wait()

    def address_string(self):
        return "agent"

    def log_message(self, *_):
        pass


class _Server(ThreadingMixIn, UnixStreamServer):
    daemon_threads = True

    def __init__(self, path):
        super().__init__(path, _Engine)
        self.asked = set()
        self.ended = threading.Event()


@pytest.fixture
def engine(tmp_path):
    with _Server(str(tmp_path / "engine.sock")) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            server.ended.set()
            server.shutdown()
            thread.join()


async def loaded(folder: Path, engine: _Server, without: str) -> set[str]:
    """The modules in an agent that is connected and has looked at its engine."""
    site = Site(SiteSettings(folder, "edge-1", "none"))
    await site.start()
    try:
        config = folder / "agent.toml"
        parts = re.split(r"^(?=\[)", config.read_text(), flags=re.MULTILINE)
        kept = [part for part in parts if not re.match(rf"\[+{without}[.\]]", part)]
        config.write_text(f'{"".join(kept)}\n[docker]\nsocket = "{engine.server_address}"\n')
        found = folder / "modules.txt"
        program = AGENT.replace("sys.argv[0]", repr(str(found)))
        words = ("run", "--role", "agent", "--config", str(config))
        with (folder / "agent.log").open("wb") as log:
            agent = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", program, *words), stdout=log, stderr=log
            )
        try:
            await _until(folder, lambda: _applied(config))
            await _until(folder, lambda: _at_rest(config, engine))
            agent.send_signal(signal.SIGUSR1)
            await _until(folder, found.exists)
            return set(found.read_text().split())
        finally:
            agent.terminate()
            await agent.wait()
    finally:
        await site.stop()


def _applied(config: Path) -> bool:
    """A deployment without modules: an agent without any does not look at its engine."""
    try:
        with AgentClient(load_config(config).agent_socket) as agent:
            agent.apply(json.dumps(MANIFEST).encode())
    except CommandError:
        return False
    return True


def _at_rest(config: Path, engine: _Server) -> bool:
    with AgentClient(load_config(config).agent_socket) as agent:
        status = agent.status()
    connected = [link["connected"] for link in status["links"]] == [True]
    looked = engine.asked >= {"/info", "/containers/json", "/images/json", "/events"}
    return connected and looked and status["deployment"]["outcome"] == "good"


async def _until(folder, condition) -> None:
    deadline = time.monotonic() + SECONDS
    while not await asyncio.to_thread(condition):
        assert time.monotonic() < deadline, (folder / "agent.log").read_text()[-4000:]
        await asyncio.sleep(0.05)


@pytest.mark.parametrize(
    ("without", "never"), [("iothub", NEVER | WITHOUT_HUB), ("mqtt", NEVER)], ids=["mqtt", "iothub"]
)
async def test_at_rest_an_agent_has_loaded_nothing_that_it_does_not_use(
    tmp_path, engine, without, never
):
    found = await loaded(tmp_path, engine, without)
    assert {"gatelet.agent.process", "gatelet.agent.runtime.docker", "grpc"} <= found
    assert sorted(never & found) == []
