"""The MQTT codec and bytes nobody should send."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from gatelet.simulator.mqtt.codec import Decoder, MalformedPacket
from hypothesis import given, settings
from hypothesis import strategies as st

PROGRAM = Path(__file__).parent / "fuzz_mqtt.py"
specification = importlib.util.spec_from_file_location("fuzz_mqtt", PROGRAM)
fuzz_mqtt = importlib.util.module_from_spec(specification)
specification.loader.exec_module(fuzz_mqtt)

# Bytes with the structure that lets them get past the first checks.
first_bytes = st.sampled_from([0x10, 0x20, *range(0x30, 0x40), 0x40, 0x50, 0x62, 0x70, 0x82, 0x90,
                               0xA2, 0xB0, 0xC0, 0xD0, 0xE0, 0xF0])  # fmt: skip
pieces = st.one_of(
    st.binary(max_size=8),
    st.sampled_from([b"\0\4MQTT\4", b"\0\4MQTT\5", b"\0\1t", b"\0\0", b"\0\1", b"\x26\0\1k\0\1v"]),
)
bodies = st.lists(pieces, max_size=8).map(b"".join)
packets = st.builds(lambda f, b: bytes((f, len(b))) + b, first_bytes, bodies)
streams = st.one_of(st.binary(max_size=300), st.lists(packets, max_size=6).map(b"".join))


@given(st.integers(0, 255), streams)
@settings(max_examples=300, deadline=None)
def test_any_bytes_in_any_chunks(choice: int, stream: bytes) -> None:
    fuzz_mqtt.check(bytes((choice,)) + stream)


@given(st.sampled_from(fuzz_mqtt.seeds()), st.data())
@settings(max_examples=300, deadline=None)
def test_good_packets_gone_bad(seed: bytes, data: st.DataObject) -> None:
    broken = bytearray(seed)
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(1, len(broken) - 1))
        broken[position] = data.draw(st.integers(0, 255))
    fuzz_mqtt.check(bytes(broken))


def test_the_seeds_are_good() -> None:
    for seed in fuzz_mqtt.seeds():
        fuzz_mqtt.check(seed)
        assert Decoder(version=(None, 4, 5)[seed[0] % 3]).feed(seed[1:])


LIMIT = 32 * 1024
GREEDY = {
    "user properties": (0x30, b"\0\1t", b"\x26\0\0\0\0", 5),
    "topic filters": (0xA2, b"\0\1\0", b"\0\1t", 5),
    "filters of 3.1.1": (0xA2, b"\0\1", b"\0\1t", 4),
    "subscriptions": (0x82, b"\0\1", b"\0\1t\0", 4),
    "an unfinished packet": (0x30, b"\0\1t", b"x", 4),
}


@pytest.mark.parametrize("name", GREEDY)
def test_memory_is_bounded_by_the_packet_limit(name: str) -> None:
    first, head, unit, version = GREEDY[name]
    room = LIMIT - 4 - len(head) - 3
    content = unit * (room // len(unit))
    if first == 0x30 and version == 5:
        length = len(content)
        prefix = bytes((length & 127 | 128, length >> 7 & 127 | 128, length >> 14))
        head += prefix
    body = head + content
    size = len(body)
    data = bytes((first, size & 127 | 128, size >> 7 & 127 | 128, size >> 14)) + body
    if name == "an unfinished packet":
        data = data[:-1]
    decoder = Decoder(LIMIT, version)
    tracemalloc.start()
    try:
        found = decoder.feed(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(found) == (name != "an unfinished packet")
    assert peak < 60 * LIMIT


def test_an_endless_packet_is_refused_before_it_is_stored() -> None:
    decoder = Decoder(LIMIT, 5)
    with pytest.raises(MalformedPacket):
        decoder.feed(b"\x30\xff\xff\xff\x7f")
    assert not decoder._buffer


@pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="atheris has no wheel for this platform"
)
def test_coverage_guided(tmp_path: Path) -> None:
    command = [sys.executable, str(PROGRAM), "-max_total_time=5", "-max_len=600", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=90, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Done " in result.stderr
