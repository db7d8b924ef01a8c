"""Docker's messages during a pull, added up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .container import PullProgress

_WAITING = ("Pulling fs layer", "Waiting")
_FETCHED = ("Verifying Checksum", "Download complete", "Extracting", "Pull complete")
_WHOLE = ("Pull complete", "Already exists")


@dataclass(slots=True)
class _Layer:
    done: int = 0
    total: int = 0
    whole: bool = False


class PullMeter:
    """Feed it every decoded message of `POST /images/create`.

    Bytes count downloads only; a layer's size is unknown until its download begins, so
    `bytes_total` grows. Layers that are there already have no bytes.
    """

    def __init__(self) -> None:
        self._layers: dict[str, _Layer] = {}

    def take(self, message: Mapping[str, Any]) -> PullProgress | None:
        """The sum, or None when `message` says nothing of it."""
        name, status = message.get("id"), message.get("status")
        if not isinstance(name, str) or not isinstance(status, str):
            return None
        if status == "Downloading":
            layer = self._layers.setdefault(name, _Layer())
            detail = message.get("progressDetail") or {}
            current, total = detail.get("current"), detail.get("total")
            if isinstance(current, int) and isinstance(total, int) and total > 0:
                layer.done, layer.total = min(current, total), total
        elif status in _WAITING or status in _WHOLE or status in _FETCHED:
            layer = self._layers.setdefault(name, _Layer())
            if status in _FETCHED:
                layer.done = layer.total
            layer.whole = layer.whole or status in _WHOLE
        else:
            return None
        layers = self._layers.values()
        return PullProgress(
            sum(layer.done for layer in layers),
            sum(layer.total for layer in layers),
            sum(layer.whole for layer in layers),
            len(layers),
        )
