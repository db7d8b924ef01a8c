"""From a socket in a container's folder to an `Instance`."""

from __future__ import annotations

import time

from .batching import BatchConfig, normalised_priority
from .errors import InstanceUnavailable
from .instances import Instance, Member, State
from .loading import InstanceOptions
from .remote import RemoteSession, Served

_NO_VERSION = "1"


class LoadedRemote:
    """As `Loaded`, for a model that a container serves. It stacks its requests itself.

    `directory` is where it is served. Raises InstanceRefused, InstanceUnavailable.
    """

    missing = False
    notes: tuple[str, ...] = ()

    def __init__(self, served: Served, options: InstanceOptions, name: str) -> None:
        self.directory = served
        self.options = options
        # Instances are named MODULE@what they are made of.
        self._session = RemoteSession(served, name.rpartition("@")[0] or name)
        metadata = self._session.metadata
        self._member = Member(
            self._session, f"container {served.socket}", time.monotonic, proven=False
        )
        self.instance = Instance(
            name,
            metadata.name,
            metadata.versions[0] if metadata.versions else _NO_VERSION,
            metadata.inputs,
            metadata.outputs,
            [self._member],
            platform=metadata.platform or "container",
            timeout=options.timeout,
            batching=BatchConfig(
                slots=options.slots or self._session.concurrency,
                priority=normalised_priority(options.priority),
            ),
        )
        self.instance.auth = options.auth
        self.instance.clients = frozenset(options.clients)

    def retry_missing(self) -> list[str]:
        """Nothing: the session connects again by itself."""
        return []

    def probe(self) -> None:
        """READY once the container says that its model is. Raises InstanceUnavailable until
        then, with the state unchanged."""
        reason = self._session.check()
        if reason is not None:
            raise InstanceUnavailable(reason)
        self._member.proven = True
        self._session.watch()
        self.instance.error = ""
        self.instance.state = State.READY
