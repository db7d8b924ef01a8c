"""The demo's device: a site and an agent as processes of their own, seen from the outside."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

START_SECONDS = 30.0
DEPLOY_SECONDS = 30.0
STOP_SECONDS = 15.0
POLL_SECONDS = 0.02
BOARD, NO_BOARD = "pynq-z2", "none"


class DemoError(Exception):
    """The demo cannot go on; the message says where it stopped and where the logs are."""


@dataclass(frozen=True, slots=True)
class Device:
    """Addresses of the running demo. `site` is what `gatelet sim up --json` printed."""

    folder: Path
    site: dict[str, Any]
    grpc_address: str

    @property
    def preferred_backend(self) -> str:
        """What answers when a deployment prefers the FPGA."""
        return "cpu" if self.site["board"]["name"] == NO_BOARD else "fpga"

    def status(self) -> dict[str, Any]:
        """What `gatelet status --json` prints."""
        from ...agent.cli.agent_client import AgentClient

        with AgentClient(self.folder / "run" / "agent.sock") as agent:
            return agent.status()

    def until(
        self,
        what: str,
        condition: Callable[[dict[str, Any]], bool],
        seconds: float = DEPLOY_SECONDS,
    ) -> dict[str, Any]:
        """The first status that fulfils `condition`. Raises DemoError."""
        from ...agent.cli.command import CommandError

        deadline = time.monotonic() + seconds
        last: dict[str, Any] = {}
        while time.monotonic() < deadline:
            try:
                last = self.status()
            except CommandError as error:
                last = {"error": str(error)}
            else:
                if condition(last):
                    return last
            time.sleep(POLL_SECONDS)
        raise DemoError(
            f"{what}: not reached within {seconds:g} s; last status: "
            f"{json.dumps(last.get('deployment') or last)[:600]}; logs are in {self.folder}"
        )


@contextmanager
def running_device(folder: Path, board: str = BOARD) -> Iterator[Device]:
    """Start a simulated site and an agent on it; both have ended when the block is left."""
    grpc_address = f"127.0.0.1:{_free_port()}"
    me = (sys.executable, "-m", "gatelet.agent.main")
    needed = {"scoring"} if board == NO_BOARD else {"scoring", "fabric"}
    with _process(
        (
            *(*me, "sim", "up", "--json", "--dir", str(folder)),
            *("--grpc-address", grpc_address, "--board", board),
        ),
        folder / "site.log",
    ) as site:
        device = Device(folder, _announcement(site, folder / "site.log"), grpc_address)
        with _process((*me, "run", "--config", device.site["agentConfig"]), folder / "agent.log"):
            device.until(
                "the agent starts and connects",
                lambda status: (
                    all(link["connected"] for link in status["links"])
                    and needed <= set(status["processes"])
                ),
                START_SECONDS,
            )
            yield device


def _announcement(process: subprocess.Popen[bytes], log: Path) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise DemoError(f"the simulated site did not start: {log.read_text()[-600:]}")
    return dict(json.loads(line))


@contextmanager
def _process(command: tuple[str, ...], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    folder = log.parent
    folder.mkdir(parents=True, exist_ok=True)
    with (
        open(log, "wb") as errors,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        ) as process,
    ):
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


def _free_port() -> int:
    # The address must be known before the agent starts; nothing else picks ports here meanwhile.
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
