"""Certificates as a hub judges them, without a network."""

from __future__ import annotations

import ssl
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from gatelet.agent.clock import SystemClock
from gatelet.simulator.iothub.client_certificates import (
    ClientCertificate,
    PresentedCertificates,
    ask_for_certificate,
)
from gatelet.simulator.iothub.dps_enrollments import derive_key
from gatelet.simulator.iothub.errors import HubError
from gatelet.simulator.pki import CertificateFiles, Pki
from hypothesis import given
from hypothesis import strategies as st

CLOCK = SystemClock()


class Later(SystemClock):
    def now(self) -> datetime:
        return super().now() + timedelta(days=100)


def presented(files: CertificateFiles) -> ClientCertificate:
    leaf, *rest = x509.load_pem_x509_certificates(files.certificate.read_bytes())
    return ClientCertificate(leaf, tuple(rest))


def root(pki: Pki) -> x509.Certificate:
    return x509.load_pem_x509_certificate(pki.ca_file.read_bytes())


def test_chains(tmp_path: Path) -> None:
    pki, other = Pki(tmp_path / "a"), Pki(tmp_path / "b")
    below = pki.intermediate("factory")
    direct, through = presented(pki.device("d1")), presented(pki.device("d1", issuer=below))
    for certificate in (direct, through):
        assert certificate.is_issued_by([root(other), root(pki)], CLOCK)
        assert not certificate.is_issued_by([root(other)], CLOCK), "the same names, other keys"
        assert not certificate.is_issued_by([root(pki)], Later())
    assert through.is_issued_by([presented(below).leaf], CLOCK)
    assert not ClientCertificate(through.leaf).is_issued_by([root(pki)], CLOCK)
    assert not ClientCertificate(presented(below).leaf).is_issued_by([direct.leaf], CLOCK)
    own = presented(pki.device("d1", self_signed=True))
    assert not own.is_issued_by([root(pki)], CLOCK)
    with pytest.raises(HubError):
        own.check_time(Later())


def test_an_authority_below_one_that_may_have_none_below_it(tmp_path: Path) -> None:
    pki = Pki(tmp_path)
    factory = pki.intermediate("factory")
    # The factory's path length is 0: what it issues may not issue.
    forged = pki.device("forged", issuer=factory)
    leaf = presented(pki.device("d1", issuer=forged))
    assert not leaf.is_issued_by([root(pki)], CLOCK)


def test_files_are_made_once_per_way_and_version(tmp_path: Path) -> None:
    pki = Pki(tmp_path)
    first = pki.device("d1/m1")
    assert pki.device("d1/m1").leaf == first.leaf
    others = [pki.device("d1/m1", version=2), pki.device("d1/m1", self_signed=True)]
    assert len({first.thumbprint, *(one.thumbprint for one in others)}) == 3
    assert presented(first).common_name == "d1/m1"
    assert presented(first).has_thumbprint(["", first.thumbprint.lower()])
    assert not presented(first).has_thumbprint(["", others[0].thumbprint])
    assert first.key.stat().st_mode & 0o077 == 0


@given(st.binary(max_size=200), st.sampled_from([0x0303, 0x0304]))
def test_no_certificate_message_breaks_the_handshake(data: bytes, version: int) -> None:
    known = PresentedCertificates(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
    known.on_message(None, "read", version, 22, 11, b"\x0b\x00\x00\x00" + data)


def test_who_showed_nothing_or_something_unreadable() -> None:
    known = ask_for_certificate(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
    assert known.of(None) is None
    with pytest.raises(HubError):
        known.of(b"not DER")


def test_derived_keys() -> None:
    # printf device-1 | openssl dgst -sha256 -mac HMAC -macopt hexkey:000102..0f -binary | base64
    expected = "2yt6dvJhsfM5K7VmkJ0Qf4D5Pzjc543CDEp6F5WyHb4="
    assert derive_key("AAECAwQFBgcICQoLDA0ODw==", "device-1") == expected
