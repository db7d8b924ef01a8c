from __future__ import annotations

import base64
from dataclasses import dataclass
from datetime import datetime, timezone

import pytest
from gatelet.simulator.iothub import sas
from gatelet.simulator.iothub.devices import ClientId, Identity, Registry
from gatelet.simulator.iothub.errors import HubError

KEY = base64.b64encode(b"0123456789abcdef").decode()
OTHER = base64.b64encode(b"fedcba9876543210").decode()
RESOURCE = "hub.example/devices/d1"


@dataclass
class FixedClock:
    epoch: int = 1_000_000

    def monotonic(self) -> float:
        return float(self.epoch)

    def now(self) -> datetime:
        return datetime.fromtimestamp(self.epoch, timezone.utc)


def test_a_signature_made_here_is_the_sdks() -> None:
    from azure.iot.device.common.auth.signing_mechanism import SymmetricKeySigningMechanism

    signed = SymmetricKeySigningMechanism(KEY).sign(f"{RESOURCE.replace('/', '%2F')}\n5000000")
    assert sas.parse(sas.make(RESOURCE, KEY, 5_000_000)).signature == base64.b64decode(signed)


def test_either_key_and_case_of_the_host() -> None:
    token = sas.parse(sas.make("HUB.example/devices/d1", OTHER, 2_000_000))
    sas.verify(token, RESOURCE, (KEY, OTHER), FixedClock())


def test_a_policy_covers_everything_below() -> None:
    token = sas.parse(sas.make("hub.example", KEY, 2_000_000, policy="service"))
    assert token.policy == "service"
    sas.verify(token, RESOURCE, (KEY,), FixedClock())


@pytest.mark.parametrize(
    ("token", "reason"),
    [
        (sas.make(RESOURCE, OTHER, 2_000_000), "does not match"),
        (sas.make("hub.example/devices/d10", KEY, 2_000_000), "not for"),
        (sas.make("hub.example/devices/d1/modules/m", KEY, 2_000_000), "not for"),
        (sas.make(RESOURCE, KEY, 1_000_000), "expired"),
        (sas.make(RESOURCE, KEY, 2_000_000).replace("se=2", "se=3"), "does not match"),
        ("Bearer x", "not a SharedAccessSignature"),
        ("SharedAccessSignature sr=x&sig=!&se=1", "malformed"),
        ("SharedAccessSignature sr=x&sig=AAAA&se=soon", "malformed"),
        ("SharedAccessSignature ", "malformed"),
    ],
)
def test_refused(token: str, reason: str) -> None:
    with pytest.raises(HubError, match=reason) as caught:
        sas.verify(sas.parse(token), RESOURCE, (KEY,), FixedClock())
    assert caught.value.status == 401


def test_client_ids() -> None:
    assert ClientId.parse("d/$edgeAgent") == ClientId("d", "$edgeAgent")
    assert ClientId("d", "m").path == "devices/d/modules/m"
    for bad in ("", "d/", "/m", "d/m/n", "d e", "d#", "d\n", "x" * 129):
        with pytest.raises(HubError):
            ClientId.parse(bad)


def test_registry_life() -> None:
    registry = Registry()
    with pytest.raises(HubError) as caught:
        registry.put(ClientId("d", "m"), {})
    assert caught.value.status == 404
    device = registry.put(
        ClientId("d"),
        {
            "capabilities": {"iotEdge": True},
            "authentication": {"symmetricKey": {"primaryKey": KEY, "secondaryKey": OTHER}},
        },
    )
    assert device.keys == (KEY, OTHER)
    assert [i.client.module for i in registry.modules("d")] == ["$edgeAgent", "$edgeHub"]
    with pytest.raises(HubError) as caught:
        registry.put(ClientId("d"), {})
    assert caught.value.status == 409
    with pytest.raises(HubError) as caught:
        registry.put(ClientId("d"), {}, if_match='"stale"')
    assert caught.value.status == 412
    changed = registry.put(ClientId("d"), {"status": "disabled"}, if_match=f'"{device.etag}"')
    assert (changed.enabled, changed.keys, changed.edge) == (False, (KEY, OTHER), True)
    assert Identity.from_json(changed.as_json()) == changed
    assert len(registry.delete(ClientId("d"))) == 3
    assert list(registry) == []


@pytest.mark.parametrize(
    "description",
    [
        {"status": "asleep"},
        {"authentication": {"type": "selfSigned"}},
        {"authentication": {"symmetricKey": {"primaryKey": "not base64!"}}},
        {"authentication": {"symmetricKey": {"primaryKey": 5}}},
        {"authentication": {"symmetricKey": {"primaryKey": "AAAA"}}},
        {"capabilities": [1]},
        {"authentication": 1},
    ],
)
def test_bad_descriptions(description: dict[str, object]) -> None:
    registry = Registry()
    with pytest.raises(HubError) as caught:
        registry.put(ClientId("d"), description)
    assert caught.value.status == 400
    assert ClientId("d") not in registry
