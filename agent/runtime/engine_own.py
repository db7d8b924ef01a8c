"""What an engine makes of a create body by itself, in ways that no rule of `drift` foresees.

Looked at right after a container was made, and never taken for somebody's change afterwards. Kept
over restarts of the agent: else every container of such an engine would be made anew by each.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable

_REMEMBERED = 500


class EnginesOwn:
    """Settings by container id; for several threads."""

    def __init__(self, saved: str = "", save: Callable[[str], None] = lambda text: None) -> None:
        """`saved` is what `save` was given last, "" at first."""
        self._save = save
        self._lock = threading.Lock()
        found = json.loads(saved) if saved else {}
        self._settings = {identity: frozenset(names) for identity, names in found.items()}

    def of(self, identity: str) -> frozenset[str]:
        with self._lock:
            return self._settings.get(identity, frozenset())

    def note(self, identity: str, settings: frozenset[str]) -> None:
        """Of a container that was just made."""
        if not settings:
            return
        with self._lock:
            self._settings[identity] = settings
            while len(self._settings) > _REMEMBERED:
                del self._settings[next(iter(self._settings))]
            # Under the lock too: what is saved last must hold what was noted last.
            self._save(json.dumps({one: sorted(names) for one, names in self._settings.items()}))
