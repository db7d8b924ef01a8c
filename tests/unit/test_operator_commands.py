"""What the commands print, from the agent's documents."""

from __future__ import annotations

import argparse
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from gatelet.agent.cli.command import CommandError, palette
from gatelet.agent.cli.diff import preview_text
from gatelet.agent.cli.spans import module_text, span
from gatelet.agent.cli.status import fabric_text
from gatelet.agent.cli.top import Sample, _text, fabric_line, rates
from gatelet.agent.cli.waiting import outcome, report, restarted, wait, wait_restarted
from gatelet.agent.status import fabric_state

NOW = datetime(2026, 11, 21, 12, 0, tzinfo=timezone.utc)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-5, "less than a second"),
        (0.9, "less than a second"),
        (1, "1 second"),
        (59, "59 seconds"),
        (61, "1 minute"),
        (3 * 3600 + 59, "3 hours"),
        (2 * 86400, "2 days"),
    ],
)
def test_spans(seconds: float, text: str) -> None:
    assert span(seconds) == text


@pytest.mark.parametrize(
    ("status", "started", "more", "expected"),
    [
        ("running", "1", {}, None),
        ("running", "2", {}, True),
        ("running", None, {}, None),
        ("running", "2", {"container": {"health": "starting"}}, None),
        ("running", "2", {"container": {"health": "healthy"}}, True),
        ("unhealthy", "2", {}, None),
        ("backoff", "2", {}, None),
        ("unknown", "1", {}, None),
        ("stopped", "1", {}, None),
        ("stopped", "2", {}, True),
        ("failed", "1", {}, None),
        ("failed", "1", {"description": "the engine refuses"}, False),
        ("failed", "2", {}, False),
        ("dead", "2", {}, False),
    ],
)
def test_a_restart_is_over_when_the_module_runs_anew(
    status: str, started: str | None, more: dict[str, Any], expected: bool | None
) -> None:
    before = module("running", started="1")
    assert restarted(before, module(status, started=started, **more)) is expected


def test_a_restart_is_not_waited_for_without_end() -> None:
    class Agent:
        def __init__(self, *modules: dict[str, Any]) -> None:
            self.modules = modules

        def watch(self, seconds: float) -> Any:
            yield {"modules": [module("running", started="1")]}
            yield {"modules": list(self.modules)}

    before = module("running", started="1")
    arguments = argparse.Namespace(timeout=2.0, json=True)
    again = module("running", started="2")
    assert wait_restarted(Agent(again), before, arguments) == (True, "as it is")
    crashed = module("backoff", started="2") | {"description": "crashed"}
    with pytest.raises(CommandError, match=r"not run anew after 2 s; .*: crashed"):
        wait_restarted(Agent(crashed), before, arguments)
    with pytest.raises(CommandError, match="m is no module of the running deployment any more"):
        wait_restarted(Agent(), before, arguments)


def module(status: str, **more: Any) -> dict[str, Any]:
    return {"name": "m", "status": status, "description": "as it is", "exitCode": 0, **more}


def ago(seconds: float) -> str:
    return (NOW - timedelta(seconds=seconds)).isoformat()


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        (module("running", started=ago(3 * 3600)), "Up 3 hours"),
        (module("running", started=None), "as it is"),
        (
            module("failed", exited=ago(120), exitCode=137, container={"state": "exited"}),
            "Failed (137) 2 minutes ago",
        ),
        (
            module("backoff", exited=ago(5), exitCode=1, container={"state": "exited"}),
            "Failed (1) 5 seconds ago, to be restarted",
        ),
        (module("stopped", exited=ago(60), container={"state": "exited"}), "Stopped 1 minute ago"),
        (module("stopped"), "Stopped"),
        (module("backoff"), "as it is"),
        (module("failed", exited=ago(9), container={"state": "created"}), "as it is"),
        (module("unhealthy", started=ago(9)), "as it is"),
    ],
)
def test_descriptions_as_iotedge_says_them(entry: dict[str, Any], text: str) -> None:
    assert module_text(entry, NOW) == text


def plain(text: str, colour: str) -> str:
    return text


def test_a_preview_in_words() -> None:
    field = {"path": "settings.image", "before": "a:1", "after": "a:2"}
    new = {"path": "env.A.value", "before": None, "after": "x" * 100}
    found = {
        "description": "",
        "generation": 3,
        "modules": [
            {"module": "a", "change": "changed", "fields": [field]},
            {"module": "b", "change": "added", "fields": [new]},
            {"module": "c", "change": "removed", "fields": [field]},
            {"module": "d", "change": "unchanged", "fields": []},
        ],
        "steps": ["pull a:2 for a"],
        "blocked": ["b waits for a"],
    }
    assert preview_text(found, plain).splitlines() == [
        "compared with deployment 3",
        "~ a changed",
        "    settings.image: a:1 -> a:2",
        "+ b added",
        f"    env.A.value: {'x' * 57}...",
        "- c removed",
        "  d unchanged",
        "steps:",
        "  1. pull a:2 for a",
        "blocked: b waits for a",
    ]
    empty = {"description": "nothing is deployed yet", "generation": 0, "modules": [], "steps": [],
             "blocked": []}  # fmt: skip
    assert preview_text(empty, plain) == "nothing is deployed yet"
    done = {**found, "steps": [], "blocked": []}
    assert "no steps: the device is as it should be" in preview_text(done, plain)


