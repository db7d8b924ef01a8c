"""Fixtures with which any project tests its device code against the simulated cloud.

Installed with the package (entry point `pytest11`), so `def test_x(iot_hub): ...` is all a test
needs. The servers run in a thread with their own event loop: the fixtures are plain objects that
work the same in ordinary and in asynchronous tests, and their methods may be called from any
thread but the servers' own. Nothing is imported until a fixture is used.

`gatelet_site`   hub, broker and registry, started once per test session
`iot_hub`        the hub of that site; every test gets fresh device ids from `new_device()`, and
                 faults are cleared and identities made with `new_device` deleted afterwards
`mqtt_broker`    the broker
`oci_registry`   the registry
`gatelet_site_settings`   override it (session scope) for another site: devices, broker, ports
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from .background import BackgroundLoop
    from .iothub.telemetry import Message
    from .pki import CertificateFiles
    from .site import Site
    from .site_config import SiteSettings

_Result = TypeVar("_Result")
_numbers = itertools.count(1)


class SiteFixture:
    """A running site. `about` is what `gatelet sim up --json` prints."""

    def __init__(self, loop: BackgroundLoop, site: Site) -> None:
        self.site = site
        self.about: dict[str, Any] = loop.call(site.describe)
        self._loop = loop

    @cached_property
    def iot_hub(self) -> HubFixture:
        """Raises RuntimeError for a site without this part; so do the others."""
        return HubFixture(self._loop, self.site)

    @cached_property
    def mqtt_broker(self) -> BrokerFixture:
        return BrokerFixture(self._loop, self.site)

    @cached_property
    def oci_registry(self) -> RegistryFixture:
        return RegistryFixture(self._loop, self.site)

    @property
    def control_url(self) -> str:
        """Base address of the control API; `control_token` goes into its Authorization header."""
        return str(self.about["control"]["url"])

    @property
    def control_token(self) -> str:
        return str(self.about["control"]["token"])


class DeviceFixture:
    """One device, or one of its modules: what it needs to connect, and what the cloud sees."""

    def __init__(self, hub: HubFixture, id: str, module: str = "") -> None:
        self._hub = hub
        self.id = id
        self.module = module

    @property
    def connection_string(self) -> str:
        """For `create_from_connection_string` of azure-iot-device."""
        return self._hub.connection_string(self.id, self.module or None)

    @property
    def desired(self) -> dict[str, Any]:
        """The desired properties, without `$version`."""
        return dict(self._hub.on_hub(lambda hub: hub.core.twin(self._client)).desired.value)

    @property
    def reported(self) -> dict[str, Any]:
        """The reported properties, without `$version`."""
        return dict(self._hub.on_hub(lambda hub: hub.core.twin(self._client)).reported.value)

    @property
    def connected(self) -> bool:
        return bool(self._hub.on_hub(lambda hub: hub.core.connected(self._client)))

    @property
    def telemetry(self) -> list[Message]:
        """Messages so far, oldest first: `body` (bytes), `properties`, `system`, `enqueued`."""
        client = self._client
        return self._hub.on_hub(lambda hub: hub.telemetry.query(client.device, client.module))

    def update(
        self, desired: dict[str, Any] | None = None, tags: dict[str, Any] | None = None
    ) -> None:
        """Patches the twin as the service side does; None (JSON null) removes a member."""
        change: dict[str, Any] = {} if tags is None else {"tags": tags}
        if desired is not None:
            change["properties"] = {"desired": desired}
        self._hub.on_hub(lambda hub: hub.core.update_twin(self._client, change))

    def send(self, body: bytes, properties: dict[str, str] | None = None) -> None:
        """Sends a cloud-to-device message; a device that is away gets it when it is back."""
        self._hub.on_hub(lambda hub: hub.core.c2d.send(self._client, body, properties=properties))

    def call_method(self, name: str, payload: Any = None, timeout: float = 30.0) -> tuple[int, Any]:
        """Status and payload of the answer to a direct method; waits for the device to listen.

        In an asynchronous test whose own loop must answer, call it with `asyncio.to_thread`.
        """
        status, answer = self._hub.run(
            lambda hub: hub.core.invoke_method(self._client, name, payload, timeout, timeout),
            2 * timeout + 5,
        )
        return status, answer

    def wait_until(
        self, condition: Callable[[DeviceFixture], _Result], timeout: float = 10.0
    ) -> _Result:
        """The first true result of `condition(self)`. Raises TimeoutError."""
        deadline = time.monotonic() + timeout
        while not (result := condition(self)):
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"not within {timeout:g} s; {self.id} is "
                    f"{'' if self.connected else 'not '}connected and reports {self.reported}"
                )
            time.sleep(0.01)
        return result

    @property
    def _client(self) -> Any:
        from .iothub.devices import ClientId

        return ClientId(self.id, self.module)


class HubFixture:
    """The simulated IoT Hub."""

    def __init__(self, loop: BackgroundLoop, site: Site) -> None:
        self._loop = loop
        self._site = site
        self._made: list[str] = []
        about = site.hub
        self.host_name = about.host_name
        self.ca_file: Path = site.ca_file
        self.ca_certificate = site.ca_file.read_text()
        """For `server_verification_cert` of azure-iot-device."""
        self.proxy_port = site.proxy.port
        """A CONNECT proxy on 127.0.0.1 that leads to the hub by its name."""
        self.mqtt_port, self.https_port = about.mqtt_port, about.https_port
        """Of 127.0.0.1, for clients that can be told a port."""
        self.service_connection_string = about.service_connection_string
        self.service_url = about.rest_url
        self.page_url = f"{site.control.url}/hub/#token={site.control.token}"

    def client_options(self) -> dict[str, Any]:
        """Keyword arguments for `create_from_connection_string` and its like."""
        from azure.iot.device import ProxyOptions

        make_proxy: Callable[..., Any] = ProxyOptions
        return {
            "server_verification_cert": self.ca_certificate,
            "proxy_options": make_proxy("HTTP", "127.0.0.1", self.proxy_port),
        }

    def new_device(
        self, *, edge: bool = False, tags: dict[str, Any] | None = None
    ) -> DeviceFixture:
        """A device of its own for this test."""
        return self.device(f"device-{next(_numbers)}", edge=edge, tags=tags)

    def device(
        self, id: str, *, edge: bool = False, tags: dict[str, Any] | None = None
    ) -> DeviceFixture:
        """The device called `id`, made for this test where it is missing."""

        def make(hub: Any) -> bool:
            from .iothub.devices import ClientId

            client = ClientId(id)
            if client in hub.core.state.registry:
                return False
            hub.core.put_identity(client, {"capabilities": {"iotEdge": edge}})
            return True

        if self.on_hub(make):
            self._made.append(id)
        device = DeviceFixture(self, id)
        if tags is not None:
            device.update(tags=tags)
        return device

    def module(self, device: str, module: str) -> DeviceFixture:
        """A module, made where it is missing."""
        self.device(device)
        self.connection_string(device, module)
        return DeviceFixture(self, device, module)

    def edge_environment(self, module: str) -> dict[str, str]:
        """For `create_from_edge_environment` of a module of the site's own device.

        Raises RuntimeError for a site whose settings have no `edge_modules`.
        """
        return self._loop.call(lambda: self._site.edge.environment(module))

    def connection_string(self, device: str, module: str | None = None) -> str:
        return str(self.on_hub(lambda hub: hub.connection_string(device, module)))

    def set_fault(self, name: str, value: float) -> None:
        """See gatelet.simulator.iothub.faults.Faults. Raises ValueError for an unknown one."""
        self.on_hub(lambda hub: hub.faults.set(name, value))

    def clear_faults(self) -> None:
        self.on_hub(lambda hub: hub.faults.clear())

    def drop_connections(self) -> None:
        self.on_hub(lambda hub: hub.drop_connections())

    def pause(self) -> None:
        """Unreachable for devices until `resume`."""
        self.run(lambda hub: hub.pause())

    def resume(self) -> None:
        self.run(lambda hub: hub.resume())

    def deploy(self, id: str, configuration: dict[str, Any]) -> None:
        """Puts an automatic deployment, as `PUT /configurations/{id}` does."""
        self.on_hub(lambda hub: hub.core.rollout.put(id, configuration, "*"))

    def on_hub(self, function: Callable[[Any], _Result]) -> _Result:
        """The result of `function(hub)` on the hub's own thread: an IotHub, all of it."""
        return self._loop.call(function, self._site.hub)

    def run(self, function: Callable[[Any], Any], seconds: float = 60.0) -> Any:
        """The same for functions that give a coroutine."""
        return self._loop.run(function(self._site.hub), seconds)

    def restore(self) -> None:
        """As before the test: no faults, no devices made meanwhile, no deployments."""

        def work(hub: Any) -> None:
            from .iothub.devices import ClientId

            hub.faults.clear()
            for one in list(hub.core.rollout):
                hub.core.rollout.delete(one.id, None)
            for id in self._made:
                if ClientId(id) in hub.core.state.registry:
                    hub.core.delete_identity(ClientId(id))

        self.on_hub(work)
        self._made.clear()
        self.resume()


