"""The agent.toml that makes `gatelet run` a device of a simulated site."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .site_config import SiteSettings


def agent_config(settings: SiteSettings, site: Mapping[str, Any], fabric_device: str) -> str:
    """The file's text; `site` is what `Site.describe` says of a site with all its parts."""
    folder = settings.folder
    hub, broker = site["hub"], site["broker"]
    sections = {
        "device": {
            "id": settings.device,
            "state-dir": folder / "state",
            "run-dir": folder / "run",
            "board": settings.board,
        },
        "iothub": {
            "connection-string": hub["edgeAgentConnectionString"],
            "ca-file": hub["caFile"],
            "proxy": hub["proxy"],
        },
        "mqtt": _mqtt(broker),
        "[registry]": {"address": site["registry"]["address"], "insecure": True},
        "scoring": {
            "grpc-address": settings.grpc_address,
            "http-address": "127.0.0.1:0",
            "metrics-address": "127.0.0.1:0",
        },
        "fabric": {"device": fabric_device},
        "deployment": {"probation-seconds": 1.0, "retry-base-seconds": 0.2},
    }
    lines = [f"# A device of the simulated site in {str(folder)!r}, made anew at each start of it."]
    for name, values in sections.items():
        lines += ["", f"[{name}]", *(f"{key} = {_toml(value)}" for key, value in values.items())]
    return "\n".join(lines) + "\n"


def _mqtt(broker: Mapping[str, Any]) -> dict[str, Any]:
    user = broker["username"]
    values = {"host": broker["host"], "port": broker["port"]}
    certificate = broker["clientCertificates"].get(user)
    if certificate is None:
        values |= {"username": user, "password": broker["password"]}
    else:
        values |= {"cert-file": certificate["certFile"], "key-file": certificate["keyFile"]}
    if broker["tls"]:
        values["ca-file"] = broker["caFile"]
    return values


def _toml(value: str | Path | float) -> str:
    # JSON's texts, numbers and truth values are TOML's too.
    return json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False)
