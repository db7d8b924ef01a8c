"""A power cut at any moment of a deployment: what was synced is enough to come back.

One run is recorded by strace and replayed on a model of a disk; at moments all along it the device
starts from what a power cut then leaves. Every tenth moment runs; all of them:

    GATELET_CRASH_EVERY=1 python -m pytest tests/crash/test_power_loss.py -s
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from random import Random
from typing import Any

import pytest
from every_call import SmallDevice, Supplies, fresh
from power_loss import TRACED, Disk

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]

EVERY = int(os.environ.get("GATELET_CRASH_EVERY", "10"))
SEED = 20261121

ENDS: dict[str, tuple[str | None, dict[str, Any], tuple[str, ...]]] = {
    "update": ("2", {"serving": {"digits": "2"}, "good": 2}, ("1", "2")),
    "failed update": (
        "broken",
        {"serving": {"digits": "1"}, "latest": [2, "failed"], "good": 1},
        ("1",),
    ),
}


def record(
    device: SmallDevice, folder: Path, log: Path, wanted: str | None, ends: dict[str, Any]
) -> str:
    life = device.live(
        folder,
        wanted,
        until=ends,
        send="now",
        strace=["-f", "-y", "-x", "-s", "4194304", "-e", f"trace={TRACED}", "-o", str(log)],
    )
    assert life.ended == "exit 0"
    assert life.outcome is not None
    assert "late" not in life.outcome, life.outcome
    return log.read_text()


@pytest.mark.parametrize("name", ENDS)
def test_a_power_cut_at_any_moment_leaves_the_old_or_the_new(
    world: tuple[SmallDevice, Supplies], tmp_path: Path, name: str
) -> None:
    device, found = world
    wanted, ends, offline = ENDS[name]
    template = tmp_path / "before"
    template.mkdir()
    device.live(template, "1", number=1, until={"serving": {"digits": "1"}, "good": 1}, send="old")
    folder = fresh(template, tmp_path / "device")
    disk = Disk(folder)
    log = record(device, folder, tmp_path / "log", wanted, ends)
    chance = Random(SEED)
    cuts = 0
    moments = 0
    for moments, call in enumerate(disk.replay(log), 1):
        if (moments + len(name)) % EVERY:
            continue
        for variant in (None, chance):
            where = f"{name}: after call {moments} ({call}), seed {SEED}"
            shutil.rmtree(folder, ignore_errors=True)
            disk.leave(folder, variant)
            cuts += 1
            with found.away():
                life = device.live(folder, until={"endpoints": ["digits"]})
                assert life.outcome is not None, where
                assert life.outcome["serving"].get("digits") in offline, f"{where}: {life}"
            life = device.live(folder, wanted, until=ends, read=True)
            assert life.outcome is not None, where
            assert "late" not in life.outcome, f"{where}: {life}"
            assert not life.outcome["damaged"], f"{where}: {life}"
            lost = set(disk.acknowledged) - set(life.outcome["held"])
            assert not lost, f"{where}: acknowledged and lost: {sorted(lost)}"
    assert cuts > 10
    print(f"\n{name}: {moments} moments, {cuts} power cuts, all recovered")


def test_the_model_finds_a_missing_sync(tmp_path: Path) -> None:
    """A file renamed into place without fsync is empty after the cut; with it, it is whole."""
    root = tmp_path / "disk"
    root.mkdir()
    (root / "old").write_bytes(b"before")
    content = r"write(3<{0}/new>, \"after\", 5) = 5".replace(r"\"", '"').format(root)
    opened = f'openat(AT_FDCWD</>, "{root}/new", O_WRONLY|O_CREAT, 0644) = 3<{root}/new>'
    renamed = f'rename("{root}/new", "{root}/old") = 0'
    synced = f"fsync(3<{root}/new>) = 0"
    folder_synced = f"fsync(4<{root}>) = 0"
    for calls, least in (
        ([opened, content, renamed], b"before"),
        ([opened, content, renamed, folder_synced], b""),
        ([opened, content, synced, renamed], b"before"),
        ([opened, content, synced, renamed, folder_synced], b"after"),
    ):
        disk = Disk(root)
        assert len(list(disk.replay("\n".join(f"1 {call}" for call in calls)))) == len(calls)
        left = tmp_path / "left"
        shutil.rmtree(left, ignore_errors=True)
        disk.leave(left, None)
        assert {path.name: path.read_bytes() for path in left.iterdir()} == {"old": least}
