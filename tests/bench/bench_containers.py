"""What gatelet's way to a container costs over the engine's own.

    python tests/bench/bench_containers.py [--runs 30]

Create and start of one container with a pre-pulled image of one small program: by the engine's API
alone (two requests on one connection), and through the runtime (create_body, leftover check, image
check, create, drift check, start). Then the calls of a quiet agent: listing ten containers, with
the comparison of their settings. Times are medians in milliseconds; the order is shuffled, so that
a slower minute of the machine hits both alike.

A dockerd of its own is started, as for the tests: needs root, dockerd and docker-registry.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

from gatelet.agent.module_spec import ModuleSpec
from gatelet.agent.runtime.create_body import CreateFacts, create_body
from gatelet.agent.runtime.docker import DockerRuntime
from gatelet.agent.runtime.policy import DockerPolicy

sys.path.insert(0, str(Path(__file__).parents[1]))

from engine_fixture import Engine

OPTIONS = {"HostConfig": {"NetworkMode": "none", "Memory": 64 << 20, "PidsLimit": 50}}
POLICY = DockerPolicy()


def spec_of(name: str, image: str, digest: str):
    module = ModuleSpec(name, image, create_options=json.dumps(OPTIONS))
    return create_body(module, "bench", POLICY, CreateFacts(digest=digest))


async def compare(engine: Engine, runs: int) -> dict[str, float]:
    pushed = engine.push("bench:1")
    runtime = DockerRuntime(engine.socket, "bench")
    api = engine.client
    times: dict[str, list[float]] = {"engine": [], "runtime": []}

    async def by_engine(name: str) -> None:
        def work() -> None:
            body = json.loads(spec_of(name, pushed.name, pushed.digest).body)
            made = api.create_container_from_config(body, name)["Id"]
            api.start(made)

        await asyncio.to_thread(work)

    async def by_runtime(name: str) -> None:
        spec = spec_of(name, pushed.name, pushed.digest)
        await runtime.create(spec)
        await runtime.start(spec.name)

    try:
        await runtime.pull(pushed.name, pushed.digest, (), lambda progress: None)
        ways = {"engine": by_engine, "runtime": by_runtime}
        for number in range(-1, runs):
            for way in random.sample(sorted(ways), len(ways)):
                name = f"{way}-{number}"
                begin = time.perf_counter()
                await ways[way](name)
                # The first of each imports and connects.
                if number >= 0:
                    times[way].append(time.perf_counter() - begin)
                await runtime.remove(name)
        for number in range(10):
            await by_runtime(f"idle-{number}")
        listing = []
        for _ in range(runs):
            begin = time.perf_counter()
            assert len(await runtime.containers()) == 10
            listing.append(time.perf_counter() - begin)
        return {
            **{way: statistics.median(found) * 1000 for way, found in times.items()},
            "listing": statistics.median(listing) * 1000,
        }
    finally:
        for view in await runtime.containers():
            await runtime.remove(view.name)
        await runtime.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    engine = Engine(Path(tempfile.mkdtemp(prefix="gatelet-engine-")))
    try:
        engine.make_sure()
        found = asyncio.run(compare(engine, options.runs))
        version = engine.client.version()["Version"]
    finally:
        engine.close()
    found["ratio"] = found["runtime"] / found["engine"]
    if options.json:
        print(json.dumps({"dockerd": version, "runs": options.runs, **found}))
        return
    print(f"dockerd {version}, {options.runs} runs each")
    print(f"create + start, engine's API alone   {found['engine']:8.1f} ms")
    print(f"create + start, gatelet's runtime    {found['runtime']:8.1f} ms  x{found['ratio']:.2f}")
    print(f"list and compare ten containers      {found['listing']:8.1f} ms")


if __name__ == "__main__":
    main()
