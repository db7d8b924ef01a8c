"""The MQTT side of a device provisioning service (IoT DPS MQTT binding, API version 2019-03-31)."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import unquote

from ..mqtt.connection import Accepted, Connection, Limits, Refused
from ..mqtt.packets import (
    V311,
    Connect,
    Disconnect,
    Publish,
    ReasonCode,
    Subscribe,
    Subscription,
    Unsubscribe,
)
from ..mqtt.session import Session
from .client_certificates import PresentedCertificates
from .dps import Applicant, ProvisioningService, Registration
from .errors import HubError, invalid
from .json_text import parse_json
from .rates import throttled

_log = logging.getLogger(__name__)
_REGISTER = re.compile(r"\$dps/registrations/PUT/iotdps-register/\?(?P<query>.*)\Z")
_POLL = re.compile(r"\$dps/registrations/GET/iotdps-get-operationstatus/\?(?P<query>.*)\Z")
_ANSWERS = "$dps/registrations/res/#"

LIMITS = Limits(versions=frozenset({V311}), max_packet_size=128 * 1024, maximum_qos=1)


class DpsDeviceServer:
    """The `Handler` of every connection; sessions end with their connections.

    `retry_after` is what a device is told to wait between its requests, in whole seconds.
    """

    def __init__(self, service: ProvisioningService, retry_after: int) -> None:
        self._service = service
        self.retry_after = retry_after
        self.certificates: PresentedCertificates | None = None
        """Of the TLS context in front of this server."""
        self._open: set[Connection] = set()

    def connection(self) -> Connection:
        """The server's end of a new connection."""
        return Connection(self, LIMITS, self._open)

    def drop_connections(self) -> None:
        for connection in list(self._open):
            connection.abort("connections are dropped on request")

    async def on_connect(self, connection: Connection, connect: Connect) -> Accepted | Refused:
        service = self._service
        try:
            password = (connect.password or b"").decode("utf-8", "replace")
            certificate = self.certificates and self.certificates.of(
                connection.peer_certificate_der
            )
            applicant = service.authenticate(
                connect.client_id, connect.username, password, certificate or None
            )
        except HubError as error:
            _log.info("refused %r: %s", connect.client_id, error)
            return Refused(ReasonCode.NOT_AUTHORIZED, str(error))
        if service.faults.take("refuse_connects"):
            return Refused(ReasonCode.NOT_AUTHORIZED, "refused on request")
        connection.tag = applicant
        return Accepted(Session(connect.client_id))

    def on_publish(self, connection: Connection, publish: Publish) -> int | None:
        faults = self._service.faults
        try:
            answer = self._answer(connection.tag, publish.topic, publish.payload)
        except HubError as error:
            _log.info("closing %s: %s", connection.client_id, error)
            connection.abort(str(error))
            return None
        if publish.qos and faults.take("drop_before_ack"):
            connection.abort("dropped before PUBACK on request")
            return None
        session = connection.session
        subscription = session and session.subscriptions.get(_ANSWERS)
        if subscription and not faults.take("lose_answers"):
            topic, body = answer
            connection.publish(Publish(topic, json.dumps(body).encode(), qos=subscription.qos))
        return ReasonCode.SUCCESS

    async def on_subscribe(self, connection: Connection, subscribe: Subscribe) -> Sequence[int]:
        codes: list[int] = []
        for wanted in subscribe.subscriptions:
            if wanted.topic_filter == _ANSWERS and connection.session is not None:
                qos = min(wanted.qos, LIMITS.maximum_qos)
                connection.session.subscriptions[_ANSWERS] = Subscription(_ANSWERS, qos)
                codes.append(qos)
            else:
                codes.append(ReasonCode.UNSPECIFIED_ERROR)
        return codes

    async def on_unsubscribe(
        self, connection: Connection, unsubscribe: Unsubscribe
    ) -> Sequence[int]:
        for topic_filter in unsubscribe.topic_filters:
            if connection.session is not None:
                connection.session.subscriptions.pop(topic_filter, None)
        return [ReasonCode.SUCCESS] * len(unsubscribe.topic_filters)

    async def on_disconnect(
        self, connection: Connection, disconnect: Disconnect | None, reason: str
    ) -> None:
        """Nothing outlives a connection."""

    def _answer(self, applicant: Applicant, topic: str, payload: bytes) -> tuple[str, Any]:
        """Topic and body. Raises HubError 400 for what has no place for an answer."""
        match = _REGISTER.match(topic) or _POLL.match(topic)
        if match is None:
            raise invalid(f"a device may not publish to {topic!r}")
        # Values as they were sent: an answer repeats its request's id letter by letter.
        query = {
            unquote(name): value
            for name, _, value in (pair.partition("=") for pair in match["query"].split("&"))
        }
        rid = query.get("$rid")
        if not rid:
            raise invalid("the topic lacks ?$rid=")
        wait = f"&retry-after={self.retry_after}"
        try:
            if self._service.faults.take("throttle_requests"):
                raise throttled("too many requests: come back later")
            if _REGISTER.match(topic):
                self._service.register(applicant, _device_payload(applicant, payload))
                operation = self._service.registrations[applicant.registration].operation
                body: dict[str, Any] = {"operationId": operation, "status": "assigning"}
                return f"$dps/registrations/res/202/?$rid={rid}{wait}", body
            registration = self._service.outcome(applicant, unquote(query.get("operationId", "")))
            if self._service.faults.take("stay_assigning"):
                body = {"operationId": registration.operation, "status": "assigning"}
                return f"$dps/registrations/res/202/?$rid={rid}{wait}", body
            return f"$dps/registrations/res/200/?$rid={rid}", _outcome(registration)
        except HubError as error:
            body = {"errorCode": error.status * 1000, "message": error.message}
            after = wait if error.status == 429 else ""
            return f"$dps/registrations/res/{error.status}/?$rid={rid}{after}", body


def _outcome(registration: Registration) -> dict[str, Any]:
    return {
        "operationId": registration.operation,
        "status": registration.status,
        "registrationState": registration.as_json(),
    }


def _device_payload(applicant: Applicant, body: bytes) -> Any:
    """The `payload` of the request. Raises HubError 400."""
    if not body.strip():
        return None
    request = parse_json(body)
    if not isinstance(request, dict):
        raise invalid("the request must be a JSON object")
    if request.get("registrationId", applicant.registration) != applicant.registration:
        raise invalid(f"registrationId is not {applicant.registration!r}")
    return request.get("payload")
