"""Faults of the simulated fabric, switched on from outside through a file.

The file holds one JSON object and is read again at every transfer, so that a test can break a
fabric that runs in another process::

    {"fault": "hang"}                        the core swallows its input and gives nothing
    {"fault": "stuck"}                       the DMA never finishes reading
    {"fault": "error", "error": "decode"}    the DMA stops with internal, slave or decode error
    {"fault": "wrong-data"}                  one bit of every output byte is flipped
    {"fault": "bit-flip"}                    one bit of the whole output is flipped
    {"fault": "slow", "seconds": 0.2}        the transfer takes that long
    {"fault": "none"}                        (or no file) all is well

`"times": N` limits a fault to the next N transfers. A hung or stuck fabric stays so until the
bitstream is downloaded again.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

FAULTS_VARIABLE = "GATELET_SIM_FAULTS"
KINDS = ("none", "hang", "stuck", "error", "wrong-data", "bit-flip", "slow")
ERRORS = ("internal", "slave", "decode")


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong with a transfer; see the module. `times` 0 is without limit."""

    kind: str = "none"
    error: str = "internal"
    seconds: float = 0.0
    times: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"fault {self.kind!r} is none of {', '.join(KINDS)}")
        if self.error not in ERRORS:
            raise ValueError(f"error {self.error!r} is none of {', '.join(ERRORS)}")


def spoil(output: bytes, fault: Fault) -> bytes:
    """What a core gives under `fault` instead of `output`."""
    if fault.kind == "wrong-data":
        return bytes(byte ^ 0x01 for byte in output)
    if fault.kind == "bit-flip" and output:
        middle = len(output) // 2
        return output[:middle] + bytes([output[middle] ^ 0x10]) + output[middle + 1 :]
    return output


def write_fault(path: Path, fault: Fault) -> None:
    """Put `fault` into the control file, in one step for readers in other processes."""
    text = json.dumps(
        {
            "fault": fault.kind,
            "error": fault.error,
            "seconds": fault.seconds,
            "times": fault.times,
        }
    )
    beside = path.with_name(path.name + ".new")
    beside.write_text(text, "utf-8")
    beside.replace(path)


def parse_fault(text: str) -> Fault:
    """The fault in a control file. Raises ValueError."""
    document = json.loads(text)
    if not isinstance(document, dict):
        raise ValueError("a fault is a JSON object")
    return Fault(
        kind=str(document.get("fault", "none")),
        error=str(document.get("error", "internal")),
        seconds=float(document.get("seconds", 0.0)),
        times=int(document.get("times", 0)),
    )


class FaultFile:
    """Reads the control file at each transfer and counts limited faults down."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._seen: tuple[int, int] | None = None
        self._left = 0

    @classmethod
    def from_environment(cls) -> FaultFile:
        value = os.environ.get(FAULTS_VARIABLE)
        return cls(Path(value) if value else None)

    def next(self) -> Fault:
        """The fault of the transfer that starts now. Raises ValueError for a bad file."""
        if self._path is None:
            return Fault()
        try:
            with self._path.open("r", encoding="utf-8") as file:
                status = os.fstat(file.fileno())
                text = file.read()
        except FileNotFoundError:
            return Fault()
        try:
            fault = parse_fault(text)
        except ValueError as error:
            raise ValueError(f"{self._path}: {error}") from error
        version = (status.st_ino, status.st_mtime_ns)
        if version != self._seen:
            self._seen, self._left = version, fault.times
        if fault.times:
            if not self._left:
                return Fault()
            self._left -= 1
        return fault
