"""Writing a part's two files durably. They count once the manifest names them, so a half-written one harms nobody."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import google_crc32c
import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from citybrain.storage import Files
from streams.history.columns import RECORDS, VALUES, Rows, Series, write_values, writer
from streams.history.manifest import Part


class Sink:
    """A new file that pyarrow writes to; it sums up what it was given."""

    def __init__(self, path: Path, files: Files) -> None:
        files.remove(path)  # of a try that a full disk ended
        self.bytes = 0
        self.checksum = 0
        self.closed = False
        self._handle = files.append(path)

    def write(self, data: bytes | memoryview) -> int:
        """Append; raises StorageError. What is written after `close` goes nowhere: pyarrow ends a file it gives up."""
        if self.closed:
            return len(data)
        piece = bytes(data)
        self._handle.write(piece)
        self.checksum = google_crc32c.extend(self.checksum, piece)
        self.bytes += len(piece)
        return len(piece)

    def tell(self) -> int:
        return self.bytes

    def flush(self) -> None:
        """Nothing waits here."""

    def finish(self) -> None:
        """Sync; raises StorageError."""
        self._handle.sync()

    def close(self) -> None:
        """Close, also half way."""
        if not self.closed:
            self.closed = True
            self._handle.close()


class PartWriter:
    """Writes one part: values in the order of their file, records in the log's; `finish` makes both durable."""

    def __init__(self, folder: Path, part: Part, files: Files) -> None:
        self._folder = folder
        self._part = part
        self._files = files
        self._sinks: list[Sink] = []
        self._writers: list[pq.ParquetWriter] = []

    def start(self) -> None:
        """Open the two files; raises StorageError."""
        for name, schema in ((self._part.values_file, VALUES), (self._part.records_file, RECORDS)):
            self._sinks.append(Sink(self._folder / name, self._files))
            self._writers.append(writer(self._sinks[-1], schema))

    def values(self, rows: Rows, names: Sequence[Series]) -> None:
        """Append values; raises StorageError."""
        write_values(self._writers[0], rows, names)

    def records(self, table: pa.Table) -> None:
        """Append records; raises StorageError."""
        self._writers[1].write_table(table)

    def finish(self) -> Part:
        """Sync both files; return the part with their size and checksums. Raises StorageError."""
        for each in self._writers:
            each.close()
        for sink in self._sinks:
            sink.finish()
            sink.close()
        values, records = self._sinks
        return msgspec.structs.replace(
            self._part, bytes=values.bytes + records.bytes, checksums=(values.checksum, records.checksum)
        )

    def abandon(self) -> None:
        """Let go of the files; what stands there is removed by the next start, or by the next try."""
        for sink in self._sinks:
            sink.close()


def checksum_of(path: Path, files: Files) -> int:
    """Return the crc32c of a file, read a piece at a time; raises StorageError."""
    total, at = 0, 0
    while piece := files.read(path, at, 1 << 20):
        total = google_crc32c.extend(total, piece)
        at += len(piece)
    return int(total)
