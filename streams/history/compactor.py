"""One shard's compactor: committed log records become parts, small parts larger ones; the manifest's only writer.

A part's files are synced before the manifest names them, and the manifest is replaced whole: kill it anywhere, and
every offset is there once.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

import msgspec

from citybrain.clock import DAY_MS, MINUTE_MS
from citybrain.counters import Counters
from citybrain.errors import Damaged
from citybrain.layout import Layout
from citybrain.segments import Record
from citybrain.storage import OS_FILES, Files
from streams.history.build import Builder, Built
from streams.history.manifest import Manifest, Part, history_folder, read_manifest, write_manifest
from streams.history.merge import group_to_merge, merged
from streams.history.parts import PartWriter, checksum_of
from streams.log import FRAME_HEAD, Kind
from streams.logs import LogStore, SegmentStore
from streams.registry import Index, decode_registry

PARQUET = ".parquet"
READ_BYTES = 4 * 1024 * 1024


class Limits(msgspec.Struct, frozen=True):
    """When what waits becomes a part. [U] our choice: 150 MB of memory, and little to read for a chart of today."""

    values: int = 150_000
    records: int = 20_000
    age_ms: int = 15 * MINUTE_MS  # platform time since the oldest record that waits arrived


class Compactor:
    """`start` first; then `step` as often as you like, `merge` in between. Only one may work on a folder."""

    def __init__(
        self,
        layout: Layout,
        shard: int,
        counters: Counters,
        *,
        limits: Limits | None = None,
        files: Files = OS_FILES,
        logs: LogStore | None = None,
    ) -> None:
        self.shard = shard
        self.folder = history_folder(layout, shard)
        self.manifest = Manifest()
        self.counters = counters
        self._layout = layout
        self._limits = limits or Limits()
        self._files = files
        self._logs = logs or SegmentStore(layout, files)
        self._reader = self._logs.reader("log", shard)
        self._waiting: list[Record] = []
        self._values = 0
        self._indexes: dict[str, Index] = {}
        self._retired: list[Part] = []  # no longer in the manifest, their files still there
        self._leaving: list[Part] = []  # the same, and longer ago

    def start(self) -> None:
        """Read the manifest and remove what a crash left; raises Damaged where the manifest is not readable."""
        self._files.make(self.folder.parent)
        self._files.make(self.folder)
        self.manifest = read_manifest(self.folder, self._files)
        self._reader.offset = self.manifest.next
        named = {name for part in self.manifest.parts for name in (part.values_file, part.records_file)}
        for name in self._files.names(self.folder):
            if name.endswith(PARQUET) and name not in named:
                self._files.remove(self.folder / name)
                self.counters.add("leftovers_total")

    @property
    def oldest_ms(self) -> int | None:
        """When the oldest record arrived that is in no part yet; None where none waits."""
        return self._waiting[0].received_at if self._waiting else None

    def step(self, now_ms: int, *, force: bool = False) -> bool:
        """Take what the log has, make one part of it if that is due; return whether there may be more to do.

        force: do not wait for more. Raises StorageError (DiskFull: nothing is lost, try again later).
        """
        more = self._read()
        take = self._due(now_ms, force=force and not more)
        if take:
            self._compact(self._waiting[:take])
            self._values -= sum(_values_in(record) for record in self._waiting[:take])
            del self._waiting[:take]
        return more or take > 0

    def _read(self) -> bool:
        if self._values >= self._limits.values or len(self._waiting) >= self._limits.records:
            return True
        try:
            found = self._reader.read(READ_BYTES)
        except Damaged as error:
            return self._pass_over(error)
        self._waiting += found
        self._values += sum(_values_in(record) for record in found)
        return bool(found)

    def _pass_over(self, error: Damaged) -> bool:
        """Go on behind a segment that cannot be read, if there is one; its offsets are counted as missing."""
        if self.counters.warnings[-1:] != [str(error)]:  # it is tried again and again where nothing is behind it
            self.counters.warn(str(error))
            self.counters.add("errors_total", stage="log")
        later = [first for first in self._logs.starts("log", self.shard) if first > self._reader.offset]
        if later:
            self._reader = self._logs.reader("log", self.shard, min(later))
        return bool(later)

    def _due(self, now_ms: int, *, force: bool) -> int:
        """Return how many of the waiting records to make a part of: of one day, and no more than the limits, or 0."""
        values, first = 0, self._waiting[0].received_at if self._waiting else 0
        for count, record in enumerate(self._waiting):
            if record.received_at // DAY_MS != first // DAY_MS:
                return count
            values += _values_in(record)
            if values >= self._limits.values or count + 1 >= self._limits.records:
                return count + 1
        old = bool(self._waiting) and now_ms - first >= self._limits.age_ms
        return len(self._waiting) if old or force else 0

    def _compact(self, records: list[Record]) -> None:
        built = self._built(records, self.manifest)
        part = self._written(built)
        self._publish(msgspec.structs.replace(built.after, parts=(*self.manifest.parts, part)))
        self.counters.add("values_total", part.values)
        self.counters.add("missing_total", built.missing)
        self.counters.add("unread_total", built.unread)

    def _built(self, records: Sequence[Record], before: Manifest) -> Built:
        builder = Builder(before, self._index)
        for record in records:
            builder.take(record)
        return builder.finish()

    def _written(self, built: Built) -> Part:
        """Return the part, durable; nothing names it yet."""
        writer = PartWriter(self.folder, built.part, self._files)
        try:
            writer.start()
            writer.values(built.rows, built.names)
            writer.records(built.records)
            return writer.finish()
        finally:
            writer.abandon()

    def _publish(self, manifest: Manifest) -> None:
        write_manifest(self.folder, manifest, self._files)
        self.manifest = manifest

    def _index(self, name: str) -> Index:
        if name not in self._indexes:
            if len(self._indexes) >= 4:  # a registry of a district is some megabytes
                self._indexes.clear()
            self._indexes[name] = Index(decode_registry(self._layout.get_blob(name)), name)
        return self._indexes[name]

    # --- merging ------------------------------------------------------------------------------------------------

    def merge(self) -> Generator[None, None, None]:
        """Merge one group of parts where one is due, yielding often; stop iterating, and nothing has happened.

        The files that it makes needless stay until `sweep`: somebody may be reading them. Raises Damaged where a part
        is not what was written: what is damaged must not become part of something larger.
        """
        found = group_to_merge(self.manifest.parts)
        if found is None:
            return
        group, level = found
        for part in group:
            if wrong := self.damage_in(part):
                raise Damaged(str(self.folder / part.values_file), 0, wrong)
            yield
        part = yield from merged(self.folder, group, level, self._files)
        first = self.manifest.parts.index(group[0])
        parts = (*self.manifest.parts[:first], part, *self.manifest.parts[first + len(group) :])
        self._publish(msgspec.structs.replace(self.manifest, parts=parts))
        self._retired += group
        self.counters.add("merged_total", len(group))

    def drop(self, parts: Sequence[Part]) -> None:
        """Take the oldest parts out of the history: they are too old. Their files stay until `sweep`."""
        if not parts:
            return
        kept = self.manifest.parts[len(parts) :]
        self._publish(msgspec.structs.replace(self.manifest, parts=kept, dropped_before=parts[-1].next))
        self._retired += parts

    def set_aside(self, part: Part) -> None:
        """Take a damaged part out of the history; its files are kept as `*.damaged`, and it is tried to be mended."""
        parts = tuple(each for each in self.manifest.parts if each != part)
        self._publish(msgspec.structs.replace(self.manifest, parts=parts, damaged=(*self.manifest.damaged, part)))
        for name in (part.values_file, part.records_file):
            if self._files.size(self.folder / name):
                self._files.rename(self.folder / name, self.folder / f"{name}.damaged")

    def damage_in(self, part: Part) -> str:
        """Return what is wrong with a part's files, "" where they are what was written."""
        for name, checksum in zip((part.values_file, part.records_file), part.checksums, strict=True):
            path = self.folder / name
            if not self._files.size(path):
                return f"{path}: not there"
            if checksum_of(path, self._files) != checksum:
                return f"{path}: not what was written (its checksum differs)"
        return ""

    def mend(self) -> int:
        """Make damaged parts anew from the log where it still has all their records; return how many."""
        mended = 0
        for part in self.manifest.damaged:
            made = self._made_anew(part)
            if not made:
                continue
            parts = tuple(sorted((*self.manifest.parts, *made), key=lambda each: each.first))
            damaged = tuple(each for each in self.manifest.damaged if each != part)
            self._publish(msgspec.structs.replace(self.manifest, parts=parts, damaged=damaged))
            mended += 1
        return mended

    def _made_anew(self, part: Part) -> list[Part]:
        reader = self._logs.reader("log", self.shard, part.first)
        state = Manifest(next=part.first, registry=part.registry)
        made: list[Part] = []
        while state.next < part.next:
            records = [record for record in reader.read(READ_BYTES) if record.offset < part.next]
            if not records or records[0].offset != state.next:
                return []  # the log no longer has them: they stay missing
            built = self._built(records, state)
            made.append(msgspec.structs.replace(self._written(built), gaps=() if made else part.gaps))
            state = built.after
        return made

    def sweep(self) -> int:
        """Remove the files of parts that had been merged or dropped by the last `sweep`; return how many parts."""
        gone, self._leaving, self._retired = self._leaving, self._retired, []
        for part in gone:
            for name in (part.values_file, part.records_file):
                self._files.remove(self.folder / name)
        return len(gone)


def _values_in(record: Record) -> int:
    return max(len(record.payload) - FRAME_HEAD.size, 0) // 20 if record.kind == Kind.FRAME else 0
