"""Reports upstream: what is sent, in what form, and what happens while nobody takes it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import pytest
from gatelet.agent.publish import Publisher
from gatelet.agent.submissions import Verdict
from gatelet.agent.twin.merge_patch import apply_patch
from gatelet.agent.twin.transport import Desired, MethodResult, TransportUnavailable, TwinSink


class TransportDouble:
    """Keeps the reported document as a hub would; the next `refuse` reports are not taken."""

    def __init__(self, name: str = "iothub") -> None:
        self.name = name
        self.document: dict[str, Any] = {}
        self.patches: list[dict[str, Any]] = []
        self.refuse = 0
        self.sink: TwinSink | None = None
        self.started = asyncio.Event()

    async def run(self, sink: TwinSink) -> None:
        self.sink = sink
        self.started.set()
        await asyncio.Event().wait()

    async def report(self, patch: Mapping[str, Any]) -> None:
        if self.refuse:
            self.refuse -= 1
            raise TransportUnavailable("throttled")
        self.patches.append(dict(patch))
        self.document = apply_patch(self.document, patch)

    async def send(self, body: bytes, properties: Mapping[str, str]) -> None:
        raise TransportUnavailable("not part of this test")


class Rig:
    def __init__(self) -> None:
        self.transport = TransportDouble()
        self.documents: list[tuple[str, int, bytes]] = []
        self.changes = 0

        async def echo(payload: Any) -> MethodResult:
            return MethodResult(200, payload)

        self.publisher = Publisher(
            (self.transport,), self._submit, {"Echo": echo}, self._link_changed
        )

    def _submit(self, source: str, version: int, body: bytes) -> Verdict:
        self.documents.append((source, version, body))
        return Verdict(200, "", 1)

    def _link_changed(self) -> None:
        self.changes += 1

    async def until(self, condition: Callable[[], bool]) -> None:
        for _ in range(1000):
            if condition():
                return
            await asyncio.sleep(0.005)
        pytest.fail("not reached")


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    rig = Rig()
    task = asyncio.ensure_future(rig.publisher.run())
    await rig.transport.started.wait()
    yield rig
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_nothing_is_sent_before_the_link_is_up_and_the_newest_report_then(rig: Rig) -> None:
    rig.publisher.publish("iothub", {"a": 1})
    rig.publisher.publish("iothub", {"a": 2})
    assert rig.transport.patches == []
    await rig.publisher.connected("iothub", {})
    await rig.until(lambda: rig.transport.document == {"a": 2})
    assert rig.transport.patches == [{"a": 2}]


async def test_only_differences_travel_and_removed_keys_go_as_null(rig: Rig) -> None:
    await rig.publisher.connected("iothub", {})
    rig.publisher.publish("iothub", {"modules": {"a": {"s": 1}, "b": {"s": 1}}})
    await rig.until(lambda: len(rig.transport.patches) == 1)
    rig.publisher.publish("iothub", {"modules": {"a": {"s": 2}}})
    await rig.until(lambda: len(rig.transport.patches) == 2)
    assert rig.transport.patches[1] == {"modules": {"a": {"s": 2}, "b": None}}


async def test_after_a_reconnect_what_the_hub_holds_counts_not_what_was_sent(rig: Rig) -> None:
    await rig.publisher.connected("iothub", {})
    rig.publisher.publish("iothub", {"a": 1, "b": 1})
    await rig.until(lambda: rig.transport.document == {"a": 1, "b": 1})
    rig.transport.document = {"a": 1, "b": 7}
    await rig.publisher.disconnected("iothub", "cable")
    await rig.publisher.connected("iothub", {"a": 1, "b": 7, "$version": 4})
    await rig.until(lambda: rig.transport.document == {"a": 1, "b": 1})
    assert rig.transport.patches[-1] == {"b": 1}


async def test_root_keys_of_others_stay(rig: Rig) -> None:
    rig.transport.document = {"theirs": 1, "ours": 1}
    await rig.publisher.connected("iothub", dict(rig.transport.document))
    rig.publisher.publish("iothub", {"ours": 2})
    await rig.until(lambda: rig.transport.document == {"theirs": 1, "ours": 2})


async def test_a_refused_report_is_sent_again(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gatelet.agent.publish.RETRY_BASE_SECONDS", 0.01)
    rig.transport.refuse = 3
    await rig.publisher.connected("iothub", {})
    rig.publisher.publish("iothub", {"a": 1})
    await rig.until(lambda: rig.transport.document == {"a": 1})


async def test_links_say_why_they_are_down(rig: Rig) -> None:
    assert [link.connected for link in rig.publisher.links()] == [False]
    await rig.publisher.disconnected("iothub", "connection refused")
    (link,) = rig.publisher.links()
    assert link.reason == "connection refused"
    await rig.publisher.connected("iothub", None)
    (link,) = rig.publisher.links()
    assert (link.connected, link.reason) == (True, "")
    assert rig.changes == 2


async def test_documents_and_methods_reach_the_agent(rig: Rig) -> None:
    await rig.publisher.desired(Desired("iothub", 3, b"{}"))
    assert rig.documents == [("iothub", 3, b"{}")]
    assert await rig.publisher.method("iothub", "eCHO", [1]) == MethodResult(200, [1])
    unknown = await rig.publisher.method("iothub", "reboot", None)
    assert unknown.status == 400
    assert "known: Echo" in unknown.payload["message"]


async def test_flush_waits_for_the_last_report_but_not_forever(rig: Rig) -> None:
    await rig.publisher.connected("iothub", {})
    rig.publisher.publish("iothub", {"bye": True})
    await rig.publisher.flush(5)
    assert rig.transport.document == {"bye": True}
    rig.transport.refuse = 10**6
    rig.publisher.publish("iothub", {"bye": False})
    await rig.publisher.flush(0.05)
    assert rig.transport.document == {"bye": True}
