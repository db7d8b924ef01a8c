"""From where an identity comes to what a connection is opened with, again for each connection."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from ..clock import Clock, SystemClock
from .certificates import Stamp, check, expiry_warning, stamp
from .edge import login_from_environment, login_from_identity_service
from .login import Login
from .module_identity import module_login
from .provisioning import Network, login_with, read_assignment, register, write_assignment
from .signing import sign_with
from .sources import (
    CertificateFiles,
    Dps,
    EdgeEnvironment,
    IdentityError,
    IdentityService,
    IdentitySource,
    ModuleOf,
    Registered,
    certificate_of,
    files_of,
)

_log = logging.getLogger(__name__)
_UNREACHABLE = 5


class IdentityResolver:
    """What is remembered between connections: the assigned hub, a module's login."""

    def __init__(
        self,
        source: IdentitySource,
        network: Network,
        *,
        state_dir: Path | None = None,
        clock: Clock | None = None,
    ) -> None:
        """`state_dir` keeps the hub that a provisioning service assigned."""
        self._source = source
        self._network = network
        self._file = None if state_dir is None else state_dir / "provisioned-hub.json"
        self._clock = clock or SystemClock()
        self._module: Login | None = None
        self._ask_again = False
        self._unreachable = 0
        self._checked: tuple[Stamp, datetime | IdentityError] | None = None

    async def login(self) -> Login:
        """Raises IdentityError."""
        source = self._source
        if isinstance(source, ModuleOf):
            if self._module is None:
                device = await self._device(source.device)
                self._module = await asyncio.to_thread(
                    module_login,
                    device,
                    source.module,
                    ca_file=self._network.ca_file,
                    proxy=self._network.proxy,
                    now=self._clock.now(),
                )
            return self._module
        if isinstance(source, EdgeEnvironment):
            return await asyncio.to_thread(login_from_environment, source.variables)
        if isinstance(source, IdentityService):
            return await asyncio.to_thread(login_from_identity_service, source)
        return await self._device(source)

    def connected(self) -> None:
        """The hub took the newest login."""
        self._ask_again, self._unreachable = False, 0

    def refused(self) -> None:
        """The hub did not take the newest login: what is remembered may be out of date."""
        self._module = None
        self._ask_again = True

    def unreachable(self) -> None:
        """No connection came about; a hub that stays away may be gone for good."""
        self._unreachable += 1
        if self._unreachable % _UNREACHABLE == 0:
            self.refused()

    def stamp(self) -> Stamp:
        """Differs when a file that proves the identity was replaced."""
        return stamp(files_of(self._source))

    def warning(self) -> str | None:
        """Of a certificate that ends soon; None where all is well. Reads files that changed."""
        files = certificate_of(self._source)
        if files is None:
            return None
        now = stamp(files.paths)
        if self._checked is None or self._checked[0] != now:
            try:
                self._checked = now, check(files)
            except IdentityError as error:
                self._checked = now, error
        found = self._checked[1]
        if isinstance(found, IdentityError):
            return str(found)
        return expiry_warning(files, found, self._clock.now())

    async def _device(self, source: Registered | Dps) -> Login:
        if isinstance(source.proof, CertificateFiles):
            await asyncio.to_thread(check, source.proof)
        if isinstance(source, Dps):
            return await self._provisioned(source)
        login = Login(source.host, source.device, source.module, source.gateway)
        if isinstance(source.proof, CertificateFiles):
            return replace(login, certificate=source.proof)
        return replace(login, sign=sign_with(source.proof))

    async def _provisioned(self, source: Dps) -> Login:
        known = None if self._file is None else read_assignment(self._file, source)
        if known is None or self._ask_again:
            try:
                assigned = await register(source, self._network)
            except IdentityError as error:
                if known is None:
                    raise
                # The hub may be right after all, and it is all we know.
                _log.warning("staying with %s: %s", known.hub, error)
            else:
                self._ask_again = False
                if assigned != known:
                    known = assigned
                    if self._file is not None:
                        write_assignment(self._file, source, assigned)
        return await asyncio.to_thread(login_with, source, known)
