"""Exports as a stream of bytes: CSV for a sheet, Parquet for a data scientist, JSON for a program."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import msgspec
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from streams.history.query import EXPORTED, History, Missing, Span

Format = Literal["csv", "parquet", "json"]
MEDIA: dict[Format, str] = {
    "csv": "text/csv; charset=utf-8",
    "parquet": "application/vnd.apache.parquet",
    "json": "application/json",
}
ROW_GROUP = 64 * 1024
_TIME = pa.timestamp("ms", "UTC")


class Pieces:
    """A file that gives away what was written to it."""

    closed = False

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._bytes = 0

    def write(self, data: bytes | memoryview) -> int:
        self._pieces.append(bytes(data))
        self._bytes += len(data)
        return len(data)

    def tell(self) -> int:
        return self._bytes

    def flush(self) -> None:
        """Nothing waits here."""

    def close(self) -> None:
        """Nothing is held."""

    def take(self) -> bytes:
        """Return what was written since the last call."""
        found, self._pieces = b"".join(self._pieces), []
        return found


def exported(history: History, spans: Sequence[Span], form: Format, missing: Sequence[Missing]) -> Iterator[bytes]:
    """Yield the values of the spans, one device after the other, each by metric and time.

    missing: what is known to be missing; only JSON has a place for it. Raises StorageError half way where a file turns
    out damaged: the transfer is then cut off, never silently short.
    """
    batches = (batch for span in spans for batch in history.export(span) if batch.num_rows)
    if form == "csv":
        return _csv(batches)
    return _parquet(batches) if form == "parquet" else _json(batches, missing)


def _csv(batches: Iterator[pa.RecordBatch]) -> Iterator[bytes]:
    pieces = Pieces()
    schema = pa.schema([*EXPORTED, ("time", _TIME)])
    with pyarrow.csv.CSVWriter(pieces, schema) as writer:
        yield pieces.take()
        for batch in batches:
            time = batch.column("observed_at").cast(_TIME)
            writer.write_batch(pa.RecordBatch.from_arrays([*batch.columns, time], schema=schema))
            yield pieces.take()


def _parquet(batches: Iterator[pa.RecordBatch]) -> Iterator[bytes]:
    pieces = Pieces()
    waiting: list[pa.RecordBatch] = []
    with pq.ParquetWriter(pieces, EXPORTED, compression="zstd") as writer:
        for batch in batches:
            waiting.append(batch)
            if sum(each.num_rows for each in waiting) >= ROW_GROUP:
                writer.write_table(pa.Table.from_batches(waiting))
                waiting = []
                yield pieces.take()
        if waiting:
            writer.write_table(pa.Table.from_batches(waiting))
    yield pieces.take()


def _json(batches: Iterator[pa.RecordBatch], missing: Sequence[Missing]) -> Iterator[bytes]:
    before = b'{"items":['
    for batch in batches:
        yield before + msgspec.json.encode(batch.to_pylist())[1:-1]
        before = b","
    yield (b"" if before == b"," else before) + b'],"missing":' + msgspec.json.encode(missing) + b"}"
