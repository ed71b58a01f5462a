"""Many small parts become one: sorted the same way, so that a chart of a year touches few row groups.

Inputs are read a few thousand rows at a time, so memory does not grow with them.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from itertools import groupby
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from citybrain.storage import Files
from streams.history.columns import RECORDS, ROW_GROUP, Rows, Series, batches, joined, names_in
from streams.history.manifest import DAY, MONTH, Part
from streams.history.parts import PartWriter

FAN = 8  # [U] parts of a level that become one of the next, within a day
MOST_INPUTS = 32
MOST_VALUES = 100_000_000  # [U] a larger part would take longer to merge than is sensible; days then stay days
BATCH = 8192


def group_to_merge(parts: Sequence[Part]) -> tuple[Sequence[Part], int] | None:
    """Return neighbours that should be one part, and its level; None where all is well.

    Within the present day FAN of one level; of a day that is over all; of a month that is over all.
    """
    for _, month in groupby(parts, key=lambda part: part.month):
        days = [list(day) for _, day in groupby(month, key=lambda part: part.day)]
        for day in days:
            over = day[-1] is not parts[-1]
            found = _few(day, DAY) if over and day[-1].day != parts[-1].day else _level_up(day)
            if found:
                return found
        all_of_it = [part for day in days for part in day]
        if all_of_it[-1].month != parts[-1].month and (found := _few(all_of_it, MONTH)):
            return found
    return None


def _few(parts: list[Part], level: int) -> tuple[Sequence[Part], int] | None:
    group = parts[:MOST_INPUTS]
    return (group, level) if len(group) > 1 and sum(part.values for part in group) <= MOST_VALUES else None


def _level_up(day: list[Part]) -> tuple[Sequence[Part], int] | None:
    for level, run in groupby(day, key=lambda part: part.level):
        group = list(run)[:FAN]
        if level < DAY - 1 and len(group) == FAN and sum(part.values for part in group) <= MOST_VALUES:
            return group, level + 1
    return None


def merged(folder: Path, parts: Sequence[Part], level: int, files: Files) -> Generator[None, None, Part]:
    """Write the part that holds what `parts` hold, yielding often; return it. Raises StorageError, Damaged."""
    filled = [part for part in parts if part.values]
    whole = msgspec.structs.replace(
        parts[0],
        next=parts[-1].next,
        level=level,
        received_ms=parts[-1].received_ms,
        from_ms=min((part.from_ms for part in filled), default=0),
        until_ms=max((part.until_ms for part in filled), default=-1),
        values=sum(part.values for part in parts),
        records=sum(part.records for part in parts),
        registries=tuple(dict.fromkeys(name for part in parts for name in part.registries)),
        gaps=tuple(gap for part in parts for gap in part.gaps),
    )
    writer = PartWriter(folder, whole, files)
    try:
        inputs = [pq.ParquetFile(folder / part.values_file) for part in filled]
        names = sorted(set[Series]().union(*(names_in(file) for file in inputs)))
        waiting: list[Rows] = []
        for rows in in_order(inputs, names):
            waiting.append(rows)
            if sum(len(each.series) for each in waiting) >= ROW_GROUP:
                whole_group = joined(waiting)
                writer.values(whole_group.take(slice(0, ROW_GROUP)), names)
                waiting = [whole_group.take(slice(ROW_GROUP, None))]
            yield
        if waiting:
            writer.values(joined(waiting), names)
        for table in _records([folder / part.records_file for part in parts]):
            writer.records(table)
            yield
        return writer.finish()
    finally:
        writer.abandon()


def in_order(inputs: Sequence[pq.ParquetFile], names: Sequence[Series]) -> Iterator[Rows]:
    """Yield the rows of sorted files as one sorted sequence, in pieces of any size."""
    number = {series: at for at, series in enumerate(names)}
    sources = [batches(file, number, BATCH) for file in inputs]
    held = [rows for source in sources if (rows := next(source, None)) is not None]
    sources = sources[: len(held)]  # every input has rows
    while held:
        bound = min(_key(rows, -1) for rows in held)
        counts = [_up_to(rows, bound) for rows in held]
        yield joined([rows.take(slice(0, n)) for rows, n in zip(held, counts, strict=True)]).sorted()
        rest = [rows.take(slice(n, None)) for rows, n in zip(held, counts, strict=True)]
        filled = [rows if len(rows.series) else next(source, None) for rows, source in zip(rest, sources, strict=True)]
        sources = [source for rows, source in zip(filled, sources, strict=True) if rows is not None]
        held = [rows for rows in filled if rows is not None]


def _key(rows: Rows, at: int) -> tuple[int, int, int, int]:
    return int(rows.series[at]), int(rows.observed_at[at]), int(rows.offset[at]), int(rows.position[at])


def _up_to(rows: Rows, key: tuple[int, int, int, int]) -> int:
    """Return how many of the sorted rows are not behind `key`."""
    low, high = 0, len(rows.series)
    for column, value in zip((rows.series, rows.observed_at, rows.offset, rows.position), key, strict=True):
        inside = column[low:high]
        low, high = low + int(np.searchsorted(inside, value, "left")), low + int(np.searchsorted(inside, value, "right"))
    return high


def _records(paths: Sequence[Path]) -> Iterator[pa.Table]:
    """Yield the rows of `records` files one after the other, a row group at a time."""
    waiting: list[pa.RecordBatch] = []
    for path in paths:
        for batch in pq.ParquetFile(path).iter_batches(BATCH):
            waiting.append(batch)
            if sum(each.num_rows for each in waiting) >= ROW_GROUP:
                yield pa.Table.from_batches(waiting, RECORDS)
                waiting = []
    if waiting:
        yield pa.Table.from_batches(waiting, RECORDS)
