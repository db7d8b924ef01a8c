"""What clients may publish to a hub, and the hub's answers (topics of IoT Hub's MQTT binding)."""

from __future__ import annotations

import json
import re
from urllib.parse import unquote

from .devices import ClientId
from .errors import HubError, invalid
from .hub import Hub
from .json_text import parse_json
from .links import Link
from .rates import throttled

_TWIN_GET = re.compile(r"\$iothub/twin/GET/\?(?P<query>.*)\Z")
_TWIN_PATCH = re.compile(r"\$iothub/twin/PATCH/properties/reported/\?(?P<query>.*)\Z")
_METHOD = re.compile(r"\$iothub/methods/res/(?P<status>-?\d{1,9})/\?(?P<query>.*)\Z")


def may_subscribe(client: ClientId, topic_filter: str) -> bool:
    """Whether a filter is one of those a hub serves to this client."""
    return topic_filter in (
        "$iothub/twin/res/#",
        "$iothub/twin/PATCH/properties/desired/#",
        "$iothub/methods/POST/#",
        f"devices/{client.device}/messages/devicebound/#",
        f"{client.path}/messages/devicebound/#",
        f"{client.path}/inputs/#",
    )


def handle_publish(
    hub: Hub, client: ClientId, link: Link, topic: str, payload: bytes, *, retain: bool = False
) -> None:
    """Carries out what a client published and answers it on `link`. Nothing is retained: telemetry
    that asks for it gets the property `mqtt-retain`.

    Raises HubError 400 for a topic a hub does not know or a body without a place for an answer: the
    connection is then closed, as IoT Hub does.
    """
    if match := _TWIN_GET.match(topic):
        _twin_request(hub, client, link, match["query"], None)
    elif match := _TWIN_PATCH.match(topic):
        _twin_request(hub, client, link, match["query"], payload)
    elif match := _METHOD.match(topic):
        if hub.faults.take("lose_method_answers"):
            return
        hub.method_answered(client, _request_id(match["query"]), int(match["status"]), payload)
    elif (bag := telemetry_bag(client, topic)) is not None:
        hub.accept_telemetry(client, payload, bag, {"mqtt-retain": "true"} if retain else None)
    else:
        raise invalid(f"{client} may not publish to {topic!r}")


def telemetry_bag(client: ClientId, topic: str) -> str | None:
    """The property bag of a topic for the client's telemetry, None for any other topic."""
    base, slash, bag = topic.partition("/messages/events")
    if base != client.path or not slash or (bag and not bag.startswith("/")):
        return None
    return bag[1:]


def _twin_request(hub: Hub, client: ClientId, link: Link, query: str, patch: bytes | None) -> None:
    rid = _request_id(query)
    suffix, body = "", b""
    try:
        if hub.faults.take("throttle_twin_requests"):
            raise throttled("too many twin requests: slow down")
        if hub.faults.take("fail_twin_requests"):
            raise HubError(500, "ServerError", "failed on request")
        hub.throttle.check("twin_reads" if patch is None else "twin_updates")
        if patch is None:
            status = 200
            body = json.dumps(hub.twin(client).device_view(), ensure_ascii=False).encode()
        else:
            status = 204
            twin = hub.patch_reported(client, parse_json(patch))
            suffix = f"&$version={twin.reported.version}"
    except HubError as error:
        status = error.status
        body = json.dumps({"errorCode": status * 1000 + 1, "message": error.message}).encode()
    if not hub.faults.take("lose_twin_answers"):
        link.deliver(f"$iothub/twin/res/{status}/?$rid={rid}{suffix}", body)


def _request_id(query: str) -> str:
    for pair in query.split("&"):
        name, _, value = pair.partition("=")
        if unquote(name) == "$rid" and value:
            return value
    raise invalid("the topic lacks ?$rid=")
