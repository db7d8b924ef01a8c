"""How a registry asks who is there, and the answers to it.

Sources: RFC 9110 section 11 (challenges), RFC 7617 (Basic), the distribution project's token
authentication specification (Bearer).
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass

_PARAMETER = re.compile(r'([A-Za-z0-9_-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]+))')
_SCHEME = re.compile(r"(?:^|,)\s*(Basic|Bearer)\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Challenge:
    """`scheme` is "basic" or "bearer"; parameter names are in lower case."""

    scheme: str
    parameters: Mapping[str, str]


def parse_challenges(header: str) -> tuple[Challenge, ...]:
    """The challenges of a WWW-Authenticate header that this client can answer."""
    # Quoted strings may hold anything: blank them out before looking for schemes.
    blank = re.sub(
        r'"(?:[^"\\]|\\.)*"', lambda match: '"' + "_" * (len(match[0]) - 2) + '"', header
    )
    starts = list(_SCHEME.finditer(blank))
    ends = [*(match.start() for match in starts), len(header)][1:]
    found = []
    for match, end in zip(starts, ends, strict=True):
        parameters = {
            name.lower(): re.sub(r"\\(.)", r"\1", quoted) if quoted else plain
            for name, quoted, plain in _PARAMETER.findall(header[match.end() : end])
        }
        found.append(Challenge(match[1].lower(), parameters))
    return tuple(found)


def basic(username: str, password: str) -> str:
    """The Authorization header of HTTP Basic."""
    return f"Basic {base64.b64encode(f'{username}:{password}'.encode()).decode()}"
