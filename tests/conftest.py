"""A simulated site in the test's own event loop, and agents on it as real processes."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import HealthCheck, settings

# What several folders of tests share lies next to this file.
sys.path.insert(0, str(Path(__file__).parent))

from engine_fixture import engine as engine
from running_device import RunningDevice

# Laws are about results: on a busy machine an example may take long, and so may drawing one.
settings.register_profile("gatelet", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("gatelet")


def deployment(endpoint: str = "digits", **changes: Any) -> dict[str, Any]:
    """A manifest with one model module; `changes`: image, backends, modules."""
    from gatelet.simulator.demo.cloud import deployment as demo_deployment

    return demo_deployment(
        changes["image"], backends=changes.get("backends", "cpu"), endpoint=endpoint
    )


@pytest.fixture(scope="session")
def make_deployment() -> Callable[..., dict[str, Any]]:
    return deployment


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_device(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningDevice]:
    """One device for all tests of a module, which leave it with a good deployment."""
    device = RunningDevice(tmp_path_factory.mktemp("device"))
    try:
        await device.start()
        yield device
    finally:
        await device.stop()


@pytest_asyncio.fixture
async def device(tmp_path: Path) -> AsyncIterator[RunningDevice]:
    """A fresh device."""
    device = RunningDevice(tmp_path)
    try:
        await device.start()
        yield device
    finally:
        await device.stop()