def status(generation: int, phase: str, **pull: Any) -> dict[str, Any]:
    return {
        "deployment": {
            "generation": generation, "phase": phase, "description": "why",
            "lastGood": {"generation": 1},
        },
        "modules": [{"name": "m", "description": "pulling m: 10 % of 5.0 MB", **pull}],
    }  # fmt: skip


def test_outcomes() -> None:
    assert outcome(status(2, "applying"), 2) is None
    assert outcome(status(1, "good"), 2) is None, "not even begun"
    assert outcome({"deployment": None, "modules": []}, 1) is None
    good = outcome(status(2, "good"), 2)
    assert good is not None
    assert good["phase"] == "good"
    newer = outcome(status(3, "applying"), 2)
    assert newer is not None
    assert newer["phase"] == "superseded"


class FakeAgent:
    def __init__(self, *documents: dict[str, Any]) -> None:
        self._documents = documents

    def watch(self, seconds: float) -> Any:
        yield from self._documents


def options(**values: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"json": False, "timeout": 1.0, **values})


def test_waiting_prints_a_line_per_change_and_no_percentages(
    capsys: pytest.CaptureFixture[str],
) -> None:
    second = status(2, "applying")
    second["modules"][0]["description"] = "pulling m: 90 % of 5.0 MB"
    third = status(2, "probation")
    third["modules"][0]["description"] = "serving"
    agent: Any = FakeAgent(status(2, "applying"), second, third, status(2, "failed"))
    result = wait(agent, 2, options())
    assert capsys.readouterr().err.splitlines() == ["m: pulling m", "m: serving"]
    assert report(result, options()) == 1
    told = capsys.readouterr().err
    assert told == "gatelet: deployment 2 failed: why; deployment 1 is running instead\n"
    assert report(result, options(json=True)) == 1
    assert capsys.readouterr().err == ""
    back = status(2, "failed")
    returning = status(2, "failed")
    returning["deployment"]["outcome"] = "rollingBack"
    back["deployment"]["outcome"] = "rolledBack"
    agent = FakeAgent(returning, back)
    assert wait(agent, 2, options(json=True))["outcome"] == "rolledBack"
    agent = FakeAgent(returning)
    assert report(wait(agent, 2, options(json=True)), options()) == 1
    told = capsys.readouterr().err
    assert told == "gatelet: deployment 2 failed: why; returning to deployment 1\n"
    agent = FakeAgent(status(2, "applying"))
    with pytest.raises(CommandError, match="not good after 1 s"):
        wait(agent, 2, options(json=True))


def sample(at: float, requests: int, failures: int = 0) -> Sample:
    backend = {"healthy": True, "requests": requests, "failures": failures}
    entry = module("running", started=ago(60), backends={"cpu": backend})
    about = {"generation": 2, "phase": "good"}
    document = {"device": "d", "deployment": about, "modules": [entry]}
    return Sample(at, document, {"agent": 50 * 2**20})


@pytest.mark.parametrize(
    ("before", "after", "rate"), [(100, 150, 25.0), (100, 100, 0.0), (100, 10, 5.0)]
)
def test_rates_between_two_looks(before: int, after: int, rate: float) -> None:
    found = rates(sample(10.0, before), sample(12.0, after, failures=4))
    (entry,) = found["modules"]
    assert entry["requestsPerSecond"] == rate, "a counter that fell began anew"
    assert entry["failuresPerSecond"] == 2.0
    text = _text(found)
    assert "d: deployment 2 good; agent 50 MiB" in text
    assert f"cpu {rate}/s" in text
    empty = Sample(0, {"device": "d", "deployment": None, "modules": []}, {})
    assert "no deployment" in _text(rates(empty, empty))


def with_fabric(at: float, **told: Any) -> Sample:
    looked = sample(at, 0)
    return Sample(at, {**looked.status, "fabric": {"up": True, **told} if told else None}, {})


