"""Register maps: which register of a Modbus device is which metric, and how few reads fetch them; pure.

Addresses are those of the protocol, from 0 (the register that many sheets call 40001 has address 0). Source: MODBUS
Application Protocol Specification V1.1b3, sections 4.3, 6.1–6.4.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import cached_property, lru_cache
from math import isfinite
from pathlib import Path
from typing import Literal

import msgspec

from citybrain.config import Duration, load_yaml
from citybrain.model import Lane
from citybrain.units import CONVERSIONS, METRICS

FUNCTIONS = {"coil": 1, "discrete": 2, "holding": 3, "input": 4}
FORMATS = {"int16": ">h", "uint16": ">H", "int32": ">i", "uint32": ">I", "float32": ">f", "bit": ">H"}
MOST_REGISTERS, MOST_BITS = 125, 2000
HIGHEST_ADDRESS = 65535


class Register(msgspec.Struct, frozen=True, forbid_unknown_fields=True, dict=True):
    """One metric: raw value × scale + offset is in `unit` (the metric's own where empty).

    low, high: what a working sensor can say, in the metric's unit (the metric's own range where not given); invalid:
    raw values that stand for "not measured". bit: which one of a register. word_order: `big` where the high word comes
    first. lane: `event` is told when it changes by more than `deadband`. interval: where it differs from the device's.
    """

    metric: str
    address: int
    table: Literal["holding", "input", "coil", "discrete"] = "holding"
    type: Literal["int16", "uint16", "int32", "uint32", "float32", "bit"] = "uint16"
    bit: int = 0
    word_order: Literal["big", "little"] = "big"
    byte_order: Literal["big", "little"] = "big"
    scale: float = 1.0
    offset: float = 0.0
    unit: str = ""
    low: float | None = None
    high: float | None = None
    invalid: tuple[float, ...] = ()
    lane: Literal["telemetry", "event"] = "telemetry"
    deadband: float = 0.0
    interval: Duration | None = None

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(f"unknown metric {self.metric!r}")
        if not 0 <= self.address <= HIGHEST_ADDRESS + 1 - self.words:
            raise ValueError(f"address: expected 0 to {HIGHEST_ADDRESS + 1 - self.words}, got {self.address}")
        if self.of_bits and self.type != "bit":
            raise ValueError(f"type: a {self.table} is a bit, got {self.type}")
        if not 0 <= self.bit <= 15 or (self.bit and (self.type != "bit" or self.of_bits)):
            raise ValueError("bit: expected 0 to 15, of a register with type bit")
        if not (isfinite(self.scale) and self.scale and isfinite(self.offset)):
            raise ValueError("scale: expected a number other than 0")
        own = METRICS[self.metric].unit
        if self.unit not in ("", own) and CONVERSIONS.get(self.unit, ("",))[0] != own:
            known = ", ".join(unit for unit, (target, _, _) in CONVERSIONS.items() if target == own)
            raise ValueError(
                f"unit: {self.metric} is in {own}{f' (also known: {known})' * bool(known)}, got {self.unit!r}"
            )
        if self.range[0] > self.range[1]:
            raise ValueError(f"low: expected at most high, got {self.range[0]:g} and {self.range[1]:g}")
        if not (isfinite(self.deadband) and self.deadband >= 0) or (self.deadband and self.lane != "event"):
            raise ValueError("deadband: expected 0 or more, for lane event; telemetry has the driver's `report`")
        if self.interval is not None and self.interval <= 0:
            raise ValueError("interval: expected more than 0")

    @property
    def of_bits(self) -> bool:
        """Whether its table holds bits, not registers."""
        return self.table in ("coil", "discrete")

    @property
    def words(self) -> int:
        """How many addresses it takes."""
        return 2 if self.type in ("int32", "uint32", "float32") else 1

    @property
    def lane_of(self) -> Lane:
        return Lane.EVENT if self.lane == "event" else Lane.TELEMETRY

    @cached_property
    def range(self) -> tuple[float, float]:
        """What a working sensor can say, in the metric's unit."""
        metric = METRICS[self.metric]
        low = metric.low if self.low is None else self.low
        return low, metric.high if self.high is None else self.high

    @cached_property
    def _line(self) -> tuple[float, float]:
        _, scale, offset = CONVERSIONS.get(self.unit, ("", 1.0, 0.0))
        return self.scale * scale, self.offset * scale + offset

    def raw(self, data: bytes, first: int) -> float:
        """Return what stands for it in a block's data; `first` is the address at which the block begins.

        >>> Register("level_m", 11, type="int32", word_order="little").raw(bytes.fromhex("aaaa 0001 0000"), 10)
        1
        """
        place = self.address - first
        if self.of_bits:
            return data[place >> 3] >> (place & 7) & 1
        words = [data[start : start + 2] for start in range(2 * place, 2 * (place + self.words), 2)]
        if self.byte_order == "little":
            words = [word[::-1] for word in words]
        if self.word_order == "little":
            words.reverse()
        value: float = struct.unpack(FORMATS[self.type], b"".join(words))[0]
        return int(value) >> self.bit & 1 if self.type == "bit" else value

    def value(self, raw: float) -> float | None:
        """Return a raw value in the metric's unit; None where no working sensor says it."""
        if raw in self.invalid:
            return None
        scale, offset = self._line
        value = raw * scale + offset
        return value if self.range[0] <= value <= self.range[1] else None


class RegisterMap(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The registers of one type of device. gap: so many unneeded registers are read along rather than asking twice; 0
    for devices that refuse them. source: where the numbers come from.
    """

    registers: tuple[Register, ...]
    gap: int = 8
    source: str = ""

    def __post_init__(self) -> None:
        if not self.registers:
            raise ValueError("registers: expected at least one")
        if not 0 <= self.gap <= MOST_REGISTERS:
            raise ValueError(f"gap: expected 0 to {MOST_REGISTERS}, got {self.gap}")
        names = [register.metric for register in self.registers]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"registers: {twice[0]} stands there twice")


class Block(msgspec.Struct, frozen=True):
    """Registers that one read fetches."""

    function: int
    address: int
    count: int
    registers: tuple[Register, ...]

    @property
    def size(self) -> int:
        """How many bytes of data its answer has."""
        return -(-self.count // 8) if self.function in (1, 2) else 2 * self.count


def blocks(registers: Sequence[Register], gap: int) -> tuple[Block, ...]:
    """Return the fewest reads that fetch all registers, at most `gap` unneeded ones between two.

    >>> [(b.address, b.count) for b in blocks([Register("value", 3), Register("floor", 7), Register("motion", 30)], 8)]
    [(3, 5), (30, 1)]
    """
    found: list[Block] = []
    for register in sorted(registers, key=lambda one: (FUNCTIONS[one.table], one.address)):
        function, end = FUNCTIONS[register.table], register.address + register.words
        last = found[-1] if found else None
        if last is not None and last.function == function and register.address <= last.address + last.count + gap:
            count = max(end - last.address, last.count)
            if count <= (MOST_BITS if register.of_bits else MOST_REGISTERS):
                found[-1] = Block(function, last.address, count, (*last.registers, register))
                continue
        found.append(Block(function, register.address, register.words, (register,)))
    return tuple(found)


MAPS = Path(__file__).parents[1] / "maps"


def known_maps() -> tuple[str, ...]:
    """Return the names of the maps that come with the product."""
    return tuple(sorted(path.stem for path in MAPS.glob("*.yaml")))


@lru_cache
def load_map(name: str) -> RegisterMap:
    """Return a map that comes with the product; raises ConfigError."""
    return load_yaml(MAPS / f"{name}.yaml", RegisterMap)
