from __future__ import annotations

import re
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from gatelet.agent.log_lines import LineFilter
from gatelet.agent.methods.blobs import blob_url, parse_target
from gatelet.agent.methods.moments import parse_moment
from gatelet.agent.methods.requests import (
    BadRequest,
    bundle_request,
    logs_request,
    module_to_restart,
    sas_url,
    task_asked_for,
)
from gatelet.agent.methods.searching import filtered, matching, search_all
from gatelet.agent.runtime.container import LogFilter, LogLine
from hypothesis import given
from hypothesis import strategies as st

NOW = datetime(2026, 11, 21, 12, 0, tzinfo=timezone.utc)
SAS = "https://account.blob.core.windows.net/logs?sv=2021-10-04&sr=c&sp=rcw&sig=c2VjcmV0%3D"


def ago(**span: float) -> datetime:
    return NOW - timedelta(**span)


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2026-11-21T11:00:00Z", ago(hours=1)),
        ("2026-11-21T11:00:00.25Z", ago(hours=1) + timedelta(milliseconds=250)),
        ("2026-11-21 13:00:00 +02:00", ago(hours=1)),
        ("1795262400", datetime.fromtimestamp(1795262400, timezone.utc)),
        (1795262400, datetime.fromtimestamp(1795262400, timezone.utc)),
        ("1 day", ago(days=1)),
        ("1d", ago(days=1)),
        ("90m", ago(minutes=90)),
        ("90 min", ago(minutes=90)),
        ("2 days 3 hours 2 minutes", ago(days=2, hours=3, minutes=2)),
        ("1h30m", ago(hours=1, minutes=30)),
        ("2 days, 1 hour and 5 secs", ago(days=2, hours=1, seconds=5)),
        ("1 week ago", ago(weeks=1)),
    ],
)
def test_moments_as_edge_agent_takes_them(text: Any, moment: datetime) -> None:
    assert parse_moment(text, NOW) == moment


@pytest.mark.parametrize(
    "text",
    ["", "soon", "3 fortnights", "-1h", "1h x", "2026-13-01T00:00:00Z", "1.5 hours", 1e40, True,
     "999999999 weeks", "2026-11-21T11:00:00", "٣h", "ago"],
)  # fmt: skip
def test_what_is_no_moment_is_said(text: Any) -> None:
    with pytest.raises(ValueError, match="expected a time"):
        parse_moment(text, NOW)


@given(st.text(max_size=40))
def test_any_text_is_a_moment_or_an_error(text: str) -> None:
    try:
        assert parse_moment(text, NOW).utcoffset() == timedelta(0)
    except ValueError:
        pass


