"""Registries that ask for credentials, or show a certificate of their own."""

from __future__ import annotations

import datetime
import ipaddress
import json

import pytest
from distribution_server import PASSWORD, USER
from gatelet.agent.main import main
from gatelet.modules.errors import InvalidImage, RegistryUnavailable, Unauthorized
from gatelet.modules.oci.client import RegistrySettings
from registries import connect, named, pull, push
from registries import image as image
from registries import serve as serve
from registries import store as store


def test_credentials(serve, image, store, monkeypatch, capsys, tmp_path):
    registry = serve(auth=True)
    right = {"username": USER, "password": PASSWORD}
    push(registry, image, **right)
    with connect(registry, **right) as client:
        client.ping()
    for wrong in ({}, {**right, "password": "wrong"}, {**right, "username": "other"}):
        with connect(registry, **wrong) as client, pytest.raises(Unauthorized) as caught:
            client.ping()
        with pytest.raises(Unauthorized) as caught:
            pull(registry, store, settings=wrong)
        assert registry.address in str(caught.value)
        assert wrong.get("password", "wrong") not in repr(caught.value)
    store.check(pull(registry, store, settings=right).digest)
    assert PASSWORD not in repr(RegistrySettings(registry.address, **right))

    monkeypatch.setenv("GATELET_REGISTRY_PASSWORD", PASSWORD)
    reference = str(named(registry, "models/cli:v1"))
    words = [str(tmp_path / "model"), reference, "--username", USER]
    assert main(["image", "push", *words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["digest"] == image.digest
    assert main(["image", "inspect", reference, "--username", USER]) == 0
    assert image.digest in capsys.readouterr().out


def certificate(folder):
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "registry")])
    start = datetime.datetime(2020, 1, 1, tzinfo=datetime.timezone.utc)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(start)
        .not_valid_after(start + datetime.timedelta(days=36500))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
        )
        .add_extension(x509.BasicConstraints(True, None), True)
        .sign(key, hashes.SHA256())
    )
    files = folder / "cert.pem", folder / "key.pem"
    files[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    files[1].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return files


def test_a_private_authority(serve, image, store, tmp_path):
    trusted, other = tmp_path / "trusted", tmp_path / "other"
    for folder in (trusted, other):
        folder.mkdir()
    files = certificate(trusted)
    registry = serve(tls=files)
    push(registry, image, ca_file=files[0])
    store.check(pull(registry, store, settings={"ca_file": files[0]}).digest)
    for ca_file, said in (
        (certificate(other)[0], "certificate is not trusted"),
        (files[1], "holds certificates in PEM form"),
    ):
        with (
            connect(registry, ca_file=ca_file) as client,
            pytest.raises(RegistryUnavailable, match=said),
        ):
            client.ping()
    plain = connect(registry)
    with plain, pytest.raises((RegistryUnavailable, InvalidImage)):
        plain.ping()
