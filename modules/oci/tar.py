"""Tar archives of image layers: a writer whose bytes depend on nothing but names and contents, and
a strict streaming reader.

Not `tarfile`: what it writes changed between Python versions, and what it reads from untrusted
archives needed several security fixes (unbounded header reads, endless loops, links) that the
Python of a board may lack. Source: POSIX.1-2017 pax (ustar and extended headers), GNU 'L' names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from ..errors import InvalidImage

BLOCK = 512
_CHUNK = 1024 * 1024
_MAX_EXTENSION = 64 * 1024
_FILE, _DIRECTORY = b"0", b"5"
_TYPES = {
    b"\0": "file",
    b"0": "file",
    b"7": "file",
    b"1": "hard link",
    b"2": "symbolic link",
    b"3": "character device",
    b"4": "block device",
    b"5": "directory",
    b"6": "FIFO",
    b"S": "sparse file",
}


@dataclass(frozen=True, slots=True)
class TarEntry:
    """`kind` is "file", "directory", or what else the archive holds, in words. Size in bytes."""

    name: str
    kind: str
    size: int


def file_header(name: str, size: int) -> bytes:
    """Header of a regular file: root's, mode 0644, 1970."""
    return _header(name, size, _FILE, 0o644)


def directory_header(name: str) -> bytes:
    """Header of a directory: root's, mode 0755, 1970."""
    return _header(name.rstrip("/") + "/", 0, _DIRECTORY, 0o755)


def padding(size: int) -> bytes:
    """Zeros after `size` bytes of contents."""
    return bytes(-size % BLOCK)


END = bytes(2 * BLOCK)


def _header(name: str, size: int, kind: bytes, mode: int) -> bytes:
    raw = name.encode()
    records = {}
    if len(raw) > 100 or not name.isascii():
        records["path"] = name
        raw = raw[:100]
    if size >= 8**11:
        records["size"] = str(size)
    extended = b""
    if records:
        body = b"".join(_pax_record(key, value) for key, value in records.items())
        extended = _ustar(b"././@PaxHeader", len(body), b"x", 0o644) + body + padding(len(body))
    return extended + _ustar(raw, 0 if size >= 8**11 else size, kind, mode)


def _pax_record(key: str, value: str) -> bytes:
    record = f" {key}={value}\n".encode()
    length = len(record)
    while len(str(length)) + len(record) != length:
        length = len(str(length)) + len(record)
    return str(length).encode() + record


def _ustar(name: bytes, size: int, kind: bytes, mode: int) -> bytes:
    head = name.ljust(100, b"\0") + b"%07o\0%07o\0%07o\0%011o\0%011o\0" % (mode, 0, 0, size, 0)
    tail = kind + bytes(100) + b"ustar\x0000" + bytes(64) + b"0000000\x000000000\0" + bytes(167)
    checksum = sum(head) + 8 * ord(" ") + sum(tail)
    return head + b"%06o\0 " % checksum + tail


def read_tar(
    source: BinaryIO, what: str, max_entries: int
) -> Iterator[tuple[TarEntry, Iterator[bytes]]]:
    """Entries of an archive and their contents, which may be left unread.

    `what` names the archive in errors. Reads to the end-of-archive mark. Raises InvalidImage.
    """
    read = _reader(source, what)
    extension: dict[str, str] = {}
    count = 0
    while True:
        block = read(BLOCK)
        if not any(block):
            return
        count += 1
        if count > max_entries:
            raise InvalidImage(f"{what}: more than {max_entries} entries; use fewer files")
        kind = block[156:157]
        size = _number(block[124:136], what)
        _verify_checksum(block, what)
        if kind in b"xgL":
            if size > _MAX_EXTENSION:
                raise InvalidImage(f"{what}: an extended header of {size} bytes")
            body = read(size)
            read(-size % BLOCK)
            if kind == b"x":
                extension |= _pax(body, what)
            elif kind == b"L":
                extension["path"] = _text(body.rstrip(b"\0"), what)
            continue
        name = extension.get("path") or _name(block, what)
        if any(key.startswith("GNU.sparse.") for key in extension):
            kind = b"S"
        if "size" in extension:
            if not extension["size"].isdecimal() or len(extension["size"]) > 18:
                raise InvalidImage(f"{what}: {name!r}: a size of {extension['size'][:30]!r}")
            size = int(extension["size"])
        extension = {}
        # Only files have contents: a size in another header counts for nothing.
        word = _TYPES.get(kind, f"entry of type {kind!r}")
        size = size if word not in ("directory", "hard link", "symbolic link") else 0
        contents = _contents(read, size)
        yield TarEntry(name, word, size), contents
        for _ in contents:
            pass
        read(-size % BLOCK)


def _reader(source: BinaryIO, what: str) -> Callable[[int], bytes]:
    def read(size: int) -> bytes:
        data = source.read(size)
        while len(data) < size:
            more = source.read(size - len(data))
            if not more:
                raise InvalidImage(f"{what}: the archive ends early; build the image again")
            data += more
        return data

    return read


def _contents(read: Callable[[int], bytes], size: int) -> Iterator[bytes]:
    while size:
        chunk = read(min(size, _CHUNK))
        size -= len(chunk)
        yield chunk


def _verify_checksum(block: bytes, what: str) -> None:
    actual = sum(block[:148]) + 8 * ord(" ") + sum(block[156:])
    if _number(block[148:156], what) != actual:
        raise InvalidImage(f"{what}: not a tar archive (wrong header checksum)")


def _number(field: bytes, what: str) -> int:
    if field[0] == 0x80:  # GNU: big-endian binary for what octal digits cannot hold
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    if any(digit not in b"01234567" for digit in digits):
        raise InvalidImage(f"{what}: not a tar archive (a number is {field!r})")
    return int(digits or b"0", 8)


def _name(block: bytes, what: str) -> str:
    name = block[:100].partition(b"\0")[0]
    prefix = block[345:500].partition(b"\0")[0] if block[257:263] == b"ustar\0" else b""
    return _text(prefix + b"/" + name if prefix else name, what)


def _text(raw: bytes, what: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidImage(f"{what}: the name {raw[:60]!r} is not UTF-8") from None


def _pax(body: bytes, what: str) -> dict[str, str]:
    records: dict[str, str] = {}
    while body:
        length_text, _, _ = body.partition(b" ")
        length = int(length_text) if length_text.isdigit() and len(length_text) < 6 else 0
        record = body[len(length_text) + 1 : length]
        if not len(length_text) + 3 <= length <= len(body) or not record.endswith(b"\n"):
            raise InvalidImage(f"{what}: a malformed extended header")
        key, _, value = record[:-1].partition(b"=")
        records[_text(key, what)] = "" if key not in (b"path", b"size") else _text(value, what)
        body = body[length:]
    return records
