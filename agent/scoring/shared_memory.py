"""Triton's system shared memory extension: tensors that lie in POSIX shared memory.

Regions are read and written with system calls instead of being mapped: a client that shortens its
object while it is registered then gets an error, where a mapping would end this process.
Source: Triton Inference Server, "Shared-Memory Extension".
"""

from __future__ import annotations

import os
import re
import stat
import threading
from dataclasses import dataclass
from pathlib import Path

from .errors import Code, ScoringError

# Where shm_open keeps its objects on Linux.
FOLDER = Path("/dev/shm")
MOST_REGIONS = 128
MOST_BYTES = 1024 * 1024 * 1024

_KEY = re.compile(r"/*([A-Za-z0-9_-][A-Za-z0-9._-]{0,253})", re.ASCII)
_LONGEST_NAME = 256


@dataclass(frozen=True, slots=True)
class Region:
    """`byte_size` bytes from `offset` on in the object `key` of shm_open."""

    name: str
    key: str
    offset: int
    byte_size: int


class _Open:
    def __init__(self, region: Region, descriptor: int) -> None:
        self.region = region
        self.descriptor = descriptor
        # A descriptor must not be closed, and its number reused, during a read.
        self.lock = threading.Lock()
        self.closed = False

    def close(self) -> None:
        with self.lock:
            if not self.closed:
                self.closed = True
                os.close(self.descriptor)


class SharedMemory:
    """The regions that clients registered. Thread-safe."""

    def __init__(
        self,
        most_bytes: int = MOST_BYTES,
        most_regions: int = MOST_REGIONS,
        folder: Path = FOLDER,
    ) -> None:
        """`most_bytes`: of all regions together; 0 refuses every region."""
        self._most_bytes = most_bytes
        self._most_regions = most_regions
        self._folder = folder
        self._lock = threading.Lock()
        self._open: dict[str, _Open] = {}

    def register(self, name: str, key: str, offset: int, byte_size: int) -> None:
        """Raises ScoringError INVALID_ARGUMENT, NOT_FOUND or RESOURCE_EXHAUSTED."""
        if not 1 <= len(name) <= _LONGEST_NAME or not name.isprintable():
            raise _invalid(name, f"name it with 1 to {_LONGEST_NAME} printable characters")
        match = _KEY.fullmatch(key)
        if match is None:
            raise _invalid(
                name,
                f"the key {key[:80]!r} is not a name of shm_open: '/' and then letters, digits, "
                "'.', '_' and '-', not led by '.'",
            )
        if byte_size < 1:
            raise _invalid(name, "it must have 1 byte or more")
        descriptor = self._descriptor(name, key, match[1])
        try:
            self._add(Region(name, key, offset, byte_size), descriptor)
        except ScoringError:
            os.close(descriptor)
            raise

    def _descriptor(self, name: str, key: str, file: str) -> int:
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            return os.open(self._folder / file, flags)
        except FileNotFoundError:
            raise ScoringError(
                Code.NOT_FOUND,
                f"shared memory region {name!r}: there is no object {key!r} on this device; "
                "create it before registering it",
            ) from None
        except OSError as error:
            raise _invalid(
                name, f"the object {key!r} cannot be opened ({error.strerror})"
            ) from None

    def _add(self, region: Region, descriptor: int) -> None:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise _invalid(region.name, f"the object {region.key!r} is not shared memory")
        if region.offset + region.byte_size > status.st_size:
            raise _invalid(
                region.name,
                f"{region.byte_size} bytes from {region.offset} on do not fit into the "
                f"{status.st_size} bytes of {region.key!r}",
            )
        with self._lock:
            if region.name in self._open:
                raise _invalid(region.name, "it is registered already; unregister it first")
            used = sum(one.region.byte_size for one in self._open.values())
            if len(self._open) >= self._most_regions or used + region.byte_size > self._most_bytes:
                raise ScoringError(
                    Code.RESOURCE_EXHAUSTED,
                    f"shared memory region {region.name!r}: {len(self._open)} regions with {used} "
                    f"bytes are registered, allowed are {self._most_regions} with "
                    f"{self._most_bytes}; unregister some",
                )
            self._open[region.name] = _Open(region, descriptor)

    def unregister(self, name: str = "") -> None:
        """Forget one region, or all of them; one that is not registered is no error."""
        with self._lock:
            names = [name] if name else list(self._open)
            gone = [self._open.pop(one) for one in names if one in self._open]
        for one in gone:
            one.close()

    def regions(self, name: str = "") -> tuple[Region, ...]:
        """One region, or all of them. Raises ScoringError NOT_FOUND."""
        if name:
            return (self._find(name).region,)
        with self._lock:
            return tuple(one.region for one in self._open.values())

    def read(self, name: str, offset: int, byte_size: int) -> bytes:
        """A copy of `byte_size` bytes from `offset` on. Raises ScoringError."""
        one = self._within(name, offset, byte_size)
        with one.lock:
            if one.closed:
                raise _unknown(name)
            data = os.pread(one.descriptor, byte_size, one.region.offset + offset)
        if len(data) != byte_size:
            raise _invalid(name, "its object became shorter after it was registered")
        return data

    def write(self, name: str, offset: int, byte_size: int, data: bytes) -> None:
        """Put `data` at `offset`, where `byte_size` bytes are set aside. Raises ScoringError."""
        one = self._within(name, offset, byte_size)
        if len(data) > byte_size:
            raise _invalid(
                name, f"the output has {len(data)} bytes, set aside are {byte_size}; give more"
            )
        start = one.region.offset + offset
        with one.lock:
            if one.closed:
                raise _unknown(name)
            # Writing behind its end would make the object longer.
            if os.fstat(one.descriptor).st_size < start + len(data):
                raise _invalid(name, "its object became shorter after it was registered")
            written = os.pwrite(one.descriptor, data, start)
        if written != len(data):
            raise _invalid(name, "its object became shorter after it was registered")

    def _within(self, name: str, offset: int, byte_size: int) -> _Open:
        one = self._find(name)
        if offset < 0 or byte_size < 0 or offset + byte_size > one.region.byte_size:
            raise _invalid(
                name,
                f"{byte_size} bytes from {offset} on do not lie in its "
                f"{one.region.byte_size} bytes",
            )
        return one

    def _find(self, name: str) -> _Open:
        with self._lock:
            one = self._open.get(name)
        if one is None:
            raise _unknown(name)
        return one


def _unknown(name: str) -> ScoringError:
    return ScoringError(
        Code.NOT_FOUND, f"shared memory region {name!r} is not registered; register it first"
    )


def _invalid(name: str, what: str) -> ScoringError:
    return ScoringError(Code.INVALID_ARGUMENT, f"shared memory region {name[:80]!r}: {what}")
