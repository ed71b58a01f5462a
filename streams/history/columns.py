"""How values and records stand in Parquet: columns that any reader understands, few bytes each.

A part is two files. `values`: one row a value, sorted by (device, metric, observed_at), with the offset of its frame
and its position there. `records`: one row a log record, so that the log can be told again in its order.

A sensor says decimals: 0.3125 is kept as 3125 / 10000, which is the same float64 bit for bit (checked for every value;
what is no short decimal stands in `raw`). docs/history.md has the figures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from citybrain.errors import Damaged
from streams.history.arrow import ask_without_pandas
from streams.log import F64, I64, U32

ask_without_pandas()

ROW_GROUP = 64 * 1024  # [U] one series of 1/min fills two thirds of a group a month: a chart of a year reads about 24
ZSTD_LEVEL = 6  # [U] our choice: 9 and more save less than 2 % of our files and take twice the time
BATCH = 4096
PAGE_BYTES = 64 * 1024  # what a merge holds of each column of each input
MOST_DECIMALS = 6
DIVISORS = 10.0 ** np.arange(MOST_DECIMALS + 1)
EXACT = 2.0**53  # beyond it not every integer is a float64

Series = tuple[str, str]  # (device, metric)

_NAMED = pa.dictionary(pa.int32(), pa.string())
VALUES = pa.schema(
    [
        ("device", _NAMED),
        ("metric", _NAMED),
        ("observed_at", pa.int64()),
        ("scaled", pa.int64()),
        ("divisor", pa.float64()),
        ("raw", pa.float64()),
        ("offset", pa.int64()),
        ("position", pa.int32()),
    ]
)
RECORDS = pa.schema(
    [
        ("offset", pa.int64()),
        ("received_at", pa.int64()),
        ("kind", pa.int8()),
        ("gateway", pa.string()),
        ("lane", pa.int8()),
        ("epoch", pa.uint64()),
        ("seq", pa.uint64()),
        ("sent_at", pa.int64()),
        ("values", pa.int32()),
        ("checksum", pa.uint32()),
        ("payload", pa.binary()),  # of what is no frame
    ]
)
_PACKED = ("observed_at", "scaled", "offset", "position", "received_at", "seq", "sent_at", "values")
_NAMES = ("device", "metric", "gateway", "divisor", "epoch", "kind", "lane")


class Rows(NamedTuple):
    """Values as they stand in a file. `series` numbers a sorted sequence of (device, metric) that goes with them.

    value = scaled / divisor; where divisor is 0, value = raw.
    """

    series: I64
    observed_at: I64
    scaled: I64
    divisor: F64
    raw: F64
    offset: I64
    position: I64

    def take(self, order: Any) -> Rows:
        """Return the rows that `order` (a slice, a mask, an index) names."""
        return Rows(*(column[order] for column in self))

    def order(self) -> I64:
        """Return what sorts the rows by series, then time, then as they came."""
        return np.lexsort((self.position, self.offset, self.observed_at, self.series))

    def values(self) -> F64:
        """Return the values."""
        plain = self.divisor != 0
        return np.where(plain, self.scaled / np.where(plain, self.divisor, 1.0), self.raw)


def joined(parts: Sequence[Rows]) -> Rows:
    """Return rows laid end to end."""
    return Rows(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def scale(value: F64, series: I64, count: int) -> tuple[I64, F64]:
    """Return (scaled, divisor) of values; per series the smallest power of ten that gives all of them back exactly.

    Where none does for a series, its values that are short decimals by themselves take the longest, the others 0.
    """
    bits = value.view(np.int64)
    scaled, divisor = np.zeros(len(value), np.int64), np.zeros(len(value), np.float64)
    undecided = np.ones(count, np.bool_)
    for power in DIVISORS:
        rows = np.flatnonzero(undecided[series])
        if not len(rows):
            break
        with np.errstate(over="ignore"):
            whole = np.rint(value[rows] * power)
        small = np.abs(whole) < EXACT
        whole = np.where(small, whole, 0.0).astype(np.int64)
        fits = small & ((whole / power).view(np.int64) == bits[rows])  # bits: -0.0 is no decimal
        missing = np.bincount(series[rows][~fits], minlength=count) > 0
        done = fits if power == DIVISORS[-1] else ~missing[series[rows]]
        scaled[rows[done]], divisor[rows[done]] = whole[done], power
        undecided &= missing
    return scaled, divisor


def values_table(rows: Rows, names: Sequence[Series]) -> pa.Table:
    """Return rows in their order as the table of a `values` file."""
    first, last = int(rows.series[0]), int(rows.series[-1])
    here = names[first : last + 1]
    columns = [_named([name[part] for name in here], rows.series - first) for part in (0, 1)]
    none = rows.divisor == 0
    columns += [
        pa.array(rows.observed_at),
        pa.array(rows.scaled, mask=none),
        pa.array(rows.divisor, mask=none),
        pa.array(rows.raw, mask=~none),
        pa.array(rows.offset),
        pa.array(rows.position.astype(np.int32)),
    ]
    return pa.table(columns, schema=VALUES)


def _named(names: list[str], index: I64) -> pa.DictionaryArray:
    different = sorted(set(names))
    number = {name: at for at, name in enumerate(different)}
    of = np.array([number[name] for name in names], np.int32)
    return pa.DictionaryArray.from_arrays(pa.array(of[index]), pa.array(different, pa.string()))


def writer(sink: Any, schema: pa.Schema) -> pq.ParquetWriter:
    """Return a writer of one of our two kinds of file; call it with one row group at a time."""
    names = set(schema.names)
    encoding = {name: "DELTA_BINARY_PACKED" for name in _PACKED if name in names}
    if "raw" in names:
        encoding["raw"] = "BYTE_STREAM_SPLIT"
    return pq.ParquetWriter(
        sink,
        schema,
        compression="zstd",
        compression_level=ZSTD_LEVEL,
        use_dictionary=[name for name in _NAMES if name in names],
        column_encoding=encoding,
        data_page_size=PAGE_BYTES,
        write_statistics=[name for name in ("device", "metric", "observed_at", "offset") if name in names],
        store_schema=False,
    )


def write_values(into: pq.ParquetWriter, rows: Rows, names: Sequence[Series]) -> None:
    """Append rows in their order, a row group at a time: one group's copy of the columns is all the memory it takes."""
    order = rows.order()
    for start in range(0, len(order), ROW_GROUP):
        group = rows.take(order[start : start + ROW_GROUP])
        into.write_table(values_table(group, names), row_group_size=ROW_GROUP)


