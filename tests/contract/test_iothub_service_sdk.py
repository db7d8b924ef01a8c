"""The unmodified azure-iot-hub and what `az iot` sends, against the hub stand-in over HTTPS."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import requests
from gatelet.simulator.background import BackgroundLoop
from gatelet.simulator.iothub import sas
from gatelet.simulator.iothub.devices import ClientId
from gatelet.simulator.iothub.server import IotHub
from gatelet.simulator.pki import Pki

pytestmark = [
    # msrest still calls datetime.utcnow and imports what Python 3.12 deprecates.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

HOST = "hub.gatelet.test"
KEY = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
AGENT = "$edgeAgent"


class Cloud:
    """A hub in its own thread, and the SDK's clients for it."""

    def __init__(self, loop: BackgroundLoop, hub: IotHub, ca_file: Path) -> None:
        from azure.iot.hub import IoTHubConfigurationManager, IoTHubRegistryManager

        text = hub.service_connection_string
        self.loop, self.hub, self.ca_file = loop, hub, ca_file
        self.registry = IoTHubRegistryManager.from_connection_string(text)
        self.configurations = IoTHubConfigurationManager.from_connection_string(text)

    def edge_device(self, name: str, **tags: Any) -> None:
        self.registry.create_device_with_sas(name, KEY, KEY, "enabled", iot_edge=True)
        self.hub_twin(name, {"tags": tags})

    def hub_twin(self, name: str, patch: dict[str, Any]) -> dict[str, Any]:
        twin = self.az("PATCH", f"/twins/{name}", patch, **{"If-Match": '"*"'})
        assert twin.status_code == 200, twin.text
        return dict(twin.json())

    def desired(self, device: str, module: str = AGENT) -> dict[str, Any]:
        path = f"/twins/{device}/modules/{quote(module, safe='')}"
        desired = self.az("GET", path).json()["properties"]["desired"]
        return {name: value for name, value in desired.items() if not name.startswith("$")}

    def report(self, device: str, code: int) -> None:
        def work() -> None:
            client = ClientId(device, AGENT)
            version = self.hub.core.twin(client).desired.version
            status = {"lastDesiredVersion": version, "lastDesiredStatus": {"code": code}}
            self.hub.core.patch_reported(client, status)

        self.loop.call(work)

    def az(self, method: str, path: str, body: Any = None, **headers: str) -> requests.Response:
        """As azure-iot-cli-extension sends it."""
        fields = dict(p.split("=", 1) for p in self.hub.service_connection_string.split(";"))
        expiry = int(datetime.now(timezone.utc).timestamp()) + 360
        token = sas.make(
            fields["HostName"], fields["SharedAccessKey"], expiry, fields["SharedAccessKeyName"]
        )
        return requests.request(
            method,
            f"https://{fields['HostName']}{path}",
            params={"api-version": "2021-04-12"},
            data=None if body is None else json.dumps(body),
            headers={
                "Authorization": token,
                "Content-Type": "application/json; charset=utf-8",
                "Accept": "application/json",
                "Accept-Encoding": "gzip, deflate",
                "User-Agent": "python/3.11 msrest/0.7.1 azure-iot-cli-extension/0.25.0",
                "x-ms-client-request-id": "3b0c1f1e-0000-0000-0000-000000000000",
                **headers,
            },
            timeout=10,
        )

    def query(self, text: str, **headers: str) -> list[dict[str, Any]]:
        answer = self.az("POST", "/devices/query", {"query": text}, **headers)
        assert answer.status_code == 200, answer.text
        return list(answer.json())


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture
def cloud(pki: Pki, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(pki.ca_file))
    with BackgroundLoop() as loop:
        hub = loop.call(lambda: IotHub(HOST, pki))
        loop.run(hub.start())
        try:
            yield Cloud(loop, hub, pki.ca_file)
        finally:
            loop.run(hub.stop())


