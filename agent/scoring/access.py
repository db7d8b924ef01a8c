"""Who may call what: keys and tokens of endpoints, request rates, and an audit of refusals."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from time import monotonic
from typing import Final

import msgspec

from .dataplane import DataPlane
from .errors import Code, ScoringError
from .http_types import HttpRequest
from .keys import KeyStore
from .prometheus import Family
from .rate import Bucket, RateLimit, RateTable, take
from .tokens import TokenRefused, TokenVerifier

audit = logging.getLogger("gatelet.scoring.audit")

NONE: Final = "none"
KEY: Final = "key"
TOKEN: Final = "token"
STRICTNESS: Final = (NONE, KEY, TOKEN)
_AUDITED = RateLimit(10.0, 50)
_BEARER = "bearer "


@dataclass(frozen=True, slots=True)
class Caller:
    """`address`: of the peer. `certificate`: the common name it proved by mutual TLS."""

    address: str
    certificate: str = ""
    authorization: str = ""


class Access:
    """Thread-safe. Refusals are ScoringError UNAUTHENTICATED, PERMISSION_DENIED or
    RESOURCE_EXHAUSTED."""

    def __init__(
        self,
        plane: DataPlane,
        *,
        keys: KeyStore | None = None,
        tokens: TokenVerifier | None = None,
        floor: str = NONE,
        rate: RateLimit | None = None,
    ) -> None:
        """`floor`: what every endpoint asks for at least."""
        self._plane = plane
        self._keys = keys
        self._tokens = tokens
        self._floor = floor
        self._rates = None if rate is None else RateTable(rate)
        self._lock = threading.Lock()
        self._refused: dict[str, int] = {}
        self._audit_bucket: Bucket | None = None
        self._unaudited = 0

    def mode(self, endpoint: str) -> str:
        """What the strictest of the endpoint's modules asks for: none, key or token."""
        table = self._plane.table
        route = table.routes.get(endpoint)
        if route is not None:
            modes = [target.instance.auth for target in route.targets]
        else:
            # Whoever may not call it shall not learn that it is being loaded.
            modes = [table.coming.get(endpoint, NONE)]
        return max((self._floor, *modes), key=STRICTNESS.index)

    def open_to_all(self, endpoint: str) -> bool:
        """Whether `admit` would let anybody pass, and counts nobody."""
        if self._rates is not None or self._floor != NONE:
            return False
        route = self._plane.table.routes.get(endpoint)
        if route is not None:
            # A plain loop: this is asked for every request.
            for target in route.targets:
                if target.instance.auth != NONE or target.instance.clients:
                    return False
            return True
        return not any(map(self._asks, self._concerned(endpoint)))

    def _asks(self, endpoint: str) -> bool:
        """Whether a client has to show something there."""
        return self.mode(endpoint) != NONE or self._clients(endpoint) is not None

    def _clients(self, endpoint: str) -> frozenset[str] | None:
        """Whose certificates every module of the endpoint takes; None where none asks for any."""
        route = self._plane.table.routes.get(endpoint)
        lists = [] if route is None else [target.instance.clients for target in route.targets]
        named = [names for names in lists if names]
        return frozenset.intersection(*named) if named else None

    def _concerned(self, endpoint: str) -> tuple[str, ...]:
        """The endpoints of which one must be open to a caller of `endpoint`."""
        known = self._plane.table.endpoints
        return (endpoint,) if endpoint in known else tuple(known)

    def admit(self, caller: Caller, endpoint: str, operation: str) -> None:
        """Let a call pass or raise. `endpoint` "": what concerns the whole server, which whoever
        may call any endpoint may call."""
        try:
            self._count(caller)
            self._check(caller, self._concerned(endpoint))
        except ScoringError as error:
            self._note(caller, endpoint, operation, error)
            raise

    def admit_request(self, request: HttpRequest, endpoint: str, operation: str) -> None:
        """`admit` for HTTP."""
        if not self.open_to_all(endpoint):
            authorization = request.headers.get("authorization", "")
            caller = Caller(request.client, request.certificate, authorization)
            self.admit(caller, endpoint, operation)

    def _count(self, caller: Caller) -> None:
        if self._rates is None:
            return
        with self._lock:
            wait = self._rates.take(caller.certificate or caller.address, monotonic())
        if wait:
            raise ScoringError(
                Code.RESOURCE_EXHAUSTED, f"too many requests; try again in {wait:.2g} s", wait
            )

    def _check(self, caller: Caller, endpoints: tuple[str, ...]) -> None:
        asking = [endpoint for endpoint in endpoints if self._asks(endpoint)]
        if not asking and (endpoints or self._floor == NONE):
            return
        modes = {one: self.mode(one) for one in self._certified(caller, asking)}
        if NONE in modes.values():
            # The certificate is all that it asks for.
            return
        text = caller.authorization
        if text[: len(_BEARER)].lower() != _BEARER:
            raise ScoringError(
                Code.UNAUTHENTICATED,
                "this needs a key or token: send the header 'Authorization: Bearer ...'",
            )
        presented = text[len(_BEARER) :].strip()
        reason = "the key is wrong"
        if TOKEN in modes.values() or (presented.count(".") == 2 and self._tokens is not None):
            try:
                self._by_token(presented, modes)
                return
            except TokenRefused as refused:
                reason = f"the token is refused: {refused}"
        if KEY in modes.values() and self._keys is not None:
            for endpoint, mode in modes.items():
                if mode == KEY and self._keys.accepts(endpoint, presented):
                    return
        raise ScoringError(Code.UNAUTHENTICATED, reason)

    def _certified(self, caller: Caller, endpoints: list[str]) -> list[str]:
        """Those of `endpoints` that take the caller's certificate. Raises where none does."""
        taking = []
        for endpoint in endpoints:
            clients = self._clients(endpoint)
            if clients is None or caller.certificate in clients:
                taking.append(endpoint)
        if endpoints and not taking:
            if not caller.certificate:
                raise ScoringError(Code.UNAUTHENTICATED, "this needs a client's certificate")
            raise ScoringError(
                Code.PERMISSION_DENIED,
                f"the certificate of {caller.certificate!r} is none of the endpoint's clients",
            )
        return taking

    def _by_token(self, presented: str, modes: Mapping[str, str]) -> None:
        if self._tokens is None:
            raise TokenRefused("no [scoring.tokens] are configured on this device")
        bearer = self._tokens.verify(presented)
        if bearer.endpoints is not None and modes and not bearer.endpoints & modes.keys():
            raise ScoringError(Code.PERMISSION_DENIED, "the token is for other endpoints")

    def _note(self, caller: Caller, endpoint: str, operation: str, error: ScoringError) -> None:
        with self._lock:
            name = error.code.value
            self._refused[name] = self._refused.get(name, 0) + 1
            self._audit_bucket, wait = take(self._audit_bucket, _AUDITED, monotonic())
            if wait:
                self._unaudited += 1
                return
            unaudited, self._unaudited = self._unaudited, 0
        record = {
            "refused": error.code.value,
            "reason": error.message,
            "client": caller.address,
            "certificate": caller.certificate,
            "endpoint": endpoint,
            "operation": operation,
            **({"unaudited": unaudited} if unaudited else {}),
        }
        audit.warning("%s", msgspec.json.encode(record).decode())

    def metrics(self) -> list[Family]:
        """For `/metrics`."""
        refused = Family("gatelet_refused_calls_total", "counter", "Calls without permission")
        with self._lock:
            for code, number in sorted(self._refused.items()):
                refused.add(number, (("code", code),))
        return [refused]
