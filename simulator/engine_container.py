"""A container of the simulated engine: what it was made of, and what its process does.

A simulated process does what its command and environment say, in the words of the test image:
`serve` (default) runs until it is stopped; EXIT_AFTER_MS and EXIT_CODE end it; with a health check
it is well from HEALTHY_AFTER_MS until SICK_AFTER_MS; IGNORE_TERM makes it wait for SIGINT or
SIGKILL; `exit N` ends at once, `lines N [PAUSE_MS [serve]]` writes lines, `eat` is killed for its
memory, `env` writes its environment.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..agent.clock import Clock
from ..agent.runtime.container import LogLine

_YEAR_ONE = "0001-01-01T00:00:00Z"
SIGTERM, SIGKILL = 143, 137
"""Exit codes of processes that a signal ended."""


@dataclass(frozen=True, slots=True)
class SimulatedImage:
    """`config` is the Docker config (Cmd, Env, Labels, Healthcheck, ...), `layers` are (id, bytes).

    `login` is (username, password) where the registry asks for it.
    """

    name: str
    digest: str
    config: Mapping[str, Any]
    layers: tuple[tuple[str, int], ...]
    login: tuple[str, str] | None

    @property
    def id(self) -> str:
        return f"sha256:{hashlib.sha256(self.digest.encode()).hexdigest()}"


class SimulatedContainer:
    """`notify` is called after every change."""

    def __init__(
        self,
        identity: str,
        name: str,
        image: SimulatedImage,
        sent: dict[str, Any],
        clock: Clock,
        notify: Callable[[], None],
    ) -> None:
        self._clock = clock
        self._notify = notify
        self.id = identity
        self.name = name
        self.image = image
        self.body = sent
        self.host = dict(sent.get("HostConfig") or {})
        self.state: dict[str, Any] = {
            "Status": "created",
            "Running": False,
            "ExitCode": 0,
            "OOMKilled": False,
            "Error": "",
            "StartedAt": _YEAR_ONE,
            "FinishedAt": _YEAR_ONE,
        }
        self.lines: list[LogLine] = []
        self._timers: list[asyncio.TimerHandle] = []
        self._watchers: list[asyncio.Event] = []
        self.sick = False
        self._started = 0.0

    @property
    def labels(self) -> dict[str, str]:
        return {**(self.image.config.get("Labels") or {}), **(self.body.get("Labels") or {})}

    @property
    def command(self) -> list[str]:
        return list(self.body.get("Cmd") or self.image.config.get("Cmd") or ["serve"])

    @property
    def environment(self) -> dict[str, str]:
        entries = [*(self.image.config.get("Env") or []), *(self.body.get("Env") or [])]
        return {name: value for name, _, value in (entry.partition("=") for entry in entries)}

    @property
    def health_check(self) -> Mapping[str, Any]:
        given = {
            **(self.image.config.get("Healthcheck") or {}),
            **(self.body.get("Healthcheck") or {}),
        }
        return {} if given.get("Test") in (None, [], ["NONE"]) else given

    @property
    def ignores_stop(self) -> bool:
        """Whether the signal that is to stop it does nothing."""
        signal = self.body.get("StopSignal") or self.image.config.get("StopSignal") or "SIGTERM"
        heard = ("SIGINT",) if "IGNORE_TERM" in self.environment else ("SIGTERM", "SIGINT")
        return signal not in heard

    def inspect(self) -> dict[str, Any]:
        """As the real engine's `GET /containers/{id}/json`, as far as it is looked at."""
        image = self.image.config
        config = {key: value for key, value in self.body.items() if key != "HostConfig"}
        config |= {"Labels": self.labels}
        config["Env"] = [f"{name}={value}" for name, value in self.environment.items()]
        for key in ("Entrypoint", "Cmd", "User", "WorkingDir"):
            config[key] = self.body.get(key) or image.get(key)
        config["Healthcheck"] = {**(image.get("Healthcheck") or {}), **self.health_check} or None
        mode = self.host.get("NetworkMode") or "default"
        networks = (self.body.get("NetworkingConfig") or {}).get("EndpointsConfig") or {}
        return {
            "Id": self.id,
            "Name": f"/{self.name}",
            "Image": self.image.id,
            "Config": config,
            "HostConfig": {**self.host, "NetworkMode": mode},
            "State": dict(self.state),
            "NetworkSettings": {
                "Networks": {
                    name: {} for name in (*networks, "bridge" if mode == "default" else mode)
                }
            },
        }

    # The process

    def write(self, stream: str, text: str) -> None:
        self.lines.append(LogLine(self._clock.now(), stream, text))
        self._notify()

    def begin(self) -> None:
        """The process starts."""
        state, environment = self.state, self.environment
        state.update(Status="running", Running=True, ExitCode=0, OOMKilled=False, Error="")
        state["StartedAt"] = self._stamp()
        self.sick = False
        self._started = asyncio.get_running_loop().time()
        check = self.health_check
        if check:
            state["Health"] = {"Status": "starting", "Log": []}
            self._later(check.get("Interval", 30e9) / 1e9, self._check_health)
        words = self.command
        if words[0] == "exit":
            self._later(0, lambda: self.end(int((*words, "0")[1])))
        elif words[0] == "eat":
            self._later(0, lambda: self.end(SIGKILL, oom=True))
        elif words[0] == "env":
            for name, value in environment.items():
                self.write("stdout", f"{name}={value}")
            self._later(0, lambda: self.end(0))
        elif words[0] == "lines":
            self._lines(words)
        if words[0] == "serve" or len(words) > 3:
            self.write("stdout", "started")
            end = environment.get("EXIT_AFTER_MS")
            if end is not None:
                code = int(environment.get("EXIT_CODE", "1"))
                self._later(int(end) / 1000, lambda: self.end(code))
        self._notify()

    def _lines(self, words: list[str]) -> None:
        count, pause = int((*words, "1")[1]), int(words[2]) / 1000 if len(words) > 2 else 0.0
        for number in range(count):
            stream = "stderr" if number % 2 else "stdout"
            text = f"line {number}"
            if pause == 0:
                self.write(stream, text)
            else:
                self._later(
                    number * pause,
                    lambda stream=stream, text=text: self.write(stream, text),  # type: ignore[misc]
                )
        if len(words) <= 3:
            self._later(count * pause, lambda: self.end(0))

    def _check_health(self) -> None:
        if not self.state["Running"] or not self.health_check:
            return
        environment = self.environment
        age = (asyncio.get_running_loop().time() - self._started) * 1000
        sick_after = float(environment.get("SICK_AFTER_MS", "inf"))
        well_from = float(environment.get("HEALTHY_AFTER_MS", "0"))
        # A timer may come a little early by the rounding of its sum.
        well = not self.sick and well_from <= age + 0.001 and age + 0.001 < sick_after
        health = self.state["Health"]
        grace = float(self.health_check.get("StartPeriod") or 0) / 1e6
        # What fails in the start period does not count until the first success.
        begins = health["Status"] == "starting" and age + 0.001 < grace
        status = "healthy" if well else "starting" if begins else "unhealthy"
        if health["Status"] != status:
            health["Status"] = status
            health["Log"] = [{"ExitCode": 0 if well else 1, "Output": "well" if well else "sick"}]
            self._notify()
        coming = [at - age for at in (well_from, sick_after, grace) if at - age > 0.001]
        if coming and min(coming) != float("inf"):
            self._later(min(coming) / 1000, self._check_health)

    def end(self, code: int, *, oom: bool = False) -> None:
        if not self.state["Running"]:
            return
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()
        for watcher in self._watchers:
            watcher.set()
        self.state.update(
            Status="exited", Running=False, ExitCode=code, OOMKilled=oom, FinishedAt=self._stamp()
        )
        self._notify()

    async def kill_after(self, seconds: float) -> None:
        """Wait until it ended, by itself or killed after `seconds`."""
        ended = asyncio.Event()
        self._watchers.append(ended)
        # Also when nobody waits any more.
        self._later(seconds, lambda: self.end(SIGKILL))
        try:
            await ended.wait()
        finally:
            self._watchers.remove(ended)

    def feel(self, *, sick: bool) -> None:
        """What the health check finds from now on."""
        self.sick = sick
        self._check_health()

    def _later(self, seconds: float, work: Callable[[], None]) -> None:
        self._timers.append(asyncio.get_running_loop().call_later(seconds, work))

    def _stamp(self) -> str:
        return self._clock.now().strftime("%Y-%m-%dT%H:%M:%S.%fZ")
