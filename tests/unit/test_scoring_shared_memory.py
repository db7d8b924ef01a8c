from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from gatelet.agent.scoring.errors import Code, ScoringError
from gatelet.agent.scoring.shared_memory import Region, SharedMemory


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "shm"
    made.mkdir()
    (made / "object").write_bytes(bytes(range(100)))
    return made


@pytest.fixture
def memory(folder: Path) -> Iterator[SharedMemory]:
    made = SharedMemory(most_bytes=200, most_regions=2, folder=folder)
    yield made
    made.unregister()


def error(call: object, *arguments: object) -> tuple[Code, str]:
    with pytest.raises(ScoringError) as caught:
        call(*arguments)  # type: ignore[operator]
    return caught.value.code, caught.value.message


def test_reads_and_writes_lie_within_the_region(memory: SharedMemory, folder: Path) -> None:
    memory.register("r", "/object", 10, 50)
    assert memory.regions() == (Region("r", "/object", 10, 50),)
    assert memory.read("r", 5, 3) == bytes([15, 16, 17])
    memory.write("r", 0, 4, b"abc")
    assert (folder / "object").read_bytes()[9:14] == b"\x09abc\x0d"
    for offset, size in ((0, 51), (48, 3), (-1, 2), (0, -1), (2**64, 1)):
        assert error(memory.read, "r", offset, size)[0] is Code.INVALID_ARGUMENT
    assert "set aside are 2" in error(memory.write, "r", 0, 2, b"abc")[1]


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/",
        "/../object",
        "..",
        ".",
        "/a/b",
        "/object/../../x",
        "/.hidden",
        "/a\0b",
        "/ü",
        "/a b",
    ],
)
def test_keys_that_are_no_names(memory: SharedMemory, key: str) -> None:
    code, message = error(memory.register, "r", key, 0, 1)
    assert code is Code.INVALID_ARGUMENT
    assert "is not a name of shm_open" in message


def test_what_is_no_shared_memory(memory: SharedMemory, folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    (folder / "link").symlink_to(secret)
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    for key in ("link", "folder", "pipe"):
        assert error(memory.register, "r", key, 0, 1)[0] is Code.INVALID_ARGUMENT
    code, message = error(memory.register, "r", "nothing", 0, 1)
    assert (code, "no object 'nothing'" in message) == (Code.NOT_FOUND, True)
    assert memory.regions() == ()


@pytest.mark.parametrize(("offset", "size"), [(0, 101), (100, 1), (0, 0), (2**63, 8)])
def test_regions_that_do_not_fit(memory: SharedMemory, offset: int, size: int) -> None:
    assert error(memory.register, "r", "object", offset, size)[0] is Code.INVALID_ARGUMENT


def test_limits(memory: SharedMemory) -> None:
    memory.register("a", "object", 0, 100)
    assert "registered already" in error(memory.register, "a", "object", 0, 10)[1]
    memory.register("b", "object", 0, 90)
    assert error(memory.register, "c", "object", 0, 1)[0] is Code.RESOURCE_EXHAUSTED
    memory.unregister("b")
    assert error(memory.register, "c", "object", 0, 101)[0] is Code.INVALID_ARGUMENT
    memory.register("c", "object", 0, 100)
    memory.unregister()
    assert memory.regions() == ()
    assert error(memory.register, "x" * 257, "object", 0, 1)[0] is Code.INVALID_ARGUMENT


def test_an_object_that_gets_shorter_is_an_error_not_the_end(
    memory: SharedMemory, folder: Path
) -> None:
    memory.register("r", "object", 0, 100)
    os.truncate(folder / "object", 50)
    assert "became shorter" in error(memory.read, "r", 40, 20)[1]
    assert "became shorter" in error(memory.write, "r", 40, 20, b"x" * 20)[1]
    assert (folder / "object").stat().st_size == 50
    assert memory.read("r", 40, 10) == bytes(range(40, 50))


def test_unregistered_regions_are_unknown_and_their_descriptors_closed(
    memory: SharedMemory,
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    memory.register("r", "object", 0, 100)
    memory.unregister("r")
    memory.unregister("r")
    assert len(os.listdir("/proc/self/fd")) == before
    for call in (memory.read, memory.regions):
        arguments = ("r", 0, 1) if call == memory.read else ("r",)
        assert error(call, *arguments)[0] is Code.NOT_FOUND
