"""Bitstreams as they lie in packages: .bit or .bin, plain or compressed (.gz, .xz).

Compressed ones are expanded as a stream with a bound: by what the part takes where that is known,
and never in memory as a whole. Hash and size are those of the expanded bitstream, so that a package
stays the same whether it is compressed or not.
"""

from __future__ import annotations

import hashlib
import lzma
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from ..errors import LoadError
from .bitfile import HEADER_LIMIT, read_header

FORMATS = (".bit", ".bin")
COMPRESSIONS = (".gz", ".xz")
BITSTREAM_LIMIT = 256 << 20
_CHUNK = 256 << 10
# xz -9 takes 65 MiB; a file that asks for more was not made by it.
_XZ_MEMORY = 80 << 20
# A full configuration in bytes, for parts of boards that PYNQ runs on. Sources: UG585, "Bitstream
# Length" (7 series); the length that Vivado writes for the others.
_FULL_CONFIGURATION = {
    "7z007s": 2_083_740, "7z010": 2_083_740, "7z014s": 4_045_564, "7z020": 4_045_564,
    "7z030": 5_979_916, "7z035": 13_321_404, "7z045": 13_321_404, "7z100": 17_416_348,
    "zu2eg": 5_568_668, "zu3eg": 5_568_668, "zu7ev": 19_311_092, "zu9eg": 26_510_780,
    "k26": 7_797_692,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Scanned:
    """A bitstream that was read to its end: `part` None for a .bin, which has no header."""

    part: str | None
    sha256: str
    size: int


def plain_name(path: Path) -> str:
    """The name of the file without its compression: finn-accel.bit of finn-accel.bit.xz."""
    return path.name[: -len(path.suffix)] if path.suffix in COMPRESSIONS else path.name


def is_bitstream(path: Path, form: str = ".bit") -> bool:
    """Whether the file is called like a bitstream of this form."""
    return plain_name(path).endswith(form)


def stem_of(path: Path) -> str:
    """The name that the handoff shares: finn-accel of finn-accel.bit.xz."""
    return Path(plain_name(path)).stem


def expanded_limit(part: str | None) -> int:
    """How many bytes a bitstream for `part` may have once it is expanded.

    A quarter above a full configuration: debug bitstreams check every frame.
    """
    device = (part or "").lower().removeprefix("xc")
    full = next((n for name, n in _FULL_CONFIGURATION.items() if device.startswith(name)), None)
    return BITSTREAM_LIMIT if full is None else full + full // 4 + HEADER_LIMIT


def scan(path: Path, into: BinaryIO | None = None, part: str | None = None) -> Scanned:
    """Read a bitstream to its end, expanded, and write it to `into` where given.

    `part` is what a .bin is said to be for. Raises LoadError when it is damaged, or larger than
    its part takes; OSError comes from `into` alone.
    """
    compressed = path.suffix in COMPRESSIONS
    digest = hashlib.sha256()
    size = 0
    head = b""
    header = None
    limit = expanded_limit(part) if compressed else BITSTREAM_LIMIT
    for chunk in _expanded(path):
        digest.update(chunk)
        size += len(chunk)
        if is_bitstream(path) and header is None:
            head += chunk
            if len(head) >= HEADER_LIMIT:
                header = read_header(head, str(path))
                limit = expanded_limit(header.part) if compressed else limit
        if size > limit:
            raise LoadError(
                f"{path}: expands to more than {limit} bytes, which no bitstream for "
                f"{(header.part if header else part) or 'any part'} has"
            )
        if into is not None:
            into.write(chunk)
    if is_bitstream(path):
        header = header or read_header(head, str(path))
        if size != header.offset + header.length:
            raise LoadError(
                f"{path}: not a valid .bit file ({size - header.offset} bytes of data where the "
                f"header says {header.length}); copy it again from the Vivado project"
            )
        part = header.part
    elif size == 0 or size % 4:
        raise LoadError(f"{path}: {size} bytes are no configuration data, which has whole words")
    return Scanned(part if header else None, digest.hexdigest(), size)


class _Decompressor(Protocol):
    """What zlib's and lzma's have in common."""

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...


_Feed = Callable[[bytes], Iterator[bytes]]


def _gzip() -> tuple[_Decompressor, _Feed]:
    decompressor = zlib.decompressobj(wbits=31)

    def feed(data: bytes) -> Iterator[bytes]:
        while data and not decompressor.eof:
            yield decompressor.decompress(data, _CHUNK)
            data = decompressor.unconsumed_tail

    return decompressor, feed


def _xz() -> tuple[_Decompressor, _Feed]:
    decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)

    def feed(data: bytes) -> Iterator[bytes]:
        yield decompressor.decompress(data, _CHUNK)
        while not (decompressor.eof or decompressor.needs_input):
            yield decompressor.decompress(b"", _CHUNK)

    return decompressor, feed


def _expanded(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            chunks = iter(lambda: file.read(_CHUNK), b"")
            if path.suffix in COMPRESSIONS:
                yield from _decompressed(path, chunks)
            else:
                yield from chunks
    except OSError as error:
        raise LoadError(f"{path}: {error.strerror or error}; the package is incomplete") from error
    except ValueError as error:
        raise LoadError(f"{str(path)!r}: no name of a file ({error})") from error


def _decompressed(path: Path, chunks: Iterator[bytes]) -> Iterator[bytes]:
    decompressor, feed = _gzip() if path.suffix == ".gz" else _xz()
    try:
        for chunk in chunks:
            if decompressor.eof:
                raise LoadError(f"{path}: goes on after the end of its compressed data")
            yield from feed(chunk)
    except (zlib.error, lzma.LZMAError) as error:
        raise LoadError(f"{path}: not valid {path.suffix[1:]} data ({error})") from error
    if not decompressor.eof:
        raise LoadError(f"{path}: the compressed data is cut off")
    if decompressor.unused_data:
        raise LoadError(f"{path}: goes on after the end of its compressed data")
