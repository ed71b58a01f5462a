"""Many small parts become one: sorted the same way, so that a chart of a year touches few row groups.

Inputs are read a few thousand rows at a time, so memory does not grow with them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from citybrain.errors import Damaged
from citybrain.storage import Files
from streams.history.columns import BATCH, RECORDS, ROW_GROUP, Rows, Series, batches, joined, names_in, opened
from streams.history.manifest import DAY, MONTH, Part
from streams.history.parts import PartWriter

FAN = 8  # [U] parts of a level that become one of the next, within a day
MOST_INPUTS = 12  # [U] at once: each takes about 2 MB
MOST_VALUES = 100_000_000  # [U] a larger part would take longer to merge than is sensible; days then stay days


def group_to_merge(parts: Sequence[Part]) -> tuple[Sequence[Part], int] | None:
    """Return neighbours that should be one part, and its level; None where all is well.

    Within the present day FAN of one level; of a day that is over all; of a month that is over all. What is missing
    between two parts (set aside as damaged) may be mended: they are no neighbours.
    """
    for month in _runs(parts, lambda part: part.month):
        for day in _runs(month, lambda part: part.day):
            found = _all_of(day, DAY) if day[0].day != parts[-1].day else _level_up(day)
            if found is not None:
                return found
        if month[0].month != parts[-1].month and (found := _all_of(month, MONTH)) is not None:
            return found
    return None


def _runs(parts: Sequence[Part], key: Callable[[Part], object]) -> list[list[Part]]:
    """Return the parts in runs of neighbours with the same key."""
    runs: list[list[Part]] = []
    for part in parts:
        if runs and runs[-1][-1].next == part.first and key(runs[-1][-1]) == key(part):
            runs[-1].append(part)
        else:
            runs.append([part])
    return runs


def _all_of(parts: list[Part], level: int) -> tuple[Sequence[Part], int] | None:
    group = parts[:MOST_INPUTS]
    return (group, level) if len(group) > 1 and sum(part.values for part in group) <= MOST_VALUES else None


def _level_up(day: list[Part]) -> tuple[Sequence[Part], int] | None:
    for run in _runs(day, lambda part: part.level):
        group, level = run[:FAN], run[0].level + 1
        if level < DAY and len(group) == FAN and sum(part.values for part in group) <= MOST_VALUES:
            return group, level
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
        writer.start()
        inputs = [opened(folder / part.values_file) for part in filled]
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
    except (pa.ArrowException, OSError) as error:
        raise Damaged(f"{folder}: parts {parts[0].values_file} and behind", 0, str(error)) from error
    finally:
        writer.abandon()
        pa.default_memory_pool().release_unused()


def in_order(inputs: Sequence[pq.ParquetFile], names: Sequence[Series]) -> Iterator[Rows]:
    """Yield the rows of sorted files as one sorted sequence, in pieces of any size."""
    number = {series: at for at, series in enumerate(names)}
    sources = [batches(file, number) for file in inputs]
    held = [rows for source in sources if (rows := next(source, None)) is not None]
    sources = sources[: len(held)]  # every input has rows
    while held:
        bound = min(_key(rows, -1) for rows in held)
        counts = [_up_to(rows, bound) for rows in held]
        found = joined([rows.take(slice(0, n)) for rows, n in zip(held, counts, strict=True)])
        yield found.take(found.order())
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
        first, behind = np.searchsorted(column[low:high], (value, value + 1))
        low, high = low + int(first), low + int(behind)
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
