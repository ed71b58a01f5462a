"""The history's core: every offset once, every value bit for bit, whatever crashes, merges or breaks."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from citybrain.clock import DAY_MS, HOUR_MS
from citybrain.counters import Counters
from citybrain.errors import Damaged, DiskFull, StorageError
from citybrain.layout import Layout
from citybrain.model import Lane
from citybrain.segments import Reader, segment_name
from citybrain.storage import OsFiles, OsHandle
from simulators.district import build
from simulators.offline import run_offline
from streams.engine import Engine
from streams.history import frames
from streams.history.columns import scale
from streams.history.compactor import Compactor, Limits
from streams.history.manifest import DAY, MONTH, Part, read_manifest
from streams.history.merge import FAN, group_to_merge
from streams.log import Kind
from tests.engine_logs import REGISTRIES, START, Log
from tests.history_logs import (
    busy_log,
    compacted,
    merge_all,
    rows_in,
    rows_of_history,
    rows_of_log,
    write,
)

SMALL = Limits(values=150, records=60)
FEW = Limits(values=90, records=30)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    found = Layout(tmp_path)
    found.make()
    return found


# --- values -----------------------------------------------------------------------------------------------------

DECIMALS = st.builds(lambda whole, power: whole / 10.0**power, st.integers(-(10**9), 10**9), st.integers(0, 6))
ANY = st.floats(allow_nan=False, allow_infinity=False)


@given(
    st.lists(st.tuples(st.integers(0, 3), DECIMALS | ANY | st.sampled_from([0.0, -0.0, 2.0**60, 1e300])), min_size=1)
)
def test_a_value_is_given_back_bit_for_bit(values: list[tuple[int, float]]) -> None:
    series, value = np.array([s for s, _ in values], np.int64), np.array([v for _, v in values])
    scaled, divisor = scale(value, series, 4)
    kept = divisor != 0
    back = np.where(kept, scaled / np.where(kept, divisor, 1.0), value)
    assert (back.view(np.int64) == value.view(np.int64)).all()


@given(st.lists(DECIMALS, min_size=1))
def test_what_a_sensor_says_in_decimals_is_kept_as_integers(values: list[float]) -> None:
    _, divisor = scale(np.array(values), np.zeros(len(values), np.int64), 1)
    assert set(divisor) <= {10.0**power for power in range(7)}
    assert len(set(divisor)) == 1


def test_bytes_on_disk_of_a_simulated_district(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "district")
    run_offline(layout, build(3), 0.1)
    for shard in (0, 1):
        compactor = Compactor(layout, shard, Counters("history"))
        compactor.start()
        while compactor.step(0, force=True):
            pass
        parts = compactor.manifest.parts
        values = sum(part.values for part in parts)
        assert values > 10_000
        assert sum(part.bytes for part in parts) / values <= 4
        assert sum(path.stat().st_size for path in compactor.folder.iterdir()) / values <= 4


# --- once, and the same again -----------------------------------------------------------------------------------


@pytest.mark.parametrize("merged", [False, True])
def test_every_value_of_the_log_is_there_once_in_order_and_sorted(layout: Layout, merged: bool) -> None:
    log = busy_log(layout, 120, 1)
    write(layout, log.records)
    compactor = compacted(layout, SMALL)
    assert len(compactor.manifest.parts) > 3
    if merged:
        merge_all(compactor)
    parts = compactor.manifest.parts
    assert rows_of_history(compactor) == sorted(rows_of_log(layout, log.records))
    assert [part.first for part in parts] == [0, *(part.next for part in parts[:-1])]
    assert compactor.manifest.next == len(log.records)
    for part in parts:
        rows = rows_in(compactor, part)
        keys = [(device, metric, at, offset, position) for offset, position, device, metric, at, _ in rows]
        assert keys == sorted(keys)
        assert len(rows) == part.values


@pytest.mark.parametrize("merged", [False, True])
def test_the_log_is_told_again_byte_for_byte_and_gives_the_same_transitions(layout: Layout, merged: bool) -> None:
    log = busy_log(layout, 150, 2)
    write(layout, log.records)
    compactor = compacted(layout, SMALL)
    if merged:
        merge_all(compactor)
    again = list(frames(layout, 0, 0, len(log.records)))
    assert again == log.records
    expected = Engine(0, layout).process(log.records)
    assert len(expected) > 20
    assert Engine(0, layout).process(again) == expected


def test_any_stretch_of_the_log_is_told_again(layout: Layout) -> None:
    log = busy_log(layout, 60, 3)
    write(layout, log.records)
    merge_all(compacted(layout, SMALL))
    for first, behind in ((0, 1), (5, 90), (89, 200), (150, 151), (7, 7)):
        assert list(frames(layout, 0, first, behind)) == log.records[first:behind]


def test_a_late_value_keeps_its_own_time(layout: Layout) -> None:
    log = Log(layout)
    log.registry(START, REGISTRIES[0])
    log.frame(START + DAY_MS, "a", Lane.TELEMETRY, [("a1", "pressure_mpa", START + 5, 0.3)])
    write(layout, log.records)
    compactor = compacted(layout)
    assert rows_of_history(compactor) == [(1, 0, "a1", "pressure_mpa", START + 5, 0.3)]


def test_a_frame_out_of_quarantine_is_there_once_and_is_no_gap(layout: Layout) -> None:
    log = Log(layout)
    log.registry(START, REGISTRIES[0])
    for number in range(3):
        log.frame(START + number, "a", Lane.TELEMETRY, [("a1", "pressure_mpa", START + number, 0.3)])
    replayed = log.records[-1]
    payload = bytearray(replayed.payload)
    struct.pack_into("<QQ", payload, 8, 0, 900)  # epoch 0, the quarantine's offset
    log.add(Kind.FRAME, START + 9, bytes(payload))
    write(layout, log.records)
    compactor = compacted(layout)
    assert rows_of_history(compactor) == rows_of_log(layout, log.records)
    assert len(rows_of_history(compactor)) == 4
    assert [part.gaps for part in compactor.manifest.parts] == [()]


def test_a_frame_that_cannot_be_read_is_counted_and_kept(layout: Layout) -> None:
    log = busy_log(layout, 10, 4)
    write(layout, log.records)
    compactor = compacted(layout)
    assert compactor.counters.values["unread_total"] == 1
    assert list(frames(layout, 0, 0, len(log.records)))[-1].payload == b"no frame at all"


def test_a_part_is_made_when_there_is_much_or_it_is_old_and_never_of_two_days(layout: Layout) -> None:
    log = busy_log(layout, 40, 5, step_ms=HOUR_MS)
    write(layout, log.records)
    compactor = Compactor(layout, 0, Counters("history"), limits=Limits(values=10**6, age_ms=HOUR_MS))
    compactor.start()
    now = log.records[-1].received_at
    while compactor.step(now):
        pass
    assert [part.day - START // DAY_MS for part in compactor.manifest.parts] == [0, 1]
    assert (compactor.oldest_ms, compactor.step(now)) == (None, False)
    fresh = Log(layout)
    fresh.records = log.records[:]
    fresh.tick(now + 1, START)
    write(layout, fresh.records[len(log.records) :])
    while compactor.step(now + 2):
        pass
    assert (compactor.oldest_ms, compactor.step(now + 1 + HOUR_MS)) == (now + 1, True)
    assert (compactor.oldest_ms, compactor.step(now + 1 + HOUR_MS)) == (None, False)


# --- crashes ----------------------------------------------------------------------------------------------------


class Crash(StorageError):
    """The process ended here."""


class Ending(OsFiles):
    """The real disk, until the n-th time something on it is changed: then `error`, before or half-way through it."""

    def __init__(self, after: int, error: type[StorageError]) -> None:
        self.left = after
        self._error = error

    def spend(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise self._error("here")

    def append(self, path: Path) -> OsHandle:
        self.spend()
        handle = super().append(path)
        return EndingHandle(handle, self)

    def replace(self, path: Path, data: bytes) -> None:
        self.spend()
        super().replace(path, data)

    def rename(self, old: Path, new: Path) -> None:
        self.spend()
        super().rename(old, new)

    def remove(self, path: Path) -> None:
        self.spend()
        super().remove(path)


class EndingHandle(OsHandle):
    def __init__(self, handle: OsHandle, files: Ending) -> None:
        super().__init__(handle._path, handle._fd)
        handle._fd = -1  # ours from now on
        self._files = files

    def write(self, data: bytes) -> None:
        half = len(data) // 2
        super().write(data[:half])
        self._files.spend()
        super().write(data[half:])

    def sync(self) -> None:
        self._files.spend()
        super().sync()


def test_a_crash_anywhere_leaves_every_offset_once(layout: Layout) -> None:
    log = busy_log(layout, 40, 6)
    write(layout, log.records)
    expected = sorted(rows_of_log(layout, log.records))
    crashes = 0
    for changes in range(0, 10_000, 7):  # every seventh change of the disk is the last one
        try:
            finish(Compactor(layout, 0, Counters("history"), limits=FEW, files=Ending(changes, Crash)))
            break
        except Crash:
            crashes += 1
        seen = compacted(layout, FEW)  # what the next start finds, and finishes
        assert rows_of_history(seen) == expected
        named = {name for p in seen.manifest.parts for name in (p.values_file, p.records_file)}
        assert {path.name for path in seen.folder.glob("*.parquet")} == named
        shutil.rmtree(seen.folder)  # and from the beginning again
    assert crashes > 30
    assert rows_of_history(compacted(layout, FEW)) == expected


def finish(compactor: Compactor) -> None:
    """Do all there is to do."""
    compactor.start()
    while compactor.step(0, force=True):
        pass
    merge_all(compactor)
    compactor.sweep()
    compactor.sweep()


def test_a_full_disk_loses_nothing_and_it_goes_on(layout: Layout) -> None:
    log = busy_log(layout, 40, 7)
    write(layout, log.records)
    files = Ending(10**6, DiskFull)
    compactor = Compactor(layout, 0, Counters("history"), limits=FEW, files=files)
    compactor.start()
    refused = 0
    for room in range(400):
        files.left = room % 9
        try:
            if not compactor.step(0, force=True):
                break
        except DiskFull:
            refused += 1
            files.left = 10**6 if refused % 3 == 0 else room % 5
    files.left = 10**6
    while compactor.step(0, force=True):
        pass
    assert refused > 5
    assert rows_of_history(compactor) == sorted(rows_of_log(layout, log.records))


# --- merging ----------------------------------------------------------------------------------------------------


def part(first: int, day: int, level: int = 0, values: int = 10, length: int = 10) -> Part:
    return Part(first, first + length, level, day, day * DAY_MS, 0, 1, values, 1, 1, "", (), (0, 0))


def chain(*days_and_levels: tuple[int, int]) -> list[Part]:
    return [part(10 * n, day, level) for n, (day, level) in enumerate(days_and_levels)]


def merges(parts: list[Part]) -> tuple[int, int, int] | None:
    """Return (number of the first, how many, level) of what is merged next."""
    found = group_to_merge(parts)
    return None if found is None else (parts.index(found[0][0]), len(found[0]), found[1])


def test_what_is_merged() -> None:
    assert merges([]) is None
    assert merges(chain((0, 0), (0, 0))) is None
    assert merges(chain(*[(0, 0)] * FAN)) == (0, FAN, 1)
    assert merges(chain((0, 1), *[(0, 0)] * FAN)) == (1, FAN, 1)
    assert merges(chain((0, 1), (0, 0), (0, 0), (1, 0))) == (0, 3, DAY)
    assert merges(chain((0, DAY), (1, DAY), (2, 0))) is None
    assert merges(chain((0, DAY), (1, DAY), (31, 0))) == (0, 2, MONTH)
    assert merges(chain((0, MONTH), (31, 0))) is None
    assert merges([part(0, 0), part(20, 0), part(30, 1)]) is None  # offsets 10..19 may be mended
    assert merges([part(0, 0, values=10**8), part(10, 0), part(20, 1)]) is None


def test_days_become_months_and_stay_sorted(layout: Layout) -> None:
    log = busy_log(layout, 33 * 4, 8, step_ms=6 * HOUR_MS)
    write(layout, log.records)
    compactor = compacted(layout)
    assert len(compactor.manifest.parts) > 31
    merge_all(compactor)
    assert [part.level for part in compactor.manifest.parts][:1] == [MONTH]
    assert len(compactor.manifest.parts) == 4  # January, two days of February, the day that is not over
    assert rows_of_history(compactor) == sorted(rows_of_log(layout, log.records))
    compactor.sweep()
    assert len(list(compactor.folder.glob("*.parquet"))) > 2 * 4  # somebody may still be reading
    compactor.sweep()
    assert len(list(compactor.folder.glob("*.parquet"))) == 2 * 4


def test_a_merge_that_is_given_up_changes_nothing(layout: Layout) -> None:
    log = busy_log(layout, 20, 9, step_ms=3 * HOUR_MS)
    write(layout, log.records)
    compactor = compacted(layout, Limits(values=20))
    before = read_manifest(compactor.folder)
    merging = compactor.merge()
    next(merging)
    merging.close()
    assert read_manifest(compactor.folder) == before
    assert rows_of_history(compactor) == sorted(rows_of_log(layout, log.records))


# --- gaps -------------------------------------------------------------------------------------------------------


def gaps_of(layout: Layout, log: Log) -> list[tuple[str, str, int, int, str, int]]:
    write(layout, log.records)
    compactor = compacted(layout, Limits(values=3))
    merge_all(compactor)
    return [
        (gap.gateway, gap.lane, gap.from_ms - START, gap.until_ms - START, gap.why, gap.messages)
        for part in compactor.manifest.parts
        for gap in part.gaps
    ]


def beating(layout: Layout, times_s: list[tuple[int, int, int]], gateway: str = "a") -> Log:
    """A gateway's heartbeats: (observed s, received s, seq)."""
    log = Log(layout)
    log.registry(START, REGISTRIES[0])
    for observed_s, received_s, seq in times_s:
        at = START + 1000 * observed_s
        log.frame(START + 1000 * received_s, gateway, Lane.TELEMETRY, [(gateway, "uptime_s", at, 1.0)])
        payload = bytearray(log.records[-1].payload)
        struct.pack_into("<QQ", payload, 8, 1, seq)
        log.records[-1] = msgspec.structs.replace(log.records[-1], payload=bytes(payload))
    return log


