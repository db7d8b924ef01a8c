"""The agent's process under identities of `agent.toml`, and what its status says of them."""

from __future__ import annotations

import re
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from gatelet.agent.config import AgentConfig, ConfigError, parse_config
from gatelet.agent.links import transports
from gatelet.simulator.iothub.devices import ClientId
from gatelet.simulator.pki import Pki


def test_transports_of_a_configuration(tmp_path: Path) -> None:
    def config(iothub: str, mqtt: str = "") -> AgentConfig:
        return parse_config(f"[iothub]\n{iothub}\n{mqtt}", "agent.toml")

    string = 'connection-string = "HostName=h;DeviceId=d;SharedAccessKey=c2VjcmV0"'
    links = transports(config(string, '[mqtt]\nhost = "b"\ntls = true\npassphrase-file = "p"'))
    assert [link.name for link in links] == ["iothub", "mqtt"]
    assert [link.warnings() for link in links] == [(), ()]
    with pytest.raises(ConfigError, match=r"\[iothub\]: the proxy 'nowhere' is not host:port"):
        transports(config(string + '\nproxy = "nowhere"'))
    with pytest.raises(ConfigError, match="names no identity"):
        transports(config(""))


async def test_edge_agent_of_a_device_with_a_certificate_over_websockets(device: Any) -> None:
    await device.stop_agent()
    folder: Path = device.folder
    pki = Pki(folder / "pki")
    hub = device.site.hub
    name = next(i.client.device for i in hub.core.state.registry)
    by_authority = {"authentication": {"type": "certificateAuthority"}}
    hub.core.put_identity(ClientId(name), by_authority, if_match="*")

    def install(**options: Any) -> None:
        made = pki.device(name, **options)
        for new, old in ((made.certificate, "device.pem"), (made.key, "device.key")):
            shutil.copy(new, folder / "new")
            (folder / "new").replace(folder / old)

    install(lifetime=timedelta(days=9))
    text = (folder / "agent.toml").read_text()
    changed, count = re.subn(
        r'^connection-string = "HostName=([^;]*);.*"$',
        'websockets = true\nmodule-id = "$edgeAgent"\n[iothub.x509]\nhost-name = "\\1"\n'
        f'device-id = "{name}"\ncert-file = "{folder}/device.pem"\n'
        f'key-file = "{folder}/device.key"',
        text,
        flags=re.MULTILINE,
    )
    assert count == 1
    # What follows in the section belongs before its new sub-section.
    keys = re.findall(r"^(?:ca-file|proxy) = .*$", changed, re.MULTILINE)[:2]
    for key in keys:
        changed = changed.replace(key + "\n", "", 1)
    changed = changed.replace("[iothub]\n", "[iothub]\n" + "\n".join(keys) + "\n", 1)
    (folder / "agent.toml").write_text(changed)

    await device.start_agent()
    status = await device.status()
    (link,) = [one for one in status["links"] if one["source"] == "iothub"]
    assert "in 8 days" in link["warnings"][0]
    await device.until_reported(lambda reported: "lastDesiredVersion" in reported)
    install(version=2)
    await device.until(lambda s: s["links"][0]["connected"] and not s["links"][0]["warnings"])
    assert "not connected" not in (folder / "agent.log").read_text().split("iothub: connected")[-1]
