"""The last retained message of every topic."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from msgspec.structs import replace

from .packets import Publish
from .session import NEVER, message_size
from .topics import matches


@dataclass(frozen=True, slots=True)
class Retained:
    """`expires_at` is monotonic seconds, NEVER when it stays."""

    publish: Publish
    expires_at: float = NEVER


class RetainedMessages:
    """At most so many topics and so many bytes of them. `now` is monotonic seconds everywhere."""

    def __init__(self, most: int, most_bytes: int) -> None:
        self._most = most
        self._most_bytes = most_bytes
        self.restore({})

    def payloads(self, now: float) -> dict[str, bytes]:
        return {
            topic: kept.publish.payload
            for topic, kept in self._by_topic.items()
            if kept.expires_at > now
        }

    def restore(self, kept: dict[str, Retained]) -> None:
        self._by_topic = kept
        self._bytes = sum(message_size(one.publish) for one in kept.values())
        self._earliest_expiry = min((one.expires_at for one in kept.values()), default=NEVER)

    def has_room(self, publish: Publish, now: float) -> bool:
        """Whether `publish` may be kept; what removes a message always may."""
        if not publish.payload or self._fits(publish):
            return True
        if self._earliest_expiry <= now:
            for topic, kept in list(self._by_topic.items()):
                if kept.expires_at <= now:
                    self._forget(topic)
            left = (one.expires_at for one in self._by_topic.values())
            self._earliest_expiry = min(left, default=NEVER)
        return self._fits(publish)

    def keep(self, publish: Publish, now: float) -> Retained | None:
        """Replace the topic's message; None when an empty payload removed it [MQTT-3.3.1-6]."""
        self._forget(publish.topic)
        if not publish.payload:
            return None
        expiry = publish.properties.message_expiry_interval
        kept = Retained(publish, NEVER if expiry is None else now + expiry)
        self._by_topic[publish.topic] = kept
        self._bytes += message_size(publish)
        self._earliest_expiry = min(self._earliest_expiry, kept.expires_at)
        return kept

    def _fits(self, publish: Publish) -> bool:
        older = self._by_topic.get(publish.topic)
        more = message_size(publish) - (message_size(older.publish) if older else 0)
        if more > 0 and self._bytes + more > self._most_bytes:
            return False
        return older is not None or len(self._by_topic) < self._most

    def _forget(self, topic: str) -> None:
        older = self._by_topic.pop(topic, None)
        if older is not None:
            self._bytes -= message_size(older.publish)

    def matching(self, topic_filter: str, now: float) -> Iterator[Publish]:
        """What a new subscriber gets, with the expiry interval that is left [MQTT-3.3.2-6]."""
        if "+" in topic_filter or "#" in topic_filter:
            topics = [topic for topic in self._by_topic if matches(topic_filter, topic)]
        else:
            topics = [topic_filter] if topic_filter in self._by_topic else []
        for topic in topics:
            kept = self._by_topic.get(topic)
            if kept is None:
                continue
            if kept.expires_at <= now:
                self._forget(topic)
            else:
                yield _aged(kept, now)


def _aged(kept: Retained, now: float) -> Publish:
    if kept.expires_at == NEVER:
        return kept.publish
    left = max(1, int(kept.expires_at - now))
    properties = replace(kept.publish.properties, message_expiry_interval=left)
    return replace(kept.publish, properties=properties)
