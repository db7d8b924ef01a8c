"""Signatures through every kind of hook, and the tokens made of them."""

from __future__ import annotations

import base64
import hashlib
import hmac
import socketserver
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
from azure.iot.device.common.auth.sastoken import NonRenewableSasToken, RenewableSasToken
from azure.iot.device.common.auth.signing_mechanism import SymmetricKeySigningMechanism
from gatelet.agent.identity import certificates
from gatelet.agent.identity.signing import derived_key, shared_access_signature, sign_with
from gatelet.agent.identity.sources import (
    CertificateFiles,
    IdentityError,
    KeyFile,
    KeyText,
    SignCommand,
    SignFunction,
    SignSocket,
)
from gatelet.simulator.pki import Pki
from hypothesis import given
from hypothesis import strategies as st
from required import needs

SECRET = bytes(range(32))
KEY = base64.b64encode(SECRET).decode()
PROGRAM = (
    "import base64,hashlib,hmac,sys;"
    "d=hmac.new(bytes(range(32)),sys.stdin.buffer.read(),hashlib.sha256).digest();"
    "print(base64.b64encode(d).decode())"
)


def digest(message: bytes) -> bytes:
    return hmac.new(SECRET, message, hashlib.sha256).digest()


def too_short(message: bytes) -> bytes:
    return digest(message)[:16]


def locked(message: bytes) -> bytes:
    raise RuntimeError("the token is locked")


@contextmanager
def signing_socket(path: Path) -> Iterator[None]:
    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(base64.b64encode(digest(self.rfile.read())))

    with socketserver.UnixStreamServer(str(path), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


@given(st.text("abcXYZ019-._:$/", min_size=1, max_size=60), st.integers(1, 2**40))
def test_tokens_are_the_sdks(resource: str, lifetime: int) -> None:
    theirs = RenewableSasToken(resource, SymmetricKeySigningMechanism(KEY), ttl=lifetime)
    ours = shared_access_signature(resource, theirs.expiry_time, sign_with(KeyText(KEY)))
    assert ours == str(theirs)
    assert NonRenewableSasToken(ours).resource_uri == resource


def test_every_hook_signs_alike(tmp_path: Path) -> None:
    key_file = tmp_path / "key"
    key_file.write_text(KEY + "\n")
    signers = [
        KeyText(KEY),
        KeyFile(key_file),
        SignCommand((sys.executable, "-c", PROGRAM)),
        SignFunction(f"{__name__}:digest"),
    ]
    for signer in signers:
        assert sign_with(signer)(b"some\nbytes") == digest(b"some\nbytes"), signer
    with signing_socket(tmp_path / "s"):
        assert sign_with(SignSocket(tmp_path / "s"))(b"x" * 9000) == digest(b"x" * 9000)


def test_a_replaced_key_file_counts_at_once(tmp_path: Path) -> None:
    key_file = tmp_path / "key"
    key_file.write_text(KEY)
    sign = sign_with(KeyFile(key_file))
    first = sign(b"m")
    key_file.write_text(base64.b64encode(b"another key with enough bytes").decode())
    assert sign(b"m") != first


def test_failing_hooks_say_which_and_why(tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.write_text("§")
    cases = [
        (KeyText("not base64!"), "the symmetric key is not base64"),
        (KeyFile(tmp_path / "absent"), "absent"),
        (KeyFile(bad), "bad"),
        (SignCommand(("/nowhere/sign",)), "'/nowhere/sign' failed"),
        (SignCommand((sys.executable, "-c", "exit('no card')")), "ended with 1: no card"),
        (SignCommand((sys.executable, "-c", "print('§')")), "must answer base64"),
        (SignCommand((sys.executable, "-c", "print('YWJj')")), "3 bytes; an HMAC-SHA256 has 32"),
        (SignSocket(tmp_path / "absent"), "signing socket .*absent failed"),
        (SignFunction("gatelet.nowhere:sign"), "No module named"),
        (SignFunction(f"{__name__}:too_short"), "must return the 32 bytes"),
        (SignFunction(f"{__name__}:locked"), "the token is locked"),
    ]
    for signer, message in cases:
        with pytest.raises(IdentityError, match=message):
            sign_with(signer)(b"m")


def test_a_groups_key_gives_each_registration_its_own() -> None:
    # The value from Azure's documentation of group enrolments.
    master = (
        "8isrFI1sGsIlvvFSSFRiMfCNzv21fjbE/+ah/lSh3lF8e2YG1Te7w1KpZhJFFXJrqYKi9yegxkqIChbqOS9Egw=="
    )
    assert (
        derived_key(sign_with(KeyText(master)), "sn-007-888-abc-mac-a1-b2-c3-d4-e5-f6")
        == "Jsm0lyGpjaVYVP2g3FnmnmG9dI/9qU24wNoykUmermc="
    )


def test_certificates_end(tmp_path: Path) -> None:
    pki = Pki(tmp_path)
    made = pki.device("d1")
    files = CertificateFiles(made.certificate, made.key)
    assert certificates.check(files) == made.leaf.not_valid_after_utc
    end = made.leaf.not_valid_after_utc
    assert certificates.expiry_warning(files, end, end - timedelta(days=31)) is None
    soon = certificates.expiry_warning(files, end, end - timedelta(days=12, hours=1))
    assert soon is not None
    assert "in 12 days" in soon
    over = certificates.expiry_warning(files, end, end)
    assert over is not None
    assert "expired on" in over


def test_what_is_no_certificate() -> None:
    with pytest.raises(ValueError, match="no PEM"):
        certificates.not_after("nothing")
    garbage = "-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n"
    with pytest.raises(ValueError, match=r"X\.509"):
        certificates.not_after(garbage)


def test_unusable_certificates_are_named(tmp_path: Path) -> None:
    pki = Pki(tmp_path)
    one, two = pki.device("d1"), pki.device("d2")
    with pytest.raises(IdentityError, match=r"d1.*cannot be used"):
        certificates.check(CertificateFiles(one.certificate, two.key))
    with pytest.raises(IdentityError, match="No such file"):
        certificates.check(CertificateFiles(tmp_path / "absent", one.key))
    locked_up = pki.device("d3", passphrase="open sesame")
    with pytest.raises(IdentityError, match="cannot be used"):
        certificates.check(CertificateFiles(locked_up.certificate, locked_up.key))
    word = tmp_path / "word"
    word.write_text("open sesame\n")
    certificates.check(CertificateFiles(locked_up.certificate, locked_up.key, word))
    with pytest.raises(IdentityError, match="pass phrase"):
        certificates.check(CertificateFiles(locked_up.certificate, locked_up.key, tmp_path))


def test_stamps_see_replaced_files(tmp_path: Path) -> None:
    file = tmp_path / "f"
    absent = certificates.stamp([file])
    file.write_text("1")
    first = certificates.stamp([file])
    other = tmp_path / "g"
    other.write_text("1")
    other.replace(file)
    assert len({absent, first, certificates.stamp([file])}) == 3


@needs("openssl")
def test_the_documented_program(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "identity.md").read_text(encoding="utf-8")
    script = text.split("```sh\n")[1].split("```")[0]
    (tmp_path / "key.hex").write_text(SECRET.hex())
    program = tmp_path / "sign-hmac"
    program.write_text(script.replace("/etc/gatelet/key.hex", str(tmp_path / "key.hex")))
    program.chmod(0o700)
    assert sign_with(SignCommand((str(program),)))(b"message") == digest(b"message")
