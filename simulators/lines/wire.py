"""A serial wire as a pseudo-terminal: it takes as long as a real one, and garbles where the two ends disagree.

The kernel's pseudo-terminal hands bytes over at once and whatever the speed; what a UART would make of them is modelled
here: each character is sent bit by bit at the sender's speed and sampled in the middle of the bits at the receiver's.
"""

from __future__ import annotations

import os
import select
import termios
import tty
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from citybrain.clock import wait_until_s

CHARACTER_BITS = 10  # 8N1
SPEEDS = {
    getattr(termios, f"B{baud}"): baud for baud in (1200, 2400, 4800, 9600, 19200, 38400, 57600, 115200, 230400, 460800)
}


def resampled(data: bytes, sent_baud: int, read_baud: int) -> bytes:
    """Return what a receiver at `read_baud` makes of characters (8N1) sent at `sent_baud`; a break reads as 0.

    >>> resampled(b"abc", 9600, 9600), resampled(b"abc", 9600, 19200) != b"abc"
    (b'abc', True)
    """
    if sent_baud == read_baud:
        return data
    bits = [bit for byte in data for bit in (0, *(byte >> place & 1 for place in range(8)), 1)]
    heard, at, step = bytearray(), 0.0, sent_baud / read_baud
    while (start := next((n for n in range(int(at), len(bits)) if not bits[n]), None)) is not None:
        samples = [_bit(bits, start + (place + 1.5) * step) for place in range(9)]
        heard.append(sum(bit << place for place, bit in enumerate(samples[:8])) if samples[8] else 0)
        at = start + 9.5 * step
    return bytes(heard)


def _bit(bits: Sequence[int], place: float) -> int:
    return bits[int(place)] if place < len(bits) else 1


class Wire:
    """One end of a serial line; the other end opens `port`, a link to the pseudo-terminal, at any speed it likes."""

    def __init__(self, port: Path, baud: int) -> None:
        self.port = port
        self.baud = baud
        self._master = self._slave = -1

    def plug(self) -> None:
        """Let the port appear."""
        self._master, self._slave = os.openpty()
        tty.setraw(self._slave)
        os.set_blocking(self._master, False)
        beside = self.port.with_name(f".{self.port.name}")
        beside.symlink_to(os.ttyname(self._slave))
        beside.replace(self.port)

    def unplug(self) -> None:
        """Let it vanish, as an adapter does that is pulled out."""
        self.port.unlink(missing_ok=True)
        for fd in (self._master, self._slave):
            if fd >= 0:
                os.close(fd)
        self._master = self._slave = -1

    @property
    def plugged(self) -> bool:
        """Whether the port is there."""
        return self._master >= 0

    @property
    def far_baud(self) -> int:
        """The speed that the other end has set."""
        return SPEEDS.get(termios.tcgetattr(self._slave)[4], 0)

    def read(self, timeout_s: float) -> bytes:
        """Return what comes within a time, as heard at this end's speed; empty where nothing does."""
        if self._master < 0 or not select.select([self._master], [], [], timeout_s)[0]:
            return b""
        return resampled(os.read(self._master, 4096), self.far_baud, self.baud)

    def write(self, data: bytes, begin_s: float) -> None:
        """Send bytes from `begin_s` on (monotonic): the other end has them when the last one has crossed the wire."""
        wait_until_s(begin_s + self.time_s(len(data)))
        with suppress(BlockingIOError):  # nobody listens: what is sent is lost, as on a wire
            os.write(self._master, resampled(data, self.baud, self.far_baud))

    def time_s(self, characters: int) -> float:
        """Return how long characters take on the wire."""
        return characters * CHARACTER_BITS / self.baud
