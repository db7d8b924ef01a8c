"""API keys of endpoints: two each, so that one can be replaced while clients use the other.

A file per endpoint, readable for its owner only. Source of the scheme: Azure ML, `get_keys` and
`regen_key`.
"""

from __future__ import annotations

import hmac
import os
import re
import secrets
import threading
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic

import msgspec

WHICH = ("primary", "secondary")
SHORTEST = 16
_BYTES = 24
# A key that was replaced may be taken for this long.
_FRESH_SECONDS = 1.0
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}", re.ASCII)


class KeysUnusable(Exception):
    """The keys of an endpoint cannot be read or written; the message says where and why."""


@dataclass(frozen=True, slots=True)
class Keys:
    primary: str
    secondary: str


@dataclass(frozen=True, slots=True)
class _Cached:
    keys: Keys | None
    stamp: tuple[int, int]
    looked: float


class KeyStore:
    """The keys below one folder. Thread-safe; other processes may change the files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._cache: dict[str, _Cached] = {}

    def show(self, endpoint: str) -> Keys:
        """The keys, made if there are none. Raises KeysUnusable."""
        with self._lock:
            keys = self._read(endpoint)
            if keys is None:
                keys = Keys(_new(), _new())
                self._write(endpoint, keys)
            return keys

    def regenerate(self, endpoint: str, which: str, value: str = "") -> Keys:
        """A new primary or secondary key, or `value`. Raises KeysUnusable."""
        if which not in WHICH:
            raise KeysUnusable(f"there is no {which!r} key; choose primary or secondary")
        if value and (len(value) < SHORTEST or not value.isascii() or not value.isprintable()):
            raise KeysUnusable(f"a key needs {SHORTEST} printable ASCII characters at least")
        with self._lock:
            keys = self._read(endpoint) or Keys(_new(), _new())
            new = value or _new()
            keys = replace(keys, primary=new) if which == WHICH[0] else replace(keys, secondary=new)
            self._write(endpoint, keys)
            return keys

    def accepts(self, endpoint: str, presented: str) -> bool:
        """Whether `presented` is one of the endpoint's keys; in constant time. No file: False."""
        keys = self._current(endpoint)
        if keys is None:
            return False
        given = presented.encode("utf-8", "surrogateescape")
        # Both are compared whichever fits, so that time tells nothing.
        first = hmac.compare_digest(given, keys.primary.encode())
        second = hmac.compare_digest(given, keys.secondary.encode())
        return first or second

    def _current(self, endpoint: str) -> Keys | None:
        cached, now = self._cache.get(endpoint), monotonic()
        if cached is not None and now - cached.looked < _FRESH_SECONDS:
            return cached.keys
        with self._lock:
            stamp = self._stamp(endpoint)
            if cached is None or stamp != cached.stamp:
                try:
                    keys = self._read(endpoint)
                except KeysUnusable:
                    keys = None
            else:
                keys = cached.keys
            if len(self._cache) > 1024:
                self._cache.clear()
            self._cache[endpoint] = _Cached(keys, stamp, now)
            return keys

    def _stamp(self, endpoint: str) -> tuple[int, int]:
        with suppress(OSError):
            status = self._file(endpoint).stat()
            return status.st_mtime_ns, status.st_ino
        return 0, 0

    def _file(self, endpoint: str) -> Path:
        if not _NAME.fullmatch(endpoint):
            raise KeysUnusable(f"{endpoint!r} is no name of an endpoint")
        return self._folder / f"{endpoint}.json"

    def _read(self, endpoint: str) -> Keys | None:
        file = self._file(endpoint)
        try:
            keys = msgspec.json.decode(file.read_bytes(), type=Keys)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.DecodeError) as error:
            raise KeysUnusable(f"cannot read the keys in {file}: {error}") from None
        if min(len(keys.primary), len(keys.secondary)) < SHORTEST:
            raise KeysUnusable(f"the keys in {file} are shorter than {SHORTEST} characters")
        return keys

    def _write(self, endpoint: str, keys: Keys) -> None:
        file = self._file(endpoint)
        new = file.with_suffix(".new")
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Of an administrator's own making, the scoring process could not read them.
            owner = self._folder.parent.stat()
            if os.geteuid() == 0:
                os.chown(self._folder, owner.st_uid, owner.st_gid)
            new.unlink(missing_ok=True)
            with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as target:
                target.write(msgspec.json.encode(keys))
                target.flush()
                if os.geteuid() == 0:
                    os.fchown(target.fileno(), owner.st_uid, owner.st_gid)
                os.fsync(target.fileno())
            new.replace(file)
        except OSError as error:
            raise KeysUnusable(f"cannot write the keys to {file}: {error.strerror}") from None
        self._cache.pop(endpoint, None)


def _new() -> str:
    return secrets.token_urlsafe(_BYTES)
