"""What a power cut may leave of the files that a process wrote: a model of a disk, fed by strace.

A disk keeps what was synced: the content of a file up to its last fsync, a directory's entries up
to the directory's last fsync. Of everything later any part may be there: some of the writes (the
last one torn), the first few of the directory changes. kill -9 cannot find a missing fsync; this
can.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

TRACED = (
    "openat,close,lseek,write,writev,pwrite64,fsync,fdatasync,rename,unlink,unlinkat,rmdir,mkdir,mkdirat,"
    "ftruncate,fallocate,copy_file_range,sendfile,renameat,renameat2,link,linkat,symlink,symlinkat"
)
_NAMED = {
    "openat": "open",
    "mkdir": "mkdir",
    "mkdirat": "mkdir",
    "rename": "rename",
    "renameat": "rename",
    "renameat2": "rename",
    "unlink": "remove",
    "unlinkat": "remove",
    "rmdir": "remove",
}
_UNKNOWN = {
    "writev",
    "fallocate",
    "copy_file_range",
    "sendfile",
    "link",
    "linkat",
    "symlink",
    "symlinkat",
}

_LINE = re.compile(r"(\d+) +(\w+)\((.*)\) += (-?\d+)")
_UNFINISHED = re.compile(r"(\d+) +(\w+\(.*) <unfinished \.\.\.>$")
_RESUMED = re.compile(r"(\d+) +<\.\.\. \w+ resumed>(.*)$")
_TEXT = re.compile(r'"((?:[^"\\]|\\.)*)"')
_NAME = re.compile(r'(?:(?:AT_FDCWD|\d+)<([^>]*)>, )?"((?:[^"\\]|\\.)*)"')
_FD = re.compile(r"(\d+)<([^>]*)>")


@dataclass
class File:
    """`synced` is what the disk has for certain; `pending` are (offset, data) or a new length."""

    synced: bytes = b""
    pending: list[tuple[int, bytes] | int] = field(default_factory=list)

    def content(self, changes: Iterable[tuple[int, bytes] | int]) -> bytes:
        data = bytearray(self.synced)
        for change in changes:
            if isinstance(change, int):
                del data[change:]
                data.extend(bytes(change - len(data)))
            else:
                offset, written = change
                data.extend(bytes(max(0, offset - len(data))))
                data[offset : offset + len(written)] = written
        return bytes(data)

    def size(self) -> int:
        return len(self.content(self.pending))

    def sync(self) -> None:
        self.synced, self.pending = self.content(self.pending), []


@dataclass
class Folder:
    """`entries` is what the process sees, `synced` what the disk has for certain."""

    entries: dict[str, File | Folder] = field(default_factory=dict)
    synced: dict[str, File | Folder] = field(default_factory=dict)


@dataclass(frozen=True)
class Change:
    """One step in the directories: `links` (folder, name, node), None where it is gone."""

    links: tuple[tuple[Folder, str, File | Folder | None], ...]


class Disk:
    """The folder `root` as the disk has it, from its present state on."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.top = self._read(root)
        self.journal: list[Change] = []
        self.acknowledged: list[str] = []
        self._positions: dict[int, tuple[File, int, bool]] = {}

    def _read(self, path: Path) -> Folder:
        entries: dict[str, File | Folder] = {
            item.name: self._read(item) if item.is_dir() else File(item.read_bytes())
            for item in sorted(path.iterdir())
        }
        return Folder(entries, dict(entries))

    # -- what a process does -------------------------------------------------------------------

    def replay(self, log: str) -> Iterator[str]:
        """Apply a log of strace; yields the name of each call that changed something."""
        begun: dict[str, str] = {}
        for line in log.splitlines():
            if match := _UNFINISHED.match(line):
                begun[match[1]] = match[2]
                if match[2].startswith("close("):
                    # Another thread may get the number before this line is complete.
                    self._close(match[2])
                continue
            if match := _RESUMED.match(line):
                line = f"{match[1]} {begun.pop(match[1])}{match[2]}"
                if line.partition(" ")[2].startswith("close("):
                    continue
            match = _LINE.match(line)
            if match is not None and int(match[4]) >= 0 and self._apply(match):
                yield match[2]

    def _apply(self, match: re.Match[str]) -> bool:
        call, arguments, result = match[2], match[3], int(match[4])
        texts = [_unescape(text) for text in _TEXT.findall(arguments)]
        fd = _FD.match(arguments)
        number, path = (int(fd[1]), fd[2]) if fd else (-1, "")
        if call == "writev" and path.startswith("pipe:"):
            self.acknowledged += texts[0].decode().split()
            return False
        if call in _NAMED:
            paths = [
                self._inside(str(Path(folder, _unescape(name).decode())))
                for folder, name in _NAME.findall(arguments)
            ]
            return None not in paths and self._named(_NAMED[call], arguments, result, paths)
        if call == "lseek":
            if number in self._positions:
                file, _, append = self._positions[number]
                self._positions[number] = (file, result, append)
            return False
        if call == "close":
            self._close(f"close({arguments}")
            return False
        if self._inside(path) is None:
            return False
        if call in _UNKNOWN:
            raise AssertionError(f"the model of the disk does not know {call}: extend it")
        if call in ("fsync", "fdatasync"):
            return self._sync(self._positions[number][0] if number in self._positions else path)
        if number not in self._positions:
            raise AssertionError(f"{call} on a file that was not seen to be opened: {path}")
        file, position, append = self._positions[number]
        if call == "ftruncate":
            file.pending.append(int(arguments.rpartition(",")[2]))
        elif call == "pwrite64":
            file.pending.append((int(arguments.rpartition(",")[2]), texts[0][:result]))
        elif call == "write":
            offset = file.size() if append else position
            file.pending.append((offset, texts[0][:result]))
            self._positions[number] = (file, offset + result, append)
        return True

    def _close(self, call: str) -> None:
        match = _FD.match(call, len("close("))
        if match is not None:
            self._positions.pop(int(match[1]), None)

    def _named(self, call: str, arguments: str, result: int, paths: list[str | None]) -> bool:
        path = str(paths[0])
        if call == "open":
            if "O_DIRECTORY" in arguments:
                return False
            node = self._node(path)
            changed = node is None
            if node is None:
                node = File()
                self._link(path, node)
            if isinstance(node, Folder):
                return False
            if "O_TRUNC" in arguments:
                node.pending.append(0)
                changed = True
            self._positions[result] = (node, 0, "O_APPEND" in arguments)
            return changed
        if call == "mkdir":
            return self._link(path, Folder())
        if call == "rename":
            node = self._node(path)
            target = str(paths[1])
            self._change([(path, None), (target, node)])
            return True
        return self._link(path, None)

    def _sync(self, what: File | str) -> bool:
        if isinstance(what, File):
            what.sync()
            return True
        node = self._node(str(self._inside(what)))
        if isinstance(node, Folder):
            # Its changes reach the disk with all that came before them in the journal.
            last = max(
                (n for n, change in enumerate(self.journal) if _touches(change, node)), default=-1
            )
            for change in self.journal[: last + 1]:
                _write(change)
            del self.journal[: last + 1]
        return True

    def _link(self, path: str, node: File | Folder | None) -> bool:
        self._change([(path, node)])
        return True

    def _change(self, links: list[tuple[str, File | Folder | None]]) -> None:
        made = []
        for path, node in links:
            parent, _, name = path.rpartition("/")
            folder = self._node(parent)
            assert isinstance(folder, Folder), f"{parent} is no folder"
            if node is None:
                folder.entries.pop(name, None)
            else:
                folder.entries[name] = node
            made.append((folder, name, node))
        self.journal.append(Change(tuple(made)))

    def _node(self, path: str) -> File | Folder | None:
        node: File | Folder | None = self.top
        for name in filter(None, path.split("/")):
            if not isinstance(node, Folder):
                return None
            node = node.entries.get(name)
        return node

    def _inside(self, path: str) -> str | None:
        root = f"{self.root}/"
        if path == str(self.root):
            return ""
        return path[len(root) :] if path.startswith(root) else None

    # -- what a power cut leaves ---------------------------------------------------------------

    def leave(self, folder: Path, chance: Random | None) -> None:
        """Write to `folder` what is there after a cut now: the least without `chance`."""
        links: dict[int, dict[str, File | Folder]] = {}
        kept = chance.randint(0, len(self.journal)) if chance is not None else 0
        for change in self.journal[:kept]:
            for parent, name, node in change.links:
                entries = links.setdefault(id(parent), dict(parent.synced))
                if node is None:
                    entries.pop(name, None)
                else:
                    entries[name] = node
        folder.mkdir()
        self._leave(self.top, folder, chance, links)

    def _leave(
        self,
        node: Folder,
        path: Path,
        chance: Random | None,
        links: dict[int, dict[str, File | Folder]],
    ) -> None:
        for name, child in links.get(id(node), node.synced).items():
            if isinstance(child, Folder):
                (path / name).mkdir()
                self._leave(child, path / name, chance, links)
            else:
                (path / name).write_bytes(child.content(_survivors(child.pending, chance)))


def _survivors(
    pending: list[tuple[int, bytes] | int], chance: Random | None
) -> Iterator[tuple[int, bytes] | int]:
    if chance is None or chance.random() < 0.3:
        return
    everything = chance.random() < 0.3
    for change in pending:
        if everything or chance.random() < 0.5:
            yield change
        elif not isinstance(change, int) and chance.random() < 0.3:
            offset, data = change
            yield offset, data[: chance.randrange(len(data) + 1)]


def _touches(change: Change, folder: Folder) -> bool:
    return any(parent is folder for parent, _, _ in change.links)


def _write(change: Change) -> None:
    for folder, name, node in change.links:
        if node is None:
            folder.synced.pop(name, None)
        else:
            folder.synced[name] = node


def _unescape(text: str) -> bytes:
    return text.encode("latin-1").decode("unicode_escape").encode("latin-1")
