"""Coverage-guided fuzzing of the MQTT codec.

    python tests/fuzz/fuzz_mqtt.py [libFuzzer options, such as -max_total_time=600, and a folder]

`check` is the law; the test suite runs it with Hypothesis and, where atheris is installed, this
program for a few seconds.
"""

from __future__ import annotations

import sys

LIMIT = 4096


def check(data: bytes) -> None:
    """Arbitrary bytes in arbitrary chunks give packets or MalformedPacket, within the limit.

    The first byte chooses the version and the chunk size.
    """
    from gatelet.simulator.mqtt.codec import Decoder, MalformedPacket, decode, encode
    from gatelet.simulator.mqtt.packets import Connect

    choice, stream = (data[0], data[1:]) if data else (0, b"")
    decoder = Decoder(LIMIT, (None, 4, 5)[choice % 3])
    size = (1, 2, 3, 7, 64, 1 << 20)[choice // 3 % 6]
    packets = []
    broken = None
    for start in range(0, len(stream), size):
        try:
            found = decoder.feed(stream[start : start + size])
        except MalformedPacket as error:
            found = list(error.packets)
            broken = error
        packets += found
        # One incomplete packet at most, and never one that is too large.
        assert len(decoder._buffer) < LIMIT
        for packet in found:
            # A second CONNECT may name another version, which the connection does not take.
            version = packet.version if isinstance(packet, Connect) else decoder.version
            # What was understood can be said, and means the same.
            assert decode(encode(packet, version), version) == packet
        if broken is not None:
            break
    if broken is not None:
        assert broken.reason_code >= 0x80
        assert not decoder._buffer
        again = None
        try:
            decoder.feed(b"\xc0\x00")
        except MalformedPacket as error:
            again = error
        assert again is broken, "a broken decoder went on"
    assert len(packets) <= len(stream) // 2


def seeds() -> list[bytes]:
    """One good packet of every type and version, to begin with."""
    from gatelet.simulator.mqtt import packets as p
    from gatelet.simulator.mqtt.codec import encode

    every = p.Properties(
        content_type="t",
        user_properties=(("k", "v"),),
        message_expiry_interval=1,
        topic_alias=1,
        response_topic="r",
        correlation_data=b"c",
    )
    sent: list[p.Packet] = [
        p.Publish("a/b", b"x", 1, True, False, 1, every),
        p.PubAck(1, 0x10),
        p.PubRec(1),
        p.PubRel(1, 0x92),
        p.PubComp(1),
        p.Subscribe(1, (p.Subscription("a/+", 1), p.Subscription("$share/g/#", 2))),
        p.SubAck(1, (0, 1)),
        p.Unsubscribe(1, ("a/+",)),
        p.UnsubAck(1, (0,)),
        p.PingReq(),
        p.PingResp(),
        p.ConnAck(),
        p.Disconnect(),
    ]
    will = p.Will("w", b"x", 1, True)
    found = []
    for choice, version in ((1, 4), (2, 5)):
        connect = p.Connect("c", version, username="u", password=b"p", will=will)
        for packet in [connect, *sent]:
            found.append(bytes((choice + 15,)) + encode(packet, version))
        found.append(b"\x0f" + encode(connect, version) + encode(p.PingReq(), version))
    return found


def main() -> None:
    import tempfile
    from pathlib import Path

    import atheris

    with atheris.instrument_imports(include=["gatelet.simulator.mqtt"]):
        from gatelet.simulator.mqtt import codec  # noqa: F401
    with tempfile.TemporaryDirectory() as folder:
        for number, seed in enumerate(seeds()):
            (Path(folder) / f"seed-{number}").write_bytes(seed)
        atheris.Setup([*sys.argv, folder], check)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
