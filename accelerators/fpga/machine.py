"""What the machine tells about its fabric: who holds it, what was put in, how much memory."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import IO, Any

from ..errors import BackendUnavailable

_OLD_STATE = "global_pl_state.json"
_STATE_LIMIT = 1 << 20


def take_lock(path: Path) -> IO[str]:
    """An open file with an exclusive flock. Raises BackendUnavailable naming who has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+", encoding="ascii")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        holder = file.read(32).strip() or "unknown"
        file.close()
        raise BackendUnavailable(
            f"the fabric belongs to process {holder} ({path} is locked); end that one first"
        ) from error
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def state_file(device: Any) -> Path | None:
    """Where pynq notes, for all processes, what the fabric was configured with last."""
    if hasattr(device, "state_file"):
        return Path(device.state_file) if device.state_file is not None else None
    try:
        import pynq.pl_server.global_state as global_state
    except ImportError:  # before pynq 3
        return None
    # pynq 3.0 has one such file; later ones have one per kind of device, with "" for this one.
    name = "global_pl_state_.json" if hasattr(global_state, "_get_state_path") else _OLD_STATE
    return Path(global_state.STATE_DIR) / name


def noted(state: Path | None) -> str | None:
    """Which bitstream `state` names, None where there is no note that can be read."""
    if state is None:
        return None
    try:
        with state.open("rb") as file:
            document = json.loads(file.read(_STATE_LIMIT))
    except (OSError, ValueError):
        return None
    name = document.get("bitfile_name") if isinstance(document, dict) else None
    return name if isinstance(name, str) and name else None


def mark_of(state: Path | None) -> tuple[int, int] | None:
    """What changes whenever the note in `state` does."""
    if state is None:
        return None
    try:
        status = state.stat()
    except OSError:
        return None
    return (status.st_ino, status.st_mtime_ns)


def cma_bytes(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Contiguous memory of this machine in bytes, None where the kernel does not say."""
    try:
        text = meminfo.read_text("ascii", "replace")
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith("CmaTotal:"):
            kib = line.split()[1]
            return int(kib) * 1024 or None if kib.isdecimal() else None
    return None
