"""The log again, from Parquet: what a backtest reads where the segments are gone.

Records come in their order and byte for byte as they were: a frame's values by (offset, position), numbered by the
registry that was in force there.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from citybrain.errors import Damaged, NotFound
from citybrain.layout import Layout
from citybrain.model import Lane
from citybrain.segments import Record
from streams.history.build import registry_of
from streams.history.columns import Series, numbered
from streams.history.manifest import Part, history_folder, read_manifest
from streams.history.query import open_database
from streams.log import F64, I64, FrameHead, Kind, pack_frame
from streams.registry import METRIC_INDEX, Index, decode_registry

BATCH = 16 * 1024
_ARRIVAL = """
SELECT device, metric, observed_at, CASE WHEN divisor IS NULL THEN raw ELSE scaled / divisor END AS value, "offset"
FROM read_parquet($file) WHERE "offset" >= $first AND "offset" < $behind ORDER BY "offset", position"""


def frames(layout: Layout, shard: int, first: int, behind: int) -> Iterator[Record]:
    """Yield the log records of a shard with first <= offset < behind, as far as the history has them.

    What is not in it yet is in the log (`read_manifest(...).next` says from where). Offsets that the history has lost
    are left out, as `citybrain.segments.Reader` does. Raises Damaged, and NotFound where a registry's content is gone.
    """
    folder = history_folder(layout, shard)
    for part in read_manifest(folder).parts:
        if part.first < behind and part.next > first:
            yield from _Replay(layout, folder, part).records(first, behind)


class _Replay:
    """One part, told again."""

    def __init__(self, layout: Layout, folder: Path, part: Part) -> None:
        self._layout = layout
        self._folder = folder
        self._part = part
        self._index: Index | None = None
        self._number: I64 = np.empty(0, np.int64)  # series number in the registry in force, by our own numbers

    def records(self, first: int, behind: int) -> Iterator[Record]:
        self._activate(self._part.registry)
        values = _Values(self._folder / self._part.values_file, self._layout, first, behind)
        for batch in pq.ParquetFile(self._folder / self._part.records_file).iter_batches(BATCH):
            for row in batch.to_pylist():
                if row["offset"] >= behind:
                    return
                payload = row["payload"]
                if row["kind"] == Kind.CONTROL:
                    self._activate(registry_of(payload))
                if row["offset"] < first:
                    continue
                if payload is None:
                    head = FrameHead(
                        self._gateway(row["gateway"]), Lane(row["lane"]), row["epoch"], row["seq"], row["sent_at"],
                        row["values"], row["checksum"],
                    )  # fmt: skip
                    payload = self._frame(head, row["offset"], values)
                yield Record(row["offset"], row["received_at"], row["kind"], payload)

    def _activate(self, registry: str) -> None:
        if registry:
            self._index = Index(decode_registry(self._layout.get_blob(registry)), registry)
            self._number = np.empty(0, np.int64)

    def _gateway(self, name: str) -> int:
        if self._index is None or name not in self._index.gateway_index:
            raise NotFound(f"{self._folder / self._part.records_file}: gateway {name!r} is not in its registry")
        return self._index.gateway_index[name]

    def _frame(self, head: FrameHead, offset: int, values: _Values) -> bytes:
        at, value, series = values.take(head.values, offset)
        if len(self._number) < len(values.names) and self._index is not None:
            of, device = self._index.series_of, self._index.device_index
            self._number = np.array([of[device[d], METRIC_INDEX[m]] if d in device else -1 for d, m in values.names])
        return pack_frame(head, at, value, self._number[series].astype(np.uint32))


class _Values:
    """The values of a part in the order of their arrival; `names` are numbered as they turn up."""

    def __init__(self, path: Path, layout: Layout, first: int, behind: int) -> None:
        self.names: list[Series] = []
        self._path = path
        self._number: dict[Series, int] = {}
        self._database = open_database(layout)
        given = {"file": str(path), "first": first, "behind": behind}
        self._batches: Iterator[pa.RecordBatch] = iter(
            self._database.sql(_ARRIVAL, params=given).to_arrow_reader(BATCH)
        )
        self._at: I64 = np.empty(0, np.int64)
        self._value: F64 = np.empty(0, np.float64)
        self._series: I64 = np.empty(0, np.int64)
        self._offset: I64 = np.empty(0, np.int64)

    def take(self, count: int, offset: int) -> tuple[I64, F64, I64]:
        """Return the next `count` values: time, value, our series number. Raises Damaged if they are another's."""
        while len(self._at) < count and (batch := next(self._batches, None)) is not None:
            self._add(batch)
        if len(self._at) < count or (self._offset[:count] != offset).any():
            raise Damaged(str(self._path), 0, f"does not hold the {count} values of offset {offset}")
        found = self._at[:count], self._value[:count], self._series[:count]
        self._at, self._value = self._at[count:], self._value[count:]
        self._series, self._offset = self._series[count:], self._offset[count:]
        return found

    def _add(self, batch: pa.RecordBatch) -> None:
        codes, names = numbered(batch)
        for name in names:
            if name not in self._number:
                self._number[name] = len(self.names)
                self.names.append(name)
        series = np.array([self._number[name] for name in names], np.int64)[codes]
        plain = [batch.column(name).to_numpy(zero_copy_only=False) for name in ("observed_at", "value", "offset")]
        self._at, self._value = np.concatenate((self._at, plain[0])), np.concatenate((self._value, plain[1]))
        self._offset, self._series = np.concatenate((self._offset, plain[2])), np.concatenate((self._series, series))
