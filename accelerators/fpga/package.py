"""What an overlay package says, whoever built it: files, tensors, and how data gets in and out.

`packages.probe` makes one from a directory; nothing here touches the fabric or runs code of a
package.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..tensors import TensorSpec
from .elements import Element
from .packing import packed_size

KINDS = ("stream", "finn", "hls4ml", "bnn-pynq", "gatelet-rtl", "dpu")
"""Values of a variant's "kind" that name an overlay package."""


@dataclass(frozen=True, slots=True)
class WireFormat:
    """How one item of a tensor travels: `elements` values of `dtype`, quantised affinely.

    real = (wire - zero_point) * scale, as in ONNX QuantizeLinear / DequantizeLinear.
    """

    dtype: str
    scale: float
    zero_point: int
    elements: int

    @property
    def item_bytes(self) -> int:
        return self.elements


@dataclass(frozen=True, slots=True)
class PackedWire:
    """How one item travels as `rows` rows of `inner` elements, each row filled up to bytes.

    `padding` bytes of zeros follow the last row.
    """

    element: Element
    rows: int
    inner: int
    padding: int = 0

    @property
    def item_bytes(self) -> int:
        return self.rows * packed_size(self.inner, self.element) + self.padding

    @property
    def elements(self) -> int:
        return self.rows * self.inner


@dataclass(frozen=True, slots=True)
class Port:
    """A tensor as clients see it, and as the fabric does."""

    spec: TensorSpec
    wire: WireFormat | PackedWire


@dataclass(frozen=True, slots=True)
class Signature:
    """Inputs and outputs as model.json promises them, in the package's order."""

    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()


@dataclass(frozen=True, slots=True)
class Pointer:
    """The register (offset from the core) that takes a buffer's address, and which buffer.

    `role` is "in", "out" or "weights"; the upper half goes into the register behind it.
    """

    offset: int
    role: str
    index: int


@dataclass(frozen=True, slots=True)
class StartedCore:
    """An HLS core: control at 0, pointers, and the items to do at `count`.

    `chained`: its block protocol is ap_ctrl_chain, where it goes on once it is told to.
    """

    core: str
    pointers: tuple[Pointer, ...]
    count: int | None
    chained: bool = False


@dataclass(frozen=True, slots=True)
class DmaStream:
    """One AXI DMA in simple mode with the network between its channels. `dma` is a cell's name.

    `starter` is a network that has to be started for each transfer, without pointers.
    """

    dma: str
    starter: StartedCore | None = None


@dataclass(frozen=True, slots=True)
class WeightFile:
    """Weights that go in before the first item: `sha256` is of the file.

    `form` is "words" (hexadecimal words of FINN into the registers of `core`, from offset 0),
    "buffer" (an .npy into memory that `core` reads) or "bnn" (BNN-PYNQ's memory writes; the
    core's memory is `layer`, its unit `unit`, and `per_line` words of the file share an index).
    """

    core: str
    path: Path
    form: str
    sha256: str
    layer: int = 0
    unit: int = 0
    per_line: int = 1


@dataclass(frozen=True, slots=True)
class StartedCores:
    """Cores that fetch and store by themselves, started in this order; done when `awaited` are."""

    cores: tuple[StartedCore, ...]
    awaited: tuple[str, ...]
    weights: tuple[WeightFile, ...] = ()


@dataclass(frozen=True, slots=True)
class RtlStream:
    """gatelet's own core behind an AXI DMA, with the program it runs."""

    dma: str
    core: str
    program: Path
    program_sha256: str


@dataclass(frozen=True, slots=True)
class VartRunner:
    """A DPU, driven by Vitis AI's runtime."""

    xmodel: Path
    xmodel_sha256: str


@dataclass(frozen=True, slots=True)
class Partial:
    """The part of a design that makes this package of it (Dynamic Function eXchange).

    `bit` goes into a region of the package's full bitstream; `sha256` is of it, expanded.
    `decouplers` names the cores that cut the region off; None: those the handoff shows.
    """

    bit: Path
    sha256: str
    decouplers: tuple[str, ...] | None = None


Transport = DmaStream | StartedCores | RtlStream | VartRunner


@dataclass(frozen=True, slots=True)
class Package:
    """An overlay package. `part` is that of the bitstream; `board` None where it does not say.

    `bit` may be compressed; `sha256` is of the expanded bitstream.
    """

    kind: str
    name: str
    directory: Path
    bit: Path
    hwh: Path
    board: str | None
    part: str
    clock_mhz: float
    transport: Transport
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    max_batch: int
    sha256: str
    partial: Partial | None = None

    @property
    def static(self) -> tuple[object, ...] | None:
        """Equal for packages of which one can follow another by its partial bitstream."""
        return None if self.partial is None else (self.sha256, self.clock_mhz)

    @property
    def identity(self) -> tuple[object, ...]:
        """Equal for packages that can take each other's place in the fabric, wherever they are."""
        transport: object = self.transport
        if isinstance(transport, StartedCores):
            files = tuple(
                (w.core, w.form, w.sha256, w.layer, w.unit, w.per_line) for w in transport.weights
            )
            transport = (transport.cores, transport.awaited, files)
        elif isinstance(transport, RtlStream):
            transport = (transport.dma, transport.core, transport.program_sha256)
        elif isinstance(transport, VartRunner):
            transport = transport.xmodel_sha256
        partial = None
        if self.partial is not None:
            partial = (self.partial.sha256, self.partial.decouplers)
        return (
            self.sha256, partial, transport, self.clock_mhz, self.max_batch, self.inputs,
            self.outputs,
        )  # fmt: skip


BUFFER_BUDGET = 1 << 20
"""Bytes of contiguous memory a package takes per tensor where it does not say how many items."""


def batch_for(ports: tuple[Port, ...], most: int = 1024) -> int:
    """Items per transfer so that no buffer exceeds the budget."""
    widest = max((port.wire.item_bytes for port in ports), default=1)
    return max(1, min(most, BUFFER_BUDGET // max(1, widest)))
