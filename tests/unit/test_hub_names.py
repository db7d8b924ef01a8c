"""By which names modules find the hub: told by the configuration or a service, and kept."""

from __future__ import annotations

from pathlib import Path

import pytest
from container_world import Device, manifest, play
from gatelet.agent.clock import SystemClock
from gatelet.agent.hub_names import HubNames, KnownHub, names_of
from gatelet.agent.identity.login import Login
from gatelet.agent.identity.sources import (
    CertificateFiles,
    Dps,
    EdgeEnvironment,
    IdentityService,
    IdentitySource,
    KeyText,
    ModuleOf,
    Registered,
)
from gatelet.agent.store import StateStore

HERE = Registered("a.hub", "edge-7", KeyText("a2V5"), gateway="gw")
DPS = Dps("0ne1", "d1", CertificateFiles(Path("c"), Path("k")))
EDGE = {"IOTEDGE_IOTHUBHOSTNAME": "a.hub", "IOTEDGE_DEVICEID": "edge-7"}


@pytest.mark.parametrize(
    ("source", "names"),
    [
        (HERE, HubNames("a.hub", "edge-7", "gw")),
        (ModuleOf(HERE, "$edgeAgent"), HubNames("a.hub", "edge-7", "gw")),
        (
            EdgeEnvironment({**EDGE, "IOTEDGE_GATEWAYHOSTNAME": "gw"}),
            HubNames("a.hub", "edge-7", "gw"),
        ),
        (EdgeEnvironment(EDGE), HubNames("a.hub", "edge-7")),
        (EdgeEnvironment({"EdgeHubConnectionString": "HostName=a"}), None),
        (DPS, None),
        (ModuleOf(DPS, "$edgeAgent"), None),
        (IdentityService(), None),
    ],
)
def test_some_sources_say_it_themselves(source: IdentitySource, names: HubNames | None) -> None:
    assert names_of(source) == names


def test_what_a_service_said_is_kept_and_a_configuration_wins_over_it(tmp_path: Path) -> None:
    store = StateStore(tmp_path / "state.db", SystemClock())
    told: list[HubNames] = []
    known = KnownHub(store)
    known.on_change = lambda: told.append(known.names)
    assert known.names == HubNames()
    known.begin(DPS)
    assert known.names == HubNames()
    known.note(Login("a.hub", "edge-7"))
    known.note(Login("a.hub", "edge-7", "$edgeAgent"))
    known.note(Login("b.hub", "edge-7", gateway="gw"))
    assert told == [HubNames("a.hub", "edge-7"), HubNames("b.hub", "edge-7", "gw")]
    again = KnownHub(store)
    assert again.names == HubNames()
    again.begin(DPS)
    assert again.names == HubNames("b.hub", "edge-7", "gw")
    again.begin(HERE)
    assert again.names == HubNames("a.hub", "edge-7", "gw")
    store.close()


def test_modules_know_the_hub_as_soon_as_the_device_does_and_only_then_are_made_anew() -> None:
    async def scenario(device: Device) -> None:
        device.engine.publish("r.io/app:1")
        await device.good(manifest(aa="r.io/app:1"))
        first = device.ids()
        environment = device.engine._named("aa").environment
        assert environment["IOTEDGE_DEVICEID"] == "edge-1"
        assert environment["IOTEDGE_MODULEID"] == "aa"
        assert not {"IOTEDGE_IOTHUBHOSTNAME", "IOTEDGE_GATEWAYHOSTNAME"} & environment.keys()

        device.hub = HubNames("a.hub", "edge-7", "gw")
        device.reconciler.wake()
        await device.until(lambda: device.ids() != first and "running" in device.containers()["aa"])
        second = device.ids()
        environment = device.engine._named("aa").environment
        assert environment["IOTEDGE_IOTHUBHOSTNAME"] == "a.hub"
        assert environment["IOTEDGE_GATEWAYHOSTNAME"] == "gw"
        assert environment["IOTEDGE_DEVICEID"] == "edge-7"
        # Nothing here answers behind a workload socket, so nobody is sent to one.
        assert not any("WORKLOAD" in name for name in environment)
        await device.kill()
        device.start()
        await device.settled()
        assert device.ids() == second
        assert device.phase() == "good"

    play(scenario)
