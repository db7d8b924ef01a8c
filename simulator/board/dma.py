"""Register model of the AXI DMA 7.1 in simple mode.

Source: PG021, "Register Space" and "Direct Register Mode". MM2S at 0x00, S2MM at 0x30.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from .cores import StreamCore
from .faults import Fault, FaultFile, spoil
from .memory import ContiguousMemory

_CONTROL, _STATUS, _ADDRESS, _ADDRESS_MSB, _LENGTH = 0x00, 0x04, 0x18, 0x1C, 0x28
_S2MM = 0x30
_RUN, _RESET = 0x1, 0x4
_HALTED, _IDLE = 0x1, 0x2
_ERROR_BITS = {"internal": 0x10, "slave": 0x20, "decode": 0x40}
_IOC, _ERROR_IRQ = 0x1000, 0x4000
_CONTROL_AFTER_RESET = 0x10002
_STATUS_AFTER_RESET = 0x10001


class _Channel:
    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.control = _CONTROL_AFTER_RESET
        self.status = _STATUS_AFTER_RESET
        self.low = self.high = self.length = 0
        self.armed = False

    @property
    def address(self) -> int:
        return self.high << 32 | self.low

    @property
    def halted(self) -> bool:
        return bool(self.status & _HALTED)

    def start(self) -> None:
        self.armed = True
        self.status &= ~_IDLE

    def finish(self, moved: int) -> None:
        self.armed = False
        self.length = moved
        self.status |= _IDLE | _IOC

    def fail(self, error: str) -> None:
        self.armed = False
        self.status |= _HALTED | _ERROR_IRQ | _ERROR_BITS[error]
        self.control &= ~_RUN


class AxiDma:
    """One DMA with a stream core between its channels. `length_width` is c_sg_length_width."""

    def __init__(
        self,
        memory: ContiguousMemory,
        core: StreamCore,
        length_width: int,
        faults: FaultFile,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._memory = memory
        self._core = core
        self._limit = (1 << length_width) - 1
        self._faults = faults
        self._monotonic = monotonic
        self._send = _Channel()
        self._receive = _Channel()
        self._stream: deque[bytes] = deque()
        self._wedged: str | None = None
        self._delayed: tuple[float, Fault] | None = None

    def exchange(self, core: StreamCore, *, clean: bool) -> None:
        """Another core between the streams; unless it was cut off (`clean`), they are stuck."""
        self._core = core
        if not clean:
            self._wedged = "stuck"

    def read(self, offset: int) -> int:
        self._advance()
        channel, register = self._channel(offset)
        return {
            _CONTROL: channel.control,
            _STATUS: channel.status,
            _ADDRESS: channel.low,
            _ADDRESS_MSB: channel.high,
            _LENGTH: channel.length,
        }.get(register, 0)

    def write(self, offset: int, value: int) -> None:
        self._advance()
        channel, register = self._channel(offset)
        if register == _CONTROL:
            self._write_control(channel, value)
        elif register == _STATUS:
            channel.status &= ~(value & 0x7000)
        elif register == _ADDRESS:
            channel.low = value
        elif register == _ADDRESS_MSB:
            channel.high = value
        elif register == _LENGTH and not channel.halted:
            channel.length = value
            self._start(channel)

    def _channel(self, offset: int) -> tuple[_Channel, int]:
        return (self._receive, offset - _S2MM) if offset >= _S2MM else (self._send, offset)

    def _write_control(self, channel: _Channel, value: int) -> None:
        if value & _RESET:
            # A reset through either channel resets the whole engine, but not the core behind it.
            self._send.reset()
            self._receive.reset()
            self._stream.clear()
            self._delayed = None
            return
        channel.control = value | 0x2
        errors = channel.status & 0x70
        if value & _RUN and not errors:
            channel.status &= ~_HALTED
        elif not value & _RUN:
            channel.status |= _HALTED
            channel.armed = False

    def _start(self, channel: _Channel) -> None:
        channel.start()
        if channel.length == 0 or channel.length > self._limit:
            channel.fail("internal")
        elif not self._memory.covers(channel.address, channel.length):
            channel.fail("decode")
        elif channel is self._send:
            self._begin_sending(self._faults.next())
        else:
            self._deliver()

    def _begin_sending(self, fault: Fault) -> None:
        if fault.kind == "error":
            self._send.fail(fault.error)
        elif fault.kind in ("hang", "stuck"):
            self._wedged = fault.kind
        if fault.kind == "slow":
            self._delayed = (self._monotonic() + fault.seconds, fault)
        elif self._send.armed:
            self._finish_sending(fault)

    def _finish_sending(self, fault: Fault) -> None:
        if self._wedged == "stuck":
            return
        packet = self._memory.bus_read(self._send.address, self._send.length)
        self._send.finish(len(packet))
        if self._wedged == "hang":
            return
        if output := self._core.process(packet):
            self._stream.append(spoil(output, fault))
            self._deliver()

    def _deliver(self) -> None:
        channel = self._receive
        if not (channel.armed and self._stream):
            return
        packet = self._stream.popleft()
        if len(packet) > channel.length:
            # The packet did not end within the buffer (PG021, DMAIntErr).
            channel.fail("internal")
            return
        self._memory.bus_write(channel.address, packet)
        channel.finish(len(packet))

    def _advance(self) -> None:
        if self._delayed and self._monotonic() >= self._delayed[0]:
            fault = self._delayed[1]
            self._delayed = None
            self._finish_sending(fault)
