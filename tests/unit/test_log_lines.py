from __future__ import annotations

import asyncio
import json
import logging
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from gatelet.accelerators.process_log import BoundedLogFile
from gatelet.agent.log_lines import (
    LineFilter,
    as_json,
    as_text,
    chosen,
    encoded,
    mentions,
    parse_line,
)
from gatelet.agent.logs import LogPart, follow_logs, read_logs
from gatelet.agent.redaction import redact, redact_document, secret_name
from gatelet.agent.runtime.container import LogFilter, LogLine
from hypothesis import given
from hypothesis import strategies as st

AT = datetime(2026, 11, 21, 5, 47, 0, 123000, tzinfo=timezone.utc)


def line(text: str, seconds: float = 0) -> LogLine:
    return LogLine(AT + timedelta(seconds=seconds), "stdout", text)


@pytest.mark.parametrize(
    ("text", "severity", "at", "rest"),
    [
        ("<6> 2026-11-21 05:47:00.123 +00:00 [INF] - hello", 6, AT, "[INF] - hello"),
        ("<3> 2026-11-21 07:47:00.123 +02:00 [ERR] bad", 3, AT, "[ERR] bad"),
        ("<4>short", 4, None, "short"),
        ("2026-11-21T05:47:00.123Z plain", 6, AT, "plain"),
        ("nothing of the kind", 6, None, "nothing of the kind"),
        ("<9> no such severity", 6, None, "<9> no such severity"),
        ("<5> 2026-99-99 05:47:00.123 +00:00 x", 6, None, "<5> 2026-99-99 05:47:00.123 +00:00 x"),
        ("", 6, None, ""),
    ],
)
def test_the_recommended_prefix(text: str, severity: int, at: datetime | None, rest: str) -> None:
    parsed = parse_line(text)
    assert (parsed.severity, parsed.at, parsed.text) == (severity, at, rest)


@given(st.text(max_size=80))
def test_any_line_parses_and_keeps_its_end(text: str) -> None:
    assert text.endswith(parse_line(text).text)


def test_filters_choose_and_the_tail_counts_what_they_chose() -> None:
    lines = [line(f"<{6 if n % 2 else 3}> line {n}", n) for n in range(10)]
    errors = LineFilter(LogFilter(tail=2), severity=3)
    assert [one.text for one in chosen(lines, errors)] == ["<3> line 6", "<3> line 8"]
    span = LogFilter(None, AT + timedelta(seconds=3), AT + timedelta(seconds=5))
    assert len(chosen(lines, LineFilter(span))) == 3
    assert chosen(lines, LineFilter(LogFilter(tail=0))) == []


def test_of_a_huge_log_the_newest_part_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gatelet.agent.log_lines.KEPT_BYTES", 10_000)
    lines = (line(f"{n:04} {'x' * 95}", n) for n in range(1000))
    kept = chosen(lines, LineFilter(LogFilter()))
    assert 0 < len(kept) * 100 <= 10_000
    assert kept[-1].text.startswith("0999")


def test_the_answers_shapes() -> None:
    lines = [line("<3> 2026-11-21 05:47:00.123 +00:00 bad"), LogLine(None, "stderr", "plain")]
    assert as_text(lines).splitlines() == [one.text for one in lines]
    first, second = json.loads(as_json(lines, "hub", "edge-1", "m"))
    assert first == {
        "iothub": "hub", "device": "edge-1", "id": "m", "stream": "stdout", "loglevel": 3,
        "text": "bad", "timestamp": "2026-11-21T05:47:00.123000Z",
    }  # fmt: skip
    assert (second["timestamp"], second["loglevel"]) == (None, 6)
    assert encoded("x" * 1000, gzipped=True) == encoded("x" * 1000, gzipped=True)
    assert len(encoded("x" * 1000, gzipped=True)) < 50
    assert encoded("\udc80", gzipped=False) == b"?"


