"""API keys, JWTs, request rates and what they let through."""

from __future__ import annotations

import json
import os
import stat
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from gatelet.agent.main import main
from gatelet.agent.scoring import keys as keys_module
from gatelet.agent.scoring import tokens as tokens_module
from gatelet.agent.scoring.keys import KeyStore, KeysUnusable
from gatelet.agent.scoring.rate import Bucket, RateLimit, RateTable, take
from gatelet.agent.scoring.tokens import TokenRefused, TokenSettings, TokensUnusable, TokenVerifier
from hypothesis import given
from hypothesis import strategies as st

NOW = datetime(2026, 1, 2, tzinfo=timezone.utc)


class FixedClock:
    def __init__(self) -> None:
        self.at = NOW

    def monotonic(self) -> float:
        return 0.0

    def now(self) -> datetime:
        return self.at


# --- keys


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KeyStore:
    monkeypatch.setattr(keys_module, "_FRESH_SECONDS", 0.0)
    return KeyStore(tmp_path / "keys")


def test_one_key_is_replaced_while_the_other_serves(store: KeyStore) -> None:
    assert not store.accepts("e", "anything")
    keys = store.show("e")
    assert store.show("e") == keys
    assert store.accepts("e", keys.primary)
    assert store.accepts("e", keys.secondary)
    new = store.regenerate("e", "primary")
    assert new.secondary == keys.secondary
    assert new.primary != keys.primary
    assert not store.accepts("e", keys.primary)
    assert store.accepts("e", new.primary)
    assert store.accepts("e", keys.secondary)
    assert not store.accepts("other", new.primary)
    assert not store.accepts("e", "")


def test_another_process_may_change_the_keys(store: KeyStore, tmp_path: Path) -> None:
    old = store.show("e")
    assert store.accepts("e", old.primary)
    new = KeyStore(tmp_path / "keys").regenerate("e", "primary", "my-own-key-0123456789")
    assert new.primary == "my-own-key-0123456789"
    assert store.accepts("e", new.primary)
    assert not store.accepts("e", old.primary)


def test_keys_are_for_their_owner_only(store: KeyStore, tmp_path: Path) -> None:
    store.show("e")
    file = tmp_path / "keys" / "e.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_keys_made_by_root_belong_to_whom_the_state_belongs(tmp_path: Path) -> None:
    os.chown(tmp_path, 12345, 23456)
    KeyStore(tmp_path / "keys").show("e")
    for path in (tmp_path / "keys", tmp_path / "keys" / "e.json"):
        assert (path.stat().st_uid, path.stat().st_gid) == (12345, 23456)


@pytest.mark.parametrize("name", ["../e", "a/b", ".hidden", "", "x" * 200])
def test_endpoints_are_no_paths(store: KeyStore, name: str) -> None:
    with pytest.raises(KeysUnusable):
        store.show(name)
    assert not store.accepts("e", name)


def test_broken_files_accept_nobody(store: KeyStore, tmp_path: Path) -> None:
    key = store.show("e").primary
    for content in ("{", '{"primary": "", "secondary": ""}', "[]"):
        (tmp_path / "keys" / "e.json").write_text(content)
        assert not store.accepts("e", key)
        assert not store.accepts("e", "")
        with pytest.raises(KeysUnusable):
            store.show("e")
    with pytest.raises(KeysUnusable, match="16 printable"):
        store.regenerate("f", "primary", "short")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "agent.toml"
    config.write_text(f'[device]\nstate-dir = "{tmp_path}"\nrun-dir = "/tmp/x"\n')

    def run(*words: str) -> dict[str, str]:
        assert main(["keys", *words, "--config", str(config), "--json"]) == 0
        return dict(json.loads(capsys.readouterr().out))

    first = run("show", "digits")
    second = run("regenerate", "digits", "--key", "Secondary")
    assert second["primary"] == first["primary"]
    assert second["secondary"] != first["secondary"]
    assert main(["keys", "show", "../x", "--config", str(config)]) == 1
    assert "is no name of an endpoint" in capsys.readouterr().err


# --- tokens


@pytest.fixture(scope="module")
def private() -> dict[str, Any]:
    return {
        "RS256": rsa.generate_private_key(65537, 2048),
        "ES256": ec.generate_private_key(ec.SECP256R1()),
        "HS256": b"0123456789abcdef0123456789abcdef",
    }


def jwk(algorithm: str, key: Any, kid: str) -> dict[str, Any]:
    made = jwt.get_algorithm_by_name(algorithm)
    public = key if isinstance(key, bytes) else key.public_key()
    return {**made.to_jwk(public, as_dict=True), "kid": kid, "alg": algorithm}


@pytest.fixture
def jwks(tmp_path: Path, private: dict[str, Any]) -> Path:
    file = tmp_path / "jwks.json"
    entries = [jwk(name, key, name) for name, key in private.items()]
    file.write_text(json.dumps({"keys": entries}))
    return file


def verifier(jwks: Path, monkeypatch: pytest.MonkeyPatch | None = None) -> TokenVerifier:
    if monkeypatch is not None:
        monkeypatch.setattr(tokens_module, "_LOOK_SECONDS", 0.0)
    return TokenVerifier(TokenSettings(jwks, "https://issuer", "device-1", 60), FixedClock())


