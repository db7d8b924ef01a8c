"""What computes behind the streams of the simulated fabric."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from .network import MAGIC, DenseLayer, decode_network, run_network


class StreamCore(Protocol):
    """A core between the two streams of a DMA: takes a packet, gives a packet."""

    def process(self, packet: bytes) -> bytes:
        """The output for one input packet; empty when nothing comes out (yet)."""


class LoopbackCore:
    """Gives back what it takes."""

    def process(self, packet: bytes) -> bytes:
        return packet


class NetworkCore:
    """Dense layers: int8 items in, int8 items out. Waits for the rest of an incomplete item."""

    def __init__(self, layers: tuple[DenseLayer, ...]) -> None:
        self._layers = layers
        self._width = layers[0].weights.shape[0]
        self._pending = b""

    def process(self, packet: bytes) -> bytes:
        stream = self._pending + packet
        whole = len(stream) // self._width * self._width
        self._pending = stream[whole:]
        items = np.frombuffer(stream[:whole], np.int8).reshape(-1, self._width)
        return run_network(self._layers, items).tobytes()


def synthesise(data: bytes) -> StreamCore:
    """The core that configuration data describes: a network container, else a loopback.

    Raises ValueError when the container is damaged.
    """
    return NetworkCore(decode_network(data)) if data.startswith(MAGIC) else LoopbackCore()
