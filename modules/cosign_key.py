"""Cosign's encrypted private keys: PEM around JSON, scrypt and NaCl's secretbox.

Sources: sigstore/cosign `pkg/cosign/keys.go`, theupdateframework/go-tuf `encrypted`,
D. J. Bernstein, "Cryptography in NaCl" and "Extending the Salsa20 nonce".
"""

from __future__ import annotations

import base64
import json
import re
import struct

_PEM = re.compile(
    rb"-----BEGIN (ENCRYPTED (?:COSIGN|SIGSTORE) PRIVATE KEY)-----(.*?)-----END \1-----", re.DOTALL
)
_SIGMA = struct.unpack("<4I", b"expand 32-byte k")
_COLUMNS = ((0, 4, 8, 12), (5, 9, 13, 1), (10, 14, 2, 6), (15, 3, 7, 11))
_ROWS = ((0, 1, 2, 3), (5, 6, 7, 4), (10, 11, 8, 9), (15, 12, 13, 14))
_MAX_MEMORY = 256 * 1024 * 1024


def is_cosign_key(pem: bytes) -> bool:
    return _PEM.search(pem) is not None


def opened(pem: bytes, password: bytes) -> bytes:
    """The private key (PKCS#8, DER) in `pem`. Raises ValueError: damaged, or a wrong password."""
    import hashlib

    match = _PEM.search(pem)
    if match is None:
        raise ValueError("not an encrypted key of cosign")
    try:
        sealed = json.loads(base64.b64decode(match[2]))
        kdf, cipher = sealed["kdf"], sealed["cipher"]
        if (kdf["name"], cipher["name"]) != ("scrypt", "nacl/secretbox"):
            raise ValueError("not scrypt and nacl/secretbox")
        cost = {name.lower(): int(kdf["params"][name]) for name in ("N", "r", "p")}
        salt, nonce = (base64.b64decode(part) for part in (kdf["salt"], cipher["nonce"]))
        box = base64.b64decode(sealed["ciphertext"])
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"not the form of cosign's keys: {error}") from None
    key = hashlib.scrypt(password, salt=salt, dklen=32, maxmem=_MAX_MEMORY, **cost)
    return open_secretbox(key, nonce, box)


def open_secretbox(key: bytes, nonce: bytes, box: bytes) -> bytes:
    """What NaCl's `crypto_secretbox` sealed: XSalsa20 and Poly1305. Raises ValueError."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.poly1305 import Poly1305

    if len(key) != 32 or len(nonce) != 24 or len(box) < 16:
        raise ValueError("a key of 32 bytes, a nonce of 24 and a tag of 16 are needed")
    tag, sealed = box[:16], box[16:]
    stream = _xsalsa20(key, nonce, 32 + len(sealed))
    try:
        Poly1305.verify_tag(stream[:32], sealed, tag)
    except InvalidSignature:
        raise ValueError("wrong password") from None
    return bytes(a ^ b for a, b in zip(sealed, stream[32:], strict=True))


def _xsalsa20(key: bytes, nonce: bytes, length: int) -> bytes:
    words = _rounds(_block(key, nonce[:16]))
    subkey = struct.pack("<8I", *(words[i] for i in (0, 5, 10, 15, 6, 7, 8, 9)))
    stream = b""
    for counter in range(-(-length // 64)):
        start = _block(subkey, nonce[16:] + struct.pack("<Q", counter))
        added = (a + b & 0xFFFFFFFF for a, b in zip(start, _rounds(start), strict=True))
        stream += struct.pack("<16I", *added)
    return stream[:length]


def _block(key: bytes, tail: bytes) -> list[int]:
    k, t = struct.unpack("<8I", key), struct.unpack("<4I", tail)
    return [_SIGMA[0], *k[:4], _SIGMA[1], *t, _SIGMA[2], *k[4:], _SIGMA[3]]


def _rounds(block: list[int]) -> list[int]:
    x = list(block)
    for _ in range(10):
        for a, b, c, d in (*_COLUMNS, *_ROWS):
            for target, one, other, turn in (
                (b, a, d, 7),
                (c, b, a, 9),
                (d, c, b, 13),
                (a, d, c, 18),
            ):
                total = x[one] + x[other] & 0xFFFFFFFF
                x[target] ^= (total << turn & 0xFFFFFFFF) | total >> (32 - turn)
    return x
