"""The part of a hardware design the simulated fabric acts on, taken from pynq's own metadata."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...accelerators.fpga.decoupling import DECOUPLERS
from ...accelerators.fpga.handoff import SHUTDOWN_MANAGERS

_DMA_TYPE = "xilinx.com:ip:axi_dma:"
# Cores that only reshape a stream on its way.
_PASS_THROUGH = (
    "axis_dwidth_converter",
    "axis_data_fifo",
    "axis_register_slice",
    "axis_clock_converter",
    "axis_subset_converter",
)


@dataclass(frozen=True, slots=True)
class DmaCell:
    """One AXI DMA: where its registers are, how long a transfer may be, what it feeds.

    `core` is the full name of the core its stream ends at, None when it is not connected.
    """

    name: str
    base: int
    size: int
    length_width: int
    core: str | None


@dataclass(frozen=True, slots=True)
class Design:
    """`dmas`, and name, base and size of every other addressable core.

    `decouplers` are the names of those that cut a region off, with whether they shut AXI down.
    """

    dmas: tuple[DmaCell, ...]
    others: tuple[tuple[str, int, int], ...]
    decouplers: tuple[tuple[str, bool], ...] = ()


def read_design(parser: Any) -> Design:
    """The design in a pynq RuntimeMetadataParser."""
    dmas = []
    others = []
    decouplers = []
    for name, entry in sorted(parser.ip_dict.items()):
        base, size = entry.get("phys_addr"), entry.get("addr_range")
        if base is None or size is None:
            continue
        if str(entry["type"]).startswith(_DMA_TYPE):
            parameters = {str(k).lower(): v for k, v in entry["parameters"].items()}
            width = int(parameters.get("c_sg_length_width", 26))
            dmas.append(DmaCell(name, base, size, width, _fed_core(parser.md, name)))
        else:
            others.append((name, base, size))
            kind = str(entry["type"]).split(":")[2:3]
            if kind and kind[0] in (*DECOUPLERS, *SHUTDOWN_MANAGERS):
                decouplers.append((name, kind[0] in SHUTDOWN_MANAGERS))
    return Design(tuple(dmas), tuple(others), tuple(decouplers))


def _fed_core(metadata: Any, dma: str) -> str | None:
    blocks = {block.hierarchy_name: block for block in metadata.blocks.values()}
    block = blocks.get(dma)
    port = block.ports.get("M_AXIS_MM2S") if block is not None else None
    for _ in range(len(blocks)):
        following = next(iter(port.destinations().values()), None) if port is not None else None
        if following is None:
            return None
        block = following.parent()
        if block.vlnv.name not in _PASS_THROUGH:
            return str(block.hierarchy_name)
        port = next((p for p in block.ports.values() if _gives_stream(p)), None)
    return None


def _gives_stream(port: Any) -> bool:
    return port.vlnv is not None and port.vlnv.name == "axis" and bool(port.driver)
