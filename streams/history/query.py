"""Reading the history: charts and exports, from Parquet and the open tail. It only reads, and asks nobody to wait.

DuckDB runs in this process, on files that never change; what is not in one yet comes from `streams.history.tail`.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import msgspec
import pyarrow as pa

from citybrain.clock import real_unix_ms
from citybrain.errors import StorageError, Unavailable
from citybrain.layout import Layout
from citybrain.mailbox import Mailbox, command
from citybrain.storage import OS_FILES
from streams.history.build import beats
from streams.history.columns import Series
from streams.history.gaps import SILENT_MS, union
from streams.history.manifest import Gap, Manifest, Part, history_folder, read_manifest
from streams.history.parts import checksum_of
from streams.history.tail import Tail
from streams.logs import LogStore
from streams.registry import Index, decode_registry

if TYPE_CHECKING:
    import duckdb

T = TypeVar("T")
MAILBOX = "history"
MEMORY = "256MB"  # [U] of one process's queries together; beyond it DuckDB sorts on disk
THREADS = 2
AT_ONCE = 2  # queries; others wait their turn
PATIENCE_S = 20.0
TRIES = 4
EXPORTED = pa.schema(
    [("device", pa.string()), ("metric", pa.string()), ("observed_at", pa.int64()), ("value", pa.float64())]
)
ROWS = 16 * 1024

_TAIL = pa.schema(
    [("device", pa.string()), ("metric", pa.string()), ("observed_at", pa.int64()), ("value", pa.float64()),
     ("offset", pa.int64()), ("position", pa.int64())]
)  # fmt: skip
_PARTS = """
SELECT device, metric, observed_at, CASE WHEN divisor IS NULL THEN raw ELSE scaled / divisor END AS value,
       "offset", position
FROM read_parquet($files) WHERE device = $device AND metric IN (SELECT unnest($metrics))
AND observed_at >= $from_ms AND observed_at < $to_ms"""
_BUCKETS = """
SELECT (observed_at - $from_ms) // $bucket_ms AS bucket, count(*), min(value), max(value),
       arg_min(value, observed_at), arg_max(value, observed_at)
FROM ({rows}) GROUP BY bucket ORDER BY bucket"""
_RAW = 'SELECT observed_at, value FROM ({rows}) ORDER BY observed_at, "offset", position'
_SORTED = 'SELECT device, metric, observed_at, value FROM ({rows}) ORDER BY metric, observed_at, "offset", position'


class Missing(msgspec.Struct, frozen=True):
    """A part of the history that cannot be read: its values with observed times in from_ms..until_ms are missing."""

    file: str
    from_ms: int
    until_ms: int


class Chart(msgspec.Struct):
    """A series over time: the values as they are (`bucket_ms` 0: `value`), or per bucket of time what stands out.

    at: observed times, or the beginnings of buckets that hold values. values: how many there are in all.
    """

    bucket_ms: int
    values: int
    at: list[int] = []
    value: list[float] = []
    count: list[int] = []
    min: list[float] = []
    max: list[float] = []
    first: list[float] = []
    last: list[float] = []
    gaps: list[Gap] = []
    missing: list[Missing] = []


class Span(NamedTuple):
    """A device's metrics in from_ms <= observed_at < to_ms."""

    device: str
    metrics: tuple[str, ...]
    from_ms: int
    to_ms: int


class Found(NamedTuple):
    """Where the values of a span stand."""

    files: list[str]
    tail: pa.Table
    missing: list[Missing]