def base(**modules: str) -> dict[str, Any]:
    return {
        "modulesContent": {
            AGENT: {
                "properties.desired": {
                    "schemaVersion": "1.1",
                    "systemModules": {"edgeAgent": {}, "edgeHub": {}},
                    "modules": {name: {"settings": {"image": i}} for name, i in modules.items()},
                }
            },
            "$edgeHub": {"properties.desired": {"schemaVersion": "1.1", "routes": {}}},
        }
    }


def layer(module: str, image: str, **more: Any) -> dict[str, Any]:
    return {
        "modulesContent": {
            AGENT: {f"properties.desired.modules.{module}": {"settings": {"image": image}}},
            "$edgeHub": {"properties.desired.routes.up": f"FROM /messages/{module}/* INTO $up"},
            **({module: more} if more else {}),
        }
    }


@pytest.fixture
def deploy(cloud: Cloud) -> Callable[..., Any]:
    from azure.iot.hub.models import Configuration, ConfigurationContent, ConfigurationMetrics

    def create(name: str, content: dict[str, Any], condition: str, priority: int = 0) -> Any:
        return cloud.configurations.create_configuration(
            Configuration(
                id=name,
                schema_version="2.0",
                content=ConfigurationContent(
                    modules_content=content.get("modulesContent"),
                    device_content=content.get("deviceContent"),
                ),
                target_condition=condition,
                priority=priority,
                labels={"owner": "tests"},
                metrics=ConfigurationMetrics(
                    queries={"all": "SELECT deviceId FROM devices"}, results={}
                ),
            )
        )

    return create


def images(desired: dict[str, Any]) -> dict[str, str]:
    return {name: one["settings"]["image"] for name, one in desired.get("modules", {}).items()}


def test_registry_of_devices_and_modules(cloud: Cloud) -> None:
    registry = cloud.registry
    device = registry.create_device_with_sas("d1", KEY, KEY, "enabled", iot_edge=True)
    assert device.authentication.symmetric_key.primary_key == KEY
    with pytest.raises(Exception, match=r"Conflict|AlreadyExists|409"):
        registry.create_device_with_sas("d1", KEY, KEY, "enabled")
    changed = registry.update_device_with_sas("d1", device.etag, KEY, KEY, "disabled")
    assert (changed.status, registry.get_device("d1").status) == ("disabled", "disabled")
    with pytest.raises(Exception, match=r"Precondition|412"):
        registry.update_device_with_sas("d1", device.etag, KEY, KEY, "enabled")
    registry.create_module_with_sas("d1", "m", "me", KEY, KEY)
    assert {m.module_id for m in registry.get_modules("d1")} == {AGENT, "$edgeHub", "m"}
    assert registry.get_module("d1", "m").managed_by == "me"
    registry.delete_module("d1", "m")
    assert [d.device_id for d in registry.get_devices()] == ["d1"]
    counts = registry.get_device_registry_statistics()
    assert (counts.total_device_count, counts.disabled_device_count) == (1, 1)
    assert registry.get_service_statistics().connected_device_count == 0
    registry.delete_device("d1")
    assert registry.get_devices() == []
    with pytest.raises(Exception, match=r"NotFound|404|Not Found"):
        registry.get_device("d1")


def test_many_devices_at_once(cloud: Cloud) -> None:
    from azure.iot.hub.models import ExportImportDevice

    def item(name: str, mode: str, **more: Any) -> Any:
        return ExportImportDevice(id=name, import_mode=mode, status="enabled", **more)

    made = cloud.registry.bulk_create_or_update_devices(
        [item("a", "create", tags={"site": "x"}), item("b", "createOrUpdate")]
    )
    assert made.is_successful
    assert cloud.query("SELECT deviceId, tags.site FROM devices") == [
        {"deviceId": "a", "site": "x"},
        {"deviceId": "b"},
    ]
    answer = cloud.registry.bulk_create_or_update_devices(
        [item("a", "create"), item("b", "delete"), item("c", "update")]
    )
    assert not answer.is_successful
    assert {error.device_id for error in answer.errors} == {"a", "c"}
    assert [d.device_id for d in cloud.registry.get_devices()] == ["a"]


