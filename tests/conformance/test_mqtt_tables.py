"""Every numbered statement of both specifications is accounted for."""

from __future__ import annotations

from pathlib import Path

import mqtt5_table
import mqtt311_table
import pytest
from mqtt_peer import COLLECTED, FILES

TABLES = [("v311", mqtt311_table), ("v5", mqtt5_table)]
versions = pytest.mark.parametrize(("version", "table"), TABLES, ids=["3.1.1", "5.0"])


@versions
def test_every_number_that_a_server_can_violate_has_a_test(version, table, pytestconfig) -> None:
    suite = {path.name for path in Path(__file__).parent.glob("test_*.py")}
    if missing := suite - pytestconfig.stash[FILES]:
        pytest.skip(f"only part of the suite was collected, without {sorted(missing)}")
    covered = pytestconfig.stash[COLLECTED][version]
    assert sorted(table.SERVER.keys() - covered.keys()) == []
    assert sorted(covered.keys() - table.SERVER.keys()) == []


@versions
def test_numbers_are_in_one_table_only_and_without_gaps(version, table) -> None:
    assert table.SERVER.keys().isdisjoint(table.NOT_SERVER)
    sections: dict[str, set[int]] = {}
    for number in [*table.SERVER, *table.NOT_SERVER]:
        section, _, position = number.rpartition("-")
        sections.setdefault(section, set()).add(int(position))
    for section, positions in sections.items():
        # The specification of 5.0 itself has no 2.2.1-1.
        first = 2 if (version, section) == ("v5", "2.2.1") else 1
        assert positions == set(range(first, max(positions) + 1)), section
    assert all(table.SERVER.values())
    assert all(table.NOT_SERVER.values())