class History:
    """All shards' history for one reading process. Methods may be called by several threads; raises StorageError."""

    def __init__(self, layout: Layout, shards: int, logs: LogStore | None = None) -> None:
        self._layout = layout
        self._indexes: dict[str, Index] = {}
        self._tails = [Tail(layout, shard, self.index, logs) for shard in range(shards)]
        self._charts, self._exports = (threading.BoundedSemaphore(AT_ONCE) for _ in range(2))
        self._opening = threading.Lock()
        self._database: duckdb.DuckDBPyConnection | None = None
        self._bad: dict[Path, tuple[int, int]] = {}  # what we found damaged: inode and time of that file

    def index(self, name: str) -> Index:
        """Return the index of a registry by its hash; raises NotFound, Damaged."""
        found = self._indexes.get(name)
        if found is None:
            if len(self._indexes) >= 4:
                self._indexes.clear()
            found = self._indexes[name] = Index(decode_registry(self._layout.get_blob(name)), name)
        return found

    # --- charts -------------------------------------------------------------------------------------------------

    def chart(self, device: str, metric: str, from_ms: int, to_ms: int, points: int) -> Chart:
        """Return a series with at most `points` values or buckets; extremes are never lost.

        Raises StorageError, and Unavailable where others keep us from reading for too long.
        """
        span = Span(device, (metric,), from_ms, to_ms)
        bucket_ms = max(-(-(to_ms - from_ms) // points), 1)
        with self._turn(self._charts) as cursor:
            found, rows = self._rows(cursor, span, _BUCKETS, bucket_ms=bucket_ms)
            values = sum(row[1] for row in rows)
            if values > points:
                bucket, count, least, most, first, last = (list(column) for column in zip(*rows, strict=True))
                at = [from_ms + number * bucket_ms for number in bucket]
                return Chart(bucket_ms, values, at, [], count, least, most, first, last, missing=found.missing)
            found, rows = self._rows(cursor, span, _RAW)
            return Chart(0, len(rows), [row[0] for row in rows], [row[1] for row in rows], missing=found.missing)

    def gaps(self, gateway: str, shard: int, from_ms: int, to_ms: int, now_ms: int) -> list[Gap]:
        """Return where nothing of a gateway was received in [from_ms, to_ms), up to now."""
        manifest = read_manifest(history_folder(self._layout, shard))
        found = [gap for part in manifest.parts for gap in part.gaps if gap.gateway == gateway]
        newer, at_ms = self._tails[shard].gaps(manifest, gateway)
        found += newer
        registry = self._tails[shard].registry
        silent = registry and beats(self.index(registry), gateway) and now_ms - at_ms > SILENT_MS
        if silent and at_ms >= 0:
            found.append(Gap(gateway, "telemetry", at_ms, now_ms, "silent"))
        return union(found, from_ms, to_ms)

    def missing(self, from_ms: int, to_ms: int) -> list[Missing]:
        """Return what is known to be missing of [from_ms, to_ms), of any device."""
        found: list[Missing] = []
        for shard in range(len(self._tails)):
            folder = history_folder(self._layout, shard)
            manifest = read_manifest(folder)
            bad = [part for part in manifest.parts if self._is_bad(folder / part.values_file)]
            found += [_missing(part) for part in touching((*bad, *manifest.damaged), from_ms, to_ms)]
        return found

    # --- exports ------------------------------------------------------------------------------------------------

    def export(self, span: Span) -> Iterator[pa.RecordBatch]:
        """Yield all values of a span by metric and time, `ROWS` at a time, under the schema `EXPORTED`."""
        with self._turn(self._exports) as cursor:
            _, (first, rest) = self._retried(span, lambda found: _begun(self._query(cursor, span, found, _SORTED)))
            for batch in itertools.chain(first, rest):
                yield batch.cast(EXPORTED)

    # --- how ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _turn(self, turns: threading.Semaphore) -> Iterator[duckdb.DuckDBPyConnection]:
        """Give a cursor, when it is our turn."""
        if not turns.acquire(timeout=PATIENCE_S):
            raise Unavailable(f"history: {AT_ONCE} other queries have been running for {PATIENCE_S:g} s; ask again")
        try:
            with self._opened().cursor() as cursor:
                yield cursor
        finally:
            turns.release()

    def _opened(self) -> duckdb.DuckDBPyConnection:
        with self._opening:
            if self._database is None:
                self._database = open_database(self._layout)
        return self._database

    def _rows(self, cursor: duckdb.DuckDBPyConnection, span: Span, query: str, **more: int) -> tuple[Found, list[Any]]:
        return self._retried(span, lambda found: self._query(cursor, span, found, query, **more).fetchall())

    def _retried(self, span: Span, ask: Callable[[Found], T]) -> tuple[Found, T]:
        """Ask; again without a part that is damaged, or with the parts of now where a merge took one away meanwhile."""
        import duckdb  # noqa: PLC0415

        for left in reversed(range(TRIES)):
            found = self._find(span)
            try:
                return found, ask(found)
            except duckdb.Error as error:
                if not left or not self._explained(found):
                    raise StorageError(f"history of {span.device}: {error}") from error
        raise AssertionError

    def _query(self, cursor: duckdb.DuckDBPyConnection, span: Span, found: Found, query: str, **more: int) -> Any:
        cursor.register("tail", found.tail)
        if found.files:
            given: dict[str, Any] = {"files": found.files, **span._asdict(), "metrics": list(span.metrics)}
            return cursor.sql(query.format(rows=f"{_PARTS} UNION ALL SELECT * FROM tail"), params=given | more)
        needs = {"from_ms": span.from_ms} if "$from_ms" in query else {}
        return cursor.sql(query.format(rows="SELECT * FROM tail"), params=needs | more)

    def _find(self, span: Span) -> Found:
        """Return where a span's values are now."""
        files: list[str] = []
        missing: list[Missing] = []
        tails: list[pa.Table] = []
        asked: list[Series] = [(span.device, metric) for metric in span.metrics]
        for shard, tail in enumerate(self._tails):
            folder = history_folder(self._layout, shard)
            manifest = read_manifest(folder)
            for part in touching(manifest.parts, span.from_ms, span.to_ms):
                path = folder / part.values_file
                if self._is_bad(path):
                    missing.append(_missing(part))
                else:
                    files.append(str(path))
            missing += [_missing(part) for part in touching(manifest.damaged, span.from_ms, span.to_ms)]
            tails.append(_table(tail, manifest, asked, span))
        return Found(files, pa.concat_tables(tails), missing)

    def _is_bad(self, path: Path) -> bool:
        return path in self._bad and self._bad[path] == _signature(path)

    def _explained(self, found: Found) -> bool:
        """Return whether we now know why a query failed: a part is gone by a merge, or damaged (left out, reported)."""
        gone = any(not Path(path).exists() for path in found.files)
        damaged = [
            (shard, folder / part.values_file, part)
            for shard, folder in enumerate(history_folder(self._layout, n) for n in range(len(self._tails)))
            for part in read_manifest(folder).parts
            if str(folder / part.values_file) in found.files and _damaged(folder / part.values_file, part)
        ]
        for shard, path, part in damaged:
            self._bad[path] = _signature(path)
            report_damage(self._layout, shard, part.values_file)
        return gone or bool(damaged)


def open_database(layout: Layout) -> duckdb.DuckDBPyConnection:
    """Return a DuckDB of our own, in memory: it holds nothing, it reads Parquet; what is too much it sorts on disk."""
    import duckdb  # noqa: PLC0415  30 MB that a process without charts does without

    return duckdb.connect(
        ":memory:",
        config={"threads": THREADS, "memory_limit": MEMORY, "temp_directory": str(layout.run / "duckdb")},
    )


def report_damage(layout: Layout, shard: int, file: str) -> None:
    """Ask the history process to look at a part and set it aside; durable. Raises StorageError."""
    body = {"shard": shard, "file": file}
    Mailbox(layout.mailbox(MAILBOX)).put(command("damaged", "reader", real_unix_ms(), body))


def _damaged(path: Path, part: Part) -> bool:
    return not path.exists() or checksum_of(path, OS_FILES) != part.checksums[0]


def _signature(path: Path) -> tuple[int, int]:
    """Return what tells a file from one made anew under its name."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return 0, 0
    return found.st_ino, found.st_mtime_ns


def _begun(result: Any) -> tuple[list[pa.RecordBatch], Iterator[pa.RecordBatch]]:
    """Return the first batch of a result (none where it is empty), and the others: most damage shows before it."""
    batches = iter(result.to_arrow_reader(ROWS))
    return list(itertools.islice(batches, 1)), batches


def touching(parts: Sequence[Part], from_ms: int, to_ms: int) -> list[Part]:
    """Return the parts that may hold values of [from_ms, to_ms)."""
    return [part for part in parts if part.values and part.from_ms < to_ms and part.until_ms >= from_ms]


def _missing(part: Part) -> Missing:
    return Missing(part.values_file, part.from_ms, part.until_ms)


def _table(tail: Tail, manifest: Manifest, asked: Sequence[Series], span: Span) -> pa.Table:
    """Return what the tail has of a span."""
    newest = tail.values(manifest, asked, span.from_ms, span.to_ms)
    series = newest.series.tolist()
    columns = [
        pa.array([asked[at][0] for at in series], pa.string()),
        pa.array([asked[at][1] for at in series], pa.string()),
        *(pa.array(column) for column in (newest.observed_at, newest.value, newest.offset, newest.position)),
    ]
    return pa.table(columns, schema=_TAIL)
