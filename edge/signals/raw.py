"""Raw samples as they come in frames, cut into windows; what is missing is counted, never filled.

A payload is the number of its first sample (uint32, comes round), then int16 values, those of one sample together.
"""

from __future__ import annotations

import msgspec
import numpy as np
import numpy.typing as npt

INDEX_BYTES = 4
INDICES = 1 << 32
RATE_KNOWN_S = 10.0  # sooner, a busy machine looks like a wrong rate


class Window(msgspec.Struct, frozen=True, eq=False):
    """One window. samples: float64 [those that came, channels]; rate_hz: that at which they came, where it is known."""

    samples: npt.NDArray[np.float64]
    missing: int
    rate_hz: float | None = None


class Block(msgspec.Struct, frozen=True, eq=False):
    """The samples of one frame. first: the number of the first one."""

    first: int
    samples: npt.NDArray[np.float64]


def decode(payload: bytes, channels: int) -> Block:
    """Return a payload's samples; raises ValueError where it has no whole ones.

    >>> decode(bytes((0, 0, 0, 7, 0, 1, 255, 255)), 1)
    Block(first=7, samples=array([[ 1.],
           [-1.]]))
    """
    values = len(payload) - INDEX_BYTES
    if values <= 0 or values % (2 * channels):
        raise ValueError(f"{len(payload)} bytes are no samples of {channels} values")
    first = int.from_bytes(payload[:INDEX_BYTES], "big")
    samples = np.frombuffer(payload, ">i2", offset=INDEX_BYTES).astype(np.float64)
    return Block(first, samples.reshape(-1, channels))


class Raw:
    """One station's samples. Windows begin at whole multiples of their size in the station's own numbers."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._blocks: list[npt.NDArray[np.float64]] = []
        self._next: int | None = None  # the number that is expected
        self._window = self._skipped = -1  # which is being filled; which began before we listened
        self._since_s: float | None = None  # when the first window ended
        self._counted = 0  # samples since then

    def gap(self, block: Block) -> int:
        """Return how many samples are missing before a block; -1 where the station began anew, or was long away."""
        if self._next is None:
            return -1
        missing = (block.first - self._next) % INDICES
        return missing if missing <= self._size else -1

    def take(self, block: Block, at_s: float) -> list[Window]:
        """Take a block that came at a monotonic time; return the windows that it completes."""
        first, samples = block.first, block.samples
        if self.gap(block) < 0:
            self._begin(first)
        done: list[Window] = []
        while len(samples):
            number, place = divmod(first, self._size)
            if number != self._window:
                done += self._close(at_s)
                self._window = number
            some = samples[: self._size - place]
            if number != self._skipped:
                self._blocks.append(some)
            samples, first = samples[len(some) :], first + len(some)
        self._next = first % INDICES
        if first % self._size == 0:
            done += self._close(at_s)
        return done

    def _begin(self, first: int) -> None:
        self._blocks, self._since_s = [], None
        self._window, place = divmod(first, self._size)
        self._skipped = self._window if place else -1

    def _close(self, at_s: float) -> list[Window]:
        blocks, self._blocks = self._blocks, []
        if not blocks:
            return []
        samples = np.concatenate(blocks)
        return [Window(samples, self._size - len(samples), self._rate_hz(at_s))]

    def _rate_hz(self, at_s: float) -> float | None:
        if self._since_s is None:
            self._since_s, self._counted = at_s, 0
            return None
        self._counted += self._size
        passed_s = at_s - self._since_s
        return self._counted / passed_s if passed_s >= RATE_KNOWN_S else None
