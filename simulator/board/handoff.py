"""Hardware handoff (.hwh) files of simulated designs, as far as pynq's parser needs them.

A design: processing system, maybe an AXI DMA in simple mode behind an interconnect with a core
between its two channels, and cores with registers (some fetch and store by themselves).
Interfaces are listed with the signals that join them, since the parser follows signals from core
to core.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from xml.sax.saxutils import quoteattr

_AXIS = "xilinx.com:interface:axis:1.0"
_AXIMM = "xilinx.com:interface:aximm:1.0"
_DDR_HIGH = 0x1FFFFFFF

# Signal, whether the initiator drives it, width.
_STREAM_SIGNALS = (
    ("TDATA", True, 32), ("TKEEP", True, 4), ("TLAST", True, 1),
    ("TREADY", False, 1), ("TVALID", True, 1),
)  # fmt: skip
_LITE_SIGNALS = (
    ("ARADDR", True, 32), ("ARREADY", False, 1), ("ARVALID", True, 1),
    ("AWADDR", True, 32), ("AWREADY", False, 1), ("AWVALID", True, 1),
    ("BREADY", True, 1), ("BRESP", False, 2), ("BVALID", False, 1),
    ("RDATA", False, 32), ("RREADY", True, 1), ("RRESP", False, 2), ("RVALID", False, 1),
    ("WDATA", True, 32), ("WREADY", False, 1), ("WVALID", True, 1),
)  # fmt: skip

_DMA_CHANNEL_REGISTERS = (
    ("DMACR", 0x00, "DMA control", (
        ("RS", 0, 1, "read-write"), ("Reset", 2, 1, "read-write"),
        ("IOC_IrqEn", 12, 1, "read-write"), ("Err_IrqEn", 14, 1, "read-write"),
    )),
    ("DMASR", 0x04, "DMA status", (
        ("Halted", 0, 1, "read-only"), ("Idle", 1, 1, "read-only"),
        ("DMAIntErr", 4, 1, "read-only"), ("DMASlvErr", 5, 1, "read-only"),
        ("DMADecErr", 6, 1, "read-only"), ("IOC_Irq", 12, 1, "read-write"),
        ("Err_Irq", 14, 1, "read-write"),
    )),
)  # fmt: skip


_CHAINED = (
    ("AP_START", 0, 1, "read-write"), ("AP_DONE", 1, 1, "read-only"),
    ("AP_IDLE", 2, 1, "read-only"), ("AP_CONTINUE", 4, 1, "read-write"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class LiteCore:
    """A core with an AXI-Lite window of `size` bytes at `base`; `registers` name -> offset.

    `chained`: its control register has the bit of ap_ctrl_chain.
    """

    name: str
    vlnv: str
    base: int
    registers: tuple[tuple[str, int], ...] = ()
    size: int = 0x10000
    masters_memory: bool = False
    chained: bool = False


@dataclass(frozen=True, slots=True)
class StreamDesign:
    """What varies between designs. `dma_length_width` is c_sg_length_width, in bits.

    Without `dma` there is neither a DMA nor a stream core. A core that has registers as well is in
    `lite` under the stream core's name.
    """

    name: str
    part: str
    clock_mhz: float
    dma_length_width: int = 14
    dma: str | None = "axi_dma_0"
    core: str = "dense_network_0"
    core_vlnv: str = "gatelet:stream:dense_network:1.0"
    dma_base: int = 0x40400000
    lite: tuple[LiteCore, ...] = ()


@dataclass(frozen=True, slots=True)
class _Interface:
    name: str
    vlnv: str
    initiator: bool
    bus: str
    peer: str
    peer_interface: str
    signals: tuple[tuple[str, bool, int], ...]


@dataclass(slots=True)
class _Module:
    instance: str
    modtype: str
    vlnv: str
    parameters: dict[str, str]
    interfaces: list[_Interface] = field(default_factory=list)
    body: list[str] = field(default_factory=list)

    @property
    def flat(self) -> str:
        """The instance name, which Vivado makes of the path through the hierarchy."""
        return self.instance.replace("/", "_")


def encode_handoff(design: StreamDesign) -> str:
    """The text of the .hwh file."""
    zynq7 = design.part.lower().startswith("xc7")
    system = _zynq7_system(design) if zynq7 else _zynqmp_system(design)
    registers, memory = (
        _Module("axi_interconnect_0", "axi_interconnect", "xilinx.com:ip:axi_interconnect:2.1", {}),
        _Module("axi_interconnect_1", "axi_interconnect", "xilinx.com:ip:axi_interconnect:2.1", {}),
    )
    master, slave = ("M_AXI_GP0", "S_AXI_HP0") if zynq7 else ("M_AXI_HPM0_FPD", "S_AXI_HP0_FPD")
    _join("registers_in", system, master, registers, "S00_AXI", _AXIMM)
    _join("memory_out", memory, "M00_AXI", system, slave, _AXIMM)
    modules = {lite.name: _lite_module(lite) for lite in design.lite}
    ranges = []
    to_registers, to_memory = 0, 0
    if design.dma is not None:
        dma = _dma(design, design.dma)
        modules[design.dma] = dma
        core = modules.setdefault(
            design.core,
            _Module(design.core, design.core_vlnv.split(":")[2], design.core_vlnv, {}),
        )
        for bus, (source, port), (target, target_port), vlnv in (
            ("registers_out", (registers, "M00_AXI"), (dma, "S_AXI_LITE"), _AXIMM),
            ("mm2s", (dma, "M_AXI_MM2S"), (memory, "S00_AXI"), _AXIMM),
            ("s2mm", (dma, "M_AXI_S2MM"), (memory, "S01_AXI"), _AXIMM),
            ("stream_in", (dma, "M_AXIS_MM2S"), (core, "in"), _AXIS),
            ("stream_out", (core, "out"), (dma, "S_AXIS_S2MM"), _AXIS),
        ):
            _join(bus, source, port, target, target_port, vlnv)
        ranges.append(
            ("Reg", design.dma_base, design.dma_base + 0xFFFF, dma.flat, master, "S_AXI_LITE")
        )
        dma.body.append(
            _memory_map(
                ("HP0_DDR_LOWOCM", 0, _DDR_HIGH, system.flat, "M_AXI_MM2S", slave),
                ("HP0_DDR_LOWOCM", 0, _DDR_HIGH, system.flat, "M_AXI_S2MM", slave),
                kind="MEMORY",
            )
        )
        to_registers, to_memory = 1, 2
    for lite in design.lite:
        module = modules[lite.name]
        port = f"M{to_registers:02d}_AXI"
        _join(f"lite_{module.flat}", registers, port, module, "s_axi_control", _AXIMM)
        to_registers += 1
        ranges.append(
            ("Reg", lite.base, lite.base + lite.size - 1, module.flat, master, "s_axi_control")
        )
        if lite.masters_memory:
            port = f"S{to_memory:02d}_AXI"
            _join(f"memory_{module.flat}", module, "m_axi_gmem", memory, port, _AXIMM)
            to_memory += 1
            module.body.append(
                _memory_map(
                    ("HP0_DDR_LOWOCM", 0, _DDR_HIGH, system.flat, "m_axi_gmem", slave),
                    kind="MEMORY",
                )
            )
    system.body.append(_memory_map(*ranges, kind="REGISTER"))
    device, package, grade = _part_fields(design.part)
    lines = [
        '<?xml version="1.0" encoding="UTF-8" standalone="no" ?>',
        '<EDKSYSTEM EDWVERSION="1.2" TIMESTAMP="Mon Jan  1 00:00:00 2024" VIVADOVERSION="2022.1">',
        f"  <SYSTEMINFO ARCH={quoteattr('zynq' if zynq7 else 'zynquplus')} "
        f"DEVICE={quoteattr(device)} NAME={quoteattr(design.name)} "
        f"PACKAGE={quoteattr(package)} SPEEDGRADE={quoteattr(grade)}/>",
        "  <EXTERNALPORTS/>",
        "  <EXTERNALINTERFACES/>",
        "  <MODULES>",
    ]
    for module in (*modules.values(), registers, memory, system):
        lines += _module_lines(module)
    return "\n".join([*lines, "  </MODULES>", "</EDKSYSTEM>", ""])


def _part_fields(part: str) -> tuple[str, str, str]:
    """("7z020", "clg400", "-1") of "xc7z020clg400-1"; ("xck26", "sfvc784", "-2LV") of a Kria."""
    if part.lower().startswith("xc7"):
        body, _, grade = part[2:].partition("-")
        cut = next(i for i in range(2, len(body)) if body[i].isalpha() and body[i - 1].isdigit())
        return body[:cut], body[cut:], f"-{grade}"
    device, package, *grades = part.split("-")
    return device, package, f"-{grades[0]}" if grades else ""


def _zynq7_system(design: StreamDesign) -> _Module:
    parameters: dict[str, str] = {}
    for index in range(4):
        used = index == 0
        frequency = design.clock_mhz if used else 10.0
        divisor0, divisor1 = _divisors(1000.0, frequency)
        parameters |= {
            f"PCW_FPGA_FCLK{index}_ENABLE": str(int(used)),
            f"PCW_FCLK{index}_PERIPHERAL_CLKSRC": "IO PLL",
            f"PCW_FCLK{index}_PERIPHERAL_DIVISOR0": str(divisor0),
            f"PCW_FCLK{index}_PERIPHERAL_DIVISOR1": str(divisor1),
            f"PCW_FPGA{index}_PERIPHERAL_FREQMHZ": f"{frequency:g}",
            f"PCW_ACT_FPGA{index}_PERIPHERAL_FREQMHZ": f"{frequency:.6f}",
        }
    return _Module(
        "processing_system7_0",
        "processing_system7",
        "xilinx.com:ip:processing_system7:5.5",
        parameters,
    )


def _zynqmp_system(design: StreamDesign) -> _Module:
    parameters = {"C_MAXIGP0_DATA_WIDTH": "32", "C_SAXIGP2_DATA_WIDTH": "64"}
    for index in range(4):
        used = index == 0
        frequency = design.clock_mhz if used else 10.0
        divisor0, divisor1 = _divisors(1500.0, frequency)
        control = f"PSU__CRL_APB__PL{index}_REF_CTRL__"
        parameters |= {
            f"PSU__FPGA_PL{index}_ENABLE": str(int(used)),
            f"{control}DIVISOR0": str(divisor0),
            f"{control}DIVISOR1": str(divisor1),
            f"{control}SRCSEL": "IOPLL",
            f"{control}ACT_FREQMHZ": f"{frequency:.6f}",
        }
    return _Module(
        "zynq_ultra_ps_e_0", "zynq_ultra_ps_e", "xilinx.com:ip:zynq_ultra_ps_e:3.4", parameters
    )


def _divisors(source_mhz: float, wanted_mhz: float) -> tuple[int, int]:
    return min(
        ((a, b) for a in range(1, 64) for b in range(1, a + 1)),
        key=lambda pair: (abs(source_mhz / (pair[0] * pair[1]) - wanted_mhz), pair),
    )


def _lite_module(lite: LiteCore) -> _Module:
    module = _Module(
        lite.name,
        lite.vlnv.split(":")[2],
        lite.vlnv,
        {
            "C_S_AXI_CONTROL_BASEADDR": f"0x{lite.base:08X}",
            "C_S_AXI_CONTROL_HIGHADDR": f"0x{lite.base + lite.size - 1:08X}",
        },
    )
    if lite.registers:
        lines = [
            "      <ADDRESSBLOCKS>",
            '        <ADDRESSBLOCK ACCESS="read-write" INTERFACE="s_axi_control" NAME="Reg" '
            f'RANGE="{lite.size}" USAGE="register">',
            "          <REGISTERS>",
        ]
        for name, offset in lite.registers:
            fields = _CHAINED if lite.chained and name == "CTRL" else ()
            lines += _register_lines(name, offset, name, fields)
        module.body = [*lines, "          </REGISTERS>", "        </ADDRESSBLOCK>",
                       "      </ADDRESSBLOCKS>"]  # fmt: skip
    return module


def _dma(design: StreamDesign, name: str) -> _Module:
    module = _Module(
        name,
        "axi_dma",
        "xilinx.com:ip:axi_dma:7.1",
        {
            "C_BASEADDR": f"0x{design.dma_base:08X}",
            "C_HIGHADDR": f"0x{design.dma_base + 0xFFFF:08X}",
            "c_include_mm2s": "1",
            "c_include_mm2s_dre": "0",
            "c_include_s2mm": "1",
            "c_include_s2mm_dre": "0",
            "c_include_sg": "0",
            "c_m_axi_mm2s_data_width": "32",
            "c_m_axi_s2mm_data_width": "32",
            "c_micro_dma": "0",
            "c_sg_length_width": str(design.dma_length_width),
        },
    )
    lines = [
        "      <ADDRESSBLOCKS>",
        '        <ADDRESSBLOCK ACCESS="read-write" INTERFACE="S_AXI_LITE" NAME="Reg" '
        'RANGE="4096" USAGE="register">',
        "          <REGISTERS>",
    ]
    for channel, base, address in (("MM2S", 0x00, "SA"), ("S2MM", 0x30, "DA")):
        for name, offset, text, fields in (
            *_DMA_CHANNEL_REGISTERS,
            (address, 0x18, "address", ()),
            (f"{address}_MSB", 0x1C, "address, upper half", ()),
            ("LENGTH", 0x28, "length in bytes", ()),
        ):
            lines += _register_lines(f"{channel}_{name}", base + offset, text, fields)
    module.body = [*lines, "          </REGISTERS>", "        </ADDRESSBLOCK>",
                   "      </ADDRESSBLOCKS>"]  # fmt: skip
    return module


def _register_lines(
    name: str, offset: int, text: str, fields: tuple[tuple[str, int, int, str], ...]
) -> list[str]:
    def properties(indent: str, values: dict[str, str]) -> list[str]:
        return [
            f'{indent}<PROPERTY NAME="{key}" VALUE="{value}"/>' for key, value in values.items()
        ]

    lines = [f'            <REGISTER NAME="{name}">']
    lines += properties(
        " " * 14,
        {
            "DESCRIPTION": text,
            "ADDRESS_OFFSET": hex(offset),
            "SIZE": "32",
            "ACCESS": "read-write",
            "IS_ENABLED": "true",
            "RESET_VALUE": "0x0",
        },
    )
    lines.append("              <FIELDS>")
    for field_name, bit, width, access in fields:
        lines.append(f'                <FIELD NAME="{field_name}">')
        lines += properties(
            " " * 18,
            {
                "DESCRIPTION": field_name,
                "BIT_OFFSET": str(bit),
                "BIT_WIDTH": str(width),
                "ACCESS": access,
            },
        )
        lines.append("                </FIELD>")
    return [*lines, "              </FIELDS>", "            </REGISTER>"]


def _join(
    bus: str, source: _Module, port: str, target: _Module, target_port: str, vlnv: str
) -> None:
    signals = _STREAM_SIGNALS if vlnv == _AXIS else _LITE_SIGNALS
    source.interfaces.append(_Interface(port, vlnv, True, bus, target.flat, target_port, signals))
    target.interfaces.append(_Interface(target_port, vlnv, False, bus, source.flat, port, signals))


def _physical(interface: str, signal: str) -> str:
    return f"{interface}_{signal}".lower()


def _memory_map(*ranges: tuple[str, int, int, str, str, str], kind: str) -> str:
    lines = ["      <MEMORYMAP>"]
    for block, base, high, instance, master, slave in ranges:
        lines.append(
            f'        <MEMRANGE ADDRESSBLOCK="{block}" BASENAME="C_BASEADDR" '
            f'BASEVALUE="0x{base:08X}" HIGHNAME="C_HIGHADDR" HIGHVALUE="0x{high:08X}" '
            f'INSTANCE="{instance}" IS_DATA="TRUE" IS_INSTRUCTION="TRUE" '
            f'MASTERBUSINTERFACE="{master}" MEMTYPE="{kind}" SLAVEBUSINTERFACE="{slave}"/>'
        )
    return "\n".join([*lines, "      </MEMORYMAP>"])


def _module_lines(module: _Module) -> list[str]:
    lines = [
        f'    <MODULE FULLNAME="/{module.instance}" HWVERSION="{module.vlnv.rsplit(":")[-1]}" '
        f'INSTANCE="{module.flat}" IPTYPE="PERIPHERAL" IS_ENABLE="1" '
        f'MODCLASS="PERIPHERAL" MODTYPE="{module.modtype}" VLNV="{module.vlnv}">',
        "      <PARAMETERS>",
    ]
    lines += [
        f'        <PARAMETER NAME="{name}" VALUE="{value}"/>'
        for name, value in sorted(module.parameters.items())
    ]
    lines += ["      </PARAMETERS>", "      <PORTS>"]
    interfaces = ["      <BUSINTERFACES>"]
    for interface in module.interfaces:
        kind = "INITIATOR" if interface.initiator else "TARGET"
        interfaces += [
            f'        <BUSINTERFACE BUSNAME="{interface.bus}" DATAWIDTH="32" '
            f'NAME="{interface.name}" TYPE="{kind}" VLNV="{interface.vlnv}">',
            "          <PORTMAPS>",
        ]
        for signal, driven, width in interface.signals:
            physical = _physical(interface.name, signal)
            direction = "O" if driven == interface.initiator else "I"
            lines += [
                f'        <PORT DIR="{direction}" LEFT="{width - 1}" NAME="{physical}" RIGHT="0" '
                f'SIGIS="undef" SIGNAME="{interface.bus}_{signal.lower()}">',
                "          <CONNECTIONS>",
                f'            <CONNECTION INSTANCE="{interface.peer}" '
                f'PORT="{_physical(interface.peer_interface, signal)}"/>',
                "          </CONNECTIONS>",
                "        </PORT>",
            ]
            interfaces.append(f'            <PORTMAP LOGICAL="{signal}" PHYSICAL="{physical}"/>')
        interfaces += ["          </PORTMAPS>", "        </BUSINTERFACE>"]
    body = [line for block in module.body for line in block.split("\n")]
    return [*lines, "      </PORTS>", *interfaces, "      </BUSINTERFACES>", *body, "    </MODULE>"]
