"""Any CSV as devices: a mapping file says which column is which metric of which device, in which unit and time format.

docs/replay.md explains the file. A cell or row that cannot be used is counted under a reason and named by file and
line; the rest goes on.
"""

from __future__ import annotations

import csv
import datetime
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import msgspec

from citybrain.config import Duration, Lines, convert, parse_yaml
from citybrain.errors import ConfigError
from citybrain.model import Cell, Device, Gateway, Place, Reading, Registry, Unit
from citybrain.units import CONVERSIONS, METRICS

WARNINGS = 50  # kept word for word; all are counted
FILE = "{file}"  # in a device's id: the name of the file that is replayed


class Time(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The time column; `format`: `iso`, `unix_s`, `unix_ms`, or a strptime format. UTC where it names no zone."""

    column: str
    format: str = "iso"


class Series(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One column as one metric: given in `unit`, or as value * scale + offset where no known unit fits."""

    column: str
    metric: str
    unit: str = ""
    scale: float = 1.0
    offset: float = 0.0


class Where(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the devices stand: degrees, the codes of cell, grid and street, an address."""

    lon: float = 120.15
    lat: float = 31.2
    cell: str = "990101001001001"
    grid: str = "990101001-G01"
    street: str = "001"
    address: str = ""


class MappedDevice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One device a file: `{file}` in its id, zone or building stands for the file's name."""

    id: str
    kind: str
    series: tuple[Series, ...]
    zone: str = ""
    building: str = ""
    name: str = ""


class Label(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A column that says what was really wrong: a fault lasts while it is at least `at_least`."""

    column: str
    at_least: float = 0.5


class Mapping(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A mapping file. `rules` and `categories` are paths beside it; without `rules`, the product's own apply.

    `step`: how much platform time passes between two looks at the clock. `speed`: platform seconds per real second,
    0 for as fast as it goes.
    """

    time: Time
    devices: tuple[MappedDevice, ...]
    delimiter: str = ","
    step: Duration = Duration(10_000)
    speed: float = 0.0
    rules: str = ""
    categories: str = ""
    label: Label | None = None
    place: Where = Where()


def load_mapping(path: Path) -> Mapping:
    """Read a mapping file; raises ConfigError with file, line and field."""
    try:
        value, lines = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), f"cannot be read: {error}") from None
    mapping = convert(value, Mapping, lines)
    _check(mapping, lines)
    return mapping


def _check(mapping: Mapping, lines: Lines) -> None:
    if len(mapping.delimiter) != 1:
        raise ConfigError(lines.where("delimiter"), f"expected one character, got {mapping.delimiter!r}")
    if mapping.step <= 0:
        raise ConfigError(lines.where("step"), "expected more than 0")
    if not 0 <= mapping.speed < math.inf:
        raise ConfigError(lines.where("speed"), f"expected 0 or more, got {mapping.speed}")
    if not mapping.devices:
        raise ConfigError(lines.where("devices"), "expected at least one device")
    for d, device in enumerate(mapping.devices):
        seen: set[str] = set()
        for s, series in enumerate(device.series):
            at = f"devices[{d}].series[{s}]"
            if series.metric not in METRICS:
                raise ConfigError(lines.where(f"{at}.metric"), f"unknown metric {series.metric!r}")
            if series.metric in seen:
                raise ConfigError(lines.where(f"{at}.metric"), f"{series.metric!r} is given twice for {device.id!r}")
            seen.add(series.metric)
            factor_of(series, lines, at)


def factor_of(series: Series, lines: Lines | None = None, at: str = "") -> tuple[float, float]:
    """Return (scale, offset) to the metric's unit; raises ConfigError where the unit does not lead there."""
    canonical = METRICS[series.metric].unit
    to, scale, offset = CONVERSIONS.get(series.unit, (series.unit, 1.0, 0.0))
    if series.unit and to != canonical:
        known = sorted(unit for unit, (target, _, _) in CONVERSIONS.items() if target == canonical)
        where = lines.where(f"{at}.unit") if lines else series.column
        raise ConfigError(where, f"{series.metric} is in {canonical}; expected one of {[canonical, *known]}")
    return scale * series.scale, offset * series.scale + series.offset


# --- what it makes ----------------------------------------------------------------------------------------------


class Source(msgspec.Struct, frozen=True):
    """One file, under the name that stands for `{file}`, behind a gateway of its own."""

    path: Path
    name: str

    @property
    def gateway(self) -> str:
        return f"replay-{self.name}"


def sources_of(paths: list[Path]) -> list[Source]:
    """Name the files: by their stem, with as many folders before it as it takes to tell them apart."""
    resolved = [path.resolve() for path in paths]
    deepest = max((len(path.parts) for path in resolved), default=1)
    for depth in range(1, deepest + 1):
        names = [_name(path, depth) for path in resolved]
        if len(set(names)) == len(names):
            return [Source(path, name) for path, name in zip(paths, names, strict=True)]
    raise ConfigError(", ".join(str(path) for path in paths), "a file is given twice")


def _name(path: Path, depth: int) -> str:
    parts = [*path.parts[:-1], path.stem]
    return re.sub(r"[^A-Za-z0-9]+", "-", "-".join(parts[-depth:])).strip("-")


def registry_of(mapping: Mapping, sources: list[Source], units: set[str]) -> Registry:
    """Return the devices of all files; `units` are the codes of the handling units that the categories name."""
    where = mapping.place
    place = Place(where.lon, where.lat, where.cell, where.address)
    gateways = tuple(Gateway(source.gateway, 0, place) for source in sources)
    devices = tuple(
        Device(
            device.id.replace(FILE, source.name),
            device.kind,
            source.gateway,
            place,
            tuple(series.metric for series in device.series),
            zone=device.zone.replace(FILE, source.name),
            building=device.building.replace(FILE, source.name),
            name=device.name.replace(FILE, source.name),
        )
        for source in sources
        for device in mapping.devices
    )
    responsible = tuple(Unit(code, code, code) for code in sorted(units))
    area = Unit(f"street-{where.street}", f"街道 {where.street}", f"Street {where.street}", where.street)
    return Registry(gateways, devices, (Cell(where.cell, where.grid, where.street),), (*responsible, area))


class Row(msgspec.Struct, frozen=True):
    """What one line of a file says: when (Unix ms), the readings, whether a fault is labelled (None: no label)."""

    at_ms: int
    readings: tuple[Reading, ...]
    faulty: bool | None = None


class Table(msgspec.Struct):
    """What reading one file counted. `skipped`: cells and rows that were not used, by reason."""

    rows: int = 0
    cells: int = 0
    skipped: Counter[str] = msgspec.field(default_factory=Counter)
    warnings: list[str] = []

    def skip(self, reason: str, where: str, what: str, cells: int = 1) -> None:
        self.skipped[reason] += cells
        if len(self.warnings) < WARNINGS:
            self.warnings.append(f"{where}: {what}")


class Column(msgspec.Struct, frozen=True):
    """Which cell is which metric, and how it becomes the metric's unit."""

    index: int
    name: str
    metric: str
    scale: float
    offset: float


class Plan(msgspec.Struct, frozen=True):
    """A mapping applied to one file's header. `label` is -1 where the file has no such column."""

    width: int
    time: int
    label: int
    devices: tuple[tuple[str, tuple[Column, ...]], ...]


class CsvReader:
    """Reads one file row by row; `table` says what was counted."""

    def __init__(self, mapping: Mapping, source: Source) -> None:
        self.table = Table()
        self._mapping = mapping
        self._source = source
        self._per_row = sum(len(device.series) for device in mapping.devices)

    def check(self) -> None:
        """Raise ConfigError where the file cannot be read or lacks a column that the mapping names."""
        try:
            with self._open() as file:
                header = next(csv.reader(file, delimiter=self._mapping.delimiter), [])
        except OSError as error:
            raise ConfigError(str(self._source.path), f"cannot be read: {error.strerror}") from None
        wanted = {series.column for device in self._mapping.devices for series in device.series}
        missing = sorted({self._mapping.time.column, *wanted} - set(header))
        if missing:
            raise ConfigError(
                f"{self._source.path}:1", f"no column {', '.join(missing)}; there are {', '.join(header)}"
            )

    def rows(self) -> Iterator[Row]:
        """Yield the rows that can be used, in the file's order; raises OSError where the file is gone."""
        with self._open() as file:
            reader = csv.reader(file, delimiter=self._mapping.delimiter)
            plan = self._plan(next(reader))
            while True:
                try:
                    cells = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    self._skip_row("malformed", reader.line_num, str(error))
                    continue
                row = self._row(cells, plan, reader.line_num) if cells else None
                if row is not None:
                    yield row

    def _open(self) -> TextIO:
        return self._source.path.open(encoding="utf-8-sig", errors="replace", newline="")

    def _plan(self, header: list[str]) -> Plan:
        index = {name: place for place, name in enumerate(header)}
        devices = tuple(
            (
                device.id.replace(FILE, self._source.name),
                tuple(Column(index[s.column], s.column, s.metric, *factor_of(s)) for s in device.series),
            )
            for device in self._mapping.devices
        )
        label = self._mapping.label
        return Plan(
            len(header), index[self._mapping.time.column], index.get(label.column, -1) if label else -1, devices
        )

    def _row(self, cells: list[str], plan: Plan, line: int) -> Row | None:
        if len(cells) != plan.width:
            self._skip_row("columns", line, f"{len(cells)} cells, the header has {plan.width}")
            return None
        try:
            at_ms = parse_time(cells[plan.time], self._mapping.time.format)
        except (ValueError, OverflowError) as error:
            self._skip_row("time", line, str(error))
            return None
        self.table.rows += 1
        readings = tuple(self._readings(cells, at_ms, plan, line))
        label = self._mapping.label
        number, _ = parse_number(cells[plan.label]) if plan.label >= 0 else (None, "")
        return Row(at_ms, readings, None if number is None or label is None else number >= label.at_least)

    def _readings(self, cells: list[str], at_ms: int, plan: Plan, line: int) -> Iterator[Reading]:
        for device, columns in plan.devices:
            values = {}
            for column in columns:
                self.table.cells += 1
                number, reason = parse_number(cells[column.index])
                if number is None:
                    where = f"{self._source.path}:{line} {column.name}"
                    self.table.skip(reason, where, f"{reason.replace('_', ' ')}: {cells[column.index][:40]!r}")
                else:
                    values[column.metric] = number * column.scale + column.offset
            if values:
                yield Reading(device, at_ms, values)

    def _skip_row(self, reason: str, line: int, what: str) -> None:
        """Count a whole row: every cell that it should have given."""
        self.table.rows += 1
        self.table.cells += self._per_row
        self.table.skip(reason, f"{self._source.path}:{line}", what, self._per_row)


def parse_number(text: str) -> tuple[float | None, str]:
    """Return a cell as a number, or None and the reason; an absent value stays absent and never becomes 0.

    >>> parse_number(" 1.5 "), parse_number(""), parse_number("off"), parse_number("nan")
    ((1.5, ''), (None, 'empty'), (None, 'not_a_number'), (None, 'not_finite'))
    """
    stripped = text.strip()
    try:
        number = float(stripped)
    except ValueError:
        return None, "not_a_number" if stripped else "empty"
    if "_" in stripped:  # Python reads 1_000 as a number; no file means it so
        return None, "not_a_number"
    return (number, "") if math.isfinite(number) else (None, "not_finite")


def parse_time(text: str, format_: str) -> int:
    """Return a time cell as Unix ms; raises ValueError.

    >>> parse_time("2020-03-01 15:44:06", "%Y-%m-%d %H:%M:%S")
    1583077446000
    """
    stripped = text.strip()
    if format_ == "unix_s":
        return round(float(stripped) * 1000)
    if format_ == "unix_ms":
        return int(stripped)
    parse = datetime.datetime.fromisoformat if format_ == "iso" else None
    moment = parse(stripped) if parse else datetime.datetime.strptime(stripped, format_)  # noqa: DTZ007
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=datetime.UTC)
    return round(moment.timestamp() * 1000)
