"""Values as InfluxDB's line protocol: measurement = kind of the device, tags = which one and where, fields = metrics.

`hydrant,device=hyd-07,gateway=gw-01,zone=z1 pressure_mpa=0.31,battery_v=3.6 1767225600123`, times in ms. A field is
always a float. Source: https://docs.influxdata.com/influxdb/v2/reference/syntax/line-protocol/
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from citybrain.model import Cell, Device
from streams.log import F64, I64, U32
from streams.registry import METRIC_NAMES, Index

_MEASUREMENT = str.maketrans({",": "\\,", " ": "\\ "})
_TAG = str.maketrans({",": "\\,", " ": "\\ ", "=": "\\="})


class Values(NamedTuple):
    """Values under one registry, in the log's order. All [n]: time (Unix ms), value, series, the record's offset."""

    at: I64
    value: F64
    series: U32
    offset: I64

    def cut(self, begin: int, end: int) -> Values:
        """Return the values from `begin` until before `end`."""
        return Values(self.at[begin:end], self.value[begin:end], self.series[begin:end], self.offset[begin:end])

    def halves(self) -> tuple[Values, Values]:
        """Return the first half and the rest; there must be two values at least."""
        middle = len(self.at) // 2
        return self.cut(0, middle), self.cut(middle, len(self.at))


def joined(values: Sequence[Values]) -> Values:
    """Return several as one; there must be one at least."""
    at, value, series, offset = zip(*values, strict=True)
    return Values(np.concatenate(at), np.concatenate(value), np.concatenate(series), np.concatenate(offset))


def escaped(text: str, table: dict[int, str] = _TAG) -> str:
    """Return a name for the line protocol; what would end a line or escape its own end becomes an underscore.

    >>> escaped("a b=c,")
    'a\\\\ b\\\\=c\\\\,'
    """
    plain = "".join(sign if sign.isprintable() and sign != "\\" else "_" for sign in text)
    return plain.translate(table)


def head_of(device: Device, cells: dict[str, Cell]) -> str:
    """Return measurement and tags of a device; tags that it has not are left out."""
    cell = cells.get(device.place.cell)
    tags = {
        "building": device.building,
        "device": device.id,
        "gateway": device.gateway,
        "grid": cell.grid if cell else "",
        "street": cell.street if cell else "",
        "zone": device.zone,
    }  # sorted by key: the server would sort them itself
    text = "".join(f",{name}={escaped(value)}" for name, value in tags.items() if value)
    return f"{escaped(device.kind, _MEASUREMENT)}{text} "


class Lines:
    """Renders values under one registry. It remembers how a device's line begins."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self._cells = {cell.code: cell for cell in index.registry.cells}
        self._heads: dict[int, str] = {}
        self._fields = [METRIC_NAMES[metric] for metric in index.series_metric.tolist()]

    def _starts(self, values: Values) -> I64:
        """Return where points begin: a point is what stands together of one device and time."""
        device = self.index.series_device[values.series]
        new = (device[1:] != device[:-1]) | (values.at[1:] != values.at[:-1])
        return np.concatenate(([0], np.flatnonzero(new) + 1)).astype(np.int64)

    def batches(self, values: Values, points: int) -> Iterator[Values]:
        """Yield them in pieces of at most so many points."""
        cuts = [*self._starts(values)[::points].tolist(), len(values.at)]
        for begin, end in pairwise(cuts):
            yield values.cut(begin, end)

    def render(self, values: Values) -> tuple[bytes, int]:
        """Return the lines and how many they are; of equal series in a point the last counts, as in the server."""
        starts = self._starts(values)
        devices = self.index.series_device[values.series[starts]].tolist()
        times = values.at[starts].tolist()
        fields = [self._fields[series] for series in values.series.tolist()]
        texts = [repr(value) for value in values.value.tolist()]
        ends = [*starts[1:].tolist(), len(texts)]
        lines = []
        for begin, end, device, at in zip(starts.tolist(), ends, devices, times, strict=True):
            of = dict(zip(fields[begin:end], texts[begin:end], strict=True))
            lines.append(f"{self._head(device)}{','.join(f'{name}={text}' for name, text in of.items())} {at}")
        return "\n".join(lines).encode(), len(lines)

    def _head(self, number: int) -> str:
        if number not in self._heads:
            self._heads[number] = head_of(self.index.devices[number], self._cells)
        return self._heads[number]

    def series(self, number: int) -> tuple[str, str]:
        """Return (device, metric) of a series."""
        return self.index.devices[int(self.index.series_device[number])].id, self._fields[number]
