"""Which points the log's values make in InfluxDB, and which of them a server has: compared series by series."""

from __future__ import annotations

import json
import urllib.parse
import urllib.request
from typing import Any

import numpy as np
import numpy.typing as npt

from citybrain.layout import Layout
from streams.history.build import open_frame, registry_of
from streams.log import Kind
from streams.logs import LogStore, records
from streams.registry import METRIC_NAMES, Index, decode_registry

# (kind_metric, device): times in Unix ms, ascending and distinct, and the value at each. VictoriaMetrics calls them so.
Series = dict[tuple[str, str], tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]]


def logged_points(logs: LogStore, layout: Layout, shards: int) -> Series:
    """Return the points that the logs' values make; of one series and time the last value counts."""
    found: Series = {}
    for shard in range(shards):
        index: Index | None = None
        parts = []
        for record in records(logs.reader("log", shard)):
            if record.kind == Kind.CONTROL and (name := registry_of(record.payload)):
                index = Index(decode_registry(layout.get_blob(name)), name)
            elif record.kind == Kind.FRAME and (opened := open_frame(record.payload, index)) is not None:
                parts.append(opened[1])
        if index is not None and parts:
            at, value, series = (np.concatenate(column) for column in zip(*parts, strict=True))
            found |= _by_series(index, at, value, series)
    return found


def _by_series(index: Index, at: npt.NDArray[Any], value: npt.NDArray[Any], series: npt.NDArray[Any]) -> Series:
    found: Series = {}
    for number in np.unique(series).tolist():
        mine = series == number
        device = index.devices[int(index.series_device[number])]
        name = f"{device.kind}_{METRIC_NAMES[int(index.series_metric[number])]}"
        found[name, device.id] = distinct(at[mine], value[mine])
    return found


def distinct(at: npt.NDArray[Any], value: npt.NDArray[Any]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Return times, ascending and each once, with the last value of each."""
    times, last = np.unique(at[::-1], return_index=True)
    return times.astype(np.int64), value[::-1][last].astype(np.float64)


def stored_points(url: str) -> Series:
    """Return what a VictoriaMetrics has."""
    with urllib.request.urlopen(f"{url}/internal/force_flush", timeout=30):
        pass
    query = urllib.parse.urlencode({"match[]": '{device!=""}', "reduce_mem_usage": "1"})
    pieces: dict[tuple[str, str], list[dict[str, Any]]] = {}
    with urllib.request.urlopen(f"{url}/api/v1/export?{query}", timeout=120) as answer:
        for line in answer:
            row = json.loads(line)
            pieces.setdefault((row["metric"]["__name__"], row["metric"]["device"]), []).append(row)
    return {
        key: distinct(
            np.array([at for row in rows for at in row["timestamps"]], np.int64),
            np.array([value for row in rows for value in row["values"]], np.float64),
        )
        for key, rows in pieces.items()
    }


def missing_points(logged: Series, stored: Series) -> dict[str, npt.NDArray[np.int64]]:
    """Return the times of a series' points that the server has not, or with another value; whole series are left out.

    >>> one = (np.array([1, 2]), np.array([0.5, 0.6]))
    >>> missing_points({("m", "d"): one}, {("m", "d"): (np.array([2]), np.array([0.7]))})
    {'m d': array([1, 2])}
    """
    nothing = np.zeros(0, np.int64), np.zeros(0)
    found = {}
    for key, (at, value) in logged.items():
        times, values = stored.get(key, nothing)
        have = np.isin(at, times)
        same = have.copy()
        if len(times):
            same[have] = values[np.searchsorted(times, at[have])] == value[have]
        if not same.all():
            found[" ".join(key)] = at[~same]
    return found
