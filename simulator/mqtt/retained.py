"""The last retained message of every topic."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from msgspec.structs import replace

from .packets import Publish
from .session import NEVER
from .topics import matches


@dataclass(frozen=True, slots=True)
class Retained:
    """`expires_at` is monotonic seconds, NEVER when it stays."""

    publish: Publish
    expires_at: float = NEVER


class RetainedMessages:
    """`now` is monotonic seconds everywhere."""

    def __init__(self) -> None:
        self._by_topic: dict[str, Retained] = {}

    def payloads(self, now: float) -> dict[str, bytes]:
        return {
            topic: kept.publish.payload
            for topic, kept in self._by_topic.items()
            if kept.expires_at > now
        }

    def restore(self, kept: dict[str, Retained]) -> None:
        self._by_topic = kept

    def keep(self, publish: Publish, now: float) -> Retained | None:
        """Replace the topic's message; None when an empty payload removed it [MQTT-3.3.1-6]."""
        if not publish.payload:
            self._by_topic.pop(publish.topic, None)
            return None
        expiry = publish.properties.message_expiry_interval
        kept = Retained(publish, NEVER if expiry is None else now + expiry)
        self._by_topic[publish.topic] = kept
        return kept

    def matching(self, topic_filter: str, now: float) -> Iterator[Publish]:
        """What a new subscriber gets, with the expiry interval that is left [MQTT-3.3.2-6]."""
        for topic, kept in list(self._by_topic.items()):
            if kept.expires_at <= now:
                del self._by_topic[topic]
            elif matches(topic_filter, topic):
                yield _aged(kept, now)


def _aged(kept: Retained, now: float) -> Publish:
    if kept.expires_at == NEVER:
        return kept.publish
    left = max(1, int(kept.expires_at - now))
    properties = replace(kept.publish.properties, message_expiry_interval=left)
    return replace(kept.publish, properties=properties)
