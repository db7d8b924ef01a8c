"""What azure-iot-device does on its own account, by number, and that our transport survives it.

1. It never subscribes again.
2. Twin requests have no time limit and are not sent again.
3. `ensure_desired_properties` can wedge after one lost answer.
4. A 429 to its own read makes it ask over and over.
5. A refused reconnect ends its own reconnecting.
6. A hub that was away is found again only after the retry interval.
7. Two clients with one identity disconnect each other.
8. After a reconnect the full desired section arrives, deletions as absence.
9. A lost PUBACK means a message again; sending while disconnected raises.
10. Its threads are shared by the whole process.
11. `shutdown()` can raise, and errors hide their cause.
12. TLS is set up once per client: a new certificate needs a new client.
"""

from __future__ import annotations

import ast
import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from gatelet.agent.twin.transport import TransportUnavailable
from gatelet.simulator.iothub.devices import ClientId

# See test_iothub_sdk: what the SDK does on its own account.
pytestmark = pytest.mark.filterwarnings(
    "ignore:ssl.PROTOCOL_TLSv1_2:DeprecationWarning", "ignore:unclosed <socket:ResourceWarning"
)

D1 = ClientId("d1")
HERE, TRANSPORT, IDENTITY = (
    "test_identity_sdk_behaviours.py",
    "test_iothub_transport.py",
    "test_identity_iothub.py",
)
SURVIVED = {
    1: [(TRANSPORT, "test_a_forgotten_session_is_subscribed_again")],
    2: [
        (TRANSPORT, "test_a_lost_answer_ends_the_connection"),
        (HERE, "test_2_silence_after_connecting"),
    ],
    3: [
        (HERE, "test_3_lost_read_then_offline_changes"),
        (TRANSPORT, "test_a_lost_patch_is_found_by_the_watchdog"),
    ],
    4: [
        (TRANSPORT, "test_throttled_reads_are_repeated_with_patience"),
        (TRANSPORT, "test_endless_throttling_is_no_storm"),
    ],
    5: [
        (HERE, "test_5_refused_reconnects"),
        (HERE, "test_5_refusal_for_long_is_no_storm"),
        (HERE, "test_5_tokens_that_a_hubs_clock_refuses"),
        (TRANSPORT, "test_refused_credentials_are_tried_again"),
    ],
    6: [
        (TRANSPORT, "test_a_hub_that_is_away"),
        (HERE, "test_6_back_within_the_cap"),
    ],
    7: [
        (TRANSPORT, "test_a_second_client_with_our_identity"),
        (HERE, "test_7_two_clients_do_not_storm"),
    ],
    8: [(HERE, "test_8_deleted_while_away")],
    9: [
        (TRANSPORT, "test_a_repeated_method_call_runs_once"),
        (TRANSPORT, "test_drops_around_the_acknowledgement"),
        (HERE, "test_9_acknowledgement_that_never_comes"),
        (HERE, "test_9_repeated_and_reordered_patches"),
        (HERE, "test_9_sending_while_away"),
    ],
    10: [(HERE, "test_10_threads_do_not_pile_up")],
    11: [
        (HERE, "test_11_stopped_while_the_connection_breaks"),
        (TRANSPORT, "test_refused_reports_say_why"),
    ],
    12: [
        (IDENTITY, "test_renewed_certificate_without_a_gap"),
        (IDENTITY, "test_refused_certificate_leaves_the_old_connection"),
        (IDENTITY, "test_token_renewal_keeps_the_connection_up"),
    ],
}


def test_every_behaviour_has_its_test() -> None:
    folder = Path(__file__).parent
    assert sorted(SURVIVED) == list(range(1, 13))
    for file in {file for tests in SURVIVED.values() for file, _ in tests}:
        tree = ast.parse((folder / file).read_text(encoding="utf-8"))
        there = {node.name for node in tree.body if isinstance(node, ast.AsyncFunctionDef)}
        wanted = {name for tests in SURVIVED.values() for where, name in tests if where == file}
        assert wanted <= there, (file, wanted - there)


