"""Noise that needs no history: the n-th number of a named stream is a hash, so any moment can be generated alone.

`Noise` gives single numbers; `keys`, `stream`, `uniforms` and `normals` give the same kind of numbers for whole arrays
of streams and indexes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]

MASK = (1 << 64) - 1
STEP = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_SPREAD = 2.642941e-05  # 1 / (65536 * sqrt(4 / 12))


def mix(number: int) -> int:
    """Return SplitMix64's output for a state (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators)."""
    number &= MASK
    number = ((number ^ (number >> 30)) * _FIRST) & MASK
    number = ((number ^ (number >> 27)) * _SECOND) & MASK
    return number ^ (number >> 31)


def key(seed: int, name: str) -> int:
    """Return the 64 bits that the stream `name` of `seed` begins with."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little")


class Noise:
    """The stream `name` of `seed`; its numbers are asked for by index, in any order.

    >>> Noise(7, "wind").uniform(3) == Noise(7, "wind").uniform(3)
    True
    """

    __slots__ = ("_key",)

    def __init__(self, seed: int, name: str) -> None:
        self._key = key(seed, name)

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
        return (total - 131070.0) * _SPREAD


def keys(seed: int, names: Iterable[str]) -> U64:
    """Return the keys of many streams: `keys(seed, [name])` with `uniforms` is `Noise(seed, name)`."""
    return np.array([key(seed, name) for name in names], np.uint64)


def stream(of: U64, number: int) -> U64:
    """Return the keys of the `number`-th of each stream's own streams, so that a device needs one name."""
    return _mixed(of + np.uint64(mix(number * STEP)))


def bits(of: U64, index: I64) -> U64:
    """Return 64 random bits for each key and index (broadcast)."""
    return _mixed(of + index.astype(np.uint64) * np.uint64(STEP))


def uniforms(of: U64, index: I64) -> F64:
    """Return numbers in [0, 1)."""
    return (bits(of, index) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def normals(of: U64, index: I64) -> F64:
    """Return numbers of mean 0 and deviation 1, within ±3.47."""
    drawn = bits(of, index)
    low = np.uint64(0xFFFF)
    total = (drawn & low) + (drawn >> np.uint64(16) & low) + (drawn >> np.uint64(32) & low) + (drawn >> np.uint64(48))
    found: F64 = (total.astype(np.float64) - 131070.0) * _SPREAD
    return found


def _mixed(number: U64) -> U64:
    number = (number ^ (number >> np.uint64(30))) * np.uint64(_FIRST)
    number = (number ^ (number >> np.uint64(27))) * np.uint64(_SECOND)
    return number ^ (number >> np.uint64(31))
