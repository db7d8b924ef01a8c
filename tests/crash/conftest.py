from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from required import program

# What the crash tests share is a module next to them.
sys.path.insert(0, str(Path(__file__).parent))

from every_call import SmallDevice, Supplies, supplies


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[SmallDevice, Supplies]]:
    """A device to suffer, and the registry it pulls from."""
    program("strace")
    with supplies(tmp_path_factory.mktemp("supplies")) as found:
        device = SmallDevice(found)
        try:
            yield device, found
        finally:
            device.close()