class Waits:
    """Waits between connections that are counted instead of waited."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)
        await asyncio.sleep(0)

    def attempts_within(self, period: float) -> int:
        at, count = 0.0, 1
        for seconds in self.seconds:
            at += seconds
            count += at <= period
        return count


async def test_2_silence_after_connecting(hub_bench: Any) -> None:
    bench = hub_bench
    source = bench.hub.connection_string("d1")
    await bench.connected(source, request_timeout=2.0, resync_interval=0.2)
    bench.hub.faults.lose_twin_answers = 2
    bench.hub.faults.lose_desired_patches = 1
    bench.deploy({"v": 1})
    await bench.until(lambda: bench.sink.newest == {"v": 1})
    assert any("no answer within" in reason for reason in bench.sink.reasons)


async def test_3_lost_read_then_offline_changes(hub_bench: Any) -> None:
    bench = hub_bench
    await bench.connected(bench.hub.connection_string("d1"), request_timeout=2.0)
    bench.hub.faults.lose_twin_answers = 1
    for value in (1, 2):
        bench.hub.drop_connections()
        bench.deploy({"v": value})
        await bench.until(lambda v=value: bench.sink.newest == {"v": v})


async def test_5_refused_reconnects(hub_bench: Any) -> None:
    bench = hub_bench
    await bench.connected(bench.hub.connection_string("d1"))
    bench.hub.faults.refuse_connects = 3
    bench.hub.drop_connections()
    bench.deploy({"v": 1})
    await bench.until(lambda: bench.sink.newest == {"v": 1})
    assert sum("not authorised" in reason for reason in bench.sink.reasons) == 3, bench.sink.reasons


async def test_5_refusal_for_long_is_no_storm(hub_bench: Any) -> None:
    bench, waits = hub_bench, Waits()
    source = bench.hub.connection_string("d1")
    bench.hub.faults.refuse_connects = 10**6
    bench.run(source, pause=waits, retry_base=1.0, retry_cap=60.0)
    await bench.until(lambda: len(waits.seconds) >= 30)
    assert max(waits.seconds) <= 60
    assert len(set(waits.seconds)) == len(waits.seconds)  # jittered
    assert waits.attempts_within(60) <= 12
    assert waits.attempts_within(600) <= 40
    assert 10**6 - bench.hub.faults.refuse_connects <= len(waits.seconds) + 1  # one per wait


async def test_5_tokens_that_a_hubs_clock_refuses(hub_bench: Any) -> None:
    bench = hub_bench
    await bench.connected(bench.hub.connection_string("d1"))
    bench.hub.faults.clock_skew_seconds = 2 * 24 * 3600.0
    bench.hub.drop_connections()
    await bench.until(lambda: any("not authorised" in reason for reason in bench.sink.reasons))
    bench.hub.faults.clock_skew_seconds = 0.0
    bench.hub.faults.expire_tokens = 2
    await bench.until(lambda: not bench.hub.faults.expire_tokens)
    bench.deploy({"v": 1})
    await bench.until(lambda: bench.sink.newest == {"v": 1})


async def test_6_back_within_the_cap(hub_bench: Any) -> None:
    bench, waits = hub_bench, []

    async def pause(seconds: float) -> None:
        waits.append(seconds)
        await asyncio.sleep(seconds)

    await bench.connected(bench.hub.connection_string("d1"), retry_cap=0.3, pause=pause)
    await bench.hub.pause()
    await bench.until(lambda: len(bench.sink.reasons) >= 4)
    loop = asyncio.get_running_loop()
    await bench.hub.resume()
    since = loop.time()
    await bench.until(lambda: len(bench.sink.connections) == 2)
    assert max(waits) <= 0.3
    assert loop.time() - since < 0.3 + 15.0  # the cap, and a slow machine's connecting


async def test_7_two_clients_do_not_storm(hub_bench: Any) -> None:
    bench, waits = hub_bench, Waits()
    source = bench.hub.connection_string("d1")
    bench.run(source, pause=waits, retry_base=1.0, retry_cap=60.0)
    bench.run(source, pause=waits, retry_base=1.0, retry_cap=60.0)
    await bench.until(lambda: len(waits.seconds) >= 20)
    assert any("is another client using this identity?" in r for r in bench.sink.reasons)
    # Waits of both, one after the other: short connections do not reset the back-off.
    assert sum(waits.seconds[10:]) > 60


async def test_8_deleted_while_away(hub_bench: Any) -> None:
    bench = hub_bench
    source = bench.hub.connection_string("d1", "m")
    await bench.connected(source)
    change = {"properties": {"desired": {"a": 1, "b": {"c": 2, "d": 3}}}}
    bench.hub.core.update_twin(ClientId("d1", "m"), change)
    await bench.until(lambda: bench.sink.newest == {"a": 1, "b": {"c": 2, "d": 3}})
    await bench.hub.pause()
    change = {"properties": {"desired": {"a": None, "b": {"d": None}, "e": 4}}}
    bench.hub.core.update_twin(ClientId("d1", "m"), change)
    await bench.hub.resume()
    await bench.until(lambda: bench.sink.newest == {"b": {"c": 2}, "e": 4})


async def test_9_acknowledgement_that_never_comes(hub_bench: Any) -> None:
    bench = hub_bench
    transport = await bench.connected(bench.hub.connection_string("d1"), request_timeout=2.0)
    bench.hub.faults.lose_acks = 1
    with pytest.raises(TransportUnavailable, match="no answer"):
        await transport.send(b"x", {})
    await bench.until(lambda: len(bench.sink.connections) == 2)
    await transport.send(b"y", {})
    assert [m.body for m in bench.hub.telemetry.query("d1")][-1] == b"y"


async def test_9_repeated_and_reordered_patches(hub_bench: Any) -> None:
    bench = hub_bench
    await bench.connected(bench.hub.connection_string("d1"))
    bench.hub.faults.repeat_desired_patches = 1
    bench.deploy({"v": 1})
    await bench.until(lambda: bench.sink.newest == {"v": 1})
    bench.hub.faults.reorder_desired_patches = 1
    bench.deploy({"v": None, "w": 2})
    bench.deploy({"x": 3})
    await bench.until(lambda: bench.sink.newest == {"w": 2, "x": 3})
    versions = [document.version for document in bench.sink.documents]
    assert versions == sorted(set(versions))
    assert bench.sink.reasons == []


async def test_9_sending_while_away(hub_bench: Any) -> None:
    bench = hub_bench
    transport = await bench.connected(bench.hub.connection_string("d1"))
    await bench.hub.pause()
    await bench.until(lambda: bench.sink.reasons)
    with pytest.raises(TransportUnavailable):
        await transport.send(b"x", {})
    with pytest.raises(TransportUnavailable):
        await transport.report({"a": 1})


async def test_10_threads_do_not_pile_up(hub_bench: Any) -> None:
    bench = hub_bench
    await bench.connected(bench.hub.connection_string("d1"))
    counts: list[int] = []
    for round_number in range(2, 12):
        bench.hub.drop_connections()
        await bench.until(lambda n=round_number: len(bench.sink.connections) == n)
        counts.append(threading.active_count())
    # asyncio's pool for blocking calls has grown to its size by the fifth round.
    assert counts[-1] <= counts[4] + 2


async def test_11_stopped_while_the_connection_breaks(
    hub_bench: Any, caplog: pytest.LogCaptureFixture
) -> None:
    bench = hub_bench
    source = bench.hub.connection_string("d1")
    for round_number in range(1, 6):
        bench.run(source)
        await bench.until(lambda n=round_number: len(bench.sink.connections) == n)
        bench.hub.drop_connections()
        await bench.stop_runs()
    assert not [r for r in caplog.records if "shut down" in r.getMessage()]
    assert bench.hub.core.link(D1) is None
