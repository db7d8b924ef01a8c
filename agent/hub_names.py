"""By which names the modules of this device find its hub, as far as they are known.

A configuration names the hub, a provisioning or identity service says it with the first connection:
what was said is kept, so that after a reboot without network containers stay as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import msgspec

from .store import StateStore
from .store_types import StoreError

if TYPE_CHECKING:
    from .identity.login import Login
    from .identity.sources import IdentitySource

log = logging.getLogger(__name__)

_FACT = "hub-names"


class HubNames(msgspec.Struct, frozen=True):
    """`host` of the hub, `device` there, and the `gateway` to connect to in place of the hub."""

    host: str = ""
    device: str = ""
    gateway: str = ""


def names_of(source: IdentitySource) -> HubNames | None:
    """Those that `source` itself says, None where a service has to be asked."""
    from .identity.sources import EdgeEnvironment, ModuleOf, Registered

    if isinstance(source, ModuleOf):
        return names_of(source.device)
    if isinstance(source, Registered):
        return HubNames(source.host, source.device, source.gateway)
    if isinstance(source, EdgeEnvironment):
        return _of_environment(source.variables)
    return None


def _of_environment(variables: Mapping[str, str]) -> HubNames | None:
    host, device = variables.get("IOTEDGE_IOTHUBHOSTNAME"), variables.get("IOTEDGE_DEVICEID")
    if not host or not device:
        return None
    return HubNames(host, device, variables.get("IOTEDGE_GATEWAYHOSTNAME", ""))


class KnownHub:
    """`names` of now. `on_change` is called when they change."""

    def __init__(self, store: StateStore) -> None:
        self._store = store
        self.on_change: Callable[[], None] = lambda: None
        self.names = HubNames()

    def begin(self, source: IdentitySource) -> None:
        """What is known before the first connection of `source`; without one there is no hub."""
        self.names = names_of(source) or _decoded(self._store.fact(_FACT))

    def note(self, login: Login) -> None:
        """A hub took this login."""
        names = HubNames(login.host, login.device, login.gateway)
        if names == self.names:
            return
        log.info("modules find their hub as %s, device %s", names.host, names.device)
        self.names = names
        try:
            self._store.note_fact(_FACT, msgspec.json.encode(names).decode())
        except StoreError as error:
            # Known all the same; the next connection says it again.
            log.error("%s", error)
        self.on_change()


def _decoded(text: str) -> HubNames:
    return msgspec.json.decode(text, type=HubNames) if text else HubNames()
