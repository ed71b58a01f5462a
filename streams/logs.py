"""Where the shards' logs are kept: one interface, as segments on disk (here) or as topics of Kafka.

A log is `log` (what ingest accepted) or `transitions` (what the engine made of it), one a shard. Whatever keeps it, a
log has one writer at a time, dense offsets, and readers that see only what is committed. Content that records name by
hash must be where the log's readers are before the record is: `share`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, Protocol

from citybrain import segments
from citybrain.layout import Layout
from citybrain.segments import Record
from citybrain.storage import OS_FILES, Files

Name = Literal["log", "transitions"]


class LogWriter(Protocol):
    """The one writer of a log; `citybrain.segments.Writer` says what each part means.

    `segment` is the first offset of the part that is written to: whoever keeps its own state in the log (ingest) writes
    it again whenever this changes, so that recovery reads about one part.
    """

    warnings: list[str]
    next_offset: int
    committed: int
    segment: int

    def start(self) -> None:
        """Find the log's end, and whatever an earlier writer left; call it first."""

    def append(self, kind: int, received_at: int, payload: bytes) -> int:
        """Buffer a record and return its offset."""

    def commit(self) -> int:
        """Make durable what was appended; return the offset behind it.

        Raises DiskFull with nothing stored and the buffer dropped; after any other StorageError the process must end
        and recover, because nobody knows what is stored.
        """

    def discard(self) -> None:
        """Forget what was appended since the last commit."""

    def close(self) -> None:
        """Let go of it; what was not committed is lost."""


class LogReader(Protocol):
    """Reads a log from an offset on."""

    offset: int

    def read(self, most_bytes: int = ...) -> list[Record]:
        """Return the next committed records, [] where there are none; raises Damaged, Unavailable.

        Missing offsets are skipped: compare `Record.offset` with what you expected.
        """


def ignore_waiting(_waited_s: float) -> None:
    """Go on waiting."""


class LogStore(Protocol):
    """All logs of a run.

    `waiting` is called about once a second, with the seconds so far, while a commit is not answered; what it raises
    gives the commit up, and the writer is broken.
    """

    waiting: Callable[[float], None]

    def writer(self, name: Name, shard: int) -> LogWriter:
        """Return a log's writer; it must be started."""

    def reader(self, name: Name, shard: int, offset: int = 0) -> LogReader:
        """Return a reader that goes on at an offset."""

    def starts(self, name: Name, shard: int) -> Iterator[int]:
        """Yield offsets to begin at when looking backwards for what was written last, down to the log's first."""

    def end(self, name: Name, shard: int) -> int:
        """Return the offset behind what is committed."""

    def where(self, name: Name, shard: int) -> str:
        """Return what a message calls this log."""

    def share(self, content: str) -> None:
        """Make a blob of the data folder, by its hash, durable wherever the log is read."""

    def forget(self, content: str) -> None:
        """Nobody needs this blob any more."""


def records(reader: LogReader) -> Iterator[Record]:
    """Yield every record that is committed now; raises Damaged, Unavailable."""
    while found := reader.read():
        yield from found


class SegmentStore:
    """Logs as segments in the data folder; their blobs are there as well."""

    def __init__(self, layout: Layout, files: Files = OS_FILES, segment_bytes: int = segments.SEGMENT_BYTES) -> None:
        self._layout = layout
        self._files = files
        self._segment_bytes = segment_bytes
        self.waiting: Callable[[float], None] = ignore_waiting  # a disk answers

    def _path(self, name: Name, shard: int) -> Path:
        return self._layout.log(shard) if name == "log" else self._layout.transitions(shard)

    def writer(self, name: Name, shard: int) -> segments.Writer:
        return segments.Writer(self._path(name, shard), self._files, self._segment_bytes)

    def reader(self, name: Name, shard: int, offset: int = 0) -> segments.Reader:
        return segments.Reader(self._path(name, shard), offset, self._files)

    def starts(self, name: Name, shard: int) -> Iterator[int]:
        return reversed(segments.segments(self._files, self._path(name, shard)))

    def end(self, name: Name, shard: int) -> int:
        return self._files.marked(self._path(name, shard) / "committed")

    def where(self, name: Name, shard: int) -> str:
        return str(self._path(name, shard))

    def share(self, content: str) -> None:
        """Do nothing: whoever reads the segments reads the folder."""

    def forget(self, content: str) -> None:
        OS_FILES.remove(self._layout.blobs / content)
