"""What a shard's history consists of: `manifest.json`, replaced whole, says which files count.

A file that the manifest does not name is what a crash left: nobody reads it, the next start removes it. So a part is
there wholly or not at all, and every offset once.
"""

from __future__ import annotations

import datetime
from pathlib import Path

import msgspec

from citybrain.clock import DAY_MS
from citybrain.errors import Damaged
from citybrain.layout import Layout
from citybrain.storage import OS_FILES, Files

FORMAT = 1
DAY, MONTH = 100, 200  # levels; below DAY: 0 as compacted, n merged n times


class Gap(msgspec.Struct, frozen=True):
    """From one value to the next nothing was received of a gateway's lane, in (from_ms, until_ms) of its time.

    why: `silent`, the gateway said nothing though its heartbeat was due; `evicted`, `messages` of its messages were
    dropped at the edge before we could have them; `missing`, the log lost records (docs/log.md, Recovery).
    """

    gateway: str
    lane: str
    from_ms: int
    until_ms: int
    why: str
    messages: int = 0


class Part(msgspec.Struct, frozen=True):
    """Two Parquet files that hold the log's offsets `first..next - 1`.

    day: of the first record's arrival, days since 1970 UTC. from_ms, until_ms: observed times of its values, both
    included. registry: in force before its first record; registries: all under which its values were numbered.
    checksums: crc32c of the two files. gateways: where the devices stood is in the registries.
    """

    first: int
    next: int
    level: int
    day: int
    received_ms: int  # of the last record
    from_ms: int
    until_ms: int
    values: int
    records: int
    bytes: int
    registry: str
    registries: tuple[str, ...]
    checksums: tuple[int, int]
    gaps: tuple[Gap, ...] = ()

    @property
    def values_file(self) -> str:
        return f"{self._stem}.values.parquet"

    @property
    def records_file(self) -> str:
        return f"{self._stem}.records.parquet"

    @property
    def _stem(self) -> str:
        return f"{self.first:020d}-{self.next:020d}-{self.level}"

    @property
    def month(self) -> tuple[int, int]:
        """The year and month of its day."""
        date = datetime.datetime.fromtimestamp(self.day * DAY_MS / 1000, datetime.UTC)
        return date.year, date.month


class Stream(msgspec.Struct):
    """How far a lane of a gateway is: its last number, and the highest time of its values (-1: none yet).

    lost: messages that were dropped at the edge since that value; broken: the log lost records since then.
    """

    epoch: int
    seq: int
    at_ms: int = -1
    lost: int = 0
    broken: bool = False


class Manifest(msgspec.Struct):
    """A shard's history. next: the log offset that comes next; streams: by `gateway/lane`, at `next`.

    damaged: parts whose files were not what was written; they are set aside, and their offsets are missing.
    """

    next: int = 0
    registry: str = ""
    parts: tuple[Part, ...] = ()
    streams: dict[str, Stream] = {}
    damaged: tuple[Part, ...] = ()
    dropped_before: int = 0  # retention has removed the parts before this offset
    format: int = FORMAT


def history_folder(layout: Layout, shard: int) -> Path:
    """Return where a shard's history stands."""
    return layout.root / "history" / str(shard)


def read_manifest(folder: Path, files: Files = OS_FILES) -> Manifest:
    """Return the folder's manifest, an empty one where there is none; raises Damaged."""
    path = folder / "manifest.json"
    if not files.size(path):
        return Manifest()
    try:
        found = msgspec.json.decode(files.read(path), type=Manifest)
    except msgspec.DecodeError as error:
        raise Damaged(
            str(path), 0, f"{error}; move the folder away, and `citybrain history compact` makes it anew from the log"
        ) from None
    if found.format != FORMAT:
        raise Damaged(str(path), 0, f"format {found.format}, this program reads {FORMAT}")
    return found


def write_manifest(folder: Path, manifest: Manifest, files: Files = OS_FILES) -> None:
    """Replace the manifest; durable. Raises StorageError."""
    files.replace(folder / "manifest.json", msgspec.json.encode(manifest))
