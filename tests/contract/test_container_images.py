"""Images that an engine pulls, keeps and removes: the simulated engine and a real dockerd."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import uuid

import pytest
from distribution_server import PASSWORD, USER
from engine_benches import NOBODY, SECONDS, spec_of, unique, view
from engine_benches import bench as bench
from engine_benches import real as real
from engine_benches import runtime as runtime
from gatelet.agent.runtime.container import RuntimeFailed
from gatelet.modules.oci.client import RegistryClient
from gatelet.modules.oci.reference import ImageRef
from gatelet.modules.oci.transport import RegistrySettings


async def test_pull_by_digest_with_progress(bench, runtime):
    image, digest = bench.publish(f"{unique()}:1", {"Labels": {"unique": uuid.uuid4().hex}})
    seen = []
    assert digest not in {d for found in await runtime.images() for d in found.digests}
    await runtime.pull(image, digest, (), seen.append)
    assert seen
    assert seen[-1].layers_done == seen[-1].layers_total
    assert all(one.bytes_done <= one.bytes_total for one in seen)
    [found] = [found for found in await runtime.images() if digest in found.digests]
    assert image in found.names
    assert "unique" in found.labels
    assert found.size > 0
    # Again: nothing is transferred, and a lost name comes back.
    await runtime.pull(image, digest, (), seen.append)
    await runtime.remove_image(digest)
    await runtime.remove_image(digest)
    assert digest not in {d for found in await runtime.images() for d in found.digests}


async def test_a_moved_tag_does_not_matter(bench, runtime):
    name = f"{unique()}:1"
    image, first = bench.publish(name, {"Labels": {"number": "1"}})
    _, second = bench.publish(name, {"Labels": {"number": "2"}})
    await runtime.pull(image, first, (), lambda progress: None)
    old = spec_of(bench, image, first)
    await runtime.create(old)
    await runtime.pull(image, second, (), lambda progress: None)
    # The name stands for the second image now, and the first one is still what is asked for.
    again = spec_of(bench, image, first, name=old.module, env=[("A", "1")])
    await runtime.create(again)
    assert (await view(runtime, again)).drift == ()
    for number, digest in (("1", first), ("2", second)):
        spec = spec_of(bench, image, digest)
        await runtime.create(spec)
        [found] = [one for one in await runtime.images() if digest in one.digests]
        assert found.labels["number"] == number
        assert (await view(runtime, spec)).drift == ()


async def test_an_unknown_digest(bench, runtime):
    image, _ = bench.publish(f"{unique()}:1")
    with pytest.raises(RuntimeFailed, match="push the image") as failed:
        await runtime.pull(image, NOBODY, (), lambda progress: None)
    assert failed.value.retryable
    with pytest.raises(RuntimeFailed, match="has to be pulled first") as failed:
        await runtime.create(spec_of(bench, image, NOBODY))
    assert failed.value.retryable


async def test_credentials(bench, runtime):
    image, digest = bench.publish(f"{unique()}:1", login=True)
    host = image.partition("/")[0]
    for wrong in ((), ((host, USER, "wrong"),), (("elsewhere:5000", USER, PASSWORD),)):
        with pytest.raises(RuntimeFailed, match=f"username and password for {host}") as failed:
            await runtime.pull(image, digest, wrong, lambda progress: None)
        assert PASSWORD not in str(failed.value)
    right = (("elsewhere:5000", "a", "b"), (host, USER, PASSWORD))
    await runtime.pull(image, digest, right, lambda progress: None)


async def test_an_image_in_use_stays(bench, runtime):
    image, digest = bench.publish(f"{unique()}:1", {"Labels": {"unique": uuid.uuid4().hex}})
    await runtime.pull(image, digest, (), lambda progress: None)
    spec = spec_of(bench, image, digest)
    await runtime.create(spec)
    with pytest.raises(RuntimeFailed, match=spec.name):
        await runtime.remove_image(digest)
    await runtime.remove(spec.name)
    await runtime.remove_image(digest)


class Door:
    """A TCP proxy in front of a registry that lets `limit` bytes through per connection."""

    def __init__(self, target: str) -> None:
        self._target = target.rpartition(":")[::2]
        self.limit = 1 << 40
        self.full = asyncio.Event()
        self.ended = asyncio.Event()
        self.open: set[asyncio.StreamWriter] = set()
        self.tasks: set[asyncio.Task] = set()
        self._more = asyncio.Event()

    def let(self, more: int) -> None:
        self.limit += more
        self._more.set()

    async def start(self) -> None:
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self.server.sockets[0].getsockname()[1]}"

    async def serve(self, reader, writer) -> None:
        inner = await asyncio.open_connection(self._target[0], int(self._target[1]))
        self.open.add(writer)
        ways = [
            asyncio.create_task(self.copy(reader, inner[1], limited=False)),
            asyncio.create_task(self.copy(inner[0], writer, limited=True)),
        ]
        self.tasks.update(ways)
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in ways:
            way.cancel()
        for end in (inner[1], writer):
            end.close()
        self.open.discard(writer)
        if self.full.is_set() and not self.open:
            self.ended.set()

    async def copy(self, reader, writer, *, limited: bool) -> None:
        passed = 0
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(64 * 1024):
                passed += len(data)
                while limited and passed > self.limit:
                    self.full.set()
                    self._more.clear()
                    await self._more.wait()
                writer.write(data)
                await writer.drain()

    async def stop(self) -> None:
        self.server.close()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self.server.wait_closed()


async def test_a_cancelled_pull_stops_the_transfer(real):
    """The registry's side of it: a pull through a door that is closed half way."""
    runtime = real.runtime()
    size = 16 << 20
    door = Door(real.engine.registry.address)
    await door.start()
    try:
        pushed = real.engine.push(f"{unique()}:1", files={"noise": os.urandom(size)})
        image = pushed.name.replace(real.engine.registry.address, door.address)
        door.limit = 2 << 20
        pull = asyncio.create_task(runtime.pull(image, pushed.digest, (), lambda progress: None))
        await asyncio.wait_for(door.full.wait(), SECONDS)
        assert door.open
        pull.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pull
        # dockerd 20.10 looks at what was cancelled when the next bytes of the layer come.
        ended = asyncio.create_task(door.ended.wait())
        while not (await asyncio.wait([ended], timeout=0.2))[0]:
            assert door.limit < size, "the engine went on to the end of the layer"
            door.let(256 << 10)
        door.let(1 << 40)
        seen = []
        await asyncio.wait_for(runtime.pull(image, pushed.digest, (), seen.append), SECONDS)
        assert seen[-1].bytes_done >= size
    finally:
        await door.stop()


