"""Every way the SDK has to be a client of a hub, against the stand-in: device or module, key or
certificate, synchronous or asyncio, MQTT on 8883 or over websockets on 443.

tests/compat/test_newer_releases.py runs it again with a newer release of azure-iot-device.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from azure.iot.device import X509, IoTHubDeviceClient, IoTHubModuleClient, Message, ProxyOptions
from azure.iot.device import aio as aio_clients
from gatelet.simulator.connect_proxy import ConnectProxy
from gatelet.simulator.iothub.devices import ClientId
from gatelet.simulator.iothub.server import IotHub
from gatelet.simulator.pki import Pki

pytestmark = pytest.mark.filterwarnings(
    "ignore:ssl.PROTOCOL_TLSv1_2:DeprecationWarning",
    "ignore:unclosed <socket:ResourceWarning",
    "ignore:unclosed <ssl.SSLSocket:ResourceWarning",
)

HOST = "hub.gatelet.test"
WAYS = list(
    itertools.product(("device", "module"), ("key", "certificate"), ("sync", "aio"), ("tcp", "ws"))
)


@pytest.fixture
async def hub(tmp_path: Path) -> AsyncIterator[IotHub]:
    hub = IotHub(HOST, Pki(tmp_path / "pki"))
    await hub.start()
    yield hub
    await hub.stop()
    gc.collect()


async def call(function: Any, *arguments: Any) -> Any:
    """A method of either kind of client; the synchronous ones block."""
    if asyncio.iscoroutinefunction(function):
        return await asyncio.wait_for(function(*arguments), 15)
    return await asyncio.wait_for(asyncio.to_thread(function, *arguments), 15)


@pytest.mark.parametrize("way", WAYS, ids="-".join)
async def test_twin_and_telemetry(hub: IotHub, tmp_path: Path, way: tuple[str, ...]) -> None:
    kind, credential, style, transport = way
    client_id = ClientId("d1", "m1" if kind == "module" else "")
    hub.identity("d1", client_id.module or None)
    pki = Pki(tmp_path / "pki")
    clients = aio_clients if style == "aio" else None
    if kind == "module":
        made = clients.IoTHubModuleClient if clients else IoTHubModuleClient
    else:
        made = clients.IoTHubDeviceClient if clients else IoTHubDeviceClient
    proxy = ConnectProxy(hub.routes)
    await proxy.start()
    options: dict[str, Any] = {
        "server_verification_cert": pki.ca_file.read_text(),
        "proxy_options": ProxyOptions("HTTP", "127.0.0.1", proxy.port),
        "websockets": transport == "ws",
        "connection_retry": False,
    }
    if credential == "key":
        text = hub.connection_string("d1", client_id.module or None)
        client = made.create_from_connection_string(text, **options)
    else:
        files = pki.device(str(client_id), passphrase="secret")
        authority = {"authentication": {"type": "certificateAuthority"}}
        hub.core.put_identity(client_id, authority, "*")
        client = made.create_from_x509_certificate(
            X509(str(files.certificate), str(files.key), files.passphrase),
            HOST,
            "d1",
            **({"module_id": "m1"} if kind == "module" else {}),
            **options,
        )
    arrived = asyncio.Event()
    loop = asyncio.get_running_loop()
    patches: list[Any] = []

    def on_patch(patch: Any) -> None:
        patches.append(patch)
        loop.call_soon_threadsafe(arrived.set)

    try:
        await call(client.connect)
        await call(setattr, client, "on_twin_desired_properties_patch_received", on_patch)
        assert (await call(client.get_twin))["desired"] == {"$version": 1}
        await call(client.patch_twin_reported_properties, {"way": list(way)})
        assert hub.core.twin(client_id).reported.value == {"way": list(way)}
        await call(client.send_message, Message("hello"))
        (message,) = hub.telemetry.query("d1")
        assert (message.client, message.body) == (client_id, b"hello")
        hub.core.update_twin(client_id, {"properties": {"desired": {"x": 1}}})
        await asyncio.wait_for(arrived.wait(), 30)
        assert patches == [{"x": 1, "$version": 2}]
    finally:
        await call(client.shutdown)
        await proxy.stop()
