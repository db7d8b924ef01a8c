"""Each fault the simulated hub can have, and that an agent recovers from it.

The real SDK, the agent's transport, publisher and outbox; one hub and one agent for the whole
table, because recovering means to go on with the same agent.
"""

from __future__ import annotations

import asyncio
import gc
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import fields
from pathlib import Path
from random import Random
from typing import Any

import pytest
import pytest_asyncio
from gatelet.agent.clock import SystemClock
from gatelet.agent.outbox import Outbox, Telemetry
from gatelet.agent.outbox_sender import OutboxSender
from gatelet.agent.publish import Publisher
from gatelet.agent.submissions import Verdict
from gatelet.agent.twin.iothub import IotHubSettings, IotHubTransport
from gatelet.agent.twin.transport import MethodResult
from gatelet.simulator.connect_proxy import ConnectProxy
from gatelet.simulator.iothub.devices import ClientId
from gatelet.simulator.iothub.errors import HubError
from gatelet.simulator.iothub.faults import Faults
from gatelet.simulator.iothub.server import IotHub
from gatelet.simulator.pki import Pki

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    # See test_iothub_sdk: what the SDK does on its own account.
    pytest.mark.filterwarnings(
        "ignore:ssl.PROTOCOL_TLSv1_2:DeprecationWarning", "ignore:unclosed <socket:ResourceWarning"
    ),
]

HOST = "faults.gatelet.test"
DEVICE = ClientId("d1")
SECONDS = 30.0

# Fault -> what it is set to, and whether it needs a new connection to show.
TABLE: dict[str, tuple[float, bool]] = {
    "throttle_twin_requests": (3, False),
    "fail_twin_requests": (3, False),
    "lose_twin_answers": (1, False),
    "drop_before_ack": (3, False),
    "drop_after_ack": (3, False),
    "drop_unhandled": (3, False),
    "lose_acks": (1, False),
    "drop_before_connack": (2, True),
    "drop_after_connack": (2, True),
    "drop_before_suback": (2, True),
    "drop_after_suback": (2, True),
    "refuse_connects": (2, True),
    "refuse_subscriptions": (1, True),
    "forget_sessions": (1, True),
    "expire_tokens": (2, True),
    "lose_desired_patches": (2, False),
    "reorder_desired_patches": (1, False),
    "repeat_desired_patches": (2, False),
    "lose_method_answers": (1, False),
    "delay_seconds": (0.3, False),
    "clock_skew_seconds": (10 * 365 * 86400, True),
}
# The agent neither takes cloud-to-device messages nor uploads files.
NOT_FOR_THE_AGENT = {"lose_c2d_acks", "fail_uploads"}
LASTING = {"delay_seconds", "clock_skew_seconds"}


class AgentOnHub:
    def __init__(self, folder: Path) -> None:
        self.pki = Pki(folder)
        self.hub = IotHub(HOST, self.pki)
        self.proxy = ConnectProxy()
        self.outbox = Outbox(folder / "outbox.db", SystemClock())
        self.documents: list[dict[str, Any]] = []
        self.work = 0
        self._jobs: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        await self.hub.start()
        self.proxy.add(f"{HOST}:8883", ("127.0.0.1", self.hub.mqtt_port))
        await self.proxy.start()
        self.transport = IotHubTransport(
            IotHubSettings(
                self.hub.connection_string("d1"),
                ca_file=self.pki.ca_file,
                proxy=f"127.0.0.1:{self.proxy.port}",
                retry_base=0.05,
                retry_cap=0.3,
                connect_timeout=10,
                request_timeout=2,
                resync_interval=2,
            ),
            Random(1),
        )
        self.publisher = Publisher(
            (self.transport,), self._submit, {"ping": self._ping}, self._link_changed, Random(1)
        )
        self.sender = OutboxSender(self.outbox, self.transport, self._connected, Random(1))
        self._jobs = [
            asyncio.ensure_future(job) for job in (self.publisher.run(), self.sender.run())
        ]
        await self.until(self._connected)

    async def stop(self) -> None:
        for job in self._jobs:
            job.cancel()
        await asyncio.gather(*self._jobs, return_exceptions=True)
        await self.outbox.close()
        await self.proxy.stop()
        await self.hub.stop()
        gc.collect()  # the sockets that the SDK leaves open, while they are ours to ignore

    def _submit(self, source: str, version: int, body: bytes) -> Verdict:
        self.documents.append(json.loads(body))
        return Verdict(200, "")

    async def _ping(self, payload: Any) -> MethodResult:
        return MethodResult(200, payload)

    def _link_changed(self) -> None:
        self.sender.link_changed()

    def _connected(self) -> bool:
        return self.publisher.links()[0].connected

    async def until(self, condition: Callable[[], Any]) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + SECONDS
        while not condition():
            if loop.time() > deadline:
                pytest.fail(
                    f"not within {SECONDS} s: {self.documents[-1:]}, {self.publisher.links()}, "
                    f"{self.outbox.status()}, {self.hub.faults}, {self.reported}"
                )
            await asyncio.sleep(0.01)

    @property
    def reported(self) -> dict[str, Any]:
        return self.hub.core.twin(DEVICE).reported.value

    def received(self) -> Counter[str]:
        return Counter(m.system["message-id"] for m in self.hub.telemetry.query(device="d1"))

    def desire(self) -> int:
        self.work += 1
        change = {"properties": {"desired": {"deployment": {"n": self.work}}}}
        self.hub.core.update_twin(DEVICE, change)
        return self.work


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def agent(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[AgentOnHub]:
    agent = AgentOnHub(tmp_path_factory.mktemp("faults"))
    await agent.start()
    yield agent
    await agent.stop()


async def test_the_table_is_complete() -> None:
    assert {field.name for field in fields(Faults)} == {*TABLE, *NOT_FOR_THE_AGENT}


@pytest.mark.parametrize("fault", TABLE)
async def test_the_agent_recovers(agent: AgentOnHub, fault: str) -> None:
    hub = agent.hub
    value, reconnect = TABLE[fault]
    await agent.until(agent._connected)
    setattr(hub.faults, fault, value)
    if reconnect:
        hub.drop_connections()
        await agent.until(lambda: not agent._connected())
    first = agent.desire()
    agent.publisher.publish("iothub", {"did": first})
    ids = [await agent.outbox.put(Telemetry(b'{"n":%d}' % n)) for n in range(4)]
    last = agent.desire()
    if fault == "lose_method_answers":
        with pytest.raises(HubError):
            await hub.core.invoke_method(DEVICE, "ping", {}, 1.0, 10.0)
    if fault == "clock_skew_seconds":
        await agent.until(lambda: agent.publisher.links()[0].reason)
    if fault in LASTING and reconnect:
        hub.faults.clear()
    agent.publisher.publish("iothub", {"did": last})

    await agent.until(lambda: agent.documents and agent.documents[-1] == {"n": last})
    await agent.until(lambda: agent.reported == {"did": last})
    await agent.until(lambda: set(ids) <= set(agent.received()))
    await agent.until(lambda: agent.outbox.status().messages == 0)
    if fault not in LASTING:
        assert getattr(hub.faults, fault) == 0, "the fault never happened"
    hub.faults.clear()
    # First arrivals are in order, and what was not asked for twice by a fault came once.
    order = [message_id for message_id in agent.received() if message_id in ids]
    assert order == ids
    assert await hub.core.invoke_method(DEVICE, "ping", {"a": 1}, 10.0, 10.0) == (200, {"a": 1})