async def test_a_damaged_layer_is_never_run(real):
    runtime = real.runtime()
    pushed = real.engine.push(f"{unique()}:1", files={"noise": os.urandom(100_000)})
    settings = RegistrySettings(real.engine.registry.address)
    ref = ImageRef.parse(pushed.name)
    with RegistryClient(settings) as client:
        manifest = json.loads(client.get_manifest(ref.repository, pushed.digest).raw)
    file = real.engine.registry.blob_file(manifest["layers"][1]["digest"])
    whole = file.read_bytes()
    file.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    with pytest.raises(RuntimeFailed, match="push the image again") as failed:
        await runtime.pull(pushed.name, pushed.digest, (), lambda progress: None)
    assert failed.value.retryable
    file.write_bytes(whole)
    await runtime.pull(pushed.name, pushed.digest, (), lambda progress: None)


async def test_a_registry_that_is_away(real):
    runtime = real.runtime()
    registry = real.engine.add_registry()
    pushed = real.engine.push("away:1", registry=RegistrySettings(registry.address))
    registry.stop()
    with pytest.raises(RuntimeFailed, match=f"that {registry.address} runs") as failed:
        await runtime.pull(pushed.name, pushed.digest, (), lambda progress: None)
    assert failed.value.retryable
    registry.start()
    await runtime.pull(pushed.name, pushed.digest, (), lambda progress: None)
