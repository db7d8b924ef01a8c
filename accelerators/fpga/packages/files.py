"""Reading what an unknown author wrote: bounded in size, depth and number."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import LoadError
from ..bitstream_file import COMPRESSIONS, is_bitstream, scan, stem_of
from ..handoff import Hardware, read_hardware
from ..package import Package, Port, Transport, batch_for

WEIGHTS_LIMIT = 64 << 20
TEXT_LIMIT = 4 << 20
_ENTRY_LIMIT = 4096
_DEPTH_LIMIT = 4


@dataclass(frozen=True, slots=True)
class Bitstream:
    """A bitstream with its handoff, read: `sha256` and `size` are of the expanded file.

    `part` is from the header of a .bit, and for a .bin from the handoff.
    """

    bit: Path
    hwh: Path
    part: str
    sha256: str
    size: int
    hardware: Hardware

    @property
    def stem(self) -> str:
        return stem_of(self.bit)

    def package(
        self,
        kind: str,
        directory: Path,
        transport: Transport,
        inputs: tuple[Port, ...],
        outputs: tuple[Port, ...],
        *,
        name: str = "",
        board: str | None = None,
        max_batch: int | None = None,
        clock_mhz: float | None = None,
    ) -> Package:
        """The package around this bitstream; by default it is called like it.

        `clock_mhz` is what else says it, should the handoff not.
        """
        return Package(
            kind=kind,
            name=name or self.stem,
            directory=directory,
            bit=self.bit,
            hwh=self.hwh,
            board=board,
            part=self.part,
            # What FINN, hls4ml and BNN-PYNQ build for unless told otherwise.
            clock_mhz=self.hardware.clock_mhz or clock_mhz or 100.0,
            transport=transport,
            inputs=inputs,
            outputs=outputs,
            max_batch=max_batch or batch_for((*inputs, *outputs)),
            sha256=self.sha256,
        )


def read_bytes(path: Path, limit: int) -> bytes:
    """The content of a file of at most `limit` bytes. Raises LoadError."""
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise LoadError(f"{path}: {error.strerror or error}; the package is incomplete") from error
    except ValueError as error:
        raise LoadError(f"{str(path)!r}: no name of a file ({error})") from error
    if len(content) > limit:
        raise LoadError(f"{path}: larger than {limit} bytes")
    return content


def read_text(path: Path, limit: int = TEXT_LIMIT) -> str:
    """A UTF-8 file. Raises LoadError."""
    try:
        return read_bytes(path, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise LoadError(f"{path}: byte {error.start} is not UTF-8") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises LoadError, for one nested too deeply as well."""
    text = read_text(path)
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LoadError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(document, dict):
        raise LoadError(f"{path}: holds no JSON object")
    return document


def sha256_of(path: Path, limit: int = WEIGHTS_LIMIT) -> str:
    return hashlib.sha256(read_bytes(path, limit)).hexdigest()


def list_files(directory: Path) -> list[Path]:
    """Files below `directory`, sorted; links are not followed. Raises LoadError."""
    found: list[Path] = []
    pending = [(directory, 0)]
    seen = 0
    while pending:
        folder, depth = pending.pop()
        try:
            entries = sorted(folder.iterdir())
        except OSError as error:
            raise LoadError(f"{folder}: {error.strerror}; expected a package directory") from error
        for entry in entries:
            seen += 1
            if seen > _ENTRY_LIMIT:
                raise LoadError(f"{directory}: more than {_ENTRY_LIMIT} entries; not a package")
            if entry.is_symlink():
                continue
            if entry.is_dir():
                if depth < _DEPTH_LIMIT:
                    pending.append((entry, depth + 1))
            else:
                found.append(entry)
    return sorted(found)


def read_bitstream(directory: Path, files: list[Path], preferred: str | None = None) -> Bitstream:
    """The one bitstream of a package and the .hwh beside it. Raises LoadError.

    A .bin counts where there is no .bit and a handoff of its name; parameters are called so too.
    """
    handoffs = {path.with_suffix("") for path in files if path.suffix == ".hwh"}
    bits = [path for path in files if is_bitstream(path)] or [
        path
        for path in files
        if is_bitstream(path, ".bin") and path.with_name(stem_of(path)) in handoffs
    ]
    if preferred is not None:
        bits = [path for path in bits if stem_of(path) == preferred] or bits
    # Beside the file it was made from, a compressed one says nothing new.
    bits = [p for p in bits if p.suffix not in COMPRESSIONS or p.with_suffix("") not in bits]
    if len(bits) != 1:
        names = ", ".join(str(path.relative_to(directory)) for path in bits[:5])
        raise LoadError(
            f"{directory}: {'no .bit file' if not bits else f'several .bit files ({names})'}; "
            "a package holds one bitstream"
        )
    bit = bits[0]
    hwh = bit.with_name(f"{stem_of(bit)}.hwh")
    if hwh not in files:
        others = ", ".join(path.name for path in files if path.suffix == ".hwh")
        raise LoadError(
            f"{bit}: {hwh.name} is missing beside it"
            + (f"; rename {others} to it" if others else "; copy it from the Vivado project")
        )
    hardware = read_hardware(hwh)
    found = scan(bit, part=hardware.part)
    part = found.part or hardware.part
    if part is None:
        raise LoadError(f"{bit}: a .bin names no part, and {hwh.name} does not either")
    return Bitstream(bit, hwh, part, found.sha256, found.size, hardware)
