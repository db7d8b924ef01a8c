"""`gatelet top`: modules and processes with their rates and memory, again and again."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..clock import SystemClock
from .command import add_config_option, add_json_option, configuration, print_json, wrong_use
from .spans import module_text

if TYPE_CHECKING:
    from rich.console import RenderableType

_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Sample:
    """`at` is monotonic seconds; `memory` is bytes resident by process name."""

    at: float
    status: Mapping[str, Any]
    memory: Mapping[str, int]


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "top",
        help="watch modules, their rates, and memory",
        description="A live table on a terminal, until Ctrl-C; one table elsewhere.",
    )
    parser.add_argument(
        "--interval", type=float, default=1.0, metavar="S", help="seconds between two looks"
    )
    parser.add_argument("--once", action="store_true", help="one table, then end")
    add_config_option(parser)
    add_json_option(parser)
    parser.set_defaults(run=_top)


def _top(arguments: argparse.Namespace) -> int:
    from .agent_client import AgentClient

    if not 0.1 <= arguments.interval <= 3600:
        wrong_use("--interval takes seconds from 0.1 to 3600")
    with AgentClient(configuration(arguments).agent_socket) as agent:
        before = _sample(agent.status())
        if arguments.json or arguments.once or not sys.stdout.isatty():
            time.sleep(arguments.interval)
            found = rates(before, _sample(agent.status()))
            if arguments.json:
                print_json(found)
            else:
                print(_text(found))
            return 0
        from rich.console import Console
        from rich.live import Live

        try:
            with Live(console=Console(), auto_refresh=False, screen=True) as live:
                while True:
                    time.sleep(arguments.interval)
                    now = _sample(agent.status())
                    live.update(_table(rates(before, now)), refresh=True)
                    before = now
        except KeyboardInterrupt:
            return 0


def _sample(status: dict[str, Any]) -> Sample:
    processes = status["processes"].items()
    memory = {name: _resident(about["pid"]) for name, about in processes}
    return Sample(time.monotonic(), status, memory)


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    except (OSError, ValueError, IndexError):
        return 0


def rates(before: Sample, now: Sample) -> dict[str, Any]:
    """Per second between two samples. A counter that fell began anew with its process."""
    seconds = max(now.at - before.at, 1e-6)
    earlier = {module["name"]: module for module in before.status["modules"]}
    clock = SystemClock().now()
    modules = []
    for module in now.status["modules"]:
        counted = {}
        for name, backend in module.get("backends", {}).items():
            old = earlier.get(module["name"], {}).get("backends", {}).get(name, {})
            grown = {key: backend[key] - old.get(key, 0) for key in ("requests", "failures")}
            counted[name] = {
                "healthy": backend["healthy"],
                **{k: round((v if v >= 0 else backend[k]) / seconds, 1) for k, v in grown.items()},
            }
        modules.append(
            {
                "name": module["name"],
                "status": module["status"],
                "description": module_text(module, clock),
                "requestsPerSecond": round(sum(c["requests"] for c in counted.values()), 1),
                "failuresPerSecond": round(sum(c["failures"] for c in counted.values()), 1),
                "backends": counted,
            }
        )
    return {
        "device": now.status["device"],
        "deployment": now.status["deployment"],
        "modules": modules,
        "memory": dict(now.memory),
        "fabric": _fabric(before.status.get("fabric"), now.status.get("fabric")),
    }


def _fabric(
    before: Mapping[str, Any] | None, now: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """The FPGA between two samples; None without one. `busy` is a share of the time."""
    if now is None:
        return None
    if not now.get("up"):
        return {"up": False}
    earlier = before or {}
    # Its counters begin anew with its process.
    same = earlier.get("pid") == now.get("pid")

    def grown(*keys: str) -> float:
        return float(sum(now.get(key, 0) - earlier.get(key, 0) for key in keys))

    # What it tells is up to a second old: its own clock says how long it was.
    passed = grown("uptimeSeconds")
    rate = 1 / passed if passed > 0 else 0.0
    configured = grown("reconfigurations", "partialReconfigurations")
    return {
        "up": True,
        "loaded": now.get("loaded"),
        "trouble": now.get("trouble"),
        "busy": round(min(1.0, grown("busySeconds") * rate), 3) if same else None,
        "requestsPerSecond": round(grown("requests") * rate, 1) if same else None,
        "configurationsPerSecond": round(configured * rate, 1) if same else None,
        "queued": now.get("queued", 0),
        "temperatures": dict(now.get("temperatures") or {}),
    }


def fabric_line(fabric: Mapping[str, Any]) -> str:
    """The FPGA in one line."""
    if not fabric["up"]:
        return "fpga: the fabric process does not answer"
    parts = [fabric["loaded"] or "nothing loaded"]
    if fabric["busy"] is not None:
        parts += [
            f"{100 * fabric['busy']:.0f} % busy",
            f"{fabric['requestsPerSecond']:.1f} requests/s",
            f"{fabric['configurationsPerSecond']:.1f} configurations/s",
        ]
    if fabric["queued"]:
        parts.append(f"{fabric['queued']} in line")
    parts += [f"{name} {value:.0f} °C" for name, value in sorted(fabric["temperatures"].items())]
    if fabric["trouble"] is not None:
        parts.append(f"sick: {fabric['trouble']}")
    return f"fpga: {', '.join(parts)}"


def _head(found: Mapping[str, Any]) -> str:
    about = found["deployment"]
    deployment = f"deployment {about['generation']} {about['phase']}" if about else "no deployment"
    memory = ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in found["memory"].items())
    head = f"{found['device']}: {deployment}; {memory or 'no process here'}"
    fabric = found.get("fabric")
    return head if fabric is None else f"{head}\n{fabric_line(fabric)}"


def _cells(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            module["name"],
            module["status"],
            f"{module['requestsPerSecond']:.1f}",
            f"{module['failuresPerSecond']:.1f}",
            ", ".join(
                f"{name} {backend['requests']:.1f}/s" if backend["healthy"] else f"{name} away"
                for name, backend in module["backends"].items()
            ),
            module["description"],
        )
        for module in found["modules"]
    ]


_TITLES = ("NAME", "STATUS", "REQ/S", "FAIL/S", "BACKENDS", "DESCRIPTION")


def _text(found: Mapping[str, Any]) -> str:
    rows = [_TITLES, *_cells(found)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_TITLES))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([_head(found), "", *(line.rstrip() for line in lines)])


def _table(found: Mapping[str, Any]) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from .status import COLOURS

    table = Table(box=None, pad_edge=False)
    for title in _TITLES:
        table.add_column(title, justify="right" if title.endswith("/S") else "left")
    for cells in _cells(found):
        texts = [Text(cell) for cell in cells]
        texts[1].stylize(COLOURS.get(cells[1], ""))
        table.add_row(*texts)
    return Group(Text(_head(found)), Text(""), table)
