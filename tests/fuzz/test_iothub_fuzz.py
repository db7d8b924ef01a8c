"""Every HTTP route of a site, called with what nobody should send: refused, and never a 500."""

from __future__ import annotations

import json
import re
import ssl
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.web_urldispatcher import PrefixedSubAppResource
from gatelet.agent.clock import SystemClock
from gatelet.simulator.iothub import sas
from gatelet.simulator.iothub.devices import ClientId
from gatelet.simulator.site import Site
from gatelet.simulator.site_config import SiteSettings
from yarl import URL

REQUESTS = 1500
DEVICE = ClientId("d1")
DIGITS = "9" * 5000
SCALARS: list[Any] = [
    *(None, True, 0, 1, -1, 1.5, 1e308, 2**63, 10**30, "", "x", "a b", "\ud800", "é", "x" * 5000),
    *("*", "²", "eA==", "d1", "SELECT * FROM devices", float("nan"), float("inf"), [], {}, [[]]),
    *({"": 1}, {"a.b": 1}, {"a": {"b": None}}, {"properties.desired.x": 1}),
]
# Names that some route reads, so that what is wrong is their value.
NAMES = re.findall(
    r"\S+",
    """authentication type symmetricKey primaryKey x509Thumbprint primaryThumbprint capabilities
    status managedBy tags properties desired reported methodName payload query id targetCondition
    responseTimeoutInSeconds connectTimeoutInSeconds content modulesContent deviceContent priority
    labels metrics queries schemaVersion $edgeAgent properties.desired importMode eTag twinETag
    customMetricQueries body bodyBase64 systemProperties ack seconds topic qos retain payloadBase64
    digest at count after blobName correlationId algo keyId data keyHandle algorithm parameters
    attestation x509 initialTwin reprovisionPolicy allocationPolicy iotHubs moduleId lose_acks
    clock_skew_seconds delay_seconds commonName plaintext ciphertext initializationVector""",
)
PARTS = ("d1", "d1", "m", "nope", "a%20b", "%ff", "%C2%B2", "x" * 200, "$edgeAgent", "..%2f")
QUERIES = (
    *("", "", "?top=²", f"?top={DIGITS}", "?after=²", f"?after={DIGITS[:4500]}", "?limit=-1"),
    *("?sig=%C3%A9&se=x", "?comp=block&blockid=%ff", "?comp=blocklist", "?n=²"),
)
HEADERS: tuple[dict[str, str], ...] = (
    *({}, {}, {"If-Match": "*"}, {"If-Match": '"x"'}, {"x-ms-max-item-count": "²"}),
    *({"x-ms-continuation": "MTAg"}, {"Content-Type": "application/json; charset=nope"}),
    *({"Authorization": "Bearer \udcff"}, {"x-ms-edge-moduleId": "d1/m"}),
)


class Caller:
    def __init__(self, site: Site, random: Random) -> None:
        self.site, self.random = site, random

    def value(self, depth: int = 0) -> Any:
        roll = self.random.random()
        if depth > 2 or roll < 0.6:
            return self.random.choice(SCALARS)
        if roll < 0.7:
            return [self.value(depth + 1) for _ in range(self.random.randint(0, 3))]
        return self.members(self.random.randint(0, 4), depth)

    def members(self, count: int, depth: int = 0) -> dict[str, Any]:
        return {name: self.value(depth + 1) for name in self.random.sample(NAMES, count)}

    def body(self) -> bytes:
        kinds = (
            lambda: b"\xff\xfe{",
            lambda: b"[" * 50_000,
            lambda: b'"\xed\xa0\x80"',
            lambda: json.dumps([self.members(4), self.value()]).encode(),
            *[lambda: json.dumps(self.members(self.random.randint(1, 6))).encode()] * 8,
        )
        return self.random.choice(kinds)()

    def authorization(self, door: str) -> str:
        site, soon = self.site, int(SystemClock().now().timestamp()) + 600
        if door == "control":
            return f"Bearer {site.control.token}"
        if door == "device":
            key = site.hub.identity("d1").primary_key
            return sas.make(f"{site.hub.host_name}/devices/d1", key, soon)
        service = site.provisioning if door == "provisioning" else site.hub
        fields = dict(one.split("=", 1) for one in service.service_connection_string.split(";"))
        policy = fields["SharedAccessKeyName"]
        return sas.make(service.host_name, fields["SharedAccessKey"], soon, policy)

    def put_right(self) -> None:
        """What a call may have changed rightly, and others need."""
        hub = self.site.hub
        hub.identity("d1", "m")
        as_before = {"status": "enabled", "authentication": {"type": "sas"}}
        hub.core.put_identity(DEVICE, as_before, "*")
        hub.faults.clear()
        self.site.registry.heal()


def routes(application: web.Application) -> list[tuple[str, str]]:
    return [
        (route.method, resource.canonical)
        for resource in application.router.resources()
        if not isinstance(resource, PrefixedSubAppResource)
        for route in resource
        if route.method != "HEAD"
    ]


@pytest.mark.parametrize("seed", [1, 2])
async def test_no_request_is_an_internal_error(tmp_path: Path, seed: int) -> None:
    site = Site(SiteSettings(tmp_path, "d1", edge_modules=("m",)))
    await site.start()
    random = Random(seed)
    caller = Caller(site, random)
    trust = ssl.create_default_context(cafile=str(site.ca_file))
    trust.check_hostname = False
    socket = site.edge.workload_uri.removeprefix("unix://")
    hub, dps, control = site.hub, site.provisioning, site.control
    doors = [
        ("service", hub.rest_url, routes(hub._rest.app)),
        ("device", f"https://127.0.0.1:{hub.https_port}", routes(hub._https.app)),
        ("provisioning", dps.url, routes(dps._rest.app)),
        ("control", control.url, routes(control._runner.app)),
        ("edge", "http://edge", routes(site.edge._application)),
    ]
    answers: dict[int, int] = {}
    try:
        async with (
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=trust)) as http,
            aiohttp.ClientSession(connector=aiohttp.UnixConnector(socket)) as edge,
        ):
            for _ in range(REQUESTS):
                door, base, known = random.choice(doors)
                method, path = random.choice(known)
                path = re.sub(r"\{[^}]*\}", lambda _: random.choice(PARTS), path)
                url = URL(base + path + random.choice(QUERIES), encoded=True)
                headers = {"Authorization": caller.authorization(door), **random.choice(HEADERS)}
                body = None if method == "GET" else caller.body()
                session = edge if door == "edge" else http
                async with session.request(method, url, data=body, headers=headers) as answer:
                    text = await answer.text(errors="replace")
                    answers[answer.status] = answers.get(answer.status, 0) + 1
                    assert answer.status != 500, (door, method, path, body, headers, text)
                caller.put_right()
    finally:
        await site.stop()
    assert answers[200] > 20, answers
    assert answers[400] > 100, answers
