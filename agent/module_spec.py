"""What a deployment asks for: one module, one registry, the runtime (IoT Edge manifest 1.0/1.1)."""

from __future__ import annotations

import hashlib
from typing import Literal

import msgspec

DesiredRunState = Literal["running", "stopped"]
RestartPolicy = Literal["never", "on-failure", "on-unhealthy", "always"]
ImagePullPolicy = Literal["on-create", "never"]

MAX_STARTUP_ORDER = 4294967295
"""The last start group, and edgeAgent's default."""


class RegistryCredential(msgspec.Struct, frozen=True):
    """How to log in at `address`; the first one whose address equals the image's host is used."""

    id: str
    address: str
    username: str
    password: str

    def __repr__(self) -> str:
        # Reprs end up in logs and tracebacks.
        return (
            f"RegistryCredential(id={self.id!r}, address={self.address!r}, "
            f"username={self.username!r}, password=...)"
        )


class Runtime(msgspec.Struct, frozen=True):
    """`$edgeAgent` `runtime` without its credentials; texts are kept as found, for the report."""

    type: str = "docker"
    min_docker_version: str = ""
    logging_options: str = ""


class ModuleSpec(msgspec.Struct, frozen=True):
    """One module as desired, every default filled in.

    `image` always carries a tag or a digest. `env` is sorted by name. `create_options` is a JSON
    object in canonical form (keys sorted, no blanks). Defaults are those of edgeAgent's code.
    """

    name: str
    image: str
    status: DesiredRunState = "running"
    restart_policy: RestartPolicy = "on-unhealthy"
    image_pull_policy: ImagePullPolicy = "on-create"
    startup_order: int = MAX_STARTUP_ORDER
    version: str = ""
    type: str = "docker"
    env: tuple[tuple[str, str], ...] = ()
    create_options: str = "{}"


def fingerprint(spec: ModuleSpec) -> str:
    """SHA-256 (hex) over every field: two specs share it exactly when they are equal.

    Fields at their default are left out of what is hashed, so that a later release can add a
    field without every module on a device looking changed.
    """
    # Not msgspec's omit_defaults: that compares by identity, so equal strings may hash unequal.
    changed = [
        (field.name, value)
        for field in msgspec.structs.fields(spec)
        if (value := getattr(spec, field.name)) != field.default
    ]
    return hashlib.sha256(msgspec.json.encode(changed)).hexdigest()
