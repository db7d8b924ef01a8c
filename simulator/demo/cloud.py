"""The demo's cloud side: an operator who changes twins, and one who publishes over MQTT."""

from __future__ import annotations

import json
import ssl
import time
import urllib.error
import urllib.request
from typing import Any

from ...agent.clock import SystemClock
from ..iothub import sas
from .device import DEPLOY_SECONDS, POLL_SECONDS, DemoError

API_VERSION = "2021-04-12"
TOKEN_SECONDS = 3600


class HubOperator:
    """Calls the hub's service API with its connection string, as `az iot edge` does."""

    def __init__(self, hub: dict[str, Any], device: str) -> None:
        self._url = hub["serviceUrl"]
        self._device = device
        self._tls = ssl.create_default_context(cafile=hub["caFile"])
        self._parts = dict(part.split("=", 1) for part in hub["serviceConnectionString"].split(";"))

    def set_modules(self, manifest: dict[str, Any]) -> None:
        """What `az iot edge set-modules` sends."""
        self._call("POST", f"/devices/{self._device}/applyConfigurationContent", manifest)

    def twin(self) -> dict[str, Any]:
        """The twin of the device's `$edgeAgent`."""
        return self._call("GET", f"/twins/{self._device}/modules/$edgeAgent", None)

    def until_reported(self, code: int, seconds: float = DEPLOY_SECONDS) -> dict[str, Any]:
        """The reported properties once they answer the newest desired ones with `code`."""
        deadline = time.monotonic() + seconds
        reported: dict[str, Any] = {}
        while time.monotonic() < deadline:
            properties = self.twin()["properties"]
            reported = properties["reported"]
            status = reported.get("lastDesiredStatus", {})
            modules = reported.get("modules", {}).values()
            if (
                reported.get("lastDesiredVersion") == properties["desired"]["$version"]
                and status.get("code") == code
                and modules
                and all(module["runtimeStatus"] == "running" for module in modules)
            ):
                return reported
            time.sleep(POLL_SECONDS)
        raise DemoError(
            f"the device did not report {code} within {seconds:g} s; it says "
            f"{json.dumps(reported.get('lastDesiredStatus'))}"
        )

    def _call(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        expiry = int(SystemClock().now().timestamp()) + TOKEN_SECONDS
        policy, key = self._parts["SharedAccessKeyName"], self._parts["SharedAccessKey"]
        request = urllib.request.Request(
            f"{self._url}{path}?api-version={API_VERSION}",
            None if body is None else json.dumps(body).encode(),
            {
                "Authorization": sas.make(self._parts["HostName"], key, expiry, policy),
                "Content-Type": "application/json",
            },
            method=method,
        )
        try:
            with urllib.request.urlopen(request, timeout=10, context=self._tls) as answer:
                return dict(json.loads(answer.read() or b"{}"))
        except urllib.error.URLError as error:
            details = error.read().decode() if isinstance(error, urllib.error.HTTPError) else ""
            raise DemoError(f"the hub refused {method} {path}: {error} {details}") from error


def publish_desired(broker: dict[str, Any], manifest: dict[str, Any]) -> None:
    """Publish a manifest as the retained desired document, with paho. Raises DemoError."""
    import paho.mqtt.publish as publish

    try:
        publish.single(
            f"{broker['prefix']}/desired",
            json.dumps(manifest),
            qos=1,
            retain=True,
            hostname=broker["host"],
            port=broker["port"],
            client_id="demo-operator",
            auth={"username": broker["username"], "password": broker["password"]},
        )
    except OSError as error:
        raise DemoError(f"cannot publish over MQTT: {error}") from error


def deployment(image: str, *, backends: str, endpoint: str = "digits") -> dict[str, Any]:
    """An IoT Edge deployment manifest with one model module."""
    system = {"type": "docker", "settings": {"image": "gatelet", "createOptions": ""}}
    return {
        "modulesContent": {
            "$edgeAgent": {
                "properties.desired": {
                    "schemaVersion": "1.1",
                    "runtime": {"type": "docker", "settings": {"minDockerVersion": "v1.25"}},
                    "systemModules": {
                        "edgeAgent": system,
                        "edgeHub": {**system, "status": "running", "restartPolicy": "always"},
                    },
                    "modules": {
                        endpoint: {
                            "type": "docker",
                            "version": "1.0",
                            "status": "running",
                            "restartPolicy": "always",
                            "settings": {"image": image, "createOptions": ""},
                            "env": {"SCORING_BACKENDS": {"value": backends}},
                        }
                    },
                }
            },
            "$edgeHub": {
                "properties.desired": {
                    "schemaVersion": "1.1",
                    "routes": {},
                    "storeAndForwardConfiguration": {"timeToLiveSecs": 7200},
                }
            },
        }
    }
