"""Topic aliases of MQTT 5 (section 3.3.2.3.4); both directions live as long as their connection."""

from __future__ import annotations

from msgspec.structs import replace

from .packets import Publish, ReasonCode


class UnknownAlias(Exception):
    """The client used an alias it may not use; `reason_code` says so in MQTT 5."""

    reason_code = ReasonCode.TOPIC_ALIAS_INVALID


class InboundAliases:
    """What the client's aliases stand for."""

    def __init__(self, maximum: int) -> None:
        self._maximum = maximum
        self._topics: dict[int, str] = {}

    def resolve(self, publish: Publish) -> Publish:
        """With its topic and without alias. Raises UnknownAlias."""
        alias = publish.properties.topic_alias
        if alias is None:
            return publish
        if alias > self._maximum:
            raise UnknownAlias(f"alias {alias} is above the topic alias maximum")
        if publish.topic:
            self._topics[alias] = publish.topic
        elif alias not in self._topics:
            raise UnknownAlias(f"alias {alias} was never set")
        properties = replace(publish.properties, topic_alias=None)
        return replace(publish, topic=self._topics[alias], properties=properties)


class OutboundAliases:
    """Names the first topics that are sent, as many as the client takes."""

    def __init__(self, maximum: int) -> None:
        self._maximum = maximum
        self._aliases: dict[str, int] = {}

    def shorten(self, publish: Publish) -> Publish:
        """What to send instead; it must be sent, or `forget` called."""
        topic = publish.topic
        alias = self._aliases.get(topic)
        if alias is None:
            if len(self._aliases) >= self._maximum:
                return publish
            alias = self._aliases[topic] = len(self._aliases) + 1
        else:
            topic = ""
        properties = replace(publish.properties, topic_alias=alias)
        return replace(publish, topic=topic, properties=properties)

    def forget(self, shortened: Publish) -> None:
        """`shortened` was not sent, so the client did not learn an alias from it."""
        if shortened.topic:
            self._aliases.pop(shortened.topic, None)
