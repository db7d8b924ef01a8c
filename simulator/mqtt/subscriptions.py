"""Which subscriptions match a topic, without looking at all of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from .packets import Subscription
from .session import Session
from .topics import split_shared

_REMEMBERED = 1024
_REMEMBERED_LENGTH = 256
_ENTRY_BYTES = 512
_LEVEL_BYTES = 512


def filter_size(topic_filter: str) -> int:
    """Bytes of memory that a subscription takes, roughly."""
    return _ENTRY_BYTES + len(topic_filter) + _LEVEL_BYTES * (topic_filter.count("/") + 1)


@dataclass(frozen=True, slots=True)
class Receiver:
    """What one session gets: one copy for all its matching subscriptions, of their highest QoS."""

    session: Session
    qos: int
    as_published: bool
    identifiers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """One session's subscription; `identifier` is MQTT 5's subscription identifier or None.

    `receiver`: the session with this subscription alone.
    """

    session: Session
    subscription: Subscription
    identifier: int | None = None
    receiver: Receiver = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "receiver", _together([self]))


@dataclass(frozen=True, slots=True)
class Match:
    """The subscriptions that match a topic. A client with overlapping filters has one entry each.

    `groups`: for every shared subscription its members by client id; none is empty.
    """

    entries: tuple[Entry, ...]
    groups: tuple[dict[str, Entry], ...]
    receivers: tuple[Receiver, ...]
    no_local: bool
    """Whether a session may have to be spared its own messages: then `others` tells."""

    def others(self, origin: Session | None) -> tuple[Receiver, ...]:
        """Who gets what `origin` publishes."""
        wanted = (
            one
            for one in self.entries
            if not one.subscription.no_local or one.session is not origin
        )
        return _receivers(wanted)


def _receivers(entries: Iterable[Entry]) -> tuple[Receiver, ...]:
    by_client: dict[str, list[Entry]] = {}
    for entry in entries:
        by_client.setdefault(entry.session.client_id, []).append(entry)
    return tuple(own[0].receiver if len(own) == 1 else _together(own) for own in by_client.values())


def _together(entries: Sequence[Entry]) -> Receiver:
    """`entries`: of one session, at least one."""
    return Receiver(
        entries[0].session,
        max(entry.subscription.qos for entry in entries),
        any(entry.subscription.retain_as_published for entry in entries),
        tuple(entry.identifier for entry in entries if entry.identifier is not None),
    )


@dataclass(slots=True)
class _Node:
    children: dict[str, _Node] = field(default_factory=dict)
    entries: dict[str, Entry] = field(default_factory=dict)  # by client id
    shared: dict[str, dict[str, Entry]] = field(default_factory=dict)  # by share name

    @property
    def is_empty(self) -> bool:
        return not (self.children or self.entries or self.shared)


class SubscriptionTree:
    """A tree over the levels of the topic filters; filters must be valid."""

    def __init__(self) -> None:
        self._root = _Node()
        self._found: dict[str, Match] = {}

    def add(self, entry: Entry) -> bool:
        """Add or replace; whether it is new for this client [MQTT-3.8.4-3]."""
        self._found.clear()
        share, topic_filter = split_shared(entry.subscription.topic_filter)
        node = self._root
        for level in topic_filter.split("/"):
            node = node.children.setdefault(level, _Node())
        place = node.shared.setdefault(share, {}) if share else node.entries
        is_new = entry.session.client_id not in place
        place[entry.session.client_id] = entry
        return is_new

    def remove(self, client_id: str, topic_filter: str) -> bool:
        """Whether there was such a subscription."""
        self._found.clear()
        share, plain = split_shared(topic_filter)
        path = [self._root]
        levels = plain.split("/")
        for level in levels:
            child = path[-1].children.get(level)
            if child is None:
                return False
            path.append(child)
        node = path[-1]
        place = node.shared.get(share, {}) if share else node.entries
        found = place.pop(client_id, None) is not None
        if share and not place:
            node.shared.pop(share, None)
        for depth in range(len(levels), 0, -1):
            if not path[depth].is_empty:
                break
            del path[depth - 1].children[levels[depth - 1]]
        return found

    def match(self, topic: str) -> Match:
        # Devices publish to the same few topics again and again.
        if (found := self._found.get(topic)) is not None:
            return found
        entries: list[Entry] = []
        groups: list[dict[str, Entry]] = []
        for node in self._nodes(topic):
            entries.extend(node.entries.values())
            groups.extend(node.shared.values())
        no_local = any(entry.subscription.no_local for entry in entries)
        found = Match(tuple(entries), tuple(groups), _receivers(entries), no_local)
        if len(topic) <= _REMEMBERED_LENGTH:
            if len(self._found) >= _REMEMBERED:
                self._found.clear()
            self._found[topic] = found
        return found

    def _nodes(self, topic: str) -> Iterator[_Node]:
        levels = topic.split("/")
        open_nodes = [self._root]
        for depth, level in enumerate(levels):
            # Leading wildcards do not match $-topics [MQTT-4.7.2-1].
            wild = depth > 0 or not level.startswith("$")
            reached: list[_Node] = []
            for node in open_nodes:
                if wild and (rest := node.children.get("#")) is not None:
                    yield rest
                if wild and (any_level := node.children.get("+")) is not None:
                    reached.append(any_level)
                if (exact := node.children.get(level)) is not None:
                    reached.append(exact)
            open_nodes = reached
            if not reached:
                return
        for node in open_nodes:
            yield node
            # "a/#" also matches "a" itself.
            if (rest := node.children.get("#")) is not None:
                yield rest