def opened(path: Path) -> pq.ParquetFile:
    """Return a `values` file, its names read as numbers; raises Damaged where it is none."""
    try:
        return pq.ParquetFile(path, read_dictionary=["device", "metric"])
    except (pa.ArrowInvalid, OSError) as error:
        raise Damaged(str(path), 0, str(error)) from error


def names_in(file: pq.ParquetFile) -> set[Series]:
    """Return the series of a `values` file."""
    found: set[Series] = set()
    for batch in file.iter_batches(BATCH, columns=["device", "metric"]):
        found.update(numbered(batch)[1])
    return found


def batches(file: pq.ParquetFile, number: dict[Series, int]) -> Iterator[Rows]:
    """Yield the rows of a `values` file, `BATCH` at a time, their series numbered by `number`."""
    for batch in file.iter_batches(BATCH):
        yield rows_of(batch, number)


def rows_of(batch: pa.RecordBatch, number: dict[Series, int]) -> Rows:
    """Return a batch of a `values` file, its series numbered by `number`."""
    codes, names = numbered(batch)
    of = np.array([number[name] for name in names], np.int64)
    columns = {name: batch.column(name) for name in VALUES.names}
    divisor = np.where(_valid(columns["divisor"]), _plain(columns["divisor"], np.float64), 0.0)
    return Rows(
        of[codes],
        _plain(columns["observed_at"], np.int64),
        np.where(divisor == 0, 0, _plain(columns["scaled"], np.int64)),
        divisor,
        np.where(divisor == 0, _plain(columns["raw"], np.float64), 0.0),
        _plain(columns["offset"], np.int64),
        _plain(columns["position"], np.int32).astype(np.int64),
    )


def _plain(column: pa.Array, kind: type[np.generic]) -> Any:
    """Return a column's values; where it is null, anything. pyarrow's own way loads all its compute kernels, 30 MB."""
    return np.frombuffer(column.buffers()[1], kind, len(column), column.offset * np.dtype(kind).itemsize)


def _valid(column: pa.Array) -> Any:
    bitmap = column.buffers()[0]
    if bitmap is None:
        return np.ones(len(column), np.bool_)
    bits = np.unpackbits(np.frombuffer(bitmap, np.uint8), bitorder="little")
    return bits[column.offset : column.offset + len(column)].astype(np.bool_)


def numbered(batch: pa.RecordBatch) -> tuple[I64, list[Series]]:
    """Return (codes, names): row i of a batch with columns device and metric is of series names[codes[i]]."""
    device, metric = (_dictionary(batch.column(name)) for name in ("device", "metric"))
    pair = device[1].astype(np.int64) * max(len(metric[0]), 1) + metric[1]
    different, codes = np.unique(pair, return_inverse=True)
    names = [(device[0][each // len(metric[0])], metric[0][each % len(metric[0])]) for each in different.tolist()]
    return codes.astype(np.int64), names


def _dictionary(column: pa.Array) -> tuple[list[str], U32]:
    coded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
    return coded.dictionary.to_pylist(), coded.indices.to_numpy(zero_copy_only=False)
