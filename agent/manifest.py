"""The IoT Edge deployment manifest: from bytes of unknown origin to a frozen `Manifest`."""

from __future__ import annotations

import msgspec

from .document import ManifestError
from .module_spec import ModuleSpec, RegistryCredential, Runtime, fingerprint

__all__ = [
    "Manifest",
    "ManifestError",
    "ModuleSpec",
    "RegistryCredential",
    "Runtime",
    "fingerprint",
]


class Manifest(msgspec.Struct, frozen=True):
    """A whole deployment. `modules` is sorted by startup order, then name.

    `system_modules` holds edgeAgent and, when given, edgeHub. `registry_credentials` keep the
    order of the document, because the first match wins.
    """

    schema_version: str
    runtime: Runtime = Runtime()
    system_modules: tuple[ModuleSpec, ...] = ()
    modules: tuple[ModuleSpec, ...] = ()
    registry_credentials: tuple[RegistryCredential, ...] = ()
