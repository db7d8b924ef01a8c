"""A device small enough to be killed at each of its system calls.

The real agent core (store, planner, puller, content store, outbox) runs in a forked child, so that
a start costs milliseconds and only its own system calls are counted. Only the scoring process is a
stand-in: it reads every byte of a model, and refuses one that is not as it was pushed.

Reads one JSON command a line on standard input, answers with JSON lines:
    {"ready": pid, "worker": tid}      the child waits for a line "go"
    {"ended": ..., "outcome": {...}}   "ended" is "exit 0" or "signal 9"
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import urllib3  # noqa: F401  (imported before the fork, not counted in a child)
from gatelet.agent.clock import SystemClock
from gatelet.agent.config import AgentConfig, ConfigError, DeviceConfig, RegistryConfig
from gatelet.agent.outbox import Limits, Outbox, OutboxError, Telemetry
from gatelet.agent.plan import InstanceView, Route
from gatelet.agent.process import Agent
from gatelet.agent.reconcile import ReconcileSettings
from gatelet.agent.scoring_env import ScoringOptions
from gatelet.agent.seams import BackendView, LoadedModel, ScoringView, StepFailed
from gatelet.agent.store import StateStore, StoreError
from gatelet.modules.model_json import load_model
from gatelet.modules.oci.store import ContentStore

SETTINGS = ReconcileSettings(
    probation_seconds=0.02,
    retry_base_seconds=0.02,
    retry_cap_seconds=0.1,
    busy_poll_seconds=0.01,
    idle_poll_seconds=0.02,
)
SECONDS = 20.0
MESSAGES = 6


class CheckedScoring:
    """Serves what it can prove to be whole. `known`: model version -> SHA-256 of its file."""

    def __init__(self, known: dict[str, str]) -> None:
        self._known = known
        self._models: dict[str, LoadedModel] = {}
        self._routes: tuple[Route, ...] = ()
        self.damaged: list[str] = []
        self.gaps: list[str] = []

    async def status(self) -> ScoringView:
        return ScoringView("boot", os.getpid(), tuple(self._models.values()), self._routes)

    async def load(self, instance: str, directory: Path, options: ScoringOptions) -> None:
        if instance in self._models:
            return
        model = load_model(directory)
        data = (directory / model.variants[0].path).read_bytes()
        if hashlib.sha256(data).hexdigest() != self._known[model.version]:
            self.damaged.append(f"{model.version} in {directory}")
        if model.version == "broken":
            raise StepFailed("this model does not load", retryable=False)
        self._models[instance] = LoadedModel(
            InstanceView(instance, "loaded"),
            model.name,
            model.version,
            (BackendView("cpu", True, "", 0, 0),),
            (),
        )

    async def probe(self, instance: str) -> None:
        loaded = self._models[instance]
        self._models[instance] = LoadedModel(
            InstanceView(instance, "ready"), loaded.model, loaded.version, loaded.backends, ()
        )

    async def announce(self, endpoints: object) -> None:
        raise AssertionError("this scoring process takes no such word")

    async def switch(self, routes: tuple[Route, ...]) -> None:
        before = {route.endpoint for route in self._routes}
        after = {route.endpoint for route in routes}
        self.gaps += sorted(before - after)
        self._routes = routes

    async def unload(self, instance: str) -> None:
        self._models.pop(instance, None)

    async def close(self) -> None:
        pass

    def serving(self) -> dict[str, str]:
        """Endpoint -> version of its default target."""
        return {
            route.endpoint: self._models[route.targets[0].instance].version
            for route in self._routes
        }


class Watch:
    """In place of the control service: tells when the agent looked again."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.looked = asyncio.Event()

    async def start(self) -> None:
        pass

    async def changed(self) -> None:
        self.looked.set()

    async def stop(self) -> None:
        pass


async def live(command: dict[str, Any], acknowledged: int) -> dict[str, Any]:
    """Run the agent until `command["until"]` holds; what it serves then."""
    asyncio.get_running_loop().set_default_executor(POOL)
    folder = Path(command["folder"])
    for name in ("state", "run"):
        (folder / name).mkdir(exist_ok=True)
    config = AgentConfig(
        device=DeviceConfig("small", folder / "state", folder / "run", "none"),
        registry=(RegistryConfig(command["registry"], insecure=True),),
    )
    scoring = CheckedScoring(command["known"])
    outcome: dict[str, Any] = {"starts": 0, "told": []}
    deadline = time.monotonic() + SECONDS
    while "late" not in outcome:
        # What the supervisor does when the agent ends, without the wait.
        outcome["starts"] += 1
        try:
            if await _run_agent(config, command, acknowledged, scoring, outcome, deadline):
                break
        except (ConfigError, StoreError, OutboxError, OSError) as error:
            outcome["told"].append(str(error))
            await asyncio.sleep(0.02)
            if time.monotonic() > deadline:
                outcome["late"] = True
    if command.get("read"):
        outcome["held"] = await _held(folder)
        outcome["images"] = sorted(
            image.model.version for image in ContentStore(folder / "state" / "images").images()
        )
    return outcome


