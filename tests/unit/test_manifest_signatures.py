"""Deployments that must be signed: what a device refuses, and what the command signs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization as ser
from cryptography.hazmat.primitives.asymmetric import ec
from gatelet.agent.main import main
from gatelet.agent.trust import Trust
from gatelet.modules.signing import read_private_key

from .manifest_server import KEY, OTHER, REQUIRE, SIX, Device, Server, inline, manifest
from .manifest_server import server as server

REFUSED = {
    "unsigned, whole": (manifest("m:8", 8), 403, "is not signed"),
    "unsigned, by reference": (inline(manifest("m:8", 8), ""), 403, "missing; this device takes"),
    "unknown key id": (inline(SIX, KEY.sign(SIX), "x"), 403, 'the key "x" is not trusted here'),
    "wrong key": (inline(SIX, OTHER.sign(SIX)), 403, "not made with the key release"),
    "wrong key, right id": (inline(SIX, OTHER.sign(SIX), "release"), 403, "not made with the key"),
    "tampered": (inline(manifest("m:7", 6), KEY.sign(SIX)), 403, "over these bytes"),
    "a blank more": (inline(SIX + b" ", KEY.sign(SIX)), 403, "over these bytes"),
    "no generation": (inline(manifest(), KEY.sign(manifest())), 403, "generation"),
    "older": (inline(SIX, KEY.sign(SIX)), 409, "generation 6 is older than 7"),
    "as new, but different": (
        inline(manifest("m:9", 7), KEY.sign(manifest("m:9", 7))),
        409,
        "generation 7 was another manifest",
    ),
    "no signature at all": (b'{"manifest": {"body": ""}}', 403, "missing"),
}


@pytest.mark.parametrize(("document", "code", "said"), REFUSED.values(), ids=REFUSED)
async def test_what_a_device_that_wants_signatures_refuses(
    tmp_path: Path, document: bytes, code: int, said: str
) -> None:
    seven = manifest("m:7", 7)
    async with Device(tmp_path, REQUIRE) as device:
        assert (
            device.source.submit("iothub", 1, inline(seven, KEY.sign(seven), "release")).code == 200
        )
    # After a reboot too, and from any source.
    for source in ("iothub", "mqtt", "local"):
        async with Device(tmp_path, REQUIRE) as device:
            verdict = device.source.submit(source, 2, document, always=source == "local")
            assert verdict.code == code
            assert said in verdict.description
            latest = device.store.latest()
            assert latest is not None
            assert latest.body == seven


async def test_an_authentic_old_reference_played_back_is_refused(
    server: Server, tmp_path: Path
) -> None:
    references = []
    async with Device(tmp_path, REQUIRE) as device:
        for generation in (1, 2):
            body = manifest(f"m:{generation}", generation)
            server.answers[f"/{generation}.json"] = body
            references.append(server.reference(body, f"/{generation}.json", KEY))
            device.source.submit("iothub", generation, references[-1])
            assert (await device.settled())[0] == 200
    async with Device(tmp_path, REQUIRE) as device:
        # The body is stored, but the generation decides.
        assert device.source.submit("iothub", 3, references[0]).code == 409
        assert device.source.submit("mqtt", 1, references[1]).code == 200
        wrong = server.reference(b"never fetched", "/x", OTHER)
        named = json.loads(wrong)
        named["manifest"]["keyId"] = "elsewhere"
        assert device.source.submit("iothub", 4, json.dumps(named).encode()).code == 403
        assert "/x" not in server.asked
        server.answers["/x"] = b"never fetched"
        assert device.source.submit("iothub", 5, wrong).code == 202
        code, description = await device.settled()
        assert (code, "not made with the key release" in description) == (403, True)


async def test_a_key_that_is_withdrawn_is_not_trusted_and_leaves_no_lock(tmp_path: Path) -> None:
    high = manifest("m:1", 2**53 - 1)
    both = Trust(True, {"release": KEY.public, "lost": OTHER.public})
    async with Device(tmp_path, both) as device:
        assert device.source.submit("iothub", 1, inline(high, OTHER.sign(high))).code == 200
        assert device.source.submit("iothub", 2, inline(SIX, KEY.sign(SIX))).code == 409
    async with Device(tmp_path, REQUIRE) as device:
        assert device.source.submit("iothub", 3, inline(high, OTHER.sign(high))).code == 403
        assert device.source.submit("iothub", 4, inline(SIX, KEY.sign(SIX))).code == 200


async def test_without_a_policy_signatures_are_not_looked_at(tmp_path: Path) -> None:
    async with Device(tmp_path, Trust(False, {"release": KEY.public})) as device:
        assert device.source.submit("iothub", 1, inline(SIX, "junk", "who")).code == 200
        assert device.store.proofs("manifest") == ()


async def test_the_command_signs_what_devices_take(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    public = key.public_key().public_bytes(ser.Encoding.PEM, ser.PublicFormat.SubjectPublicKeyInfo)
    form = ser.PrivateFormat.PKCS8
    (tmp_path / "k").write_bytes(key.private_bytes(ser.Encoding.PEM, form, ser.NoEncryption()))
    (tmp_path / "p").write_bytes(public)
    (tmp_path / "m.json").write_bytes(manifest())
    sign = ["manifest", "sign", str(tmp_path / "m.json"), "--key", str(tmp_path / "k")]
    assert main(sign) == 1
    assert "give it one with --generation" in capsys.readouterr().err
    url = f"http://{server.address}/m.json"
    assert main([*sign, "--generation", "4", "--url", url]) == 2
    capsys.readouterr()
    out = tmp_path / "signed.json"
    assert main([*sign, "--generation", "4", "--url", url, "-o", str(out), "--key-id", "r"]) == 0
    reference = capsys.readouterr().out.encode()
    assert main([*sign, "--generation", "5"]) == 0
    whole = capsys.readouterr().out.encode()
    trust = Trust(True, {"r": read_private_key((tmp_path / "k").read_bytes(), None, "k").public})
    async with Device(tmp_path / "device", trust) as device:
        server.answers["/m.json"] = out.read_bytes()
        device.source.submit("iothub", 1, reference)
        assert (await device.settled())[0] == 200
        assert device.source.submit("iothub", 2, whole).code == 200
    (tmp_path / "r.json").write_bytes(reference)
    (tmp_path / "w.json").write_bytes(whole)
    verify = ["manifest", "verify", "--key", str(tmp_path / "p")]
    assert main([*verify, str(tmp_path / "w.json")]) == 0
    assert main([*verify, str(tmp_path / "r.json")]) == 2
    assert main([*verify, str(tmp_path / "r.json"), "--manifest", str(out), "--json"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith('{"key":')
    assert main([*verify, str(tmp_path / "r.json"), "--manifest", str(tmp_path / "m.json")]) == 1
    assert main([*verify, str(tmp_path / "m.json")]) == 1
