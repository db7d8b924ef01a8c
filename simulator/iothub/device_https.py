"""Port 443 of a hub, for devices: MQTT over websockets, file upload, calls between modules, a
device's own module identities, and the storage that uploads go to (the Put Blob, Put Block, Put
Block List, Get Blob and List Blobs calls of Azure Storage).
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from ..mqtt.channel import Channel
from ..mqtt.websocket import serve_websocket
from .client_certificates import PresentedCertificates
from .devices import ClientId
from .errors import HubError, invalid
from .hub import TELEMETRY_LIMIT, Hub
from .json_text import parse_json
from .uploads import BLOB_LIMIT, CONTAINER

WEBSOCKET_PATH = "/$iothub/websocket"
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def make_device_application(
    hub: Hub,
    connection: Callable[[], Channel | None],
    certificates: Callable[[], PresentedCertificates | None],
) -> web.Application:
    """`connection` makes the server's end of an MQTT connection, None while the hub is paused;
    `certificates` are those of the TLS context in front.
    """
    routes = _Routes(hub, connection, certificates)
    application = web.Application(middlewares=[_errors], client_max_size=BLOB_LIMIT)
    add = application.router
    add.add_get(WEBSOCKET_PATH, routes.websocket)
    add.add_post("/devices/{device}/files", routes.begin_upload)
    add.add_post("/devices/{device}/files/notifications", routes.finish_upload)
    add.add_post("/devices/{device}/files/notifications/{correlation}", routes.finish_upload)
    for base in ("/devices/{device}", "/devices/{device}/modules/{module}"):
        add.add_post(base + "/messages/events", routes.telemetry)
    module = "/devices/{device}/modules/{module}"
    add.add_get(module, routes.get_module)
    add.add_put(module, routes.put_module)
    for base in ("/twins/{device}", "/twins/{device}/modules/{module}"):
        add.add_post(base + "/methods", routes.invoke_method)
    blob = f"/{CONTAINER}/{{blob:.+}}"
    add.add_get(f"/{CONTAINER}", routes.list_blobs)
    add.add_put(blob, routes.put_blob)
    add.add_get(blob, routes.get_blob)
    return application


class _Routes:
    def __init__(
        self,
        hub: Hub,
        connection: Callable[[], Channel | None],
        certificates: Callable[[], PresentedCertificates | None],
    ) -> None:
        self._hub = hub
        self._connection = connection
        self._certificates = certificates

    async def websocket(self, request: web.Request) -> web.StreamResponse:
        connection = self._connection()
        if connection is None:
            raise HubError(503, "ServiceUnavailable", "the hub is paused")
        return await serve_websocket(request, connection)

    async def begin_upload(self, request: web.Request) -> web.Response:
        client = self._caller(request)
        if self._hub.faults.take("fail_uploads"):
            raise HubError(503, "ServiceUnavailable", "failed on request")
        name = (await _object(request)).get("blobName")
        return web.json_response(self._hub.uploads.begin(client.device, name))

    async def finish_upload(self, request: web.Request) -> web.Response:
        client = self._caller(request)
        call = await _object(request)
        if "correlation" in request.match_info:
            call = {**call, "correlationId": request.match_info["correlation"]}
        self._hub.uploads.finish(client.device, call)
        return web.Response(status=204)

    async def telemetry(self, request: web.Request) -> web.Response:
        client = self._caller(request)
        body = await request.read()
        if len(body) > TELEMETRY_LIMIT:
            raise HubError(413, "MessageTooLarge", f"a message has up to {TELEMETRY_LIMIT} bytes")
        self._hub.accept_telemetry(client, body, "")
        return web.Response(status=204)

    async def get_module(self, request: web.Request) -> web.Response:
        """A device may look up and make its own modules, as IoT Edge does."""
        module = self._own_module(request)
        return web.json_response(self._hub.identity_view(self._hub.state.registry.get(module)))

    async def put_module(self, request: web.Request) -> web.Response:
        module = self._own_module(request)
        identity = self._hub.put_identity(
            module, await _object(request), request.headers.get("If-Match")
        )
        return web.json_response(self._hub.identity_view(identity))

    async def invoke_method(self, request: web.Request) -> web.Response:
        """From a module of the same device, as `IoTHubModuleClient.invoke_method` calls."""
        caller = ClientId.parse(request.headers.get("x-ms-edge-moduleId", ""))
        self._check(request, caller)
        device, module = request.match_info["device"], request.match_info.get("module", "")
        if caller.device != device:
            raise HubError(403, "Forbidden", f"{caller} may call its own device only")
        call = await _object(request)
        name = call.get("methodName")
        if not isinstance(name, str) or not name:
            raise invalid("methodName is missing")
        times = {
            "response_timeout": call.get("responseTimeoutInSeconds") or 30,
            "connect_timeout": call.get("connectTimeoutInSeconds") or 0,
        }
        if not all(isinstance(t, (int, float)) and 0 <= t <= 300 for t in times.values()):
            raise invalid("time-outs are seconds from 0 to 300")
        status, payload = await self._hub.invoke_method(
            ClientId(device, module), name, call.get("payload"), **times
        )
        return web.json_response({"status": status, "payload": payload})

    async def put_blob(self, request: web.Request) -> web.Response:
        blob = request.match_info["blob"]
        uploads = self._hub.uploads
        uploads.check(blob, request.query)
        body, kind = await request.read(), request.headers.get("x-ms-blob-content-type")
        content_type = kind or request.content_type
        if request.query.get("comp") == "block":
            uploads.put_block(blob, request.query.get("blockid", ""), body)
        elif request.query.get("comp") == "blocklist":
            try:
                blocks = [one.text or "" for one in ElementTree.fromstring(body)]
            except ElementTree.ParseError as error:
                raise invalid(f"the block list is not XML: {error}") from error
            uploads.put_block_list(blob, blocks, content_type)
        elif request.headers.get("x-ms-blob-type") != "BlockBlob":
            raise invalid("x-ms-blob-type must be BlockBlob")
        else:
            uploads.put(blob, body, content_type)
        return web.Response(status=201, headers={"ETag": '"0x1"', "x-ms-version": "2021-10-04"})

    async def list_blobs(self, request: web.Request) -> web.Response:
        """List Blobs, of the whole container at once."""
        uploads = self._hub.uploads
        uploads.check("", request.query)
        if request.query.get("sr") != "c" or request.query.get("comp") != "list":
            raise invalid("a container answers restype=container&comp=list, signed for all of it")
        root = ElementTree.Element("EnumerationResults", ContainerName=CONTAINER)
        blobs = ElementTree.SubElement(root, "Blobs")
        for name, stored in sorted(uploads.blobs.items()):
            blob = ElementTree.SubElement(blobs, "Blob")
            ElementTree.SubElement(blob, "Name").text = name
            properties = ElementTree.SubElement(blob, "Properties")
            ElementTree.SubElement(properties, "Content-Length").text = str(len(stored.body))
            ElementTree.SubElement(properties, "Content-Type").text = stored.content_type
        ElementTree.SubElement(root, "NextMarker")
        body = ElementTree.tostring(root, "utf-8", xml_declaration=True)
        return web.Response(body=body, content_type="application/xml")

    async def get_blob(self, request: web.Request) -> web.Response:
        blob = request.match_info["blob"]
        self._hub.uploads.check(blob, request.query)
        stored = self._hub.uploads.get(blob)
        return web.Response(body=stored.body, headers={"Content-Type": stored.content_type})

    def _own_module(self, request: web.Request) -> ClientId:
        """Raises HubError 401."""
        device = ClientId.parse(request.match_info["device"])
        self._check(request, device)
        return ClientId.parse(f"{device}/{request.match_info['module']}")

    def _caller(self, request: web.Request) -> ClientId:
        device, module = request.match_info["device"], request.match_info.get("module")
        client = ClientId.parse(device if module is None else f"{device}/{module}")
        self._check(request, client)
        return client

    def _check(self, request: web.Request, client: ClientId) -> None:
        """Raises HubError 401."""
        certificate = None
        known, transport = self._certificates(), request.transport
        ssl_object = transport.get_extra_info("ssl_object") if transport is not None else None
        if known is not None and ssl_object is not None:
            certificate = known.of(ssl_object.getpeercert(binary_form=True))
        self._hub.log_in(client, request.headers.get("Authorization", ""), certificate)


@web.middleware
async def _errors(request: web.Request, handler: _Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except HubError as error:
        headers = {"iothub-errorcode": error.code}
        return web.json_response(error.as_json(), status=error.status, headers=headers)


async def _object(request: web.Request) -> dict[str, Any]:
    body = parse_json(await request.read())
    if not isinstance(body, dict):
        raise invalid("the body must be a JSON object")
    return body
