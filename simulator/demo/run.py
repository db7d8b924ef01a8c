"""The demo: what gatelet is for, end to end, on real input. Every step measures what it claims."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...accelerators.tensors import Array
from ...agent.scoring.client import ScoringClient
from ...agent.scoring.errors import ScoringError
from .cloud import HubOperator, deployment, publish_desired
from .dataset import load_heldout, model_directory
from .device import BOARD, DEPLOY_SECONDS, NO_BOARD, DemoError, Device, running_device

ENDPOINT = "digits"
STREAM_ROUNDS = 3
"""How often the held-out images are sent around the kill of the fabric process."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the demo's table. Latencies are in milliseconds, seen by the client."""

    step: str
    happened: str
    seconds: float
    accuracy: float | None = None
    requests: int = 0
    failures: int = 0
    p50_ms: float | None = None
    p99_ms: float | None = None


@dataclass
class Traffic:
    """What a client saw: one entry per request, in the order sent."""

    seconds: list[float] = field(default_factory=list)
    correct: list[bool] = field(default_factory=list)
    versions: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def row(self, step: str, happened: str, seconds: float) -> Row:
        times = np.asarray(self.seconds) * 1000
        return Row(
            step,
            happened,
            seconds,
            float(np.mean(self.correct)) if self.correct else None,
            len(self.seconds) + len(self.errors),
            len(self.errors),
            float(np.percentile(times, 50)) if len(times) else None,
            float(np.percentile(times, 99)) if len(times) else None,
        )


class Client:
    """Sends the held-out digits, one image a request, over the Open Inference Protocol."""

    def __init__(self, grpc_address: str) -> None:
        self._client = ScoringClient(grpc_address, timeout=10.0)
        self._images, self._labels = load_heldout()

    def __len__(self) -> int:
        return len(self._labels)

    def send(self, index: int, traffic: Traffic) -> None:
        image = self._images[index : index + 1]
        started = time.perf_counter()
        try:
            answer = self._client.request(ENDPOINT, {"x": image})
        except ScoringError as error:
            traffic.errors.append(f"{error.code.value}: {error.message}")
            return
        traffic.seconds.append(time.perf_counter() - started)
        scores: Array = answer.outputs[0].array
        traffic.correct.append(bool(np.argmax(scores) == self._labels[index]))
        traffic.versions.append(answer.version)

    def send_all(self) -> Traffic:
        traffic = Traffic()
        for index in range(len(self)):
            self.send(index, traffic)
        return traffic

    @contextmanager
    def in_background(self) -> Iterator[Traffic]:
        """Send one image after the other until the block ends."""
        traffic, stop = Traffic(), threading.Event()

        def work() -> None:
            index = 0
            while not stop.is_set():
                self.send(index % len(self), traffic)
                index += 1

        thread = threading.Thread(target=work, name="demo-client")
        thread.start()
        try:
            yield traffic
        finally:
            stop.set()
            thread.join()

    def close(self) -> None:
        self._client.close()


Announce = Callable[[str], None]


def run_demo(
    announce: Announce, on_row: Callable[[Row], None], folder: Path | None = None
) -> list[Row]:
    """Run all steps; `announce` hears what begins, `on_row` what was measured. Raises DemoError."""
    if folder is None:
        # Removed only after success: an error names the logs in it.
        folder = Path(tempfile.mkdtemp(prefix="gatelet-demo-"))
        rows = run_demo(announce, on_row, folder)
        shutil.rmtree(folder)
        return rows
    rows = []

    def done(row: Row) -> None:
        rows.append(row)
        on_row(row)

    started = time.perf_counter()
    announce("starting the simulated site and the agent")
    fabric = importlib.util.find_spec("pynq") is not None
    with running_device(folder, BOARD if fabric else NO_BOARD) as device:
        board = f"simulated {BOARD}" if fabric else "no FPGA steps: pynq is not installed here"
        done(
            Row(
                "start",
                f"site (IoT Hub, MQTT broker, registry, {board}) and agent are up",
                time.perf_counter() - started,
            )
        )
        client = Client(device.grpc_address)
        try:
            for step in (_cpu, _fpga, _mqtt, *((_fabric_killed,) if fabric else ()), _broken_image):
                for row in step(device, client, announce):
                    done(row)
        finally:
            client.close()
    return rows


def _cpu(device: Device, client: Client, announce: Announce) -> list[Row]:
    operator = HubOperator(device.site["hub"], device.site["device"])
    announce("packaging digits v1 and pushing it to the registry")
    started = time.perf_counter()
    image, size = push(device, "v1")
    rows = [Row("push v1", f"{image} ({size / 1000:.0f} kB)", time.perf_counter() - started)]

    announce("deploying v1 through the IoT Hub twin")
    started = time.perf_counter()
    operator.set_modules(deployment(image, backends="cpu"))
    operator.until_reported(200)
    rows.append(
        Row("deploy v1", "IoT Hub twin -> pulled, probed, serving", time.perf_counter() - started)
    )

    announce(f"scoring {len(client)} held-out digits on the CPU")
    rows.append(_scored(device, client, "score v1", "cpu"))
    return rows


def _fpga(device: Device, client: Client, announce: Announce) -> list[Row]:
    operator = HubOperator(device.site["hub"], device.site["device"])
    image, _ = push(device, "v2")
    announce("deploying v2, which prefers the FPGA, while a client keeps scoring")
    started = time.perf_counter()
    with client.in_background() as traffic:
        operator.set_modules(deployment(image, backends="fpga,cpu"))
        operator.until_reported(200)
        _until_answered_by("2", traffic)
    row = traffic.row(
        "deploy v2", "swapped under traffic by IoT Hub twin", time.perf_counter() - started
    )
    announce(f"scoring {len(client)} held-out digits on the fabric")
    return [row, _scored(device, client, "score v2", device.preferred_backend)]


