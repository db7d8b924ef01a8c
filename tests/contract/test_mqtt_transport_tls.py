"""Our MQTT transport with certificates on both sides."""

from __future__ import annotations

import datetime
import importlib
import json
import shutil
import ssl
from pathlib import Path
from typing import Any

from mqtt_agent import P, agent, connected
from paho_peer import both, ignores_what_paho_leaves, ours, until
from paho_peer import collected as collected

pytestmark = ignores_what_paho_leaves


def certificates(folder: Path) -> dict[str, Path]:
    """A CA, a server certificate for 127.0.0.1 and a client certificate."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    ipaddress = importlib.import_module("ipaddress")
    now = datetime.datetime.now(datetime.timezone.utc)
    made: dict[str, Path] = {}

    def make(name: str, issuer: Any, issuer_key: Any, extension: Any) -> tuple[Any, Any]:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer or subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(extension, critical=True)
            # From Python 3.13 on a chain without them is refused.
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(
                    (issuer_key or key).public_key()
                ),
                critical=False,
            )
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
            )
        )
        if issuer is None:
            words = ("digital_signature", "content_commitment", "key_encipherment")
            words += ("data_encipherment", "key_agreement", "encipher_only", "decipher_only")
            usage = dict.fromkeys(words, False)
            builder = builder.add_extension(
                x509.KeyUsage(key_cert_sign=True, crl_sign=True, **usage), critical=True
            )
        certificate = builder.sign(issuer_key or key, hashes.SHA256())
        made[name] = folder / f"{name}.pem"
        made[name].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        made[f"{name}-key"] = folder / f"{name}-key.pem"
        made[f"{name}-key"].write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return subject, key

    subject, key = make("ca", None, None, x509.BasicConstraints(ca=True, path_length=None))
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    make("server", subject, key, x509.SubjectAlternativeName([address]))
    make("client", subject, key, x509.BasicConstraints(ca=False, path_length=None))
    return made


@both
async def test_mutual_tls(tmp_path: Path, version: int) -> None:
    files = certificates(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files["server"], files["server-key"])
    context.load_verify_locations(files["ca"])
    context.verify_mode = ssl.CERT_REQUIRED
    with_tls = {"ca_file": files["ca"], "cert_file": tmp_path / "device.pem"}
    with_tls["key_file"] = files["client-key"]
    async with ours(ssl=context) as broker:
        async with agent(broker.port, version, with_tls) as (transport, sink):
            await until(lambda: sink.links, "the missing file is told")
            assert "device.pem" in sink.links[0][1]
            shutil.copy(files["client"], tmp_path / "device.pem")
            await connected(sink)
            big = {f"k{number}": "x" * 1000 for number in range(200)}
            await transport.report(big)
            # Larger than a TLS record: what TLS holds back must be read without a new event.
            for number in range(20):
                broker.publish(f"{P}/desired", b'{"$version":%d}' % number + b" " * 40_000, 1)
            while (await sink.next()).version != 19:
                pass
            assert json.loads(broker.retained[f"{P}/reported"]) == big
        async with agent(broker.port, version, {"ca_file": files["client"]}) as (_, sink):
            await until(lambda: sink.links, "a stranger's certificate is told")
            assert "certificate verify failed" in sink.links[0][1]
