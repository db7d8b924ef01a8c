"""Everything about a package that can be checked before the fabric is touched. Pure but for reads.

`examine` decides over facts; `preflight` reads them and stops at the first check that fails.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import LoadError
from .bitstream_file import Scanned, scan
from .board import same_part
from .decoupling import decouplers
from .handoff import Hardware, read_hardware
from .package import DmaStream, Package, RtlStream, StartedCores, VartRunner

CLOCK_TOLERANCE = 0.01
"""How far, relatively, dividers may leave a clock from what was asked for."""
UNLIMITED = 1 << 31
"""Bytes per transfer where no length register limits them."""
_CMA_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class Device:
    """The board as far as it is known: part, free contiguous memory, and the fabric's content.

    `loaded_sha256` is of the bitstream someone else has configured, None when nobody has.
    """

    part: str | None = None
    cma_bytes: int | None = None
    loaded_sha256: str | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """What the package's files turned out to be; `size` and `sha256` of the expanded bitstream."""

    sha256: str
    part: str
    hardware: Hardware
    size: int = 0
    partial: Scanned | None = None


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at. `ok` None: worth knowing, no obstacle."""

    name: str
    ok: bool | None
    detail: str


def examine(package: Package, found: Found, device: Device) -> tuple[Check, ...]:
    """All checks, in the order in which they matter."""
    return (
        _hash(package, found),
        _part(package, found, device),
        _clock(package, found),
        *_partial(package, found),
        _transfer(package, found),
        *_cores(package, found),
        _memory(package, device),
        _shutdown(found),
        _loaded(package, device),
    )


def look(package: Package) -> Found:
    """Read the files of a package. Raises LoadError."""
    hardware = read_hardware(package.hwh)
    found = scan(package.bit, part=hardware.part or package.part)
    part = found.part or hardware.part or package.part
    partial = package.partial
    return Found(
        found.sha256, part, hardware, found.size,
        None if partial is None else scan(partial.bit, part=part),
    )  # fmt: skip


def preflight(package: Package, part: str | None, cma_bytes: int | None = None) -> int:
    """The longest transfer in bytes. Raises LoadError naming both sides of what does not fit."""
    found = look(package)
    for check in examine(package, found, Device(part, cma_bytes)):
        if check.ok is False:
            raise LoadError(check.detail)
    return transfer_limit(package, found.hardware)


def transfer_limit(package: Package, hardware: Hardware) -> int:
    """Bytes per transfer. Raises LoadError when the package's DMA is not in the design."""
    transport = package.transport
    if isinstance(transport, DmaStream | RtlStream):
        return hardware.dma_limit(transport.dma)
    return UNLIMITED


def _hash(package: Package, found: Found) -> Check:
    same = found.sha256 == package.sha256
    return Check(
        "bitstream", same,
        f"sha256 {found.sha256}" if same else
        f"{package.bit}: sha256 is {found.sha256} but overlay.json says {package.sha256}; "
        "the package is damaged or was changed, build it again",
    )  # fmt: skip


def _part(package: Package, found: Found, device: Device) -> Check:
    if not same_part(found.part, package.part):
        return Check("part", False,
            f"{package.bit}: built for part {found.part} but overlay.json says "
            f"{package.part}; build the package again for one part")  # fmt: skip
    if device.part is None:
        return Check("part", None, f"{found.part}; the part of this board is not known")
    if not same_part(found.part, device.part):
        return Check("part", False,
            f"{package.bit}: built for part {found.part} but this board carries {device.part}; "
            "use the package for this board")  # fmt: skip
    return Check("part", True, found.part)


def _clock(package: Package, found: Found) -> Check:
    closed = found.hardware.clock_mhz
    if closed is None:
        return Check(
            "clock", None, f"{package.hwh.name} does not say what PL clock 0 was built for"
        )
    if package.clock_mhz > closed * (1 + CLOCK_TOLERANCE):
        return Check("clock", False,
            f"{package.name}: overlay.json asks for a clock of {package.clock_mhz} MHz but "
            f"{package.hwh.name} was built for {closed} MHz")  # fmt: skip
    return Check("clock", True, f"{package.clock_mhz:g} MHz, built for {closed:g} MHz")