def token(private: Any, algorithm: str = "RS256", kid: str | None = None, **claims: Any) -> str:
    whole = {
        "iss": "https://issuer",
        "aud": "device-1",
        "sub": "app",
        "exp": NOW + timedelta(minutes=5),
        **claims,
    }
    headers = {"kid": kid or algorithm}
    kept = {key: value for key, value in whole.items() if value is not None}
    return jwt.encode(kept, private[algorithm], algorithm, headers)


@pytest.mark.parametrize("algorithm", ["RS256", "ES256", "HS256"])
def test_tokens_of_each_algorithm(jwks: Path, private: dict[str, Any], algorithm: str) -> None:
    bearer = verifier(jwks).verify(token(private, algorithm, endpoints=["a", "b"]))
    assert (bearer.subject, bearer.endpoints) == ("app", frozenset({"a", "b"}))
    assert verifier(jwks).verify(token(private, algorithm)).endpoints is None


@pytest.mark.parametrize(
    ("claims", "text"),
    [
        ({"iss": "https://other"}, "another issuer"),
        ({"aud": "device-2"}, "another audience"),
        ({"exp": NOW - timedelta(seconds=61)}, "expired"),
        ({"nbf": NOW + timedelta(seconds=61)}, "not valid yet"),
        ({"exp": None}, "lacks"),
        ({"aud": None}, "lacks"),
        ({"endpoints": "a"}, "no list of names"),
        ({"kid": "unknown"}, "not among the trusted"),
    ],
)
def test_tokens_that_are_refused(
    jwks: Path, private: dict[str, Any], claims: dict[str, Any], text: str
) -> None:
    with pytest.raises(TokenRefused, match=text):
        verifier(jwks).verify(token(private, **claims))


def test_leeway(jwks: Path, private: dict[str, Any]) -> None:
    ends = NOW - timedelta(seconds=59)
    begins = NOW + timedelta(seconds=59)
    assert verifier(jwks).verify(token(private, exp=ends, nbf=begins))


def test_a_public_key_is_no_shared_secret(jwks: Path, private: dict[str, Any]) -> None:
    public = private["RS256"].public_key()
    pem = public.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    import base64
    import hashlib
    import hmac

    def part(data: bytes) -> str:
        return base64.urlsafe_b64encode(data).decode().rstrip("=")

    claims = {"iss": "https://issuer", "aud": "device-1", "exp": NOW.timestamp() + 300}
    head = part(json.dumps({"alg": "HS256", "kid": "RS256"}).encode())
    signed = f"{head}.{part(json.dumps(claims).encode())}"
    forged = f"{signed}.{part(hmac.new(pem, signed.encode(), hashlib.sha256).digest())}"
    with pytest.raises(TokenRefused, match="algorithm"):
        verifier(jwks).verify(forged)
    unsigned = part(json.dumps({"alg": "none", "kid": "RS256"}).encode())
    with pytest.raises(TokenRefused):
        verifier(jwks).verify(f"{unsigned}.{part(json.dumps(claims).encode())}.")
    for broken in ("", "a.b.c", "x" * 9000, "\udcff.a.b"):
        with pytest.raises(TokenRefused):
            verifier(jwks).verify(broken)


def test_a_remembered_token_still_ends(jwks: Path, private: dict[str, Any]) -> None:
    clock = FixedClock()
    checks = TokenVerifier(TokenSettings(jwks, "https://issuer", "device-1", 0), clock)
    made = token(private)
    assert checks.verify(made) == checks.verify(made)
    clock.at = NOW + timedelta(minutes=6)
    with pytest.raises(TokenRefused, match="expired"):
        checks.verify(made)


def test_keys_are_rotated_by_replacing_the_file(
    jwks: Path, private: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = verifier(jwks, monkeypatch)
    made = token(private, "ES256")
    assert checks.verify(made)
    jwks.write_text("{")
    # A broken file changes nothing.
    assert checks.verify(made)
    jwks.write_text(json.dumps({"keys": [jwk("RS256", private["RS256"], "RS256")]}))
    with pytest.raises(TokenRefused, match="not among the trusted"):
        checks.verify(made)
    with pytest.raises(TokensUnusable):
        verifier(jwks.with_name("missing.json"))


# --- rates


@given(
    st.lists(st.floats(0, 3), min_size=1, max_size=60),
    st.floats(0.5, 20),
    st.integers(1, 10),
)
def test_never_more_than_the_rate_and_the_burst(
    pauses: list[float], per_second: float, burst: int
) -> None:
    limit, bucket, now, passed = RateLimit(per_second, burst), None, 100.0, 0
    for pause in pauses:
        now += pause
        bucket, wait = take(bucket, limit, now)
        passed += wait == 0
        if wait:
            assert take(bucket, limit, now + wait + 1e-6)[1] == 0
    assert passed <= burst + (now - 100.0) * per_second + 1e-6


def test_clients_do_not_share_and_are_forgotten() -> None:
    table = RateTable(RateLimit(1, 1), most=2)
    assert table.take("a", 0) == 0
    assert table.take("a", 0) == 1
    assert table.take("b", 0) == 0
    assert table.take("c", 0) == 0
    assert table.take("a", 0) == 0
    assert take(Bucket(0.5, 0), RateLimit(2, 5), 0) == (Bucket(0.5, 0), 0.25)