async def _run_agent(
    config: AgentConfig,
    command: dict[str, Any],
    acknowledged: int,
    scoring: CheckedScoring,
    outcome: dict[str, Any],
    deadline: float,
) -> bool:
    """One life of the agent: True when what is waited for holds, or will not in time."""
    folder = config.device.state_dir
    store = StateStore(folder / "state.db", SystemClock())
    outbox = Outbox(folder / "outbox.db", SystemClock(), Limits())
    watches: list[Watch] = []

    def control(*arguments: Any, **named: Any) -> Watch:
        watches.append(Watch())
        return watches[-1]

    agent = Agent(
        config,
        store,
        SystemClock(),
        (),
        None,
        scoring=scoring,
        control=control,
        settings=SETTINGS,
    )
    stop = asyncio.Event()
    running = asyncio.ensure_future(agent.run(stop))
    sending = asyncio.ensure_future(_send(outbox, command.get("send", ""), acknowledged))
    try:
        if command.get("manifest"):
            body = json.dumps(command["manifest"]).encode()
            verdict = agent._reconciler.submit("iothub", command["version"], body)
            if verdict.code == 500:
                outcome["told"].append(verdict.description)
            else:
                assert verdict.code == 200, verdict
        while not running.done():
            watches[0].looked.clear()
            latest, good = store.latest(), store.last_good()
            outcome |= {
                "serving": scoring.serving(),
                "endpoints": sorted(scoring.serving()),
                "latest": None if latest is None else [latest.version, latest.phase],
                "good": None if good is None else good.version,
                "description": "" if latest is None else latest.description,
                "damaged": scoring.damaged,
                "gaps": scoring.gaps,
            }
            for text in (failure.message for failure in agent._snapshot.failures):
                if text not in outcome["told"]:
                    outcome["told"].append(text)
            if all(outcome[key] == value for key, value in command["until"].items()):
                await sending
                return True
            if time.monotonic() > deadline:
                outcome["late"] = True
                return True
            timer = asyncio.get_running_loop().call_later(0.05, watches[0].looked.set)
            await watches[0].looked.wait()
            timer.cancel()
        running.result()
        return False
    finally:
        stop.set()
        sending.cancel()
        await asyncio.gather(running, sending, return_exceptions=True)
        await outbox.close()
        store.close()


async def _send(outbox: Outbox, name: str, acknowledged: int) -> None:
    for number in range(MESSAGES if name else 0):
        key = f"{name}-{number}"
        while True:
            try:
                await outbox.put(Telemetry(key.encode(), key=key))
            except OutboxError:
                await asyncio.sleep(0.02)
            else:
                break
        # Not write: some tests let that fail.
        os.writev(acknowledged, [f"{key}\n".encode()])


async def _held(folder: Path) -> list[str]:
    outbox = Outbox(folder / "state" / "outbox.db", SystemClock(), Limits())
    held = []
    while (head := outbox.head()) is not None:
        held.append(head.body.decode())
        outbox.acknowledge(head.sequence)
    await outbox.close()
    return held


def main() -> None:
    global POOL
    for line in sys.stdin:
        command = json.loads(line)
        results, results_in = os.pipe()
        acks, acks_in = os.pipe()
        go, go_in = os.pipe()
        pid = os.fork()
        if pid == 0:
            POOL = ThreadPoolExecutor(1)
            worker = POOL.submit(threading.get_native_id).result()
            ready = json.dumps({"ready": os.getpid(), "worker": worker})
            os.writev(results_in, [ready.encode(), b"\n"])
            os.read(go, 1)
            outcome = asyncio.run(live(command, acks_in))
            os.writev(results_in, [json.dumps(outcome).encode(), b"\n"])
            os._exit(0)
        for end in (results_in, acks_in, go):
            os.close(end)
        with os.fdopen(results) as answers, os.fdopen(acks) as said, os.fdopen(go_in, "w") as gate:
            print(answers.readline(), end="", flush=True)
            sys.stdin.readline()
            gate.write("g")
            gate.flush()
            outcome = answers.readline()
            _, status = os.waitpid(pid, 0)
            code = os.waitstatus_to_exitcode(status)
            print(
                json.dumps(
                    {
                        "ended": f"signal {-code}" if code < 0 else f"exit {code}",
                        "outcome": json.loads(outcome) if outcome else None,
                        "acknowledged": said.read().split(),
                    }
                ),
                flush=True,
            )


POOL: ThreadPoolExecutor

if __name__ == "__main__":
    main()
