"""What the fabric process counts and measures, as metrics and for the agent's status."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from .prometheus import Family

Status = Mapping[str, Any]

_COUNTERS = (
    ("busySeconds", "busy_seconds_total", "Time that somebody had the fabric, whatever for"),
    ("configuringSeconds", "configuring_seconds_total", "Time that configuring it took"),
    ("requests", "requests_total", "Requests that reached the fabric process"),
    ("transfers", "transfers_total", "Transfers through the fabric"),
    ("reconfigurations", "reconfigurations_total", "Bitstreams that were configured"),
    ("partialReconfigurations", "partial_reconfigurations_total",
     "Partial bitstreams that were configured"),
    ("swaps", "swaps_total", "Turns after which another overlay had the fabric"),
    ("swapsAvoided", "swaps_avoided_total", "Turns of the loaded overlay ahead of another's"),
    ("refused", "refused_total", "Requests refused since configuring takes too long for them"),
    ("prefetches", "prefetches_total", "Overlays configured before a request for them came"),
    ("expired", "expired_total", "Requests whose deadline passed in line"),
    ("dmaErrors", "dma_errors_total", "Transfers that ended with an error of a DMA"),
    ("hangs", "hangs_total", "Transfers that did not end"),
    ("resets", "resets_total", "Resets of cores and DMAs after failures"),
    ("replaced", "replaced_total", "Times another process had configured the fabric"),
)  # fmt: skip
_GAUGES = (
    ("queued", "queued", "Requests in line for the fabric"),
    ("uptimeSeconds", "uptime_seconds", "Time since the fabric process started"),
)


class FabricMetrics:
    """A `MetricsSource`. `status` gives what the process told last.

    That is None while it is away, and empty before it was asked.
    """

    def __init__(self, status: Callable[[], Status | None]) -> None:
        self._status = status

    def document(self) -> bytes:
        """The same for the agent, as JSON; `{"up": false}` while the process is away."""
        status = self._status()
        if status is not None and not status:
            return b""
        return json.dumps({"up": status is not None, **(status or {})}).encode()

    def metrics(self) -> list[Family]:
        status = self._status()
        if status is not None and not status:
            return []
        up = Family("gatelet_fabric_up", "gauge", "1 while the fabric process answers")
        up.add(int(status is not None))
        if status is None:
            return [up]
        sick = Family("gatelet_fabric_sick", "gauge", "1 after a failure, until a transfer works")
        sick.add(int(status.get("trouble") is not None))
        about = Family("gatelet_fabric_info", "gauge", "Board, part, and the overlay in the fabric")
        about.add(
            1, tuple((key, str(status.get(key) or "")) for key in ("board", "part", "loaded"))
        )
        families = [up, sick, about]
        for keys, kind in ((_COUNTERS, "counter"), (_GAUGES, "gauge")):
            for key, name, text in keys:
                family = Family(f"gatelet_fabric_{name}", kind, text)
                if (value := _number(status.get(key))) is not None:
                    family.add(value)
                families.append(family)
        for key, name, text, label, factor in (
            ("temperatures", "temperature_celsius", "What a sensor of the board measures",
             "sensor", 1.0),
            ("clocksMhz", "clock_hertz", "Clocks that the processor gives to the fabric",
             "clock", 1e6),
        ):  # fmt: skip
            family = Family(f"gatelet_fabric_{name}", "gauge", text)
            measured = status.get(key)
            for sensor, told in sorted(measured.items()) if isinstance(measured, Mapping) else ():
                if (value := _number(told)) is not None:
                    family.add(value * factor, ((label, str(sensor)),))
            families.append(family)
        return families


def _number(value: object) -> float | int | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value
