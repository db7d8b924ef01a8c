"""How long each process of a device takes to be ready after `gatelet run`, and its memory then.

    python tests/bench/bench_processes.py

All three start at once and share the machine, as on a device. Memory is PSS and RSS from
/proc/PID/smaps_rollup (proc(5)), in MiB: idle after the start, and after scoring all digits
on the fabric.
"""

from __future__ import annotations

import json
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gatelet.simulator.demo.cloud import HubOperator, deployment
from gatelet.simulator.demo.device import Device, running_device
from gatelet.simulator.demo.run import Client, push

ROLES = ("agent", "scoring", "fabric")
STARTS = 5


def memory(pid: int) -> tuple[float, float]:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    pss, rss = (
        int(re.search(rf"^{name}:\s+(\d+) kB", text, re.M)[1]) / 1024 for name in ("Pss", "Rss")
    )
    return pss, rss


def connects(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


def start_seconds(config: Path, run_dir: Path) -> dict[str, float]:
    """Seconds from the start of `gatelet run` until each process's socket accepts."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "gatelet.agent.main", "run", "--config", str(config)],
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    ready: dict[str, float] = {}
    try:
        while len(ready) < len(ROLES) and time.perf_counter() - began < 30:
            for role in ROLES:
                if role not in ready and connects(run_dir / f"{role}.sock"):
                    ready[role] = time.perf_counter() - began
            time.sleep(0.002)
    finally:
        process.terminate()
        process.wait()
    return ready


def main() -> None:
    table: dict[str, dict[str, Any]] = {role: {} for role in ROLES}
    with tempfile.TemporaryDirectory(prefix="gatelet-bench-") as name:
        folder = Path(name)
        (folder / "agent.toml").write_text(
            f'[device]\nstate-dir = "{name}/s"\nrun-dir = "{name}/r"\nboard = "pynq-z2"\n'
            '[scoring]\ngrpc-address = "127.0.0.1:0"\n'
            'http-address = "127.0.0.1:0"\nmetrics-address = "127.0.0.1:0"\n'
            '[fabric]\ndevice = "gatelet.simulator.board"\n'
        )
        starts = [start_seconds(folder / "agent.toml", folder / "r") for _ in range(STARTS)]
    for role in ROLES:
        seconds = sorted(start[role] for start in starts if role in start)
        table[role]["start s"] = statistics.median(seconds)
    with (
        tempfile.TemporaryDirectory(prefix="gatelet-bench-") as name,
        running_device(Path(name)) as device,
    ):
        _note(table, device, "idle")
        image, _ = push(device, "v3")
        operator = HubOperator(device.site["hub"], device.site["device"])
        operator.set_modules(deployment(image, backends="fpga,cpu"))
        operator.until_reported(200)
        client = Client(device.grpc_address)
        client.send_all()
        client.close()
        _note(table, device, "busy")
    print(json.dumps(table) if "--json" in sys.argv else _text(table))


def _note(table: dict[str, dict[str, Any]], device: Device, when: str) -> None:
    processes = device.status()["processes"]
    for role in ROLES:
        pss, rss = memory(processes[role]["pid"])
        table[role][f"{when} PSS"], table[role][f"{when} RSS"] = pss, rss


def _text(table: dict[str, dict[str, Any]]) -> str:
    columns = list(table["agent"])
    lines = ["process  " + "  ".join(f"{column:>9}" for column in columns)]
    for role, values in table.items():
        lines.append(f"{role:8} " + "  ".join(f"{values[column]:9.2f}" for column in columns))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
