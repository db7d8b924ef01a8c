"""A disk that is full from any write on: what serves goes on, and the rest recovers by itself.

strace lets every write fail with ENOSPC from the n-th on, until the device has met it several
times; then there is space again. Every tenth write runs; all of them:

    GATELET_CRASH_EVERY=1 python -m pytest tests/crash/test_disk_full.py -s
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from every_call import SmallDevice, Supplies, calls, fresh

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]

EVERY = int(os.environ.get("GATELET_CRASH_EVERY", "10"))
WRITING = "write,pwrite64,mkdir,mkdirat,ftruncate"
OFTEN = 12
"""Refused writes before there is space again."""


def test_a_disk_that_is_full_from_any_write_on(
    world: tuple[SmallDevice, Supplies], tmp_path: Path
) -> None:
    device, _ = world
    template = tmp_path / "before"
    template.mkdir()
    device.live(template, "1", number=1, until={"serving": {"digits": "1"}, "good": 1}, send="old")
    log = tmp_path / "log"
    ends = {"serving": {"digits": "2"}, "good": 2}
    points = []
    for thread in ("ready", "worker"):
        folder = fresh(template, tmp_path / "device")
        recording = ["-e", f"trace={WRITING}", "-o", str(log)]
        device.live(folder, "2", until=ends, send="now", strace=recording, thread=thread)
        total = sum(calls(log).values())
        points += [(thread, number) for number in range(1, total + 1)]

    reported = 0
    chosen = points[::EVERY]
    for index, (thread, number) in enumerate(chosen):
        where = f"write {number} of the {thread} thread"
        folder = fresh(template, tmp_path / "device")
        log.unlink()

        def full() -> None:
            deadline = time.monotonic() + 5
            while time.monotonic() < deadline:
                if log.exists() and log.read_text().count("(INJECTED)") >= OFTEN:
                    return
                time.sleep(0.002)

        life = device.live(
            folder,
            "2",
            until=ends,
            # The outbox shares its thread with the pull: without it the pull meets every refusal.
            send="now" if index % 2 else "",
            thread=thread,
            suffer=full,
            strace=[
                *("-e", f"trace={WRITING}", "-o", str(log)),
                *("-e", f"inject={WRITING}:error=ENOSPC:when={number}+"),
            ],
        )
        assert life.outcome is not None, where
        assert "late" not in life.outcome, f"{where}: {life}"
        assert not life.outcome["gaps"], f"{where}: stopped serving: {life}"
        assert not life.outcome["damaged"], f"{where}: {life}"
        after = device.live(folder, until={"serving": {"digits": "2"}}, read=True).outcome
        assert after is not None, where
        lost = set(life.acknowledged) - set(after["held"])
        assert not lost, f"{where}: acknowledged and lost: {sorted(lost)}"
        told = " ".join(life.outcome["told"])
        reported += "full" in told or "space" in told
    assert reported
    print(f"\n{len(points)} writes, {len(chosen)} run, {reported} reported, all recovered")