class BrokerFixture:
    """The MQTT broker: `host`, `port`, `username`, `password`, and passwords of all `users`.

    With TLS `ca_file` is what clients trust, else None; `websocket_port` is None where there are
    no websockets.
    """

    def __init__(self, loop: BackgroundLoop, site: Site) -> None:
        self._loop = loop
        self._site = site
        about = loop.call(site.describe)["broker"]
        self.host: str = about["host"]
        self.port: int = about["port"]
        self.username: str = about["username"]
        self.password: str = about["password"]
        self.users: dict[str, str] = about["users"]
        self.ca_file: Path | None = site.ca_file if about["tls"] else None
        self.websocket_port = site.broker.websocket_port if about["websocketUrl"] else None

    def certificate(self, user: str) -> CertificateFiles:
        """PEM files `certificate` and `key` of a user in `client_certificates`. Raises KeyError."""
        return self._site.broker_certificates[user]

    @property
    def retained(self) -> dict[str, bytes]:
        """Payloads of the retained messages by topic."""
        return self._loop.call(lambda: dict(self._site.broker.retained))

    def publish(self, topic: str, payload: bytes, qos: int = 0, retain: bool = False) -> None:
        self._loop.call(self._site.broker.publish, topic, payload, qos, retain)

    def drop_connections(self) -> None:
        self._loop.call(self._site.broker.drop_connections)

    def pause(self) -> None:
        """Unreachable until `resume`."""
        self._loop.run(self._site.broker.pause())

    def resume(self) -> None:
        self._loop.run(self._site.broker.resume())

    @contextmanager
    def for_a_test(self) -> Iterator[BrokerFixture]:
        """What it retains meanwhile is gone afterwards, and it is reachable again."""
        before = self.retained
        try:
            yield self
        finally:
            self.resume()
            for topic in self.retained.keys() - before.keys():
                self.publish(topic, b"", retain=True)


