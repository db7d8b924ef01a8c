"""A whole device: REST, metrics and keys, from the deployment to the client."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
from gatelet.agent.scoring.client import ScoringClient
from gatelet.agent.scoring.errors import ScoringError
from gatelet.simulator.demo.dataset import load_heldout

pytestmark = pytest.mark.e2e


async def gatelet(device: Any, *words: str) -> str:
    config = ("--config", str(device.folder / "agent.toml"))
    command = (sys.executable, "-m", "gatelet.agent.main", *words, *config)
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    assert process.returncode == 0
    return out.decode()


def ask(
    address: str, method: str, path: str, key: str | None = None, body: Any = None
) -> tuple[int, str]:
    headers = {"Content-Type": "application/json"}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    connection = http.client.HTTPConnection(address, timeout=20)
    connection.request(method, path, None if body is None else json.dumps(body), headers)
    response = connection.getresponse()
    answer = response.read().decode()
    connection.close()
    return response.status, answer


async def until_it_answers(good: str, ask: Callable[[], str]) -> set[str]:
    """All that was answered until `good` was."""
    found: set[str] = set()
    deadline = time.monotonic() + 40
    while good not in found:
        assert time.monotonic() < deadline, found
        found.add(await asyncio.to_thread(ask))
    return found


async def test_an_endpoint_with_keys_over_rest(
    device: Any, make_deployment: Callable[..., dict[str, Any]]
) -> None:
    content = make_deployment(image=await device.push("v1"))
    text = json.dumps(content).replace(
        '"SCORING_BACKENDS":', '"SCORING_AUTH": {"value": "key"}, "SCORING_BACKENDS":'
    )
    assert "SCORING_AUTH" in text
    await device.until_good(device.desire(json.loads(text)))

    shown = await gatelet(device, "status")
    addresses = json.loads(await gatelet(device, "status", "--json"))["scoring"]
    assert set(addresses) == {"grpc", "http", "metrics"}
    assert f"http {addresses['http']}" in shown
    keys = json.loads(await gatelet(device, "keys", "show", "digits", "--json"))

    images, labels = load_heldout()
    body = {"data": images[:10].tolist()}

    def score(key: str | None) -> tuple[int, str]:
        return ask(addresses["http"], "POST", "/score", key, body)

    assert (await asyncio.to_thread(score, None))[0] == 401
    status, answer = await asyncio.to_thread(score, keys["secondary"])
    assert status == 200, answer
    rows = json.loads(answer)
    rows = rows["scores"] if isinstance(rows, dict) else rows
    right = sum(row.index(max(row)) == label for row, label in zip(rows, labels, strict=False))
    assert right >= 8

    new = json.loads(
        await gatelet(device, "keys", "regenerate", "digits", "--key", "primary", "--json")
    )
    # Soon, and never anything but the one or the other.
    statuses = []
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        statuses.append((await asyncio.to_thread(score, keys["primary"]))[0])
        if statuses[-1] == 401:
            break
    assert statuses[-1] == 401
    assert set(statuses) <= {200, 401}
    assert (await asyncio.to_thread(score, new["primary"]))[0] == 200
    assert (await asyncio.to_thread(score, keys["secondary"]))[0] == 200

    def scrape() -> tuple[int, str]:
        return ask(addresses["metrics"], "GET", "/metrics", keys["secondary"])

    status, text = await asyncio.to_thread(scrape)
    assert status == 200
    assert 'nv_inference_request_success{model="digits",version="1"}' in text
    assert 'gatelet_refused_calls_total{code="UNAUTHENTICATED"}' in text

    # What a crash inside a model does: the process is started again, models, keys and all. Nobody
    # is told meanwhile that there is no such endpoint, or that its key is wrong.
    def over_grpc() -> str:
        try:
            with ScoringClient(device.grpc_address, 20, bearer=keys["secondary"]) as client:
                client.infer("digits", {"x": images[:1]})
        except ScoringError as error:
            return error.code.name
        return "OK"

    before = device.processes()["scoring"]["pid"]
    os.kill(before, signal.SIGSEGV)
    codes = await until_it_answers("OK", over_grpc)
    assert codes <= {"OK", "UNAVAILABLE"}
    status = await device.until(
        lambda s: s["scoring"].get("http") not in (None, addresses["http"]) and s["endpoints"]
    )
    addresses = status["scoring"]
    assert device.processes()["scoring"]["pid"] != before
    assert await asyncio.to_thread(score, keys["secondary"]) == (200, answer)
    assert (await asyncio.to_thread(score, None))[0] == 401