def test_a_module_is_named_as_a_word() -> None:
    about = mentions("digits")
    assert about("load digits (sha256:ab)")
    assert about("loaded digits@12ab")
    assert not about("load digits-2")
    assert not about("load mydigits")


# -- the files ---------------------------------------------------------------------------------


def logger_into(path: Path, max_bytes: int = 64 * 1024, files: int = 3) -> logging.Logger:
    logger = logging.Logger(f"gatelet.agent.{path.stem}")
    logger.addHandler(BoundedLogFile(path, max_bytes, files, redact))
    return logger


def close(logger: logging.Logger) -> None:
    for handler in logger.handlers:
        handler.close()


def test_lines_have_the_prefix_that_is_read_again(tmp_path: Path) -> None:
    logger = logger_into(tmp_path / "agent.log")
    try:
        logger.warning("one\ntwo %s", "https://h/c?sig=abc%3D&se=1")
        try:
            raise ValueError("inner")
        except ValueError:
            logger.exception("failed")
    finally:
        close(logger)
    lines = read_logs(tmp_path, [LogPart("agent")], LogFilter())
    parsed = [parse_line(one.text) for one in lines]
    assert [p.severity for p in parsed[:2]] == [4, 4]
    assert [p.text for p in parsed[:2]] == [
        "[WRN] [agent] one",
        "[WRN] [agent] two https://h/c?sig=(hidden)&se=1",
    ]
    assert all(p.severity == 3 and p.at is not None for p in parsed[2:])
    assert parsed[-1].text.endswith("ValueError: inner")
    assert (tmp_path / "agent.log").stat().st_mode & 0o007 == 0


def test_the_files_stay_bounded_and_the_newest_lines_stay(tmp_path: Path) -> None:
    logger = logger_into(tmp_path / "agent.log", 16 * 1024, 3)
    try:
        for number in range(2000):
            logger.info("line %d", number)
    finally:
        close(logger)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 3 * 16 * 1024
    lines = read_logs(tmp_path, [LogPart("agent")], LogFilter())
    numbers = [int(one.text.rsplit(" ", 1)[1]) for one in lines]
    assert numbers == list(range(numbers[0], 2000))
    assert len(numbers) > 300
    tail = read_logs(tmp_path, [LogPart("agent")], LogFilter(tail=3))
    assert [one.text for one in tail] == [one.text for one in lines[-3:]]


def test_two_processes_are_merged_by_time(tmp_path: Path) -> None:
    stamp = "<6> 2026-11-21 05:47:0{}.000 +00:00 [INF] [x] {}\n"
    (tmp_path / "agent.log").write_text(stamp.format(1, "pull digits") + stamp.format(4, "other"))
    (tmp_path / "scoring.log").write_text(stamp.format(2, "load digits") + "no prefix digits\n")
    parts = [LogPart(role, mentions("digits")) for role in ("agent", "scoring", "fabric")]
    texts = [one.text.rsplit("] ")[-1] for one in read_logs(tmp_path, parts, LogFilter())]
    assert texts == ["pull digits", "load digits", "no prefix digits"]
    assert read_logs(tmp_path / "none", parts, LogFilter()) == []


async def test_following_goes_on_over_rotations_without_loss(tmp_path: Path) -> None:
    path = tmp_path / "agent.log"
    logger = logger_into(path, 16 * 1024, 50)
    logger.info("line 0")
    seen: list[int] = []
    arrived = asyncio.Event()

    async def follow() -> None:
        async for one in follow_logs(tmp_path, [LogPart("agent")], LogFilter()):
            seen.append(int(one.text.rsplit(" ", 1)[1]))
            arrived.set()

    task = asyncio.ensure_future(follow())
    try:
        await asyncio.wait_for(arrived.wait(), 30)
        # Once per turn of the follower at most: a file that is rotated away twice between two
        # looks is not followed.
        for start in range(1, 801, 200):
            before = len(seen)
            for number in range(start, start + 200):
                logger.info("line %d", number)
            while len(seen) < before + 200:
                arrived.clear()
                await asyncio.wait_for(arrived.wait(), 30)
        assert seen == list(range(801))
        assert len(list(tmp_path.iterdir())) > 2
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        close(logger)


