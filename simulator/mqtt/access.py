"""Who a client is, and which topics it may use; pure."""

from __future__ import annotations

import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from .handler import Refused
from .packets import Connect, ReasonCode
from .topics import filter_problem, split_shared

_REMEMBERED = 4096
_REMEMBERED_LENGTH = 512


@dataclass(frozen=True, slots=True)
class Grant:
    """Topics that may be published to or subscribed to (or both).

    `topic_filter` is an MQTT topic filter in which `%c` stands for the client id and `%u` for the
    user name; where such a name is missing, or would change the filter's levels, it grants
    nothing. `user` limits the grant to one user. Raises ValueError for an invalid filter.
    """

    topic_filter: str
    publish: bool = True
    subscribe: bool = True
    user: str | None = None

    def __post_init__(self) -> None:
        if problem := filter_problem(self.topic_filter):
            raise ValueError(f"grant for {self.topic_filter!r}: {problem}")

    def filter_for(self, user: str | None, client_id: str) -> str | None:
        """The filter for this client, None when the grant is not for it."""
        if self.user is not None and self.user != user:
            return None
        result = self.topic_filter
        for placeholder, name in (("%c", client_id), ("%u", user)):
            if placeholder not in result:
                continue
            # "+" as a client id must not open everybody's topics.
            if not name or any(character in name for character in "/+#%"):
                return None
            result = result.replace(placeholder, name)
        return result


class AccessList:
    """What is not granted is denied."""

    def __init__(self, grants: Sequence[Grant]) -> None:
        self._grants = tuple(grants)
        # Asked for every message, and devices publish to the same few topics again and again.
        self._known = lru_cache(maxsize=_REMEMBERED)(self._may_publish)

    def may_publish(self, user: str | None, client_id: str, topic: str) -> bool:
        if len(client_id) + len(topic) > _REMEMBERED_LENGTH:
            return self._may_publish(user, client_id, topic)
        return self._known(user, client_id, topic)

    def _may_publish(self, user: str | None, client_id: str, topic: str) -> bool:
        return any(
            covers(allowed, topic) for allowed in self._filters(user, client_id, publish=True)
        )

    def may_subscribe(self, user: str | None, client_id: str, topic_filter: str) -> bool:
        """Whether every topic that `topic_filter` (shared or not) matches is granted."""
        wanted = split_shared(topic_filter)[1]
        return any(
            covers(allowed, wanted) for allowed in self._filters(user, client_id, publish=False)
        )

    def _filters(self, user: str | None, client_id: str, *, publish: bool) -> list[str]:
        granted = [
            grant for grant in self._grants if (grant.publish if publish else grant.subscribe)
        ]
        filters = (grant.filter_for(user, client_id) for grant in granted)
        return [one for one in filters if one is not None]


def covers(wide: str, narrow: str) -> bool:
    """Whether `wide` matches every topic that the filter (or topic) `narrow` matches."""
    if narrow[:1] == "$" and wide[:1] in ("+", "#"):
        return False
    wide_levels, narrow_levels = wide.split("/"), narrow.split("/")
    for position, level in enumerate(wide_levels):
        if level == "#":
            return True
        if position == len(narrow_levels) or narrow_levels[position] == "#":
            return False
        if level not in ("+", narrow_levels[position]):
            return False
    return len(wide_levels) == len(narrow_levels)


def identify(
    users: Mapping[str, str] | None, certificate: Mapping[str, Any] | None, connect: Connect
) -> str | Refused | None:
    """The user's name, None for somebody nameless whom we let in, or why not.

    A client certificate (as `ssl` gives it, already verified) names the user by its common name;
    its holder needs no password. `users` None lets everybody else in.
    """
    if certificate is not None:
        name = common_name(certificate)
        if not name:
            return Refused(ReasonCode.NOT_AUTHORIZED, "the client certificate has no common name")
        return name
    if users is None:
        return None
    if connect.username is None:
        return Refused(ReasonCode.NOT_AUTHORIZED, "a user name and password are required")
    known = users.get(connect.username)
    # Compared in any case, so that time does not tell which names exist.
    good = hmac.compare_digest((known or "").encode(), connect.password or b"")
    if known is None or not good:
        return Refused(ReasonCode.BAD_USER_NAME_OR_PASSWORD, "wrong user name or password")
    return connect.username


def common_name(certificate: Mapping[str, Any]) -> str | None:
    for relative_name in certificate.get("subject", ()):
        for key, value in relative_name:
            if key == "commonName":
                return str(value)
    return None
