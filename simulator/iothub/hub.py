"""The hub itself: identities, twins, methods and telemetry, whatever protocol asks for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ...agent.clock import Clock
from ...agent.twin.merge_patch import make_patch
from . import sas
from .c2d import CloudQueues
from .client_certificates import ClientCertificate, load_authorities
from .configurations_rollout import Rollout
from .credentials import Gate, Login
from .deployment import desired_sections, module_ids
from .devices import ClientId, Identity
from .errors import HubError, unauthorized
from .faults import Faults, SkewedClock
from .json_text import json_bytes
from .links import Link
from .methods import METHOD_PAYLOAD_LIMIT, DirectMethods
from .rates import RateLimits, Throttle
from .state import HubState
from .telemetry import Message, TelemetryStore
from .twins import Twin
from .uploads import Uploads

__all__ = ["METHOD_PAYLOAD_LIMIT", "TELEMETRY_LIMIT", "Hub", "Link"]

TELEMETRY_LIMIT = 256 * 1024
_NEVER = "0001-01-01T00:00:00Z"


class Hub:
    """All operations are atomic on the event loop; those that fail raise HubError and change
    nothing. `changed` is called after every change of the state.
    """

    def __init__(
        self,
        host_name: str,
        state: HubState,
        clock: Clock,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self.host_name = host_name
        self.state = state
        self.faults = Faults()
        self.clock: Clock = SkewedClock(clock, self.faults)
        self.throttle = Throttle(RateLimits(), self.clock)
        self.authorities: dict[str, str] = {}
        self.telemetry = TelemetryStore()
        self.rollout = Rollout(self, state)
        self.c2d = CloudQueues(self)
        self.uploads = Uploads(f"storage.{host_name}", self.clock)
        self._changed = changed
        self._links: dict[ClientId, Link] = {}
        self._activity: dict[ClientId, str] = {}
        self._methods = DirectMethods(self.link, self.clock)

    # Clients.

    def authenticate(
        self,
        client_id: str,
        username: str | None,
        password: str | None,
        certificate: ClientCertificate | None = None,
    ) -> Login:
        """Checks a CONNECT. Raises HubError 400 (client id) or 401."""
        client = ClientId.parse(client_id)
        name, question, query = (username or "").partition("?")
        host, _, named = name.rstrip("/").partition("/")
        if host.lower() != self.host_name.lower() or named != client_id:
            raise unauthorized(
                f"the user name starts {name!r}; it must be {self.host_name}/{client_id}/"
            )
        if not question or "api-version" not in query:
            raise unauthorized("the user name lacks ?api-version=")
        return self.log_in(client, password or "", certificate)

    def log_in(
        self, client: ClientId, token: str, certificate: ClientCertificate | None = None
    ) -> Login:
        """Checks what a client shows, by whatever protocol. Raises HubError 401."""
        if client not in self.state.registry:
            raise unauthorized(f"there is no {client} in this hub")
        identity = self.state.registry.get(client)
        device = self.state.registry.get(ClientId(client.device))
        if not (identity.enabled and device.enabled):
            raise unauthorized(f"{client} is disabled")
        known = self.authorities.values() if certificate is not None else ()
        trusted = [one for pem in known for one in load_authorities(pem)]
        gate = Gate(self.host_name, trusted, self._policy_key, self.clock)
        return gate.check(identity, token, certificate)

    def authorize_service(self, authorization: str | None, host: str) -> None:
        """Checks the Authorization header of the service side. Raises HubError 401.

        The resource may be the hub's name or `host`, the name the client used to reach it.
        """
        token = sas.parse(authorization or "")
        resource = host if token.resource.lower() == host.lower() else self.host_name
        sas.verify(token, resource, [self._policy_key(token.policy)], self.clock)

    def attach(self, client: ClientId, link: Link) -> None:
        """A client connected; an older link of it must have been dropped and detached before."""
        self._links[client] = link
        self.touch(client)

    def link(self, client: ClientId) -> Link | None:
        return self._links.get(client)

    def detach(self, client: ClientId, link: Link) -> None:
        if self._links.get(client) is link:
            del self._links[client]
            self._activity[client] = self.now()
            self._methods.disconnected(client)

    def touch(self, client: ClientId) -> None:
        """Something the client did may let waiting methods proceed (connect, subscribe)."""
        self._activity[client] = self.now()
        self._methods.changed()

    def connected(self, client: ClientId) -> bool:
        return client in self._links

    def subscriptions_changed(self, client: ClientId, filters: Mapping[str, int]) -> None:
        """What a lasting session is subscribed to now: topic filters and their granted QoS."""
        if filters:
            self.state.subscriptions[client] = dict(filters)
        else:
            self.state.subscriptions.pop(client, None)
        self._changed()
        self.touch(client)
        self.c2d.pump(client)

    def drop_connections(self) -> None:
        for link in list(self._links.values()):
            link.drop("connections are dropped on request")

    # Identities.

    def put_identity(
        self, client: ClientId, description: Mapping[str, Any], if_match: str | None = None
    ) -> Identity:
        """Raises HubError as Registry.put does."""
        identity = self.state.registry.put(client, description, if_match)
        for known in self.state.registry.modules(client.device):
            self.state.twins.setdefault(known.client, Twin())
        self.state.twins.setdefault(ClientId(client.device), Twin())
        if not identity.enabled:
            for other in [i.client for i in self.state.registry.modules(client.device)] + [client]:
                if client in (other, ClientId(other.device)):
                    self._drop(other, f"{client} was disabled")
        self._changed()
        self.rollout.evaluate(client.device)
        return identity

    def delete_identity(self, client: ClientId, if_match: str | None = None) -> None:
        """Raises HubError 404 or 412."""
        for gone in self.state.registry.delete(client, if_match):
            self.state.twins.pop(gone, None)
            self.state.subscriptions.pop(gone, None)
            self.rollout.forget(gone)
            self.c2d.forget(gone)
            self._drop(gone, "the identity was deleted")
        self._changed()

    # Twins.

    def twin(self, client: ClientId) -> Twin:
        """Raises HubError 404."""
        self.state.registry.get(client)
        return self.state.twins.setdefault(client, Twin())

    def update_twin(
        self,
        client: ClientId,
        change: Mapping[str, Any],
        *,
        whole: bool = False,
        if_match: str | None = None,
    ) -> Twin:
        """A PATCH (or PUT: `whole`) of the service side. Raises HubError 400, 404, 412 or 413."""
        old = self.twin(client)
        old.check_match(if_match)
        new = old.updated(change, self.now(), whole=whole)
        patch = (change.get("properties") or {}).get("desired")
        self._set_desired(client, old, new, None if whole else patch)
        if not client.module:
            self.rollout.evaluate(client.device)
        return self.twin(client)

    def patch_reported(self, client: ClientId, patch: Any) -> Twin:
        """A device's PATCH. Raises HubError 400 or 413."""
        twin = self.twin(client).reported_patched(patch, self.now())
        self.state.twins[client] = twin
        self._changed()
        if not client.module:
            self.rollout.evaluate(client.device)
        return twin

    def apply_configuration(self, device: str, content: Mapping[str, Any]) -> None:
        """Gives each module named its desired section, creating identities as needed.

        All or nothing; on a device that an automatic deployment targets, that one comes back.
        Raises HubError 400, 404 or 413.
        """
        self.state.registry.get(ClientId(device))
        self.set_sections(device, desired_sections(content))
        self.rollout.evaluate(device)

    def set_sections(self, device: str, sections: Mapping[str, Mapping[str, Any]]) -> None:
        """Module ids ("" for the device itself) to whole desired sections; all or nothing.

        Raises HubError 400 or 413.
        """
        needed = [ClientId.parse(f"{device}/{module}") for module in module_ids(sections)]
        before, after = {}, {}
        for module, section in sections.items():
            client = ClientId(device, module)
            before[client] = self.state.twins.get(client, Twin())
            change = {"tags": before[client].tags, "properties": {"desired": section}}
            after[client] = before[client].updated(change, self.now(), whole=True)
        for client in needed:
            if client not in self.state.registry:
                self.state.registry.put(client, {"managedBy": "IotEdge"})
        for client, twin in after.items():
            self._set_desired(client, before[client], twin, None)

    def _set_desired(
        self, client: ClientId, old: Twin, new: Twin, patch: Mapping[str, Any] | None
    ) -> None:
        self.state.twins[client] = new
        self._changed()
        if new.desired.version == old.desired.version:
            return
        if patch is None:
            patch = make_patch(old.desired.value, new.desired.value)
        version = new.desired.version
        body = {**{k: v for k, v in patch.items() if k != "$metadata"}, "$version": version}
        if not self.faults.take("lose_desired_patches"):
            self._deliver(
                client, f"$iothub/twin/PATCH/properties/desired/?$version={version}", body
            )

    # Methods and telemetry.

    async def invoke_method(
        self,
        client: ClientId,
        name: str,
        payload: Any,
        response_timeout: float = 30.0,
        connect_timeout: float = 0.0,
    ) -> tuple[int, Any]:
        """Calls a direct method; returns the device's status and payload.

        Raises HubError 404 (unknown, or not online within `connect_timeout` seconds), 413, or 504
        (no answer within `response_timeout` seconds).
        """
        self.state.registry.get(client)
        return await self._methods.invoke(client, name, payload, response_timeout, connect_timeout)

    def method_answered(self, client: ClientId, rid: str, status: int, body: bytes) -> None:
        """A client's answer; late and repeated ones are dropped. Raises HubError 400 or 413."""
        self._methods.answered(client, rid, status, body)

    def accept_telemetry(
        self, client: ClientId, body: bytes, bag: str, added: Mapping[str, str] | None = None
    ) -> Message:
        """`added` are application properties that the hub itself sets. Raises HubError 413."""
        if len(body) > TELEMETRY_LIMIT:
            raise HubError(413, "MessageTooLarge", f"a message has up to {TELEMETRY_LIMIT} bytes")
        return self.telemetry.add(client, body, bag, self.now(), added)

    # What the service side sees of an identity.

    def identity_view(self, identity: Identity) -> dict[str, Any]:
        client = identity.client
        view: dict[str, Any] = {
            "deviceId": client.device,
            "generationId": identity.generation,
            "etag": identity.etag,
            "connectionState": "Connected" if self.connected(client) else "Disconnected",
            "connectionStateUpdatedTime": self._activity.get(client, _NEVER),
            "lastActivityTime": self._activity.get(client, _NEVER),
            "cloudToDeviceMessageCount": self.c2d.count(client),
            "authentication": identity.authentication_view(),
        }
        if client.module:
            return {**view, "moduleId": client.module, "managedBy": identity.managed_by}
        return {
            **view,
            "status": "enabled" if identity.enabled else "disabled",
            "statusReason": None,
            "statusUpdatedTime": _NEVER,
            "capabilities": {"iotEdge": identity.edge},
        }

    def twin_view(self, client: ClientId) -> dict[str, Any]:
        """Raises HubError 404."""
        twin = self.twin(client)
        identity = self.state.registry.get(client)
        device = self.state.registry.get(ClientId(client.device))
        view = {
            "deviceId": client.device,
            **({"moduleId": client.module} if client.module else {}),
            "deviceEtag": identity.etag,
            "status": "enabled" if device.enabled else "disabled",
            "statusUpdateTime": _NEVER,
            "connectionState": "Connected" if self.connected(client) else "Disconnected",
            "lastActivityTime": self._activity.get(client, _NEVER),
            "cloudToDeviceMessageCount": self.c2d.count(client),
            "authenticationType": identity.authentication,
            "x509Thumbprint": identity.authentication_view()["x509Thumbprint"],
            "capabilities": {"iotEdge": device.edge},
            "configurations": self.rollout.status(client),
        }
        return twin.service_view(view)

    def state_changed(self) -> None:
        """For changes of the state that are made elsewhere."""
        self._changed()

    def now(self) -> str:
        return self.clock.now().strftime("%Y-%m-%dT%H:%M:%S.%fZ")

    def _policy_key(self, policy: str | None) -> str:
        key = self.state.policies.get(policy or "")
        if key is None:
            raise unauthorized(f"there is no shared access policy {policy!r}")
        return key

    def _deliver(self, client: ClientId, topic: str, body: Any) -> None:
        link = self._links.get(client)
        if link is not None:
            link.deliver(topic, json_bytes(body))

    def _drop(self, client: ClientId, reason: str) -> None:
        link = self._links.get(client)
        if link is not None:
            link.drop(reason)
