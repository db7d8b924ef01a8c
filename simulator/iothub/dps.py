"""A device provisioning service: registrations turn into identities of the hubs linked to it."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...agent.clock import Clock
from . import sas
from .client_certificates import ClientCertificate, load_authorities
from .devices import ClientId
from .dps_enrollments import Enrollment
from .errors import HubError, invalid, unauthorized
from .hub import Hub
from .twins import Twin

_SUBJECT = "registrations"


@dataclass(slots=True)
class DpsFaults:
    """Each number says how many of the next matching events go wrong; 0 is none."""

    throttle_requests: int = 0
    """Requests over MQTT answered 429, with `retry-after`."""
    stay_assigning: int = 0
    """Polls answered "assigning" although the assignment is done."""
    fail_registrations: int = 0
    """Registrations that end as "failed"."""
    lose_answers: int = 0
    """Requests carried out and never answered."""
    refuse_connects: int = 0
    """CONNECTs with right credentials answered with return code 5 (not authorized)."""
    drop_before_ack: int = 0
    """Requests carried out, then the connection dropped instead of a PUBACK."""

    def take(self, name: str) -> bool:
        """Whether the event `name` (a field) goes wrong this time; counts it."""
        left: int = getattr(self, name)
        if left > 0:
            setattr(self, name, left - 1)
        return left > 0


@dataclass(frozen=True, slots=True)
class Applicant:
    """A device that proved that it is `registration` under `enrollment`."""

    registration: str
    enrollment: Enrollment
    thumbprint: str = ""


@dataclass(frozen=True, slots=True)
class Registration:
    """The outcome of the latest registration of a device.

    `status` is assigned, failed or disabled; `hub` and `device` are empty unless it is assigned.
    """

    id: str
    enrollment: str
    operation: str
    status: str
    created: str
    updated: str
    hub: str = ""
    device: str = ""
    substatus: str = ""
    error: tuple[int, str] = (0, "")
    payload: Any = None
    etag: str = ""

    def as_json(self) -> dict[str, Any]:
        """`registrationState` of the device's answer and of the service side."""
        state: dict[str, Any] = {
            "registrationId": self.id,
            "createdDateTimeUtc": self.created,
            "lastUpdatedDateTimeUtc": self.updated,
            "status": self.status,
            "etag": self.etag,
        }
        if self.status == "assigned":
            state.update(assignedHub=self.hub, deviceId=self.device, substatus=self.substatus)
            if self.payload is not None:
                state["payload"] = self.payload
        elif self.error[0]:
            state.update(errorCode=self.error[0], errorMessage=self.error[1])
        return state


@dataclass(frozen=True, slots=True)
class Allocation:
    """What a custom allocation decides: a hub's name, a twin or None, a payload for the device."""

    hub: str
    initial_twin: Mapping[str, Any] | None = None
    payload: Any = None


Allocate = Callable[[Registration | None, Enrollment, Any, Sequence[str]], Allocation]
"""Called with the earlier registration, the enrolment, the device's payload and the hubs."""


