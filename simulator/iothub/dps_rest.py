"""The service side of a device provisioning service (API version 2021-10-01)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from . import sas
from .dps import ProvisioningService
from .dps_enrollments import Enrollment, parse_enrollment
from .errors import HubError, invalid, unauthorized
from .json_text import parse_json

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
OPEN = web.AppKey("open", frozenset[str])
"""Paths of the application that need no authorization of the service side."""


def make_application(
    service: ProvisioningService, policies: dict[str, str], changed: Callable[[], None]
) -> web.Application:
    """`policies` maps shared access policy names to base64 keys."""
    application = web.Application(middlewares=[_errors_and_access(service, policies)])
    application[OPEN] = frozenset()
    add = application.router
    for base, group in (("/enrollments", False), ("/enrollmentGroups", True)):
        routes = _Enrollments(service, group, changed)
        add.add_post(base + "/query", routes.query)
        add.add_put(base + "/{id}", routes.put)
        add.add_get(base + "/{id}", routes.get)
        add.add_delete(base + "/{id}", routes.delete)
        add.add_post(base + "/{id}/attestationmechanism", routes.attestation)
    registrations = _Registrations(service, changed)
    add.add_post("/registrations/{id}/query", registrations.query)
    add.add_get("/registrations/{id}", registrations.get)
    add.add_delete("/registrations/{id}", registrations.delete)
    return application


class _Enrollments:
    def __init__(
        self, service: ProvisioningService, group: bool, changed: Callable[[], None]
    ) -> None:
        self._service = service
        self._group = group
        self._changed = changed
        self._stored = service.groups if group else service.enrollments

    async def put(self, request: web.Request) -> web.Response:
        name = request.match_info["id"]
        body = parse_json(await request.read())
        if not isinstance(body, dict):
            raise invalid("the body must be a JSON object")
        old = self._stored.get(name)
        if old is not None:
            if (if_match := request.headers.get("If-Match")) is None:
                raise HubError(409, "Conflict", f"{name} already exists: send If-Match")
            _check_match(old, if_match)
            body = {"createdDateTimeUtc": old.document["createdDateTimeUtc"], **body}
        enrollment = parse_enrollment(name, self._group, body, self._service.now())
        self._stored[name] = enrollment
        self._changed()
        return web.json_response(self._view(enrollment))

    async def get(self, request: web.Request) -> web.Response:
        return web.json_response(self._view(self._get(request)))

    async def delete(self, request: web.Request) -> web.Response:
        enrollment = self._get(request)
        _check_match(enrollment, request.headers.get("If-Match", "*"))
        del self._stored[enrollment.id]
        for registration in list(self._service.registrations.values()):
            if registration.enrollment == enrollment.id:
                del self._service.registrations[registration.id]
        self._changed()
        return web.Response(status=204)

    async def query(self, request: web.Request) -> web.Response:
        """All of them, whatever the query says."""
        return web.json_response([self._view(one) for _, one in sorted(self._stored.items())])

    async def attestation(self, request: web.Request) -> web.Response:
        return web.json_response(self._get(request).document["attestation"])

    def _get(self, request: web.Request) -> Enrollment:
        enrollment = self._stored.get(request.match_info["id"])
        if enrollment is None:
            raise HubError(404, "NotFound", f"there is no enrolment {request.match_info['id']!r}")
        return enrollment

    def _view(self, enrollment: Enrollment) -> dict[str, Any]:
        view = dict(enrollment.document)
        registration = self._service.registrations.get(enrollment.id)
        if not self._group and registration is not None:
            view["registrationState"] = registration.as_json()
        return view


class _Registrations:
    def __init__(self, service: ProvisioningService, changed: Callable[[], None]) -> None:
        self._service = service
        self._changed = changed

    async def get(self, request: web.Request) -> web.Response:
        return web.json_response(self._service.registrations[self._known(request)].as_json())

    async def delete(self, request: web.Request) -> web.Response:
        del self._service.registrations[self._known(request)]
        self._changed()
        return web.Response(status=204)

    async def query(self, request: web.Request) -> web.Response:
        """Those of one enrolment group."""
        group = request.match_info["id"]
        found = [r for r in self._service.registrations.values() if r.enrollment == group]
        return web.json_response([registration.as_json() for registration in found])

    def _known(self, request: web.Request) -> str:
        name = request.match_info["id"]
        if name not in self._service.registrations:
            raise HubError(404, "NotFound", f"{name!r} has not registered")
        return name


def _check_match(enrollment: Enrollment, if_match: str) -> None:
    if if_match != "*" and if_match.strip('"') != enrollment.etag:
        raise HubError(412, "PreconditionFailed", f"{enrollment.id} has changed: read it again")


def _errors_and_access(service: ProvisioningService, policies: dict[str, str]) -> Any:
    @web.middleware
    async def middleware(request: web.Request, handler: _Handler) -> web.StreamResponse:
        try:
            if request.path not in request.app[OPEN]:
                token = sas.parse(request.headers.get("Authorization", ""))
                host = request.host
                resource = host if token.resource.lower() == host.lower() else service.host_name
                key = policies.get(token.policy or "")
                if key is None:
                    raise unauthorized(f"there is no shared access policy {token.policy!r}")
                sas.verify(token, resource, [key], service.clock)
            return await handler(request)
        except HubError as error:
            body = {"errorCode": error.status * 1000, "message": error.message}
            return web.json_response(body, status=error.status)

    return middleware
