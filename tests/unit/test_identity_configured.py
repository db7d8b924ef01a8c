"""`[iothub]` of agent.toml: one source of the identity, and errors that name key and remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
from gatelet.agent.config import ConfigError, parse_config
from gatelet.agent.identity.configured import identity_source
from gatelet.agent.identity.sources import (
    CertificateFiles,
    Dps,
    EdgeEnvironment,
    IdentityService,
    IdentitySource,
    KeyFile,
    KeyText,
    ModuleOf,
    Registered,
    SignCommand,
    SignFunction,
    SignSocket,
    certificate_of,
    files_of,
)

STRING = 'connection-string = "HostName=h;DeviceId=d;SharedAccessKey=c2VjcmV0"\n'
SAS = '[iothub.sas]\nhost-name = "h"\ndevice-id = "d"\n'
X509 = '[iothub.x509]\nhost-name = "h"\ndevice-id = "d"\ncert-file = "c"\nkey-file = "k"\n'
DPS = '[iothub.dps]\nid-scope = "0ne"\nregistration-id = "r"\n'
ENVIRONMENT = {"IOTEDGE_DEVICEID": "d"}


def source_of(text: str) -> IdentitySource:
    hub = parse_config("[iothub]\n" + text, "agent.toml").iothub
    assert hub is not None
    return identity_source(hub, ENVIRONMENT)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (STRING, Registered("h", "d", KeyText("c2VjcmV0"))),
        (
            STRING + 'module-id = "$edgeAgent"',
            ModuleOf(Registered("h", "d", KeyText("c2VjcmV0")), "$edgeAgent"),
        ),
        (SAS + 'key-file = "k"', Registered("h", "d", KeyFile(Path("k")))),
        (SAS + 'sign-command = ["a", "b"]', Registered("h", "d", SignCommand(("a", "b")))),
        (SAS + 'sign-socket = "/s"', Registered("h", "d", SignSocket(Path("/s")))),
        (
            SAS + 'sign-function = "m:f"\nmodule-id = "m1"\ngateway-host-name = "g"',
            Registered("h", "d", SignFunction("m:f"), "m1", "g"),
        ),
        (
            X509 + 'passphrase-file = "p"\nmodule-id = "m"',
            Registered("h", "d", CertificateFiles(Path("c"), Path("k"), Path("p")), "m"),
        ),
        (DPS + 'symmetric-key = "c2Vj"', Dps("0ne", "r", KeyText("c2Vj"))),
        (DPS + 'symmetric-key-file = "f"', Dps("0ne", "r", KeyFile(Path("f")))),
        (DPS + 'group-key-file = "f"', Dps("0ne", "r", KeyFile(Path("f")), group=True)),
        (
            DPS + 'cert-file = "c"\nkey-file = "k"\nhost = "dps.test"',
            Dps("0ne", "r", CertificateFiles(Path("c"), Path("k")), host="dps.test"),
        ),
        (
            'module-id = "$edgeAgent"\n' + DPS + 'symmetric-key = "c2Vj"',
            ModuleOf(Dps("0ne", "r", KeyText("c2Vj")), "$edgeAgent"),
        ),
        ("edge-environment = true", EdgeEnvironment(ENVIRONMENT)),
        ("[iothub.identity-service]", IdentityService()),
        (
            '[iothub.identity-service]\nmodule-id = "m"\nidentity-socket = "/i"\nkey-socket = "/k"',
            IdentityService("m", Path("/i"), Path("/k")),
        ),
    ],
)
def test_every_source(text: str, expected: IdentitySource) -> None:
    assert source_of(text) == expected
    assert "c2Vj" not in repr(expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"names no identity: give exactly one of iothub\.connection-string"),
        (STRING + SAS, r"iothub\.connection-string and \[iothub\.sas\] exclude each other"),
        (STRING + "edge-environment = true", r"iothub\.edge-environment exclude each other"),
        ('connection-string = "HostName=h"', r"iothub\.connection-string: .*lacks DeviceId"),
        ('connection-string-file = "/nowhere/x"', r"iothub\.connection-string-file: cannot read"),
        (SAS, r"\[iothub\.sas\] needs exactly one of key-file, sign-command"),
        (SAS + 'key-file = "k"\nsign-socket = "s"', r"\[iothub\.sas\] needs exactly one of"),
        (SAS + 'sign-function = "nowhere"', r"must be package\.module:function"),
        (SAS.replace('"h"', '" "') + 'key-file = "k"', r"iothub\.sas\.host-name is empty"),
        (DPS, r"\[iothub\.dps\] needs exactly one of symmetric-key"),
        (DPS + 'cert-file = "c"', r"needs cert-file and key-file"),
        (DPS + 'symmetric-key = "a"\ngroup-key-file = "b"', r"\[iothub\.dps\] needs exactly one"),
        ('module-id = "a"\nedge-environment = true', r"iothub\.module-id is for identities of dev"),
        ('module-id = "a"\n' + X509 + 'module-id = "b"', r"remove iothub\.module-id"),
        ("token-lifetime-seconds = 5\n" + STRING, r"it must be at least 60"),
        ("[iothub.x509]\nhost-name = 'h'", r"missing required field"),
    ],
)
def test_errors_name_the_key(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        source_of(text)
    assert "c2VjcmV0" not in str(caught.value)


def test_what_is_watched() -> None:
    assert files_of(source_of(STRING)) == ()
    assert files_of(source_of(SAS + 'key-file = "k"')) == (Path("k"),)
    assert files_of(source_of(X509)) == (Path("c"), Path("k"))
    assert files_of(source_of('module-id = "m"\n' + X509)) == (Path("c"), Path("k"))
    assert certificate_of(source_of('module-id = "m"\n' + X509)) == CertificateFiles(
        Path("c"), Path("k")
    )
    assert certificate_of(source_of(STRING)) is None
