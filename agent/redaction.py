"""Taking secrets out of texts and documents that leave the device or stay in its logs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "(hidden)"

_SECRET_NAME = re.compile(
    r"pass(word|wd|phrase)?$|passphrase|password|secret|token|api[-_]?key|access[-_]?key"
    r"|private[-_]?key|symmetric[-_]?key|credential|connection[-_]?string|auth(orization)?$"
    r"|sas([-_]?url)?$|(^|[-_])key$|^sig$|^pwd$",
    re.IGNORECASE,
)
_FILE_NAME = re.compile(r"[-_](file|socket|command|function)$|lifetime", re.IGNORECASE)
_IN_TEXT = (
    # Connection strings, headers and settings: NAME=value or NAME: value.
    re.compile(
        r"(?i)\b((?:[\w-]*(?:password|passwd|passphrase|secret|accesskey|access_key|api[-_]?key"
        r"|token|accountkey|pwd|[_-]key))[\"']?\s*[=:]\s*[\"']?)([^\s\"',;&]+)"
    ),
    re.compile(r"(?i)((?:SharedAccessKey|AccountKey)\s*=\s*)([^\s\"';,]+)"),
    # Signatures in URLs and in shared access signatures.
    re.compile(r"(?i)([?&;\s]sig=|\bsig=)([^&\s\"';]+)"),
    re.compile(r"(?i)\b((?:bearer|basic)\s+)([A-Za-z0-9+/_.=-]{8,})"),
    re.compile(r"(://[^/\s:@]+:)([^/\s@]+)(?=@)"),
)
_PEM = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL
)
_BASE64_KEY = re.compile(
    r"(?<![A-Za-z0-9+/=])(?:[A-Za-z0-9+/]{43}=|[A-Za-z0-9+/]{86}==)(?![A-Za-z0-9+/=])"
)


def redact(text: str) -> str:
    """`text` without keys, passwords, tokens, signatures and private keys, as far as their form
    gives them away. Applying it again changes nothing."""
    text = _PEM.sub(HIDDEN, text)
    for pattern in _IN_TEXT:
        text = pattern.sub(rf"\g<1>{HIDDEN}", text)
    # 32 and 64 bytes in base64 are what device keys look like; digests are written in hex.
    return _BASE64_KEY.sub(HIDDEN, text)


def secret_name(name: str) -> bool:
    """Whether a setting or variable of this name holds a secret (and not the path of one)."""
    return _SECRET_NAME.search(name) is not None and _FILE_NAME.search(name) is None


def redact_document(value: Any, name: str = "") -> Any:
    """A JSON-like value with the same shape, its secrets hidden: by the names they stand under, in
    whatever depth, as variables and as options of a command line, and by the form of texts."""
    if secret_name(name) and value not in (None, "", (), [], {}) and not isinstance(value, bool):
        if isinstance(value, Mapping) and "credential" in name.lower():
            # A table of credentials by name: which ones there are is no secret.
            return {str(key): redact_document(inner) for key, inner in value.items()}
        return HIDDEN
    if isinstance(value, Mapping):
        return {str(key): redact_document(inner, str(key)) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        before = ["", *value][:-1]
        return [_element(inner, last, name) for inner, last in zip(value, before, strict=True)]
    return redact(value) if isinstance(value, str) else value


def _element(value: Any, before: Any, name: str) -> Any:
    if not isinstance(value, str):
        return redact_document(value, name)
    # VARIABLE=value as in Docker's Env, --option=value and --option value as in its Cmd.
    variable, equals, _ = value.partition("=")
    if equals and not re.search(r"\s", variable) and secret_name(variable.lstrip("-")):
        return f"{variable}={HIDDEN}"
    option = isinstance(before, str) and before.startswith("-") and "=" not in before
    return HIDDEN if option and secret_name(before.lstrip("-")) else redact(value)


def secret_values(value: Any, name: str = "") -> set[str]:
    """The texts that `redact_document` hides by name: to be taken out of other texts as well."""
    if isinstance(value, Mapping):
        whole = secret_name(name) and "credential" not in name.lower()
        return {
            found
            for key, inner in value.items()
            for found in secret_values(inner, name if whole else str(key))
        }
    if isinstance(value, (list, tuple)):
        pairs = [v.partition("=") for v in value if isinstance(v, str)]
        variables = {text for variable, _, text in pairs if secret_name(variable.lstrip("-"))}
        return variables | {found for inner in value for found in secret_values(inner, name)}
    return {value} if isinstance(value, str) and secret_name(name) else set()
