"""A simulated site in the caller's event loop, and `gatelet run` on it as real processes."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gatelet.agent.cli.agent_client import AgentClient
from gatelet.agent.cli.command import CommandError
from gatelet.agent.config import load_config
from gatelet.agent.scoring.client import ScoringClient
from gatelet.modules.oci.build import build_model_image
from gatelet.modules.oci.client import RegistryClient
from gatelet.modules.oci.layout import open_layout
from gatelet.modules.oci.manifest import Descriptor, digest_of
from gatelet.modules.oci.push import push_image
from gatelet.modules.oci.reference import ImageRef
from gatelet.modules.oci.transport import RegistrySettings
from gatelet.simulator.demo.dataset import load_heldout, model_directory
from gatelet.simulator.iothub.devices import ClientId
from gatelet.simulator.site import EDGE_AGENT, Site, SiteSettings

DEVICE = "edge-1"
SECONDS = 40.0


class RunningDevice:
    """A site and `gatelet run` on it. Blocking calls go to a thread: the site shares our loop."""

    def __init__(self, folder: Path, board: str = "pynq-z2") -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.grpc_address = f"127.0.0.1:{probe.getsockname()[1]}"
        self.site = Site(SiteSettings(folder, DEVICE, board, self.grpc_address))
        self.process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        await self.site.start()
        await self.start_agent()

    async def stop(self) -> None:
        await self.stop_agent()
        await self.site.stop()

    async def start_agent(self, ready: Callable[[dict[str, Any]], bool] | None = None) -> None:
        with open(self.folder / "agent.log", "ab") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "gatelet.agent.main", "run"),
                    *("--config", str(self.folder / "agent.toml")),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        await self.until(ready or (lambda status: all(n["connected"] for n in status["links"])))

    async def stop_agent(self) -> None:
        if self.process is not None:
            self.process.terminate()
            await asyncio.to_thread(self.process.wait, 20)
            self.process = None

    async def kill(self, role: str) -> None:
        """SIGKILL to one process of the device."""
        os.kill(self.processes()[role]["pid"], signal.SIGKILL)

    def processes(self) -> dict[str, Any]:
        return json.loads((self.folder / "run" / "processes.json").read_bytes())

    async def status(self) -> dict[str, Any]:
        def ask() -> dict[str, Any]:
            with AgentClient(load_config(self.folder / "agent.toml").agent_socket) as agent:
                return agent.status()

        return await asyncio.to_thread(ask)

    async def until(
        self, condition: Callable[[dict[str, Any]], bool], seconds: float = SECONDS
    ) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        last: Any = None
        while time.monotonic() < deadline:
            try:
                last = await self.status()
            except CommandError as error:
                last = str(error)
            else:
                if condition(last):
                    return last
            await asyncio.sleep(0.02)
        log = (self.folder / "agent.log").read_text()[-4000:]
        pytest.fail(f"not reached in {seconds} s; last status {last}\n{log}")

    async def push(self, version: str, directory: Path | None = None, name: str = "digits") -> str:
        """Package a demo model (or `directory`) and push it; returns the image name."""
        image = f"{self.site.registry.address}/models/{name}:{version}"

        def work() -> None:
            layout = self.folder / "layouts" / name / version
            build_model_image(directory or model_directory(version), layout)
            with RegistryClient(RegistrySettings(self.site.registry.address)) as client:
                push_image(client, ImageRef.parse(image), open_layout(layout))

        await asyncio.to_thread(work)
        return image

    async def push_without_model(self) -> str:
        """Push an ordinary OCI image: no layers, no labels; returns its name."""
        image = f"{self.site.registry.address}/library/empty:1"
        config = json.dumps(
            {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": []}}
        ).encode()
        blob = Descriptor(
            "application/vnd.oci.image.config.v1+json", digest_of(config), len(config)
        )
        manifest = json.dumps(
            {
                "schemaVersion": 2,
                "mediaType": "application/vnd.oci.image.manifest.v1+json",
                "config": {"mediaType": blob.media_type, "digest": blob.digest, "size": blob.size},
                "layers": [],
            }
        ).encode()

        def work() -> None:
            with RegistryClient(RegistrySettings(self.site.registry.address)) as client:
                client.push_blob("library/empty", blob, lambda: io.BytesIO(config))
                kind = "application/vnd.oci.image.manifest.v1+json"
                client.put_manifest("library/empty", "1", kind, manifest)

        await asyncio.to_thread(work)
        return image

    def desire(self, content: dict[str, Any]) -> int:
        """Replace the desired properties of `$edgeAgent`; returns their new version."""
        self.site.hub.core.apply_configuration(DEVICE, content)
        return self.twin()["desired"]["$version"]

    def desire_raw(self, desired: dict[str, Any]) -> int:
        """Set exactly these desired properties of `$edgeAgent`, whatever they are."""
        client = ClientId(DEVICE, EDGE_AGENT)
        self.site.hub.core.update_twin(client, {"properties": {"desired": desired}}, whole=True)
        return self.twin()["desired"]["$version"]

    def twin(self) -> dict[str, Any]:
        return self.site.hub.core.twin(ClientId(DEVICE, EDGE_AGENT)).device_view()

    async def until_reported(
        self, condition: Callable[[dict[str, Any]], bool], seconds: float = SECONDS
    ) -> dict[str, Any]:
        """The reported properties in the hub once they fulfil `condition`."""
        deadline = time.monotonic() + seconds
        reported: dict[str, Any] = {}
        while time.monotonic() < deadline:
            reported = self.twin()["reported"]
            if condition(reported):
                return reported
            await asyncio.sleep(0.02)
        log = (self.folder / "agent.log").read_text()[-4000:]
        pytest.fail(f"not reported in {seconds} s; last: {json.dumps(reported)[:3000]}\n{log}")

    async def until_good(self, version: int) -> dict[str, Any]:
        """Desired `version` is reported as good and running."""
        return await self.until_reported(
            lambda r: (
                r.get("lastDesiredVersion") == version
                and r["lastDesiredStatus"]["code"] == 200
                and r["gatelet"]["deployment"]["phase"] == "good"
                and all(m["runtimeStatus"] == "running" for m in r["modules"].values())
            )
        )

    async def accuracy(self, count: int = 50, endpoint: str = "digits") -> tuple[float, set[str]]:
        """Accuracy on the first held-out digits, and the versions that answered."""

        def work() -> tuple[float, set[str]]:
            images, labels = load_heldout()
            versions = set()
            right = 0
            with ScoringClient(self.grpc_address) as client:
                for image, label in zip(images[:count], labels[:count], strict=True):
                    answer = client.request(endpoint, {"x": image[None]})
                    versions.add(answer.version)
                    right += int(np.argmax(answer.outputs[0].array)) == label
            return right / count, versions

        return await asyncio.to_thread(work)
