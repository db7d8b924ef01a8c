"""`gatelet demo`: runs the demo and prints its table."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ...agent.cli.command import CommandError, add_json_option, print_json
from .device import DemoError

if TYPE_CHECKING:
    from rich.table import Table

    from .run import Row


TABLE_WIDTH = 132


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "demo",
        help="the whole agent at work on a simulated site",
        description="Starts a simulated site and an agent, deploys three versions of a digits "
        "classifier over IoT Hub and MQTT, scores on CPU and FPGA, and breaks things on purpose.",
    )
    parser.add_argument(
        "--dir", type=Path, help="keep the logs and state here (default: a folder that is removed)"
    )
    add_json_option(parser)
    parser.set_defaults(run=_demo)


def _demo(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from .run import run_demo

    console = Console(stderr=True, quiet=arguments.json)
    started = time.perf_counter()
    try:
        with console.status("starting") as spinner:

            def announce(text: str) -> None:
                spinner.update(text)
                if not console.is_terminal:
                    console.print(f"... {text}")

            def on_row(row: Row) -> None:
                console.print(f"[green]ok[/green]  {row.step}: {row.happened}", highlight=False)

            rows = run_demo(announce, on_row, arguments.dir)
    except DemoError as error:
        raise CommandError(f"the demo stopped: {error}") from error
    took = time.perf_counter() - started
    failures = sum(row.failures for row in rows)
    if arguments.json:
        print_json({"seconds": took, "failures": failures, "rows": [asdict(row) for row in rows]})
    else:
        # A pipe or a file has no width; a table squeezed into 80 columns would say nothing.
        terminal = Console()
        width = None if terminal.is_terminal else TABLE_WIDTH
        Console(width=width).print(_table(rows, took))
    if failures:
        print(f"gatelet: {failures} requests failed", file=sys.stderr)
    return 1 if failures else 0


def _table(rows: list[Row], took: float) -> Table:
    from rich.table import Table

    table = Table(title=f"gatelet demo, {took:.1f} s", title_justify="left")
    table.add_column("step", no_wrap=True)
    table.add_column("what happened", overflow="fold", ratio=1, min_width=30)
    for name in ("seconds", "accuracy", "requests", "failures", "p50 ms", "p99 ms"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        sent = row.requests > 0
        table.add_row(
            row.step,
            row.happened,
            f"{row.seconds:.2f}",
            "" if row.accuracy is None else f"{row.accuracy:.1%}",
            str(row.requests) if sent else "",
            str(row.failures) if sent else "",
            "" if row.p50_ms is None else f"{row.p50_ms:.2f}",
            "" if row.p99_ms is None else f"{row.p99_ms:.2f}",
        )
    return table