def test_twins_with_etags(cloud: Cloud) -> None:
    from azure.iot.hub.models import Twin, TwinProperties

    cloud.edge_device("d1")
    twin = cloud.registry.get_twin("d1")
    patch = Twin(tags={"site": "a"}, properties=TwinProperties(desired={"rate": 5}))
    after = cloud.registry.update_twin("d1", patch, twin.etag)
    assert (after.tags, after.properties.desired["rate"]) == ({"site": "a"}, 5)
    with pytest.raises(Exception, match=r"Precondition|412"):
        cloud.registry.update_twin("d1", patch, twin.etag)
    whole = cloud.registry.replace_twin("d1", Twin(tags={"b": 1}), after.etag)
    assert whole.tags == {"b": 1}
    assert "rate" not in whole.properties.desired
    module = cloud.registry.update_module_twin("d1", AGENT, patch, "*")
    assert module.properties.desired["rate"] == 5
    # `az iot hub device-twin update --desired '{...}' --tags '{...}'`
    body = {"properties": {"desired": {"rate": 6}}, "tags": {"b": None}}
    answer = cloud.az("PATCH", "/twins/d1", body, **{"If-Match": '"*"'})
    assert (answer.status_code, answer.json()["tags"]) == (200, {})


def test_set_modules_as_the_command_line_sends_it(cloud: Cloud) -> None:
    from azure.iot.hub.models import ConfigurationContent

    cloud.edge_device("d1")
    path = "/devices/d1/applyConfigurationContent"
    assert cloud.az("POST", path, base(digits="a:1")).status_code == 204
    listed = cloud.az("GET", "/devices/d1/modules").json()
    assert [m["moduleId"] for m in listed] == [AGENT, "$edgeHub", "digits"]
    assert images(cloud.desired("d1")) == {"digits": "a:1"}
    content = ConfigurationContent(modules_content=base(digits="a:2")["modulesContent"])
    cloud.configurations.apply_configuration_on_edge_device("d1", content)
    assert images(cloud.desired("d1")) == {"digits": "a:2"}


def test_direct_methods_reach_a_real_device(cloud: Cloud) -> None:
    from azure.iot.device import IoTHubDeviceClient, MethodResponse, ProxyOptions
    from azure.iot.hub.models import CloudToDeviceMethod
    from gatelet.simulator.connect_proxy import ConnectProxy

    cloud.registry.create_device_with_sas("d1", KEY, KEY, "enabled")
    call = CloudToDeviceMethod(method_name="add", payload=[1, 2], response_timeout_in_seconds=10)
    with pytest.raises(Exception, match=r"NotOnline|404|Not Found"):
        cloud.registry.invoke_device_method("d1", call)
    proxy = ConnectProxy({f"{HOST}:8883": ("127.0.0.1", cloud.hub.mqtt_port)})
    cloud.loop.run(proxy.start())
    client = IoTHubDeviceClient.create_from_connection_string(
        cloud.hub.connection_string("d1"),
        server_verification_cert=cloud.ca_file.read_text(),
        proxy_options=ProxyOptions("HTTP", "127.0.0.1", proxy.port),
    )
    try:
        client.on_method_request_received = lambda request: client.send_method_response(
            MethodResponse.create_from_method_request(request, 200, sum(request.payload))
        )
        client.connect()
        result = cloud.registry.invoke_device_method("d1", call)
        assert (result.status, result.payload) == (200, 3)
        assert cloud.registry.get_service_statistics().connected_device_count == 1
    finally:
        client.shutdown()
        cloud.loop.run(proxy.stop())