def _mqtt(device: Device, client: Client, announce: Announce) -> list[Row]:
    image, _ = push(device, "v3")
    announce("deploying v3 over plain MQTT, while a client keeps scoring")
    started = time.perf_counter()
    with client.in_background() as traffic:
        publish_desired(device.site["broker"], deployment(image, backends="fpga,cpu"))
        _until_good(device, "mqtt")
        _until_answered_by("3", traffic)
    row = traffic.row("deploy v3", "swapped under traffic over MQTT", time.perf_counter() - started)
    return [row, _scored(device, client, "score v3", device.preferred_backend)]


def _fabric_killed(device: Device, client: Client, announce: Announce) -> list[Row]:
    announce("killing the fabric process in the middle of a stream of requests")
    before = _backend_counts(device)
    pid = device.status()["processes"]["fabric"]["pid"]
    started = time.perf_counter()
    with client.in_background() as traffic:
        _until_sent(len(client), traffic)
        os.kill(pid, signal.SIGKILL)
        _until_sent(STREAM_ROUNDS * len(client), traffic)
    took = time.perf_counter() - started
    after = _backend_counts(device)
    fpga, cpu = (after.get(name, 0) - before.get(name, 0) for name in ("fpga", "cpu"))
    if not cpu:
        raise DemoError("the CPU answered nothing although the fabric process was killed")
    row = traffic.row("kill fabric", f"kill -9; fpga {fpga}, cpu {cpu} answers", took)

    announce("waiting for the fabric to come back")
    started = time.perf_counter()
    device.until("the fabric serves again", _fpga_is_healthy)
    return [row, Row("fabric back", "restarted, reloaded", time.perf_counter() - started)]


def _broken_image(device: Device, client: Client, announce: Announce) -> list[Row]:
    operator = HubOperator(device.site["hub"], device.site["device"])
    image, _ = push(device, "broken")
    announce("deploying an image whose model is damaged")
    started = time.perf_counter()
    with client.in_background() as traffic:
        operator.set_modules(deployment(image, backends="cpu"))
        reported = operator.until_reported(500)
    took = time.perf_counter() - started
    if set(traffic.versions) != {"3"}:
        raise DemoError(f"versions {set(traffic.versions)} answered, expected only the old one")
    row = traffic.row("deploy broken", reported["lastDesiredStatus"]["description"], took)
    return [row, _scored(device, client, "score v3 still", device.preferred_backend)]


def push(device: Device, version: str) -> tuple[str, int]:
    """Package a demo model and push it; returns its image name and its size in bytes."""
    from ...modules.oci.build import build_model_image
    from ...modules.oci.client import RegistryClient
    from ...modules.oci.layout import open_layout
    from ...modules.oci.push import push_image
    from ...modules.oci.reference import ImageRef
    from ...modules.oci.transport import RegistrySettings

    name = f"{device.site['registry']['address']}/models/{ENDPOINT}:{version}"
    layout = device.folder / "layouts" / version
    built = build_model_image(model_directory(version), layout)
    with RegistryClient(RegistrySettings(device.site["registry"]["address"])) as client:
        push_image(client, ImageRef.parse(name), open_layout(layout))
    return name, built.size


def _scored(device: Device, client: Client, step: str, backend: str) -> Row:
    """Score every held-out image once, and check that `backend` answered all of them."""
    before = _backend_counts(device)
    started = time.perf_counter()
    traffic = client.send_all()
    took = time.perf_counter() - started
    answered = _backend_counts(device).get(backend, 0) - before.get(backend, 0)
    if answered < len(client) - len(traffic.errors):
        raise DemoError(f"{step}: {backend} answered {answered} of {len(client)} requests")
    where = "CPU (onnxruntime)" if backend == "cpu" else "FPGA (pynq, simulated board)"
    return traffic.row(step, f"{answered} answers by the {where}", took)


def _backend_counts(device: Device) -> dict[str, int]:
    """Answers so far by each backend of the module that serves."""
    (module,) = device.status()["modules"]
    return {name: backend["requests"] for name, backend in module["backends"].items()}


def _fpga_is_healthy(status: dict[str, Any]) -> bool:
    return all(
        module.get("backends", {}).get("fpga", {}).get("healthy") for module in status["modules"]
    )


def _until_good(device: Device, source: str) -> None:
    device.until(
        f"a deployment from {source} is good",
        lambda status: (
            (status["deployment"] or {}).get("source") == source
            and status["deployment"]["phase"] == "good"
        ),
    )


def _until_sent(count: int, traffic: Traffic) -> None:
    deadline = time.monotonic() + DEPLOY_SECONDS
    while len(traffic.seconds) + len(traffic.errors) < count:
        if time.monotonic() > deadline:
            raise DemoError(f"the client sent only {len(traffic.seconds)} requests in time")
        time.sleep(0.001)


def _until_answered_by(version: str, traffic: Traffic) -> None:
    """Wait until the client has seen an answer of `version`. Raises DemoError."""
    deadline = time.monotonic() + DEPLOY_SECONDS
    while version not in traffic.versions[-1:]:
        if time.monotonic() > deadline:
            raise DemoError(
                f"no answer by version {version}; last errors: {traffic.errors[-3:] or 'none'}"
            )
        time.sleep(0.01)