class RegistryFixture:
    """The OCI registry: `address` is HOST:PORT as in image names; plain HTTP."""

    def __init__(self, loop: BackgroundLoop, site: Site) -> None:
        self._loop = loop
        self._site = site
        self.address = site.registry.address

    def corrupt(self, digest: str) -> None:
        """Serve this blob with one bit flipped until `heal`."""
        self._loop.call(self._site.registry.corrupt, digest)

    def fail_next(self, count: int, status: int = 503) -> None:
        self._loop.call(self._site.registry.fail_next, count, status)

    def heal(self) -> None:
        self._loop.call(self._site.registry.heal)


@pytest.fixture(scope="session")
def gatelet_site_settings(tmp_path_factory: pytest.TempPathFactory) -> SiteSettings:
    """What the site of this session consists of."""
    from .site_config import SiteSettings

    return SiteSettings(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="session")
def gatelet_site(gatelet_site_settings: SiteSettings) -> Iterator[SiteFixture]:
    """A hub, a broker and a registry for the whole session."""
    from .background import BackgroundLoop
    from .site import Site

    with BackgroundLoop() as loop:
        site = loop.call(lambda: Site(gatelet_site_settings))
        loop.run(site.start())
        try:
            yield SiteFixture(loop, site)
        finally:
            loop.run(site.stop())


@pytest.fixture
def iot_hub(gatelet_site: SiteFixture) -> Iterator[HubFixture]:
    """The simulated IoT Hub, as it was before once the test ends."""
    yield gatelet_site.iot_hub
    gatelet_site.iot_hub.restore()


@pytest.fixture
def mqtt_broker(gatelet_site: SiteFixture) -> Iterator[BrokerFixture]:
    """The MQTT broker; once the test ends, reachable again and without what it retained."""
    with gatelet_site.mqtt_broker.for_a_test() as broker:
        yield broker


@pytest.fixture
def oci_registry(gatelet_site: SiteFixture) -> Iterator[RegistryFixture]:
    """The OCI registry, healed once the test ends."""
    yield gatelet_site.oci_registry
    gatelet_site.oci_registry.heal()