def test_queries_in_pages(cloud: Cloud) -> None:
    from azure.iot.hub.models import QuerySpecification

    for index in range(5):
        cloud.edge_device(f"d{index}", floor=index // 2)
    specification = QuerySpecification(query="SELECT * FROM devices WHERE tags.floor < 2")
    first = cloud.registry.query_iot_hub(specification, None, 3)
    assert [twin.device_id for twin in first.items] == ["d0", "d1", "d2"]
    rest = cloud.registry.query_iot_hub(specification, first.continuation_token, 3)
    assert [twin.device_id for twin in rest.items] == ["d3"]
    assert (rest.type, rest.continuation_token) == ("Twin", None)
    counted = "SELECT tags.floor AS floor, COUNT() AS n FROM devices GROUP BY tags.floor"
    assert cloud.query(counted) == [
        {"floor": 0, "n": 2},
        {"floor": 1, "n": 2},
        {"floor": 2, "n": 1},
    ]
    modules = "SELECT deviceId FROM devices.modules WHERE moduleId = '$edgeHub'"
    assert len(cloud.query(modules)) == 5
    assert cloud.query(modules, **{"x-ms-max-item-count": "1"}) == [{"deviceId": "d0"}]
    for text, where in (("SELECT * FROM jobs", "FROM jobs"), ("SELECT", "missing")):
        answer = cloud.az("POST", "/devices/query", {"query": text})
        assert answer.status_code == 400
        assert where in answer.json()["Message"]
    stolen = {"x-ms-continuation": first.continuation_token}
    assert cloud.az("POST", "/devices/query", {"query": counted}, **stolen).status_code == 400


def test_deployments_by_priority_follow_tags(cloud: Cloud, deploy: Callable[..., Any]) -> None:
    cloud.edge_device("d1", site="north")
    deploy("low", base(digits="low"), "*", 1)
    assert images(cloud.desired("d1")) == {"digits": "low"}
    deploy("high", base(digits="high", camera="high"), "tags.site = 'north'", 5)
    assert images(cloud.desired("d1")) == {"digits": "high", "camera": "high"}
    assert [m.module_id for m in cloud.registry.get_modules("d1")][-2:] == ["camera", "digits"]
    agent = cloud.registry.get_module_twin("d1", AGENT)
    assert agent.additional_properties["configurations"] == {
        "low": {"status": "Targeted"},
        "high": {"status": "Applied"},
    }
    cloud.hub_twin("d1", {"tags": {"site": "south"}})
    assert images(cloud.desired("d1")) == {"digits": "low"}
    cloud.hub_twin("d1", {"tags": {"site": "north"}})
    assert images(cloud.desired("d1")) == {"digits": "high", "camera": "high"}
    cloud.configurations.delete_configuration("high")
    assert images(cloud.desired("d1")) == {"digits": "low"}
    cloud.configurations.delete_configuration("low")
    assert images(cloud.desired("d1")) == {"digits": "low"}, "the last one stays, as in IoT Hub"
    cloud.edge_device("d2", site="north")
    assert cloud.desired("d2") == {}


def test_layers_over_a_base(cloud: Cloud, deploy: Callable[..., Any]) -> None:
    cloud.edge_device("d1", site="north", beta=True)
    deploy("base", base(digits="1"), "deviceId = 'd1'", 10)
    own = {"properties.desired": {"a": 1, "b": {"c": 1}}}
    deploy("one", layer("camera", "1", **own), "tags.site IN ['north', 'south']", 20)
    deploy(
        "two", layer("camera", "2", **{"properties.desired.b": {"d": 2}}), "tags.beta = true", 30
    )
    deploy("weak", layer("digits", "weak"), "*", 10)
    assert images(cloud.desired("d1")) == {"digits": "1", "camera": "2"}
    assert cloud.desired("d1", "camera") == {"a": 1, "b": {"d": 2}}
    assert cloud.desired("d1", "$edgeHub")["routes"] == {"up": "FROM /messages/camera/* INTO $up"}
    cloud.hub_twin("d1", {"tags": {"beta": False}})
    assert cloud.desired("d1", "camera") == {"a": 1, "b": {"c": 1}}
    assert images(cloud.desired("d1")) == {"digits": "1", "camera": "1"}
    cloud.hub_twin("d1", {"tags": {"site": None}})
    assert images(cloud.desired("d1")) == {"digits": "1"}
    assert cloud.desired("d1", "camera") == {}
    states = cloud.registry.get_module_twin("d1", AGENT).additional_properties["configurations"]
    assert {name: one["status"] for name, one in states.items()} == {
        "base": "Applied",
        "weak": "Targeted",
    }


def test_metrics_of_a_deployment(cloud: Cloud, deploy: Callable[..., Any]) -> None:
    for name in ("d1", "d2", "d3"):
        cloud.edge_device(name)
    cloud.registry.create_device_with_sas("plain", KEY, KEY, "enabled")
    deploy("base", base(digits="1"), "deviceId IN ['d1', 'd2', 'plain']")
    cloud.report("d1", 200)
    cloud.report("d2", 406)
    shown = cloud.configurations.get_configuration("base")
    assert shown.system_metrics.results == {
        "targetedCount": 2,
        "appliedCount": 2,
        "reportedSuccessfulCount": 1,
        "reportedFailedCount": 1,
    }
    assert shown.metrics.results == {"all": 4}
    assert shown.labels == {"owner": "tests"}
    # `az iot edge deployment show-metric` runs the queries itself.
    for name, text in shown.system_metrics.queries.items():
        assert len(cloud.query(text)) == shown.system_metrics.results[name], name
    cloud.hub_twin("d1", {"tags": {"x": 1}})
    assert cloud.desired("d1") == cloud.desired("d2"), "nothing was pushed again"


def test_configurations_are_checked_and_updated(cloud: Cloud, deploy: Callable[..., Any]) -> None:
    made = deploy("base", base(digits="1"), "tags.x = 1", 1)
    with pytest.raises(Exception, match=r"Conflict|AlreadyExists|409"):
        deploy("base", base(digits="1"), "tags.x = 1")
    made.priority, made.target_condition = 7, "tags.x = 2"
    changed = cloud.configurations.update_configuration(made, made.etag)
    assert (changed.priority, changed.target_condition) == (7, "tags.x = 2")
    with pytest.raises(Exception, match=r"Precondition|412"):
        cloud.configurations.update_configuration(made, made.etag)
    assert [one.id for one in cloud.configurations.get_configurations(10)] == ["base"]
    for body, why in (
        ({"content": base(), "targetCondition": "tags.x ="}, "column 9"),
        ({"content": {}}, "modulesContent"),
        ({"content": base(), "priority": -1}, "priority"),
        ({"content": base(), "metrics": {"queries": {"q": "SELECT"}}}, "metrics.queries.q"),
        ({"content": {"modulesContent": {"m": {"x": {}}}}}, "properties.desired"),
        ({"content": base(), "id": "other"}, "address"),
    ):
        answer = cloud.az("PUT", "/configurations/new", body)
        assert (answer.status_code, why in answer.json()["Message"]) == (400, True), answer.text
    other = {"content": base(digits="2")}
    answer = cloud.az("PUT", "/configurations/base", other, **{"If-Match": '"*"'})
    assert (answer.status_code, "cannot change" in answer.text) == (400, True)
    tested = cloud.az(
        "POST",
        "/configurations/testQueries",
        {"targetCondition": "tags.x", "customMetricQueries": {"a": "SELECT * FROM devices"}},
    ).json()
    assert "missing" in tested["targetConditionError"]
    assert tested["customMetricQueryErrors"] == {}
    cloud.configurations.delete_configuration("base")
    assert cloud.az("GET", "/configurations/base").status_code == 404


def test_device_configurations(cloud: Cloud, deploy: Callable[..., Any]) -> None:
    cloud.registry.create_device_with_sas("d1", KEY, KEY, "enabled")
    deploy("c", {"deviceContent": {"properties.desired.chiller": {"on": True}}}, "*", 1)
    twin = cloud.registry.get_twin("d1")
    assert twin.properties.desired["chiller"] == {"on": True}
    assert cloud.configurations.get_configuration("c").system_metrics.results == {
        "targetedCount": 1,
        "appliedCount": 1,
    }
