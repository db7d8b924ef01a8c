"""Signatures under keys that may be out of our reach: file, program, socket or library."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import importlib
import socket
import subprocess
from collections.abc import Callable
from urllib.parse import quote

from .sources import IdentityError, KeyFile, KeyText, SignCommand, Signer, SignSocket

Sign = Callable[[bytes], bytes]
"""HMAC-SHA256 of the argument: 32 bytes. May block; raises IdentityError."""

SIGN_SECONDS = 10.0
_DIGEST_BYTES = 32
_REPLY_LIMIT = 4096


def sign_with(signer: Signer) -> Sign:
    """The signing function of a signer. Whatever is wrong is found at the first signature."""
    if isinstance(signer, KeyText):
        return key_signer(signer.text, "the symmetric key")
    if isinstance(signer, KeyFile):
        return _file_signer(signer)
    if isinstance(signer, SignCommand):
        return _command_signer(signer)
    if isinstance(signer, SignSocket):
        return _socket_signer(signer)
    return _function_signer(signer.target)


def key_signer(text: str, name: str) -> Sign:
    """Of a key as base64 text; `name` is what errors call it."""

    def sign(message: bytes) -> bytes:
        try:
            key = base64.b64decode(text, validate=True)
        except (ValueError, binascii.Error) as error:
            raise IdentityError(f"{name} is not base64 text") from error
        return hmac.new(key, message, hashlib.sha256).digest()

    return sign


def derived_key(sign: Sign, name: str) -> str:
    """The key, as base64 text, that follows from a secret one and a name (RFC 2104 as a KDF).

    How an enrolment group's key becomes that of one registration (Azure DPS, "Symmetric key
    attestation", group enrolments).
    """
    return base64.b64encode(sign(name.encode())).decode()


def shared_access_signature(resource: str, expiry: int, sign: Sign, policy: str = "") -> str:
    """A token for `resource`, such as `hub.example/devices/d1`, until `expiry` (epoch seconds).

    Source: IoT Hub developer guide, "Control access with shared access signatures".
    """
    encoded = quote(resource, safe="")
    signature = base64.b64encode(sign(f"{encoded}\n{expiry}".encode())).decode()
    token = f"SharedAccessSignature sr={encoded}&sig={quote(signature, safe='')}&se={expiry}"
    return f"{token}&skn={quote(policy, safe='')}" if policy else token


def _file_signer(signer: KeyFile) -> Sign:
    def sign(message: bytes) -> bytes:
        try:
            text = signer.path.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise IdentityError(f"cannot read the key file {signer.path}: {error}") from error
        return key_signer(text, f"the key in {signer.path}")(message)

    return sign


def _command_signer(signer: SignCommand) -> Sign:
    name = f"the signing command {signer.argv[0]!r}"

    def sign(message: bytes) -> bytes:
        try:
            done = subprocess.run(
                signer.argv, input=message, capture_output=True, timeout=SIGN_SECONDS, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise IdentityError(f"{name} failed: {error}") from error
        if done.returncode:
            said = done.stderr.decode("utf-8", "replace").strip()[-300:]
            raise IdentityError(f"{name} ended with {done.returncode}: {said or 'no message'}")
        return _decoded(done.stdout, name)

    return sign


def _socket_signer(signer: SignSocket) -> Sign:
    name = f"the signing socket {signer.path}"

    def sign(message: bytes) -> bytes:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
                link.settimeout(SIGN_SECONDS)
                link.connect(str(signer.path))
                link.sendall(message)
                link.shutdown(socket.SHUT_WR)
                reply = b""
                while (chunk := link.recv(_REPLY_LIMIT)) and len(reply) <= _REPLY_LIMIT:
                    reply += chunk
        except OSError as error:
            raise IdentityError(f"{name} failed: {error}") from error
        return _decoded(reply, name)

    return sign


def _function_signer(target: str) -> Sign:
    name = f"the signing function {target!r}"

    def sign(message: bytes) -> bytes:
        module, _, attribute = target.partition(":")
        try:
            function = getattr(importlib.import_module(module), attribute)
            digest = function(message)
        except Exception as error:  # foreign code: whatever it raises is its own failure
            raise IdentityError(f"{name} failed: {error!r}") from error
        if not isinstance(digest, bytes) or len(digest) != _DIGEST_BYTES:
            raise IdentityError(f"{name} must return the {_DIGEST_BYTES} bytes of an HMAC-SHA256")
        return digest

    return sign


def _decoded(text: bytes, name: str) -> bytes:
    try:
        digest = base64.b64decode(text.strip(), validate=True)
    except (ValueError, binascii.Error) as error:
        raise IdentityError(f"{name} must answer base64 text, not {text[:40]!r}") from error
    if len(digest) != _DIGEST_BYTES:
        raise IdentityError(
            f"{name} answered {len(digest)} bytes; an HMAC-SHA256 has {_DIGEST_BYTES}"
        )
    return digest
