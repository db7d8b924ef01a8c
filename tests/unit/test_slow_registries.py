"""Registries that take their time, and whom they must not hold up."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

import pytest
from gatelet.agent.clock import SystemClock
from gatelet.agent.config import RegistryConfig
from gatelet.agent.images import RegistryImages
from gatelet.agent.seams import StepFailed
from gatelet.modules.errors import StorageFull
from gatelet.modules.oci.manifest import digest_of
from gatelet.modules.oci.store import ContentStore

TO_THREAD = min(32, (os.cpu_count() or 1) + 4)
"""Threads that asyncio.to_thread shares out (concurrent.futures)."""


@pytest.mark.parametrize("full", [False, True])
async def test_what_unfinished_pulls_left_does_not_stay_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: bool
) -> None:
    store = ContentStore(tmp_path)
    partial, whole = digest_of(b"never finished"), store.put_blob(b"a layer whose image failed")
    with store.ingest(partial, 100) as ingest:
        assert ingest is not None
        ingest.write(b"never")
    files = [tmp_path / "ingest" / f"{partial[7:]}.partial", tmp_path / "blobs/sha256" / whole[7:]]
    images = RegistryImages(tmp_path, (), None, None)
    assert all(file.exists() for file in files), "the next attempt goes on with them"
    day = 24 * 3600
    ago = SystemClock().now().timestamp() - (day if full else 15 * day)
    for file in files:
        os.utime(file, (ago, ago))
    if full:

        def no_room(*_: object, **__: object) -> None:
            raise StorageFull("no space left")

        monkeypatch.setattr("gatelet.modules.oci.pull.pull_model_image", no_room)
        with pytest.raises(StepFailed, match="no space left"):
            await images.pull("127.0.0.1:1/m:1", digest_of(b"m"), (), lambda progress: None)
    else:
        RegistryImages(tmp_path, (), None, None)
    assert not any(file.exists() for file in files)


async def until(condition: object, seconds: float = 20.0) -> None:
    deadline = asyncio.get_running_loop().time() + seconds
    while not condition():  # type: ignore[operator]
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.01)


async def test_a_registry_that_never_answers_holds_nothing_else_up(tmp_path: Path) -> None:
    before = threading.active_count()
    connections: list[asyncio.StreamWriter] = []

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        await reader.read()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    images = RegistryImages(tmp_path, (RegistryConfig(address, insecure=True),), None, None)
    asked = [
        asyncio.ensure_future(images.resolve(f"{address}/m{number}:1", ()))
        for number in range(TO_THREAD + 1)
    ]
    try:
        await until(lambda: len(connections) > TO_THREAD)
        # What the outbox, the hub's client and the logs need a thread for goes on.
        other = asyncio.ensure_future(asyncio.to_thread(lambda: "done"))
        await asyncio.wait({other}, timeout=20)
        assert other.done()
        assert other.result() == "done"
    finally:
        server.close()
        for connection in connections:
            connection.transport.abort()
        await asyncio.gather(*asked, return_exceptions=True)
    await until(lambda: threading.active_count() <= before + TO_THREAD)
