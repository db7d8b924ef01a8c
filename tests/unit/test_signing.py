"""Keys and signatures in cosign's format: what counts, and why something else does not."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization as ser
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.poly1305 import Poly1305
from gatelet.modules import cosign_key
from gatelet.modules.errors import Unsigned, Untrusted
from gatelet.modules.oci.reference import ImageRef
from gatelet.modules.oci.signatures import (
    GENERATION,
    Signature,
    signature_tag,
    signed_payload,
    trusted_signer,
)
from gatelet.modules.signing import (
    KeyUnusable,
    PrivateKey,
    PublicKey,
    read_private_key,
    read_public_key,
)

DIGEST = f"sha256:{'ab' * 32}"
REF = ImageRef.parse("registry.example/models/digits:v1")


def pem(key: Any, password: bytes | None = None) -> bytes:
    protection = ser.BestAvailableEncryption(password) if password else ser.NoEncryption()
    return bytes(key.private_bytes(ser.Encoding.PEM, ser.PrivateFormat.PKCS8, protection))


def public_pem(key: Any) -> bytes:
    form = ser.PublicFormat.SubjectPublicKeyInfo
    return bytes(key.public_key().public_bytes(ser.Encoding.PEM, form))


KEY = ec.generate_private_key(ec.SECP256R1())
OTHER = read_private_key(pem(ec.generate_private_key(ec.SECP256R1())), None, "other")
PRIVATE = read_private_key(pem(KEY), None, "key")
PUBLIC = read_public_key(public_pem(KEY), "pub")


def test_openssl_agrees(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(pem(KEY))
    (tmp_path / "pub").write_bytes(public_pem(KEY))
    (tmp_path / "data").write_bytes(b"some bytes")
    (tmp_path / "sig").write_bytes(base64.b64decode(PRIVATE.sign(b"some bytes")))
    check = ["openssl", "dgst", "-sha256", "-verify", "pub", "-signature", "sig", "data"]
    assert subprocess.run(check, cwd=tmp_path, capture_output=True, check=False).returncode == 0
    made = subprocess.run(
        ["openssl", "dgst", "-sha256", "-sign", "key", "data"],
        cwd=tmp_path,
        capture_output=True,
        check=True,
    )
    assert PUBLIC.verifies(base64.b64encode(made.stdout).decode(), b"some bytes")
    assert PRIVATE.public.fingerprint == PUBLIC.fingerprint


def test_what_does_not_verify() -> None:
    signature = PRIVATE.sign(b"data")
    assert PUBLIC.verifies(signature, b"data")
    assert not PUBLIC.verifies(signature, b"date")
    assert not OTHER.public.verifies(signature, b"data")
    # The length of a signature in DER varies by a byte or two: each ends in its own padding.
    for _ in range(20):
        other = PRIVATE.sign(b"data")
        assert PUBLIC.verifies(other, b"data")
        assert not PUBLIC.verifies(other + "=", b"data")
    for bad in ("", "x", "é", "A" * 600, base64.b64encode(b"1" * 70).decode()):
        assert not PUBLIC.verifies(bad, b"data")


def cosign_pem(der: bytes, password: bytes, name: str = "SIGSTORE") -> bytes:
    """As `cosign generate-key-pair` writes it, with a cheaper scrypt."""
    salt, nonce = b"s" * 32, b"n" * 24
    cost = {"N": 1024, "r": 8, "p": 1}
    key = hashlib.scrypt(password, salt=salt, dklen=32, n=1024, r=8, p=1)
    stream = cosign_key._xsalsa20(key, nonce, 32 + len(der))
    sealed = bytes(a ^ b for a, b in zip(der, stream[32:], strict=True))
    box = Poly1305.generate_tag(stream[:32], sealed) + sealed

    def text(data: bytes) -> str:
        return base64.b64encode(data).decode()

    document = {
        "kdf": {"name": "scrypt", "params": cost, "salt": text(salt)},
        "cipher": {"name": "nacl/secretbox", "nonce": text(nonce)},
        "ciphertext": text(box),
    }
    body = base64.encodebytes(json.dumps(document).encode())
    frame = f"ENCRYPTED {name} PRIVATE KEY-----\n".encode()
    return b"-----BEGIN " + frame + body + b"-----END " + frame


def test_the_stream_is_that_of_nacl() -> None:
    # "Cryptography in NaCl", section 9: firstkey and nonce of the example, the first 32 bytes.
    key = bytes.fromhex("1b27556473e985d462cd51197a9a46c76009549eac6474f206c4ee0844f68389")
    nonce = bytes.fromhex("69696ee955b62b73cd62bda875fc73d68219e0036b7a0b37")
    stream = bytes.fromhex("eea6a7251c1e72916d11c2cb214d3c252539121d8e234e652d651fa4c8cff880")
    assert cosign_key._xsalsa20(key, nonce, 32) == stream


@pytest.mark.parametrize("name", ["SIGSTORE", "COSIGN"])
def test_keys_of_cosign_open_with_their_password(name: str) -> None:
    der = KEY.private_bytes(ser.Encoding.DER, ser.PrivateFormat.PKCS8, ser.NoEncryption())
    sealed = cosign_pem(der, b"pass", name)
    assert read_private_key(sealed, b"pass", "k").public.fingerprint == PUBLIC.fingerprint
    for password, said in ((b"Pass", "wrong password"), (None, "its password is needed")):
        with pytest.raises(KeyUnusable, match=said):
            read_private_key(sealed, password, "cosign.key")
    damaged = sealed.replace(b"eyJ", b"eyK", 1)
    with pytest.raises(KeyUnusable, match=r"cosign.key: cannot be opened"):
        read_private_key(damaged, b"pass", "cosign.key")


def test_pkcs8_keys_open_with_their_password() -> None:
    sealed = pem(KEY, b"pass")
    assert read_private_key(sealed, b"pass", "k").public.fingerprint == PUBLIC.fingerprint
    for password in (None, b"wrong"):
        with pytest.raises(KeyUnusable, match=r"^k: "):
            read_private_key(sealed, password, "k")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "not a public key in PEM form"),
        (b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "not a public key"),
        (public_pem(ec.generate_private_key(ec.SECP384R1())), "expected an ECDSA key on P-256"),
        (public_pem(ed25519.Ed25519PrivateKey.generate()), "expected an ECDSA key on P-256"),
        (pem(KEY), "holds a private key"),
    ],
)
def test_public_keys_that_are_refused(data: bytes, said: str) -> None:
    with pytest.raises(KeyUnusable, match=f"^cosign.pub: .*{said}"):
        read_public_key(data, "cosign.pub")


def signed(key: PrivateKey, payload: bytes) -> Signature:
    return Signature(payload, key.sign(payload))


def payload(**changes: Any) -> bytes:
    document = json.loads(signed_payload(REF, DIGEST, {GENERATION: "7"}))
    document["critical"].update(changes)
    return json.dumps(document).encode()


GOOD = signed(PRIVATE, payload())
KEYS = {"release": PUBLIC}


def test_a_trusted_signature_among_others_counts_and_the_highest_generation() -> None:
    low = signed(PRIVATE, signed_payload(REF, DIGEST, {}))
    junk = Signature(b"{", "x")
    for signatures in ([GOOD], [junk, low, GOOD, signed(OTHER, payload())], [GOOD, low]):
        signer = trusted_signer(DIGEST, signatures, KEYS, "image")
        assert (signer.name, signer.generation) == ("release", 7)
        assert signer.fingerprint == PUBLIC.fingerprint
    assert trusted_signer(DIGEST, [low], KEYS, "image").generation == 0
    both: dict[str, PublicKey] = {"old": OTHER.public, **KEYS}
    assert trusted_signer(DIGEST, [GOOD], both, "image").name == "release"


@pytest.mark.parametrize(
    ("signatures", "kind", "said"),
    [
        ([], Unsigned, r"image: is not signed; .*trusts \(release\)"),
        ([signed(OTHER, payload())], Untrusted, "a key that is not trusted here, or changed"),
        ([Signature(payload() + b" ", GOOD.signature)], Untrusted, "or changed afterwards"),
        ([Signature(payload(), "")], Untrusted, "or changed afterwards"),
        (
            [signed(PRIVATE, payload(image={"docker-manifest-digest": f"sha256:{'cd' * 32}"}))],
            Untrusted,
            "it is for another image",
        ),
        ([signed(PRIVATE, payload(type="blob"))], Untrusted, "not a signature of an image"),
        ([signed(PRIVATE, b"[]")], Untrusted, "not a signature of an image"),
        ([signed(PRIVATE, b"{")], Untrusted, "of key release: payload"),
        ([signed(PRIVATE, b'{"critical":{},"critical":{}}')], Untrusted, "critical"),
        (
            [signed(PRIVATE, signed_payload(REF, DIGEST, {GENERATION: "-1"}))],
            Untrusted,
            "is not a number",
        ),
    ],
)
def test_what_is_not_trusted(signatures: list[Signature], kind: type, said: str) -> None:
    with pytest.raises(kind, match=said):
        trusted_signer(DIGEST, signatures, KEYS, "image")


def test_the_tag() -> None:
    assert signature_tag(DIGEST) == f"sha256-{'ab' * 32}.sig"