def test_the_fpga_between_two_looks() -> None:
    told = {
        "pid": 7, "loaded": "digits", "trouble": None, "busySeconds": 10.0, "requests": 100,
        "reconfigurations": 3, "partialReconfigurations": 1, "uptimeSeconds": 60.0, "queued": 0,
        "temperatures": {"xadc temp0": 45.3},
    }  # fmt: skip
    later = {
        **told, "busySeconds": 11.0, "requests": 180, "reconfigurations": 5,
        "partialReconfigurations": 3, "uptimeSeconds": 64.0,
    }  # fmt: skip
    found = rates(with_fabric(10.0, **told), with_fabric(12.0, **later))["fabric"]
    assert (found["busy"], found["requestsPerSecond"], found["configurationsPerSecond"]) == (
        0.25, 20.0, 1.0,
    ), "by its own clock, since what it tells is a second old"  # fmt: skip
    assert fabric_line(found) == (
        "fpga: digits, 25 % busy, 20.0 requests/s, 1.0 configurations/s, xadc temp0 45 °C"
    )
    assert fabric_line(found) in _text(rates(with_fabric(10.0, **told), with_fabric(12.0, **later)))
    # A process that was started anew counts from the start: nothing to compare with yet.
    anew = rates(with_fabric(10.0, **told), with_fabric(12.0, **{**later, "pid": 8, "queued": 2}))
    assert anew["fabric"]["busy"] is None
    assert fabric_line(anew["fabric"]) == "fpga: digits, 2 in line, xadc temp0 45 °C"
    same = rates(with_fabric(10.0, **told), with_fabric(10.1, **told))["fabric"]
    assert (same["busy"], same["requestsPerSecond"]) == (0.0, 0.0)
    sick = {**later, "trouble": "hung"}
    assert fabric_line(rates(with_fabric(1, **told), with_fabric(2, **sick))["fabric"]).endswith(
        "sick: hung"
    )
    away = rates(with_fabric(1.0, **told), with_fabric(2.0, up=False))["fabric"]
    assert fabric_line(away) == "fpga: the fabric process does not answer"
    assert rates(with_fabric(1.0), with_fabric(2.0))["fabric"] is None


def test_what_the_status_says_of_the_fpga() -> None:
    told = {
        "up": True, "board": "pynq-z2", "loaded": None, "reconfigurations": 2, "requests": 9,
        "partialReconfigurations": 1, "temperatures": {"a": 40.2, "b": 51.0}, "trouble": None,
    }  # fmt: skip
    assert fabric_text(told) == "nothing on pynq-z2, 3 configurations, 9 requests, 51 °C"
    assert fabric_text({**told, "trouble": "hung"}).endswith(", sick: hung")
    assert fabric_text({"up": False}) == "the fabric process does not answer"
    assert fabric_state(None) == {}
    assert fabric_state({"up": False}) == {"fabric": "away"}
    assert fabric_state(told) == {"fabric": "serving"}
    assert fabric_state({**told, "trouble": "hung"}) == {"fabric": "sick"}


def test_on_a_terminal_there_are_bars_and_colours_unless_refused() -> None:
    """A real pseudo-terminal: what is printed depends on it."""
    script = (
        "import argparse, pty, os, sys\n"
        "pid, fd = pty.fork()\n"
        "if pid == 0:\n"
        "    from gatelet.agent.cli.command import palette\n"
        "    from gatelet.agent.cli.waiting import wait\n"
        "    print(palette()('word', 'red'))\n"
        "    def status(phase, done):\n"
        "        return {'deployment': {'generation': 1, 'phase': phase, 'description': ''},\n"
        "                'modules': [{'name': 'm', 'description': 'pulling m: 1 % of 5.0 MB',\n"
        "                             'pull': {'bytes': done, 'bytesTotal': 4096}}]}\n"
        "    class Agent:\n"
        "        def watch(self, seconds):\n"
        "            yield status('applying', 1024)\n"
        "            yield status('good', 4096)\n"
        "    wait(Agent(), 1, argparse.Namespace(json=False, timeout=1))\n"
        "    sys.exit(0)\n"
        "data = b''\n"
        "while True:\n"
        "    try:\n"
        "        piece = os.read(fd, 4096)\n"
        "    except OSError:\n"
        "        break\n"
        "    if not piece: break\n"
        "    data += piece\n"
        "os.waitpid(pid, 0)\n"
        "sys.stdout.buffer.write(data)\n"
    )
    shown = {}
    for name, extra in (("colour", {}), ("plain", {"NO_COLOR": "1"}), ("dumb", {"TERM": "dumb"})):
        env = {"PATH": "/usr/bin:/bin", "TERM": "xterm-256color", "COLUMNS": "100", **extra}
        run = subprocess.run(
            [sys.executable, "-c", script], env=env, capture_output=True, timeout=60, check=True
        )
        shown[name] = run.stdout.decode()
    assert "\x1b[31mword\x1b[0m" in shown["colour"]
    assert "m: pulling m" in shown["colour"]
    assert "1.0/4.1 kB" in shown["colour"] or "1.0/4.0 KiB" in shown["colour"]
    for name in ("plain", "dumb"):
        assert "\x1b[31m" not in shown[name]
    assert palette()("word", "red") == "word", "this test's output is no terminal"
