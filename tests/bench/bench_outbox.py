"""Telemetry through the outbox: messages a second stored (each with its commit, in company, and in
company under twenty routes) and sent.

Run: python tests/bench/bench_outbox.py [--messages N] [--folder DIR]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from pathlib import Path

from gatelet.agent.clock import SystemClock
from gatelet.agent.edge_hub import EdgeHub, HubRoute
from gatelet.agent.outbox import Limits, Outbox, Telemetry
from gatelet.agent.telemetry import Upstream

CONDITION = "n = '{}' OR $body.sensor = 'b'"
ROUTES = (
    *(
        HubRoute(f"r{n}", "/messages/modules/m/*", "$upstream", CONDITION.format(n), n % 10)
        for n in range(19)
    ),
    HubRoute("rest", "/messages/*", "$upstream"),
)


async def measure(folder: Path, messages: int) -> dict[str, float]:
    outbox = Outbox(folder / "outbox.db", SystemClock())
    body = json.dumps({"sensor": "a", "values": list(range(40))}).encode()

    async def put(number: int) -> None:
        await outbox.put(Telemetry(body, properties={"n": str(number)}, priority=number % 10))

    began = time.perf_counter()
    for number in range(messages // 10):
        await put(number)
    alone = time.perf_counter()
    await asyncio.gather(*map(put, range(messages)))
    together = time.perf_counter()
    upstream = Upstream(outbox, "device", Limits())
    upstream.configure(EdgeHub("1.2", ROUTES))
    messages_of = [Telemetry(body, properties={"n": str(n)}) for n in range(messages)]
    await asyncio.gather(*(upstream.put("m", "o", message) for message in messages_of))
    routed = time.perf_counter()
    sent = 0
    while (held := outbox.head()) is not None:
        outbox.acknowledge(held.sequence)
        sent += 1
        if sent % 64 == 0:
            await asyncio.sleep(0)
    await outbox.close()
    drained = time.perf_counter()
    return {
        "storedAlonePerSecond": round(messages // 10 / (alone - began)),
        "storedTogetherPerSecond": round(messages / (together - alone)),
        "storedRoutedPerSecond": round(messages / (routed - together)),
        "sentPerSecond": round(sent / (drained - routed)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=20000)
    parser.add_argument("--folder", type=Path, help="on the file system to measure")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        print(json.dumps(asyncio.run(measure(Path(folder), arguments.messages))))


if __name__ == "__main__":
    main()
