from __future__ import annotations

import sys
from pathlib import Path

import pytest

# The suite's tables and its client are modules next to the tests.
sys.path.insert(0, str(Path(__file__).parent))

from mqtt_peer import COLLECTED, FILES


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "covers(v311, v5): numbers of the MQTT specifications")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What each test claims to prove, before -k and the like take tests away."""
    found: dict[str, dict[str, list[str]]] = {"v311": {}, "v5": {}}
    for item in items:
        for mark in item.iter_markers("covers"):
            for version, numbers in mark.kwargs.items():
                for number in numbers:
                    found[version].setdefault(number, []).append(item.nodeid)
    config.stash[COLLECTED] = found
    config.stash[FILES] = {item.path.name for item in items}
