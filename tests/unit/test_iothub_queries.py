"""The query language of the hub: what is selected, and what is refused with a place."""

from __future__ import annotations

from typing import Any

import pytest
from gatelet.simulator.iothub.queries import QuerySyntaxError, parse_condition, parse_query
from gatelet.simulator.iothub.queries_evaluation import matches, run
from hypothesis import given
from hypothesis import strategies as st

TWIN: dict[str, Any] = {
    "deviceId": "d'1",
    "tags": {"site": "north", "floor": 2, "beta": True, "in": {"a.b": 1}, "none": None},
    "properties": {"desired": {"$version": 3}, "reported": {"seen": 3, "list": ["a"]}},
    "configurations": {"a:b": {"status": "Applied"}},
    "capabilities": {"iotEdge": True},
}


@pytest.mark.parametrize(
    "text",
    [
        "tags.site = 'north'",
        'tags.site="north"',
        "deviceId = 'd''1'",
        "tags.site != 'south' and tags.floor >= 2",
        "tags.floor < 3 AND tags.floor > 1.5 AND tags.floor <= 2e0 AND tags.floor <> -2",
        "NOT tags.site = 'south'",
        "NOT NOT tags.site = 'north'",
        "tags.site IN ['south', 'north']",
        "tags.site in ('south', 'north')",
        "tags.site NIN ['south']",
        "tags.site NOT IN ['south']",
        "tags.beta = true AND tags.none = null",
        "tags.floor = 1 OR (tags.floor = 2 AND tags.beta = TRUE)",
        "tags.floor = 2 OR tags.floor = 2 AND tags.floor = 3",
        "tags.nothing = 1 OR tags.floor = 2",
        "properties.desired.$version = properties.reported.seen",
        "configurations.[[a:b]].status = 'Applied'",
        "tags.[[in]]['a.b'] = 1",
        "tags.in['a.b'] = 1",
        "is_defined(tags.site) AND NOT IS_DEFINED(tags.nothing)",
        "STARTS_WITH(tags.site, 'no') and endswith(tags.site, 'th') and CONTAINS(tags.site, 'ort')",
        "IS_NULL(tags.none) AND IS_NUMBER(tags.floor) AND IS_OBJECT(tags) AND IS_BOOL(tags.beta)",
        "IS_ARRAY(properties.reported.list) AND NOT IS_PRIMITIVE(tags)",
        "capabilities.iotEdge = true",
    ],
)
def test_what_is_true(text: str) -> None:
    assert matches(parse_condition(text), TWIN)


@pytest.mark.parametrize(
    "text",
    [
        "tags.site = 'south'",
        "tags.nothing = 'x'",
        "tags.nothing != 'x'",
        "NOT tags.nothing = 'x'",
        "NOT (tags.nothing = 1 OR tags.floor = 3)",
        "tags.floor = '2'",
        "tags.beta = 1",
        "tags.nothing NOT IN ['x']",
        "tags.site.deeper = 'x'",
        "tags > 1",
        "STARTS_WITH(tags.floor, '2')",
        "false",
    ],
)
def test_what_is_not(text: str) -> None:
    assert not matches(parse_condition(text), TWIN)


@pytest.mark.parametrize(
    ("text", "column", "why"),
    [
        ("tags.x =", 9, "missing"),
        ("tags.x", 7, "comparison"),
        ("tags. = 1", 7, "a name"),
        ("tags.x = 1 AND", 15, "missing"),
        ("tags.x = 'open", 10, "does not belong"),
        ("(tags.x = 1", 12, "')'"),
        ("tags.x IN [1, ]", 15, "missing"),
        ("tags.x = 1 tags.y = 2", 12, "more than"),
        ("tags.x # 1", 8, "'#'"),
        ("nope(tags.x)", 1, "no function nope"),
        ("STARTS_WITH(tags.x)", 1, "2 arguments"),
        ("(" * 100 + "tags.x = 1", 65, "deeper"),
    ],
)
def test_conditions_that_are_refused(text: str, column: int, why: str) -> None:
    with pytest.raises(QuerySyntaxError) as caught:
        parse_condition(text)
    assert caught.value.message.startswith(f"column {column},")
    assert why in caught.value.message


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("SELECT TOP 1 deviceId FROM devices", [{"deviceId": "a"}]),
        ("select deviceId as id, n from devices where n > 1", [{"id": "b", "n": 2}]),
        ("SELECT COUNT() AS c, SUM(n) AS s, MAX(n) AS m FROM devices", [{"c": 3, "s": 3, "m": 2}]),
        ("SELECT COUNT(n) AS c, AVG(n) FROM devices", [{"c": 2, "$2": 1.5}]),
        ("SELECT kind, COUNT() AS c FROM devices GROUP BY kind", [{"kind": "x", "c": 2}, {"c": 1}]),
        ("SELECT COUNT() AS c FROM devices WHERE n > 9", [{"c": 0}]),
        ("SELECT MIN(n) AS m FROM devices WHERE n > 9", [{}]),
    ],
)
def test_rows(text: str, rows: list[dict[str, Any]]) -> None:
    twins = [{"deviceId": "a", "n": 1, "kind": "x"}, {"deviceId": "b", "n": 2, "kind": "x"}]
    assert run(parse_query(text), [*twins, {"deviceId": "c"}]) == rows


@pytest.mark.parametrize(
    "text",
    [
        "",
        "SELECT",
        "SELECT * FROM",
        "SELECT * FROM devices.jobs",
        "SELECT * FROM devices WHERE",
        "SELECT TOP x * FROM devices",
        "SELECT SUM() FROM devices",
        "SELECT kind, COUNT() FROM devices",
        "SELECT * FROM devices ORDER BY x",
        "DELETE FROM devices",
        "SELECT * FROM devices " + "x" * 9000,
    ],
)
def test_queries_that_are_refused(text: str) -> None:
    with pytest.raises(QuerySyntaxError):
        parse_query(text)


_WORDS = "tags.x = != < IN [ ] ( ) 'a' 1 true null AND OR NOT , . [[a]] SELECT FROM devices WHERE *"
_PIECES = st.sampled_from(
    [*_WORDS.split(), "COUNT(", "GROUP", "BY", "AS", "$v", '"', "'", "é", "\x00"]
)


@given(st.lists(_PIECES, max_size=20).map(" ".join) | st.text(max_size=60))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    for parse in (parse_condition, parse_query):
        try:
            parsed = parse(text)
        except QuerySyntaxError:
            continue
        if parse is parse_condition:
            assert matches(parsed, TWIN) in (True, False)


@given(st.text(max_size=20))
def test_quoted_texts_come_back(value: str) -> None:
    condition = parse_condition("tags.x = '{}'".format(value.replace("'", "''")))
    assert matches(condition, {"tags": {"x": value}})
