"""A deployment by reference: fetched, tried again, kept over a reboot, and given up."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from gatelet.agent.clock import SystemClock
from gatelet.agent.manifest_fetch import FetchFailed
from gatelet.agent.store import StateStore
from gatelet.simulator.virtual_time import VirtualClock, run

from .manifest_server import KEY, OTHER, REQUIRE, SIX, Device, Server, inline, manifest
from .manifest_server import server as server


async def test_a_reference_becomes_a_deployment_and_a_reboot_needs_no_network(
    server: Server, tmp_path: Path
) -> None:
    body = manifest()
    reference = server.reference(body, "/m.json?sig=secret")
    async with Device(tmp_path) as device:
        verdict = device.source.submit("iothub", 3, reference)
        assert (verdict.code, verdict.generation) == (202, 0)
        assert "secret" not in verdict.description
        await device.until(lambda: bool(device.source.awaited and device.source.awaited.error))
        awaited = device.source.awaited
        assert awaited is not None
        assert "answered 404" in awaited.description
        assert "secret" not in awaited.description
        assert device.source.submit("iothub", 4, reference).code == 202
        server.answers["/m.json"] = body
        assert await device.settled() == (200, "")
        assert device.store.seen()[0].version == 4
        latest = device.store.latest()
        assert latest is not None
        assert (latest.body, latest.version, latest.source) == (body, 4, "iothub")
        assert device.store.pending() is None
    asked = len(server.asked)
    async with Device(tmp_path) as device:
        assert device.source.submit("iothub", 4, reference).code == 200
        # Another address of the same manifest: it is here.
        moved = server.reference(body, "/elsewhere.json")
        assert device.source.submit("iothub", 5, moved).code == 200
        assert device.source.awaited is None
    assert len(server.asked) == asked


async def test_what_was_to_be_fetched_survives_a_reboot(server: Server, tmp_path: Path) -> None:
    body = manifest()
    async with Device(tmp_path) as device:
        assert device.source.submit("local", 0, server.reference(body), always=True).code == 202
    server.answers["/m.json"] = body
    async with Device(tmp_path) as device:
        await device.until(lambda: device.store.latest() is not None)
        assert device.store.seen()[0].source == "local"


async def test_a_newer_document_ends_the_fetch(server: Server, tmp_path: Path) -> None:
    hold, entered = threading.Event(), threading.Event()

    def held(handler: Any) -> None:
        entered.set()
        hold.wait(10)
        handler.send_error(500)

    server.answers["/m.json"] = held
    try:
        async with Device(tmp_path) as device:
            reference = server.reference(manifest("old:1"))
            device.source.submit("mqtt", 0, manifest("first:1"))
            device.source.submit("iothub", 1, reference)
            await device.until(entered.is_set)
            # What another source sent before, and what it is refused, ends nothing.
            assert device.source.submit("mqtt", 0, manifest("first:1")).code == 200
            assert device.source.submit("mqtt", 0, b"{").code == 400
            assert device.source.awaited is not None
            assert device.source.submit("mqtt", 0, manifest("new:1")).code == 200
            assert device.source.awaited is None
            assert device.store.pending() is None
            # It does not come back with the next connection.
            verdict = device.source.submit("iothub", 1, reference)
            assert (verdict.code, device.source.awaited) == (409, None)
            assert "a newer document from mqtt" in verdict.description
            reference = server.reference(manifest("old:2"))
            # The same source: back to what it had, or to something that is refused.
            for again in (manifest("newer:1"), manifest("newer:1"), b"{"):
                device.source.submit("iothub", 2, reference)
                assert device.source.awaited is not None
                device.source.submit("iothub", 3, again)
                assert device.source.awaited is None
            hold.set()
    finally:
        hold.set()
    store = StateStore(tmp_path / "state.db", SystemClock())
    assert not any(b"old:" in deployment.body for deployment in store.deployments())
    store.close()


async def test_a_rollback_ends_the_fetch(server: Server, tmp_path: Path) -> None:
    async with Device(tmp_path) as device:
        for number in (1, 2):
            device.source.submit("iothub", number, manifest(f"m:{number}"))
            device.store.set_phase(number, "good")
        assert device.source.submit("iothub", 3, server.reference(SIX)).code == 202
        assert device.source.rollback(7).code == 400
        assert device.source.awaited is not None
        assert device.source.rollback().code == 200
        assert device.source.awaited is None
        latest = device.store.latest()
        assert latest is not None
        assert latest.body == manifest("m:1")


async def test_a_preview_judges_and_fetches_nothing(server: Server, tmp_path: Path) -> None:
    async with Device(tmp_path, REQUIRE) as device:
        for document, code, said in (
            (manifest("m:8", 8), 403, "is not signed"),
            (inline(SIX, OTHER.sign(SIX)), 403, "not made with the key"),
            (server.reference(SIX, key=KEY), 202, "name the file itself"),
            (b'{"manifest": {"url": "file:///x", "sha256": ""}}', 400, "expected https"),
        ):
            found = device.source.preview(document)
            assert (found.code, said in found.description) == (code, True), found
        assert device.source.preview(b"").code == 200
        found = device.source.preview(inline(SIX, KEY.sign(SIX)))
        assert [change.module for change in found.modules] == ["m"]
        assert server.asked == []
        assert device.store.seen() == ()
        assert device.store.proofs("manifest") == ()


async def test_a_wrong_hash_is_never_parsed_and_tried_again(server: Server, tmp_path: Path) -> None:
    body = manifest("right:1")
    server.answers["/m.json"] = manifest("wrong:1")
    async with Device(tmp_path) as device:
        device.source.submit("iothub", 1, server.reference(body))
        await device.until(lambda: bool(device.source.awaited and device.source.awaited.error))
        assert device.store.latest() is None
        awaited = device.source.awaited
        assert awaited is not None
        assert "has sha256" in awaited.error
        server.answers["/m.json"] = body
        assert await device.settled() == (200, "")


async def test_what_was_fetched_and_is_no_manifest_is_refused_for_good(
    server: Server, tmp_path: Path
) -> None:
    bodies = (b"{", server.reference(b"x"), manifest("no image"))
    async with Device(tmp_path) as device:
        for number, body in enumerate(bodies):
            server.answers["/m.json"] = body
            device.source.submit("iothub", number, server.reference(body))
            code, description = await device.settled()
            assert code == 400
            assert description
        asked = len(server.asked)
        assert device.source.submit("iothub", 9, server.reference(bodies[-1])).code == 400
        assert len(server.asked) == asked


async def test_a_full_disk_delays_and_loses_nothing(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = manifest()
    async with Device(tmp_path) as device:
        (pages,) = device.store._db.execute("PRAGMA page_count").fetchone()
        device.store._db.execute(f"PRAGMA max_page_count={pages}")
        wide = {"url": f"http://{server.address}/m.json?{'x' * 1900}"}
        inside = json.loads(server.reference(body))["manifest"] | wide
        reference = json.dumps({"manifest": inside, "$metadata": {"x": "x" * 9000}}).encode()
        # It is not stored, and fetched all the same.
        assert device.source.submit("local", 0, reference).code == 202
        assert device.store.pending() is None
        await device.until(lambda: bool(device.source.awaited and device.source.awaited.error))
        # Refusals cannot be stored either.
        assert device.source.submit("mqtt", 0, b"{" + b" " * 9000).code in (400, 500)
        device.store._db.execute("PRAGMA max_page_count=100000")
        await device.until(lambda: device.store.pending() is not None)
        server.answers["/m.json"] = body
        assert (await device.settled())[0] == 200
        assert device.store.pending() is None


def test_three_days_without_a_network(tmp_path: Path) -> None:
    body = manifest()
    inside = {"url": "https://h/m", "sha256": hashlib.sha256(body).hexdigest()}
    asked: list[float] = []
    told: set[str] = set()

    async def days(clock: VirtualClock) -> float:
        def fetch(url: str, stop: Callable[[], bool]) -> bytes:
            asked.append(clock.monotonic())
            awaited = device.source.awaited
            assert awaited is not None
            told.add(json.dumps([awaited.desired_status(), awaited.report()]))
            if clock.monotonic() < 72 * 3600:
                raise FetchFailed("no route to host")
            return body

        async with Device(tmp_path, clock=clock, fetch=fetch, retry_seconds=(1.0, 60.0)) as device:
            device.source.submit("iothub", 1, json.dumps({"manifest": inside}).encode())
            await asyncio.sleep(72 * 3600)
            assert device.store.latest() is None
            device.source.retry_now()
            began = clock.monotonic()
            assert await device.settled() == (200, "")
            return clock.monotonic() - began

    assert run(days) < 0.1
    pauses = [after - before for before, after in pairwise(asked)]
    assert max(pauses) <= 60.0
    assert len(told) < 12, "the report changes with every attempt"
    # Full jitter: half of the cap on average, and no two devices alike.
    assert 25 < sum(pauses[10:]) / len(pauses[10:]) < 35