def test_a_logs_request_with_everything() -> None:
    request = logs_request(
        {
            "schemaVersion": "1.0",
            "Items": [
                {
                    "id": "^dig",
                    "filter": {"tail": 5, "since": "1h", "until": 1795262400, "logLevel": 3,
                               "regex": "fail(ed|ure)"},
                },
                {"id": "all"},
            ],
            "encoding": "GZIP",
            "contentType": "json",
            "sasURL": SAS,
        },
        NOW,
    )  # fmt: skip
    assert (request.encoding, request.content) == ("gzip", "json")
    first, second = request.items
    assert first.lines.where.tail == 5
    assert first.lines.where.since == ago(hours=1)
    assert first.lines.severity == 3
    assert first.lines.pattern is not None
    assert second.modules is None
    assert second.lines.plain
    found = matching(request.items, ("edgeAgent", "Digits", "other"))
    assert found["Digits"] is first.lines, "the first item that matches counts, without case"
    assert found["edgeAgent"] is found["other"] is second.lines


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (None, "payload: expected a JSON object, found nothing"),
        ([], "payload: expected a JSON object"),
        ({}, r"payload\.items: expected a list"),
        ({"items": []}, r"payload\.items"),
        ({"items": ["all"]}, r"payload\.items\[0\]: expected a JSON object"),
        ({"items": [{}]}, r"payload\.items\[0\]\.id: expected a text"),
        ({"items": [{"id": "("}]}, r"payload\.items\[0\]\.id: not a regular expression"),
        ({"items": [{"id": "x" * 600}]}, "longer than 512"),
        ({"items": [{"id": "all", "filter": []}]}, r"items\[0\]\.filter: expected a JSON object"),
        ({"items": [{"id": "all", "filter": {"tail": -1}}]}, r"filter\.tail: expected a whole"),
        ({"items": [{"id": "all", "filter": {"tail": True}}]}, r"filter\.tail"),
        ({"items": [{"id": "all", "filter": {"tail": 1.5}}]}, r"filter\.tail"),
        ({"items": [{"id": "all", "filter": {"loglevel": 8}}]}, "from 0 to 7"),
        ({"items": [{"id": "all", "filter": {"since": "soon"}}]}, r"filter\.since: 'soon'"),
        ({"items": [{"id": "all", "filter": {"until": {}}}]}, r"filter\.until: expected a time"),
        ({"items": [{"id": "all", "filter": {"regex": "*"}}]}, r"filter\.regex: not a regular"),
        ({"items": [{"id": "all"}], "encoding": "zip"}, "expected one of none, gzip"),
        ({"items": [{"id": "all"}], "contentType": 3}, "expected one of text, json"),
        ({"schemaVersion": "2.0", "items": [{"id": "all"}]}, "expected 1.0, found '2.0'"),
    ],
)
def test_what_is_wrong_in_a_logs_request_is_said_with_its_place(payload: Any, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        logs_request(payload, NOW)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["id", "items", "filter", "tail", "since", "regex", "sasUrl", "x"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


@given(_JSON)
def test_any_payload_is_a_request_or_a_bad_one(payload: Any) -> None:
    for read in (
        lambda p: logs_request(p, NOW),
        lambda p: bundle_request(p, NOW),
        module_to_restart,
        task_asked_for,
        sas_url,
    ):
        try:
            read(payload)
        except BadRequest:
            pass


@pytest.mark.parametrize("pattern", ["line [12]", "line [12]+$", "LINE (?:1|2)?[12]"])
def test_patterns_find_the_same_in_a_process_of_their_own(pattern: str) -> None:
    compiled = re.compile(pattern, re.IGNORECASE)
    texts = [f"line {n}" for n in range(30)] + ["", "\U0001f600 line 1", "\udc80"]
    assert search_all(compiled, texts) == [compiled.search(t) is not None for t in texts]
    assert search_all(compiled, []) == []


def test_a_pattern_that_takes_ages_is_refused_while_others_go_on() -> None:
    with pytest.raises(BadRequest, match="repetitions inside repetitions"):
        search_all(re.compile(r"(\w+\W?)*!"), ["a" * 60], seconds=0.3)


def test_the_tail_counts_what_the_pattern_found() -> None:
    lines = [LogLine(None, "stdout", f"<3> line {n}") for n in range(20)]
    wanted = LineFilter(LogFilter(tail=2), None, re.compile("line .$"))
    assert [line.text for line in filtered(lines, wanted)] == ["<3> line 8", "<3> line 9"]
    assert filtered(lines, LineFilter(LogFilter(tail=0))) == []
    begin = LineFilter(LogFilter(), None, re.compile("^line 7"))
    assert len(filtered(lines, begin)) == 1, "the prefix is not part of the text"


def test_the_other_requests() -> None:
    assert module_to_restart({"schemaVersion": "1.0", "id": "m"}) == "m"
    assert task_asked_for({"schemaVersion": "1.0", "correlationId": "c"}) == "c"
    bundle = bundle_request({"since": "2d", "edgeRuntimeOnly": True}, NOW)
    assert (bundle.since, bundle.until, bundle.runtime_only) == (ago(days=2), None, True)
    with pytest.raises(BadRequest, match="edgeRuntimeOnly"):
        bundle_request({"edgeRuntimeOnly": "yes"}, NOW)


def test_blobs_of_a_container_get_edge_agents_names() -> None:
    url = blob_url(parse_target(SAS), "hub.example", "edge 1", "digits", "log.gz", NOW)
    path, query = url.split("?")
    assert path.endswith("/logs/hub.example/edge%201/digits-2026-11-21--12-00-00.log.gz")
    assert query == SAS.split("?")[1]


def test_a_signature_for_one_blob_is_used_as_it_stands() -> None:
    url = SAS.replace("/logs?", "/logs/one.txt?").replace("sr=c", "sr=b")
    assert blob_url(parse_target(url), "hub", "device", "digits", "log", NOW) == url


@pytest.mark.parametrize(
    "url",
    [
        "http://account.example/logs?sig=s3cret",
        "https://account.example?sig=s3cret",
        "https://account.example/logs?se=2026",
        "https://user:s3cret@account.example/logs?sig=s3cret",
        "https://account.example/logs?sig=s3cret#s3cret",
        "ftp://127.0.0.1/logs?sig=s3cret",
        "file:///etc/passwd?sig=s3cret",
        "https://[::/logs?sig=s3cret",
        "s3cret",
    ],
)
def test_urls_that_are_refused_are_not_repeated(url: str) -> None:
    with pytest.raises(ValueError, match="sasUrl") as caught:
        parse_target(url)
    assert "s3cret" not in str(caught.value)


def test_a_target_never_shows_its_signature() -> None:
    target = parse_target("http://127.0.0.1:1/logs?sr=c&sig=s3cret")
    assert "s3cret" not in f"{target} {target!r} {target.where}"
