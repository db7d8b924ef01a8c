"""JWT bearer tokens (RFC 7519), checked against a JWKS file (RFC 7517) that may change any time."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import msgspec

from ..clock import Clock, SystemClock

log = logging.getLogger(__name__)

# By the type of a key, so that a public key is never taken for a shared secret.
_ALGORITHMS = {"RSA": ("RS256",), "EC": ("ES256",), "oct": ("HS256",)}
_LONGEST = 8192
_REMEMBERED = 1024
_LOOK_SECONDS = 1.0


class TokensUnusable(Exception):
    """Tokens cannot be checked; the message says what is missing."""


class TokenRefused(Exception):
    """Why a token is not taken, without any of its content."""


@dataclass(frozen=True, slots=True)
class TokenSettings:
    """`jwks_file` holds RSA, EC or symmetric (`oct`) keys. `issuer` and `audience` must be met."""

    jwks_file: Path
    issuer: str
    audience: str
    leeway_seconds: float = 60.0


@dataclass(frozen=True, slots=True)
class Bearer:
    """Who a token speaks for. `endpoints` None: all; `expires`: seconds since 1970."""

    subject: str
    endpoints: frozenset[str] | None
    expires: float


class _Jwk(msgspec.Struct):
    kty: str
    kid: str = ""
    alg: str = ""


class TokenVerifier:
    """Thread-safe. A token that was good is remembered until it ends or the keys change."""

    def __init__(self, settings: TokenSettings, clock: Clock | None = None) -> None:
        """Raises TokensUnusable."""
        try:
            import jwt
        except ModuleNotFoundError:
            raise TokensUnusable(
                "scoring.tokens needs PyJWT and cryptography: pip install 'gatelet[tokens]'"
            ) from None
        self._jwt = jwt
        self._settings = settings
        self._clock = clock or SystemClock()
        self._lock = threading.Lock()
        self._known: dict[bytes, Bearer] = {}
        self._stamp = self._look()
        self._looked = monotonic()
        self._keys = self._load()

    def verify(self, token: str) -> Bearer:
        """Raises TokenRefused."""
        if len(token) > _LONGEST:
            raise TokenRefused("it is too long")
        if not token.isascii():
            raise TokenRefused("it is no JWT")
        digest = hashlib.sha256(token.encode("ascii")).digest()
        now = self._clock.now().timestamp()
        with self._lock:
            self._reload()
            known, keys = self._known.get(digest), self._keys
        if known is not None and known.expires + self._settings.leeway_seconds > now:
            return known
        bearer = self._check(token, keys)
        with self._lock:
            if keys is self._keys:
                if len(self._known) >= _REMEMBERED:
                    self._known.clear()
                self._known[digest] = bearer
        return bearer

    def _check(self, token: str, keys: Mapping[str, Any]) -> Bearer:
        jwt, settings = self._jwt, self._settings
        try:
            header = jwt.get_unverified_header(token)
        except jwt.PyJWTError:
            raise TokenRefused("it is no JWT") from None
        wanted = header.get("kid")
        # Without a name, the only key is meant.
        key = keys.get(wanted) if isinstance(wanted, str) else None
        if key is None and wanted is None and len(keys) == 1:
            key = next(iter(keys.values()))
        if key is None:
            raise TokenRefused("its key is not among the trusted ones")
        try:
            claims = jwt.decode(
                token,
                key.key,
                algorithms=_ALGORITHMS[key.key_type],
                audience=settings.audience,
                issuer=settings.issuer,
                leeway=settings.leeway_seconds,
                # Compared with our own clock below.
                options={
                    "require": ["exp", "iss", "aud"],
                    "verify_exp": False,
                    "verify_nbf": False,
                    "verify_iat": False,
                },
            )
            return self._bearer(claims)
        except jwt.PyJWTError as error:
            raise TokenRefused(_reason(type(error).__name__)) from None

    def _bearer(self, claims: Mapping[str, Any]) -> Bearer:
        now, leeway = self._clock.now().timestamp(), self._settings.leeway_seconds
        expires, begins = claims["exp"], claims.get("nbf", 0)
        if not isinstance(expires, int | float) or not isinstance(begins, int | float):
            raise TokenRefused("its times are no numbers")
        if expires + leeway <= now:
            raise TokenRefused("it has expired; get a new one")
        if begins - leeway > now:
            raise TokenRefused("it is not valid yet")
        endpoints = claims.get("endpoints")
        if endpoints is not None and (
            not isinstance(endpoints, list) or not all(isinstance(one, str) for one in endpoints)
        ):
            raise TokenRefused("its claim 'endpoints' is no list of names")
        subject = str(claims.get("sub", ""))[:128]
        allowed = None if endpoints is None else frozenset(endpoints)
        return Bearer(subject, allowed, float(expires))

    def _look(self) -> tuple[int, int]:
        try:
            status = self._settings.jwks_file.stat()
        except OSError:
            return 0, 0
        return status.st_mtime_ns, status.st_ino

    def _reload(self) -> None:
        now = monotonic()
        if now - self._looked < _LOOK_SECONDS:
            return
        self._looked = now
        stamp = self._look()
        if stamp == self._stamp:
            return
        try:
            keys = self._load()
        except TokensUnusable as error:
            log.warning("the tokens' keys stay as they were: %s", error)
        else:
            self._keys, self._known = keys, {}
        self._stamp = stamp

    def _load(self) -> dict[str, Any]:
        file = self._settings.jwks_file
        try:
            raw = msgspec.json.decode(file.read_bytes(), type=dict[str, msgspec.Raw])
            entries = msgspec.json.decode(raw["keys"], type=list[msgspec.Raw])
            keys = {}
            for entry in entries:
                about = msgspec.json.decode(entry, type=_Jwk)
                allowed = _ALGORITHMS.get(about.kty, ())
                if allowed and about.alg in ("", *allowed):
                    keys[about.kid] = self._jwt.PyJWK.from_json(
                        bytes(entry).decode(), algorithm=allowed[0]
                    )
        except (OSError, KeyError, msgspec.DecodeError, self._jwt.PyJWTError) as error:
            raise TokensUnusable(f"{file} is no JWKS: {error}") from None
        if not keys:
            raise TokensUnusable(f"{file} has no key for RS256, ES256 or HS256")
        return keys


def _reason(name: str) -> str:
    return {
        "InvalidAudienceError": "it is meant for another audience",
        "InvalidIssuerError": "it comes from another issuer",
        "InvalidSignatureError": "its signature is wrong",
        "InvalidAlgorithmError": "its algorithm does not fit its key",
        "MissingRequiredClaimError": "it lacks one of the claims exp, iss and aud",
    }.get(name, "it is not valid")