def test_a_disk_that_takes_nothing_does_not_disturb_the_process(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    logger = logger_into(tmp_path / "agent.log")
    (handler,) = logger.handlers
    assert isinstance(handler, BoundedLogFile)
    handler.stream.close()
    if sys.platform == "linux":
        handler.stream = open("/dev/full", "a")  # noqa: SIM115
    logger.info("lost")
    close_quietly(handler)
    assert capfd.readouterr().err == ""


def close_quietly(handler: BoundedLogFile) -> None:
    try:
        handler.close()
    except OSError:
        pass


# -- secrets -----------------------------------------------------------------------------------

KEY = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        (f"HostName=h;DeviceId=d;SharedAccessKey={KEY}", KEY),
        (f"key {KEY} in a sentence", KEY),
        ("https://a.blob/c?sr=c&sig=abc%2Bdef%3D&se=1", "abc%2Bdef"),
        ("SharedAccessSignature sr=h&sig=abcdef%3D&se=1", "abcdef"),
        ("password=hunter2 and on", "hunter2"),
        ('{"password": "hunter2"}', "hunter2"),
        ("DB_PASSWORD=hunter2", "hunter2"),
        ("Authorization: Bearer abcdefghijklmno", "abcdefghijklmno"),
        ("https://user:hunter2@host/x", "hunter2"),
        ("-----BEGIN PRIVATE KEY-----\nMIIB\n-----END PRIVATE KEY-----", "MIIB"),
        ("-----BEGIN EC PRIVATE KEY-----\nMIIB cut off", "MIIB"),
        ("AccountKey=abc/def==;", "abc/def"),
    ],
)
def test_secrets_go_and_applying_it_twice_changes_nothing(text: str, secret: str) -> None:
    once = redact(text)
    assert secret not in once
    assert redact(once) == once


@pytest.mark.parametrize(
    "text",
    [
        "pull host:5000/models/digits:v1 for digits",
        "sha256:" + "ab" * 32,
        "deployment 3 from iothub accepted",
        "[WRN] [twin.mqtt] MQTT broker:8883: not connected",
    ],
)
def test_ordinary_lines_stay(text: str) -> None:
    assert redact(text) == text


def test_documents_keep_their_shape_without_their_secrets() -> None:
    document = {
        "iothub": {"connection-string": "HostName=h;SharedAccessKey=x", "ca-file": "/etc/ca.pem"},
        "registryCredentials": {"r1": {"username": "u", "password": "hunter2", "address": "a"}},
        "env": {"API_TOKEN": {"value": "t0ken"}, "MODE": {"value": "fast"}},
        "password-file": "/etc/gatelet/password",
        "tokenLifetimeSeconds": 5,
        "password": "",
    }
    clean = redact_document(document)
    assert "hunter2" not in str(clean)
    assert "t0ken" not in str(clean)
    assert clean["registryCredentials"]["r1"]["username"] == "u"
    assert clean["env"]["MODE"] == {"value": "fast"}
    assert clean["iothub"]["ca-file"] == "/etc/ca.pem"
    assert clean["password-file"] == "/etc/gatelet/password"
    assert clean["password"] == ""
    assert clean["tokenLifetimeSeconds"] == 5


@pytest.mark.parametrize("name", ["password", "apiKey", "SECRET_X", "connection_string", "sasUrl"])
def test_names_of_secrets(name: str) -> None:
    assert secret_name(name)


@pytest.mark.parametrize("name", ["keepalive", "key-file", "monkey", "digest", "module"])
def test_names_of_others(name: str) -> None:
    assert not secret_name(name)
