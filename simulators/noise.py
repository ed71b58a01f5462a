"""Noise that needs no history: the n-th number of a named stream is a hash, so any moment can be generated alone."""

from __future__ import annotations

import hashlib

MASK = (1 << 64) - 1
STEP = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio


def mix(number: int) -> int:
    """Return SplitMix64's output for a state (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators)."""
    number &= MASK
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & MASK
    return number ^ (number >> 31)


class Noise:
    """The stream `name` of `seed`; its numbers are asked for by index, in any order.

    >>> Noise(7, "wind").uniform(3) == Noise(7, "wind").uniform(3)
    True
    """

    __slots__ = ("_key",)

    def __init__(self, seed: int, name: str) -> None:
        self._key = int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little")

    def bits(self, index: int) -> int:
        """Return 64 random bits."""
        return mix(self._key + index * STEP)

    def uniform(self, index: int) -> float:
        """Return a number in [0, 1)."""
        return (self.bits(index) >> 11) * 2.0**-53

    def normal(self, index: int) -> float:
        """Return a number of mean 0 and deviation 1, within ±3.47: the sum of four 16-bit uniforms."""
        bits = self.bits(index)
        total = (bits & 0xFFFF) + (bits >> 16 & 0xFFFF) + (bits >> 32 & 0xFFFF) + (bits >> 48)
        return (total - 131070.0) * 2.642941e-05  # 1 / (65536 * sqrt(4 / 12))