class ProvisioningService:
    """All operations are atomic on the event loop; those that fail raise HubError.

    `hubs` by host name. `allocate` serves enrolments whose allocationPolicy is "custom".
    `authorities` (PEM by name) are what `caReferences` of groups mean.
    """

    def __init__(
        self, id_scope: str, host_name: str, hubs: Mapping[str, Hub], clock: Clock
    ) -> None:
        self.id_scope = id_scope
        self.host_name = host_name
        self.hubs = dict(hubs)
        self.clock = clock
        self.faults = DpsFaults()
        self.changed: Callable[[], None] = lambda: None
        """Called after every change of the registrations."""
        self.allocate: Allocate | None = None
        self.authorities: dict[str, str] = {}
        self.enrollments: dict[str, Enrollment] = {}
        self.groups: dict[str, Enrollment] = {}
        self.registrations: dict[str, Registration] = {}

    # Who is it?

    def authenticate(
        self,
        client_id: str,
        username: str | None,
        password: str,
        certificate: ClientCertificate | None,
    ) -> Applicant:
        """Checks a CONNECT. Raises HubError 400 or 401."""
        prefix = f"{self.id_scope}/{_SUBJECT}/{client_id}/api-version="
        if not client_id or not (username or "").startswith(prefix):
            raise unauthorized(f"the user name is {username!r}; it must start {prefix}")
        individual = self.enrollments.get(client_id)
        candidates = [individual] if individual else list(self.groups.values())
        if certificate is not None and not password:
            return self._by_certificate(client_id, candidates, certificate)
        token = sas.parse(password)
        resource = f"{self.id_scope}/{_SUBJECT}/{client_id}"
        for enrollment in candidates:
            if not enrollment.symmetric:
                continue
            try:
                sas.verify(token, resource, enrollment.keys_for(client_id), self.clock)
            except HubError:
                if individual:
                    raise
            else:
                return Applicant(client_id, enrollment)
        raise unauthorized(f"no enrolment has a key for {client_id!r}, or the token has expired")

    def _by_certificate(
        self, registration: str, candidates: list[Enrollment], certificate: ClientCertificate
    ) -> Applicant:
        if certificate.common_name != registration:
            raise unauthorized(
                f"the certificate is for {certificate.common_name!r}, not for {registration!r}"
            )
        certificate.check_time(self.clock)
        for enrollment in candidates:
            if enrollment.group:
                named = [
                    self.authorities[n] for n in enrollment.authorities if n in self.authorities
                ]
                trusted = [
                    *enrollment.certificates,
                    *(c for p in named for c in load_authorities(p)),
                ]
                matches = certificate.is_issued_by(trusted, self.clock)
            else:
                matches = certificate.has_thumbprint(enrollment.thumbprints())
            if matches:
                return Applicant(registration, enrollment, certificate.thumbprints[1])
        raise unauthorized(f"no enrolment has the certificate of {registration!r}")

    # What becomes of it?

    def register(self, applicant: Applicant, payload: Any = None) -> Registration:
        """Assigns the device to a hub; what goes wrong is in the registration's status."""
        old = self.registrations.get(applicant.registration)
        now = self.now()
        # The enrolment may have changed since the device connected.
        enrollment = self._current(applicant.enrollment)
        new = Registration(
            id=applicant.registration,
            enrollment=applicant.enrollment.id,
            operation=f"5.{secrets.token_hex(8)}.{secrets.token_hex(16)}",
            status="failed",
            created=old.created if old else now,
            updated=now,
            error=(400_000, "failed on request"),
            etag=secrets.token_hex(8),
        )
        if enrollment is None or not enrollment.enabled:
            new = replace(new, status="disabled", error=(0, ""))
        elif not self.faults.take("fail_registrations"):
            try:
                new = self._assign(replace(applicant, enrollment=enrollment), old, new, payload)
            except HubError as error:
                new = replace(new, error=(error.status * 1000, error.message))
        self.registrations[new.id] = new
        self.changed()
        return new

    def outcome(self, applicant: Applicant, operation: str) -> Registration:
        """Raises HubError 404 for an operation that is not this device's latest."""
        registration = self.registrations.get(applicant.registration)
        if registration is None or registration.operation != operation:
            raise HubError(404, "NotFound", f"there is no operation {operation!r}: register again")
        return registration

    def _current(self, enrollment: Enrollment) -> Enrollment | None:
        where = self.groups if enrollment.group else self.enrollments
        return where.get(enrollment.id)

    def _assign(
        self, applicant: Applicant, old: Registration | None, new: Registration, payload: Any
    ) -> Registration:
        enrollment = applicant.enrollment
        may_move, with_data = enrollment.policy
        before = old if old is not None and old.status == "assigned" else None
        if before is not None and before.hub not in self.hubs:
            before = None
        device = str(enrollment.document.get("deviceId") or applicant.registration)
        if before is not None and not may_move:
            allocation = Allocation(before.hub)
        else:
            allocation = self._allocation(before, enrollment, payload, applicant.registration)
        hub = self.hubs[allocation.hub]
        initial = enrollment.document["initialTwin"]
        if allocation.initial_twin is not None:
            initial = allocation.initial_twin
        client = ClientId.parse(device)
        moved = before is not None and (before.hub, before.device) != (allocation.hub, device)
        substatus = "initialAssignment"
        if before is not None and may_move and not with_data:
            substatus = "deviceDataReset"
        elif moved:
            substatus = "deviceDataMigrated"
        fresh = client not in hub.state.registry
        hub.put_identity(client, self._identity(applicant), None if fresh else "*")
        if substatus == "deviceDataMigrated" and before is not None:
            _migrate(self.hubs[before.hub], ClientId(before.device), hub, client)
        elif fresh or substatus == "deviceDataReset":
            hub.state.twins[client] = Twin()
            hub.update_twin(client, initial, whole=True)
        if moved and before is not None:
            source, gone = self.hubs[before.hub], ClientId(before.device)
            if gone in source.state.registry:
                source.delete_identity(gone)
        return replace(
            new,
            status="assigned",
            hub=allocation.hub,
            device=device,
            substatus=substatus,
            error=(0, ""),
            payload=allocation.payload,
        )

    def _allocation(
        self, old: Registration | None, enrollment: Enrollment, payload: Any, registration: str
    ) -> Allocation:
        wanted = enrollment.hubs or tuple(sorted(self.hubs))
        hubs = [name for name in wanted if name in self.hubs]
        if not hubs:
            raise HubError(
                400, "HubNotLinked", f"no hub of {', '.join(wanted) or 'this service'} is linked"
            )
        policy = enrollment.document["allocationPolicy"]
        if policy == "custom":
            if self.allocate is None:
                raise invalid("no custom allocation is set")
            allocation = self.allocate(old, enrollment, payload, hubs)
            if allocation.hub not in self.hubs:
                raise HubError(400, "HubNotLinked", f"{allocation.hub} is not linked")
            return allocation
        if policy == "hashed":
            number = int.from_bytes(hashlib.sha256(registration.encode()).digest()[:8], "big")
            return Allocation(hubs[number % len(hubs)])
        return Allocation(hubs[0])

    def _identity(self, applicant: Applicant) -> dict[str, Any]:
        enrollment = applicant.enrollment
        if enrollment.symmetric:
            primary, secondary = enrollment.keys_for(applicant.registration)
            keys = {"primaryKey": primary, "secondaryKey": secondary}
            authentication: dict[str, Any] = {"type": "sas", "symmetricKey": keys}
        else:
            # Also for groups: the hub need not know their authority.
            thumbprint = {"primaryThumbprint": applicant.thumbprint}
            authentication = {"type": "selfSigned", "x509Thumbprint": thumbprint}
        return {
            "authentication": authentication,
            "capabilities": enrollment.document["capabilities"],
        }

    def now(self) -> str:
        return self.clock.now().strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _migrate(source: Hub, old: ClientId, target: Hub, new: ClientId) -> None:
    """Takes twins, and the modules they belong to, from one hub to another."""
    if old not in source.state.registry:
        return
    target.state.twins[new] = source.twin(old)
    for module in source.state.registry.modules(old.device):
        client = ClientId(new.device, module.client.module)
        if client not in target.state.registry:
            description = {
                "managedBy": module.managed_by,
                "authentication": module.authentication_view(),
            }
            target.put_identity(client, description)
        target.state.twins[client] = source.twin(module.client)