def test_a_gateway_that_was_off_leaves_a_gap(layout: Layout) -> None:
    log = beating(layout, [(0, 0, 1), (10, 10, 2), (400, 400, 3), (410, 410, 4)])
    assert gaps_of(layout, log) == [("a", "telemetry", 10_000, 400_000, "silent", 0)]


def test_a_backlog_that_came_late_leaves_none(layout: Layout) -> None:
    log = beating(layout, [(s, max(s, 500) if s > 10 else s, s // 10 + 1) for s in range(0, 600, 10)])
    assert gaps_of(layout, log) == []


def test_messages_evicted_at_the_edge_leave_a_gap_however_short(layout: Layout) -> None:
    log = beating(layout, [(0, 0, 1), (10, 10, 2), (60, 70, 7), (70, 70, 8)])
    assert gaps_of(layout, log) == [("a", "telemetry", 10_000, 60_000, "evicted", 4)]


def test_records_that_the_log_lost_leave_a_gap(layout: Layout) -> None:
    log = beating(layout, [(s, s, s // 10 + 1) for s in range(0, 100, 10)])
    write(layout, log.records[:4], segment_bytes=1)
    write(layout, log.records[4:], segment_bytes=1)
    (layout.log(0) / segment_name(5)).unlink()
    compactor = compacted(layout)
    assert compactor.counters.values["missing_total"] == 1
    assert [(g.from_ms - START, g.until_ms - START, g.why) for p in compactor.manifest.parts for g in p.gaps] == [
        (30_000, 50_000, "missing")
    ]


# --- damage -----------------------------------------------------------------------------------------------------


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.write_bytes(bytes(data))


def test_a_damaged_part_is_set_aside_and_made_anew_from_the_log(layout: Layout) -> None:
    log = busy_log(layout, 60, 10)
    write(layout, log.records)
    compactor = compacted(layout, SMALL)
    bad = compactor.manifest.parts[1]
    flip(compactor.folder / bad.values_file, 100)
    assert [bool(compactor.damage_in(part)) for part in compactor.manifest.parts][:3] == [False, True, False]
    compactor.set_aside(bad)
    assert (compactor.folder / f"{bad.values_file}.damaged").exists()
    assert compactor.mend() == 1
    assert compactor.manifest.damaged == ()
    assert rows_of_history(compactor) == sorted(rows_of_log(layout, log.records))
    merge_all(compactor)
    assert list(frames(layout, 0, 0, len(log.records))) == log.records


def test_a_damaged_part_whose_log_is_gone_is_missing_and_the_rest_stays(layout: Layout) -> None:
    log = busy_log(layout, 60, 11)
    write(layout, log.records, segment_bytes=4096)
    compactor = compacted(layout, SMALL)
    bad = compactor.manifest.parts[0]
    flip(compactor.folder / bad.records_file, 50)
    (layout.log(0) / segment_name(0)).unlink()
    compactor.set_aside(bad)
    assert compactor.mend() == 0
    assert compactor.manifest.damaged == (bad,)
    again = list(frames(layout, 0, 0, len(log.records)))
    assert again == log.records[bad.next :]
    merge_all(compactor)
    assert compactor.manifest.parts[0].first == bad.next


def test_a_manifest_that_is_none_says_what_to_do(layout: Layout) -> None:
    write(layout, busy_log(layout, 5, 12).records)
    compactor = compacted(layout)
    (compactor.folder / "manifest.json").write_text("{")
    with pytest.raises(Damaged, match="citybrain history compact"):
        compacted(layout)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.integers(20, 200))
def test_any_log_is_told_again(tmp_path_factory: pytest.TempPathFactory, seed: int, limit: int) -> None:
    layout = Layout(tmp_path_factory.mktemp("any"))
    layout.make()
    log = busy_log(layout, 25, seed, step_ms=HOUR_MS)
    write(layout, log.records)
    merge_all(compacted(layout, Limits(values=limit, records=limit)))
    assert list(frames(layout, 0, 0, len(log.records))) == list(Reader(layout.log(0)))