def _partial(package: Package, found: Found) -> list[Check]:
    partial, scanned = package.partial, found.partial
    if partial is None or scanned is None:
        return []
    if scanned.sha256 != partial.sha256:
        return [Check("partial bitstream", False,
            f"{partial.bit}: sha256 is {scanned.sha256} but overlay.json says {partial.sha256}; "
            "the package is damaged or was changed, build it again")]  # fmt: skip
    if scanned.part is not None and not same_part(scanned.part, found.part):
        return [Check("partial bitstream", False,
            f"{partial.bit}: built for part {scanned.part}, {package.bit.name} for {found.part}; "
            "build both of one design")]  # fmt: skip
    try:
        cells = decouplers(found.hardware, partial.decouplers)
    except LoadError as error:
        return [Check("partial bitstream", False, str(error))]
    names = ", ".join(cell.name for cell in cells)
    detail = f"{scanned.size} bytes into {package.bit.name}"
    return [
        Check("partial bitstream", True, f"{detail}, decoupled by {names}")
        if cells
        else Check("partial bitstream", None, f"{detail}; nothing decouples the region meanwhile")
    ]


def _cores(package: Package, found: Found) -> list[Check]:
    transport, hardware = package.transport, found.hardware
    if isinstance(transport, StartedCores):
        names = [core.core for core in transport.cores]
    elif isinstance(transport, RtlStream):
        names = [transport.dma, transport.core]
    elif isinstance(transport, VartRunner):
        return []
    else:
        starter = transport.starter
        names = [transport.dma, *([] if starter is None else [starter.core])]
    checks = []
    for name in dict.fromkeys(names):
        try:
            cell = hardware.addressed(name)
        except LoadError as error:
            checks.append(Check("core", False, str(error)))
        else:
            checks.append(Check("core", True, f"{name} at 0x{cell.base:08X}"))
    return checks


def _transfer(package: Package, found: Found) -> Check:
    try:
        limit = transfer_limit(package, found.hardware)
    except LoadError as error:
        return Check("transfer", False, str(error))
    for port in (*package.inputs, *package.outputs):
        size = port.wire.item_bytes
        if size > limit:
            return Check("transfer", False,
                f"{package.name}: one item of {port.spec.name} is {size} bytes but "
                f"{_dma(package)} moves at most {limit} bytes at once (c_sg_length_width in "
                f"{package.hwh.name}); build the overlay with a wider length register")  # fmt: skip
    if limit == UNLIMITED:
        return Check("transfer", True, "cores fetch and store by themselves")
    widest = max((p.wire.item_bytes for p in (*package.inputs, *package.outputs)), default=1)
    return Check(
        "transfer", True,
        f"{limit} bytes at once, {min(package.max_batch, limit // widest)} items; larger batches "
        "are split",
    )  # fmt: skip


def _memory(package: Package, device: Device) -> Check:
    ports = (*package.inputs, *package.outputs)
    need = sum(package.max_batch * port.wire.item_bytes for port in ports)
    if device.cma_bytes is None:
        return Check("memory", None, f"takes {need} bytes of contiguous memory")
    least = sum(port.wire.item_bytes for port in ports)
    share = int(device.cma_bytes * _CMA_SHARE)
    if least > share:
        return Check("memory", False,
            f"{package.name}: one item takes {least} bytes of contiguous memory, {share} of "
            f"{device.cma_bytes} may be used; raise cma= on the kernel's command line")  # fmt: skip
    return Check("memory", True, f"{need} bytes of contiguous memory, {share} may be used")


def _shutdown(found: Found) -> Check:
    managers = found.hardware.shutdown_managers
    text = ", ".join(managers) if managers else "none; a hang ends with the next configuration"
    return Check("shutdown managers", None, text)


def _loaded(package: Package, device: Device) -> Check:
    other = device.loaded_sha256
    if other is None or other == package.sha256:
        return Check("fabric", True, "free" if other is None else "holds this bitstream")
    return Check("fabric", None, f"holds another bitstream ({other[:12]}), which is replaced")


def _dma(package: Package) -> str:
    transport = package.transport
    return transport.dma if isinstance(transport, DmaStream | RtlStream) else "the package"
