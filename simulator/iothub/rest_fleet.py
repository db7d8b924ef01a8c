"""The service side of many devices: configurations, queries, statistics, bulk changes."""

from __future__ import annotations

import base64
import hashlib
from typing import Any

from aiohttp import web

from .devices import ClientId
from .errors import HubError, invalid
from .hub import Hub
from .queries import parse_condition, parse_query
from .rest_requests import count_of, json_body, object_body
from .twins import Twin

_PAGE_LIMIT = 100
_DEVICE_LIMIT = 1000
_BULK_LIMIT = 100


def add_routes(application: web.Application, hub: Hub) -> None:
    routes = _Fleet(hub)
    add = application.router
    add.add_get("/configurations", routes.list_configurations)
    add.add_post("/configurations/testQueries", routes.test_queries)
    add.add_put("/configurations/{id}", routes.put_configuration)
    add.add_get("/configurations/{id}", routes.get_configuration)
    add.add_delete("/configurations/{id}", routes.delete_configuration)
    add.add_post("/devices/query", routes.query)
    add.add_get("/devices", routes.list_devices)
    add.add_post("/devices", routes.change_many)
    add.add_get("/statistics/service", routes.service_statistics)
    add.add_get("/statistics/devices", routes.device_statistics)


class _Fleet:
    def __init__(self, hub: Hub) -> None:
        self._hub = hub

    # Configurations.

    async def list_configurations(self, request: web.Request) -> web.Response:
        top = count_of(request.query.get("top"), "top", _PAGE_LIMIT, _PAGE_LIMIT)
        views = [self._hub.rollout.view(one) for one in self._hub.rollout]
        return web.json_response(views[:top])

    async def get_configuration(self, request: web.Request) -> web.Response:
        return self._configuration(request.match_info["id"], 200)

    async def put_configuration(self, request: web.Request) -> web.Response:
        id, if_match = request.match_info["id"], request.headers.get("If-Match")
        known = id in self._hub.state.configurations
        self._hub.rollout.put(id, await object_body(request), if_match)
        return self._configuration(id, 200 if known else 201)

    async def delete_configuration(self, request: web.Request) -> web.Response:
        self._hub.rollout.delete(request.match_info["id"], request.headers.get("If-Match"))
        return web.Response(status=204)

    async def test_queries(self, request: web.Request) -> web.Response:
        """Parses a target condition and metric queries, so that tools can check them first."""
        body = await object_body(request)
        condition, metrics = body.get("targetCondition"), body.get("customMetricQueries") or {}
        if not isinstance(metrics, dict):
            raise invalid("customMetricQueries is an object of texts")
        found = {name: _problem(parse_query, text) for name, text in metrics.items()}
        return web.json_response(
            {
                "targetConditionError": _problem(parse_condition, condition) if condition else None,
                "customMetricQueryErrors": {name: why for name, why in found.items() if why},
            }
        )

    def _configuration(self, id: str, status: int) -> web.Response:
        view = self._hub.rollout.view(self._hub.rollout.get(id))
        return web.json_response(view, status=status, headers={"ETag": f'"{view["etag"]}"'})

    # Queries.

    async def query(self, request: web.Request) -> web.Response:
        """Pages of `x-ms-max-item-count` rows; `x-ms-continuation` leads to the next one."""
        body = await object_body(request)
        text = body.get("query")
        if not isinstance(text, str):
            raise invalid("query is missing")
        size = count_of(
            request.headers.get("x-ms-max-item-count"), "x-ms-max-item-count", _PAGE_LIMIT, 10_000
        )
        start = _start(request.headers.get("x-ms-continuation"), text)
        statement, rows = self._hub.rollout.query(text)
        headers = {"x-ms-item-type": "Twin" if statement.whole_twins else "Raw"}
        if start + size < len(rows):
            headers["x-ms-continuation"] = _continuation(start + size, text)
        return web.json_response(rows[start : start + size], headers=headers)

    # The registry as a whole.

    async def list_devices(self, request: web.Request) -> web.Response:
        top = count_of(request.query.get("top"), "top", _DEVICE_LIMIT, _DEVICE_LIMIT)
        devices = [i for i in self._hub.state.registry if not i.client.module]
        return web.json_response([self._hub.identity_view(i) for i in devices[:top]])

    async def change_many(self, request: web.Request) -> web.Response:
        """Each item on its own: what fails is named in `errors`, the others are done."""
        items = await json_body(request)
        if not isinstance(items, list) or not 0 < len(items) <= _BULK_LIMIT:
            raise invalid(f"the body is a list of 1 to {_BULK_LIMIT} devices")
        errors = []
        for item in items:
            try:
                self._change(item)
            except HubError as error:
                known = item if isinstance(item, dict) else {}
                errors.append(
                    {
                        "deviceId": known.get("id"),
                        "moduleId": known.get("moduleId"),
                        "errorCode": error.code,
                        "errorStatus": error.message,
                        "operation": known.get("importMode"),
                    }
                )
        answer = {"isSuccessful": not errors, "errors": errors, "warnings": []}
        return web.json_response(answer, status=400 if errors else 200)

    def _change(self, item: Any) -> None:
        if not isinstance(item, dict) or not isinstance(item.get("id"), str):
            raise invalid("each device is an object with an id")
        module = item.get("moduleId")
        client = ClientId.parse(f"{item['id']}/{module}" if module else item["id"])
        known = client in self._hub.state.registry
        mode = str(item.get("importMode") or "createOrUpdate").lower()
        etag, twin_etag = item.get("eTag") or "*", item.get("twinETag")
        if not isinstance(etag, str) or not isinstance(twin_etag, (str, type(None))):
            raise invalid("eTag and twinETag are texts")
        twin = {
            **({"tags": item["tags"]} if item.get("tags") is not None else {}),
            **({"properties": item["properties"]} if item.get("properties") else {}),
        }
        if mode in ("delete", "deleteifmatchetag"):
            self._hub.delete_identity(client, etag if mode != "delete" else None)
        elif mode in ("updatetwin", "updatetwinifmatchetag"):
            match = twin_etag if mode != "updatetwin" else None
            self._hub.update_twin(client, twin, if_match=match)
        elif mode in ("create", "createorupdate", "createorupdateifmatchetag") and not known:
            Twin().updated(twin, "")  # all of it or nothing
            self._hub.put_identity(client, item)
            if twin:
                self._hub.update_twin(client, twin)
        elif mode == "create":
            self._hub.put_identity(client, item)
        elif mode in ("update", "updateifmatchetag", "createorupdate", "createorupdateifmatchetag"):
            self._hub.state.registry.get(client)
            self._hub.put_identity(client, item, etag if mode.endswith("etag") else "*")
        else:
            raise invalid(f"importMode {item['importMode']!r} is not served by this hub")

    async def service_statistics(self, request: web.Request) -> web.Response:
        connected = [
            i
            for i in self._hub.state.registry
            if not i.client.module and self._hub.connected(i.client)
        ]
        return web.json_response({"connectedDeviceCount": len(connected)})

    async def device_statistics(self, request: web.Request) -> web.Response:
        devices = [i for i in self._hub.state.registry if not i.client.module]
        enabled = sum(identity.enabled for identity in devices)
        return web.json_response(
            {
                "totalDeviceCount": len(devices),
                "enabledDeviceCount": enabled,
                "disabledDeviceCount": len(devices) - enabled,
            }
        )


def _problem(parse: Any, text: Any) -> str | None:
    try:
        parse(str(text))
    except HubError as error:
        return error.message
    return None


def _continuation(start: int, text: str) -> str:
    mark = hashlib.sha256(text.encode()).hexdigest()[:16]
    return base64.urlsafe_b64encode(f"{start} {mark}".encode()).decode()


def _start(token: str | None, text: str) -> int:
    if not token:
        return 0
    try:
        start = int(base64.urlsafe_b64decode(token).split()[0])
    except (ValueError, IndexError) as error:
        raise invalid("x-ms-continuation is not from this hub") from error
    if start < 0 or token != _continuation(start, text):
        raise invalid("x-ms-continuation belongs to another query")
    return start
