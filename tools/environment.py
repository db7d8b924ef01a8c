"""Make .venv and install gatelet with some extra: `python3 tools/environment.py demo`.

Standard library only, and syntax that Python 3.8 reads, so that an old one can say what it lacks.
"""

from __future__ import annotations

import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
LOG = VENV / "install.log"
OLDEST, FPGA_NEWEST, NEWEST = (3, 10), (3, 12), (3, 13)
TAIL = 25

# pip before 23.1 installs source packages without wheels, one slow step each. pynqutils limits
# setuptools, and what it limits to also builds every source package here: no isolated builds.
BUILD_TOOLS = ["pip>=24", "setuptools>=70,<=80", "wheel"]

# The stubs of tritonclient need a newer grpcio than the one that pynq 4.0.0 demands, yet pynq runs
# with it; a resolver would fall back to an old pynq, so these go past it.
UNRESOLVED = {"dev": ["grpcio>=1.67.1,<1.68", "tritonclient>=2.52,<2.67", "python-rapidjson"]}


class Refused(Exception):
    """The message says what is missing and how to get it."""


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, check=False, capture_output=True, text=True)


def find_interpreter() -> str:
    """The interpreter to use: $PYTHON, else one that pynq supports, else any that gatelet does."""
    wanted = os.environ.get("PYTHON")
    names = [wanted] if wanted else ["python3", "python3.12", "python3.11", "python3.10"]
    names += [] if wanted else ["python3.13"]
    found: dict[str, tuple[tuple[int, ...], bool]] = {}
    for name in names:
        path = shutil.which(name)
        if path is None:
            continue
        probe = "import sys; print(*sys.version_info[:2]); import ensurepip, venv"
        # A version manager's stand-in exists for versions that it does not have.
        result = run([path, "-c", probe])
        if result.stdout:
            version = tuple(int(part) for part in result.stdout.split())
            found[name] = (version, result.returncode == 0)
    fitting = {name: it for name, it in found.items() if OLDEST <= it[0] <= NEWEST}
    complete = [name for name, it in fitting.items() if it[1]]
    if complete:
        return min(complete, key=lambda name: fitting[name][0] > FPGA_NEWEST)
    if fitting:
        has = ".".join(map(str, next(iter(fitting.values()))[0]))
        raise Refused(
            f"Python {has} cannot make environments here: its venv package is missing.\n"
            f"  apt-get install python{has}-venv    (Debian and Ubuntu)"
        )
    seen = ", ".join(f"{name} is {it[0][0]}.{it[0][1]}" for name, it in found.items())
    raise Refused(
        f"gatelet needs Python 3.10 to 3.13; {seen or 'no such program was found'}.\n"
        "  apt-get install python3 python3-venv    or    make PYTHON=/path/to/python3.11 ..."
    )


def make_environment() -> None:
    """Create .venv unless there is a working one."""
    python = VENV / "bin" / "python"
    probe = "import sys, pip; sys.exit(sys.version_info < (3, 10))"
    if python.exists() and run([str(python), "-c", probe]).returncode == 0:
        return
    interpreter = find_interpreter()
    print(f"Creating .venv with {shutil.which(interpreter)}", flush=True)
    subprocess.run([interpreter, "-m", "venv", "--clear", str(VENV)], check=True)
    run_pip("preparing", ["--upgrade", *BUILD_TOOLS])


def run_pip(title: str, arguments: list[str]) -> None:
    """`pip install` with one line of progress; everything it says goes to install.log."""
    command = [str(VENV / "bin" / "python"), "-m", "pip", "install", "--progress-bar", "off"]
    environment = dict(os.environ, PIP_DISABLE_PIP_VERSION_CHECK="1", PYTHONUNBUFFERED="1")
    environment["PIP_ROOT_USER_ACTION"] = "ignore"
    process = subprocess.Popen(
        command + arguments,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    lines: queue.Queue[str | None] = queue.Queue()
    reader = threading.Thread(target=_feed, args=(process.stdout, lines), daemon=True)
    reader.start()
    progress = Progress(title)
    tail: list[str] = []
    with LOG.open("a", encoding="utf-8") as log:
        line: str | None = ""
        while line is not None:
            try:
                line = lines.get(timeout=0.5)
            except queue.Empty:
                progress.draw()
                continue
            if line is not None:
                log.write(line)
                tail = [*tail[-TAIL:], line]
                progress.see(line)
    progress.end()
    if process.wait() != 0:
        raise Refused(f"pip failed (all of it: {LOG.relative_to(ROOT)}):\n  " + "  ".join(tail))


def _feed(stream: Iterable[str], lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


class Progress:
    """What pip is doing: one line that changes on a terminal, a line per phase elsewhere."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._phase, self._detail, self._packages = "", "", 0
        self._started = time.monotonic()
        self._live = sys.stdout.isatty()

    def see(self, line: str) -> None:
        words = line.split()
        if line.startswith("Collecting "):
            self._packages += 1
            self._enter("resolving", words[1])
        elif words[:1] in (["Downloading"], ["Using"]):
            self._enter("downloading", " ".join(words[1:]))
        elif line.startswith("Building wheels"):
            self._enter("building", " ".join(words[5:]))
        elif line.startswith("Installing collected"):
            self._enter("installing", f"{len(words) - 3} packages")
        self.draw()

    def _enter(self, phase: str, detail: str) -> None:
        # Resolving and downloading alternate: one phase to a log.
        same = {phase, self._phase} <= {"resolving", "downloading"}
        changed, self._phase, self._detail = phase != self._phase and not same, phase, detail
        if changed and not self._live:
            detail = "" if phase == "resolving" else f" {detail}"
            print(f"  {self._title}: {phase}{detail}", flush=True)

    def draw(self) -> None:
        if self._live:
            text = f"  {self._title}, {self._seconds()}: {self._packages} packages, "
            text += f"{self._phase} {self._detail}"
            print("\r\033[K" + text[: shutil.get_terminal_size().columns - 1], end="", flush=True)

    def end(self) -> None:
        print(
            ("\r\033[K" if self._live else "") + f"  {self._title}: {self._seconds()}", flush=True
        )

    def _seconds(self) -> str:
        return f"{time.monotonic() - self._started:.0f} s"


def main(extra: str) -> int:
    try:
        make_environment()
        print(f"Installing gatelet[{extra}] and what it needs (one to two minutes)", flush=True)
        run_pip("gatelet", ["--no-build-isolation", "--editable", f".[{extra}]"])
        if extra in UNRESOLVED:
            run_pip("beyond the resolver", ["--no-deps", *UNRESOLVED[extra]])
    except Refused as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    probe = "import sys; print(*sys.version_info[:2])"
    version = run([str(VENV / "bin" / "python"), "-c", probe]).stdout.split()
    if tuple(map(int, version)) > FPGA_NEWEST:
        print(
            f"Python {'.'.join(version)} has no pynq, so everything runs on the CPU.\n"
            "For the FPGA steps: make clean, then make PYTHON=python3.12 ... (3.10 to 3.12)"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
