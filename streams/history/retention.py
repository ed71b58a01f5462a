"""How long things are kept, and what may go: `DATA/retention.yaml`.

A log segment goes when it is old enough and nobody needs it: its records are in Parquet, durably; every engine snapshot
that is kept, and the desk, are behind it; and ingest's last two segments stay for its own recovery.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import msgspec

from citybrain.clock import DAY_MS
from citybrain.config import Duration, load_yaml
from citybrain.errors import CityBrainError, ConfigError
from citybrain.layout import Layout
from citybrain.segments import Reader, segment_name, segments
from citybrain.storage import OS_FILES, Files
from streams.evidence import KEPT_DAYS
from streams.history.manifest import Manifest, Part

SNAPSHOT = ".snapshot"
KEPT_SEGMENTS = 2  # ingest's recovery reads the last segment, or the one before


class Retention(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How long log segments, Parquet and pictures are kept, and how far back a backtest must be possible.

    [U] our choice: disputes about a case are settled within a year or two; a backtest wants a season. `evidence` is
    the least that is asked of public video (State Council Order 799), and pictures of people are not kept for longer.
    """

    log: Duration = Duration(7 * DAY_MS)
    parquet: Duration = Duration(730 * DAY_MS)
    backtest: Duration = Duration(90 * DAY_MS)
    evidence: Duration = Duration(KEPT_DAYS * DAY_MS)


def read_retention(layout: Layout) -> Retention:
    """Return what `retention.yaml` says, the defaults where there is none; raises ConfigError."""
    path = layout.root / "retention.yaml"
    if not path.exists():
        return Retention()
    found = load_yaml(path, Retention)
    if found.parquet < found.backtest:
        raise ConfigError(f"{path} parquet", "expected at least as long as `backtest`: it is read from there")
    for name, kept_ms in (("log", found.log), ("backtest", found.backtest), ("evidence", found.evidence)):
        if kept_ms < DAY_MS:
            raise ConfigError(f"{path} {name}", 'expected at least "1d"')
    return found


def removable_segments(firsts: Sequence[int], below: int, expired: Sequence[bool]) -> list[int]:
    """Return the segments (by first offset) that may go: from the front, all before `below`, all expired.

    `expired[i]`: whether the last record of segment i is old enough. The last two stay in any case.
    """
    found = []
    for (first, following), old in zip(pairwise(firsts[: 1 - KEPT_SEGMENTS]), expired, strict=False):
        if following > below or not old:
            break
        found.append(first)
    return found


def removable_parts(manifest: Manifest, now_ms: int, kept_ms: int) -> list[Part]:
    """Return the parts that may go: from the front, all whose last record arrived more than `kept_ms` ago."""
    found = []
    for part in manifest.parts:
        if part.received_ms >= now_ms - kept_ms:
            break
        found.append(part)
    return found


class Needed(msgspec.Struct, frozen=True):
    """The lowest log offset of a shard that somebody still needs, and who does."""

    offset: int
    by: str


def needed(layout: Layout, shard: int, manifest: Manifest, files: Files = OS_FILES) -> Needed:
    """Return what holds a shard's log back: what is not in Parquet yet, an engine snapshot that is kept, the desk."""
    snapshots = [
        int(name[: -len(SNAPSHOT)])
        for name in files.names(layout.engine(shard))
        if name.endswith(SNAPSHOT) and name[: -len(SNAPSHOT)].isdecimal()
    ]
    found = [
        Needed(manifest.next, "history"),
        Needed(min(snapshots, default=0), "engine snapshot"),
        Needed(_desk_needs(layout, shard, files, manifest.next), "desk"),
        *(Needed(part.first, f"damaged {part.values_file}") for part in manifest.damaged),
    ]
    return min(found, key=lambda each: each.offset)


def _desk_needs(layout: Layout, shard: int, files: Files, most: int) -> int:
    """Return the log offset of the last transition that the desk took; all, where none waits or there never was one."""
    written = files.marked(layout.transitions(shard) / "committed")
    if not written:
        return most
    from sqlalchemy import select  # noqa: PLC0415  30 MB that only retention needs

    from citybrain.db.schema import consumed  # noqa: PLC0415
    from citybrain.db.store import open_store, reading  # noqa: PLC0415

    try:
        store = open_store(layout.place, readonly=True)
        try:
            with reading(store) as connection:
                row = connection.execute(select(consumed).where(consumed.c.shard == shard)).mappings().first()
        finally:
            store.dispose()
    except CityBrainError:  # no desk has ever run here, or its database is away: everything waits for it
        return 0
    if row is None:
        return 0
    return most if row["offset"] >= written else max(int(row["source"]), 0)


def first_received_ms(folder: Path, first: int, files: Files = OS_FILES) -> int | None:
    """Return when a segment's first record arrived, None where it has none that can be read."""
    try:
        records = Reader(folder, first, files).read(1)
    except CityBrainError:
        return None
    return records[0].received_at if records and records[0].offset >= first else None


def expired_segments(
    layout: Layout, shard: int, manifest: Manifest, now_ms: int, kept_ms: int, files: Files = OS_FILES
) -> list[int]:
    """Return the log segments of a shard that may go. A segment is as old as the first record behind it."""
    folder = layout.log(shard)
    firsts = segments(files, folder)
    followed = [first_received_ms(folder, following, files) for following in firsts[1:]]
    expired = [at is not None and at < now_ms - kept_ms for at in followed]
    if not expired or not expired[0]:
        return []
    return removable_segments(firsts, needed(layout, shard, manifest, files).offset, expired)


def remove_segments(layout: Layout, shard: int, firsts: Sequence[int], files: Files = OS_FILES) -> int:
    """Remove log segments, oldest first, so that what a crash leaves has no hole; return their bytes."""
    size = 0
    for first in firsts:
        path = layout.log(shard) / segment_name(first)
        size += files.size(path)
        files.remove(path)
    return size
