"""Topic names and topic filters (section 4.7), shared subscriptions (section 4.8.2)."""

from __future__ import annotations

_MAX_BYTES = 65_535
_SHARE = "$share/"
MOST_LEVELS = 200
"""Of topics and filters that a broker takes: it spends time or memory on each level."""


def topic_problem(topic: str) -> str | None:
    """Why `topic` is no valid topic name, None when it is (sections 4.7.1 and 4.7.3)."""
    if not topic:
        return "a topic name has at least one character"
    if "+" in topic or "#" in topic:
        return "a topic name has no wildcard characters (+ and #)"
    return _string_problem(topic)


def filter_problem(topic_filter: str) -> str | None:
    """Why `topic_filter` is no valid topic filter (shared or not), None when it is."""
    if not topic_filter:
        return "a topic filter has at least one character"
    if topic_filter.startswith(_SHARE):
        group, slash, rest = topic_filter[len(_SHARE) :].partition("/")
        if not group or "+" in group or "#" in group:
            return "a share name has at least one character and no wildcards"
        if not slash or not rest:
            return "a shared subscription is $share/NAME/FILTER"
        levels = rest.split("/")
    else:
        levels = topic_filter.split("/")
    for position, level in enumerate(levels):
        if "#" in level and (level != "#" or position != len(levels) - 1):
            return "# stands alone in the last level of a topic filter"
        if "+" in level and level != "+":
            return "+ fills a whole level of a topic filter"
    return _string_problem(topic_filter)


def _string_problem(text: str) -> str | None:
    if "\0" in text:
        return "U+0000 is not allowed"
    if text.isascii() and len(text) <= _MAX_BYTES:
        return None
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        return "surrogates cannot be encoded"
    return f"longer than {_MAX_BYTES} bytes" if size > _MAX_BYTES else None


def too_deep(topic: str) -> bool:
    """Whether a topic or a filter has more than MOST_LEVELS levels."""
    return len(topic) >= MOST_LEVELS and topic.count("/") >= MOST_LEVELS


def split_shared(topic_filter: str) -> tuple[str, str]:
    """(share name, filter); the share name is "" for an ordinary subscription.

    `topic_filter` must be valid (`filter_problem`). 3.1.1 has no shared subscriptions in its text,
    yet brokers serve them to 3.1.1 clients too, and so do we.
    """
    if not topic_filter.startswith(_SHARE):
        return "", topic_filter
    group, _, rest = topic_filter[len(_SHARE) :].partition("/")
    return group, rest


def matches(topic_filter: str, topic: str) -> bool:
    """Whether a (not shared) filter matches a topic name; both must be valid.

    A wildcard in the first level never matches a topic that starts with `$` [MQTT-4.7.2-1].
    """
    if topic_filter == topic:
        return True
    if topic[:1] == "$" and topic_filter[:1] in ("+", "#"):
        return False
    levels = topic.split("/")
    wanted = topic_filter.split("/")
    for position, level in enumerate(wanted):
        if level == "#":
            return True
        if position >= len(levels) or (level != "+" and level != levels[position]):
            return False
    return len(wanted) == len(levels)
