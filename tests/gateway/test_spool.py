"""The spool: what it committed it keeps, numbers once, and gives up only when acknowledged, evicted or unreadable."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from citybrain.errors import DiskFull, StorageError
from citybrain.model import Lane, Reading
from citybrain.segments import OVERHEAD, Record, pack, segment_name, segments
from citybrain.storage import OS_FILES, Files, OsFiles
from citybrain.wire import (
    HEAD,
    MAX_MESSAGE,
    MAX_SEQ,
    Header,
    Message,
    columns_body,
    columns_message,
    crc32c,
    readings_of,
)
from edge.agent import Agent
from gateway.pace import Paced
from gateway.spool import CLOCK_SET_MS, LIMIT_BYTES, MAX_BODY, SEGMENT_BYTES, Spool, seeded_epochs
from gateway.store import whole_records
from tests.faulty_files import LossyFiles, LossyHandle

T, E, B = Lane
FOLDER = Path("/disk/spool")


def reading(number: float, device: str = "hyd-1", at: int = 1_000) -> Reading:
    return Reading(device, at, {"pressure_mpa": float(number)})


def opened(
    folder: Path,
    serial: str = "A",
    files: Files = OS_FILES,
    limit_bytes: int = LIMIT_BYTES,
    segment_bytes: int = SEGMENT_BYTES,
) -> Spool:
    spool = Spool(folder, serial, files, limit_bytes, segment_bytes)
    spool.start()
    return spool


def fill(spool: Spool, numbers: range, lane: Lane = T) -> None:
    for number in numbers:
        spool.append(lane, [reading(number)], number)
        spool.commit()


def numbers(body: bytes) -> list[float]:
    message = Message(Header(1, 1, 1, 0), True, body, crc32c(body))
    return [value for found in readings_of(message) for value in found.values.values()]


def content(spool: Spool, lane: Lane = T, seq: int = 0) -> dict[int, float]:
    found: dict[int, float] = {}
    seq = max(seq, spool.floor(lane))
    while messages := spool.read(lane, seq, 7, 100_000):
        found |= {number: numbers(body)[0] for number, body in messages}
        seq = messages[-1][0] + 1
    return found


def test_messages_are_numbered_from_1_and_readable_once_committed(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    assert (spool.floor(T), spool.next_seq(T)) == (1, 1)
    assert spool.append(T, [reading(1), reading(2)], 5) == 1
    assert spool.append(E, [reading(3)], 5) == 1
    assert spool.read(T, 1, 32, 1 << 20) == []
    spool.commit()
    ((seq, body),) = spool.read(T, 1, 32, 1 << 20)
    assert (seq, numbers(body)) == (1, [1.0, 2.0])
    assert spool.next_seq(T) == 2
    assert spool.spooled() == 2
    assert spool.append(T, [], 6) == 1


def test_reading_is_bounded_by_messages_and_bytes(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    fill(spool, range(1, 11))
    size = len(spool.read(T, 1, 1, 1 << 20)[0][1])
    assert [seq for seq, _ in spool.read(T, 3, 4, 1 << 20)] == [3, 4, 5, 6]
    assert [seq for seq, _ in spool.read(T, 3, 99, 2 * size + 1)] == [3, 4]
    assert spool.read(T, 3, 99, size - 1) == []
    assert spool.read(T, 11, 99, 1 << 20) == []


def test_what_is_uncommitted_is_gone_after_a_restart_and_its_seq_given_again(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    fill(spool, range(1, 3))
    spool.append(T, [reading(99)], 5)
    again = opened(tmp_path)
    assert again.append(T, [reading(3)], 5) == 3
    again.commit()
    assert content(again) == {1: 1.0, 2: 2.0, 3: 3.0}
    assert again.epoch == spool.epoch


def test_an_all_acknowledged_spool_never_gives_a_seq_twice(tmp_path: Path) -> None:
    spool = opened(tmp_path, segment_bytes=300)
    fill(spool, range(1, 30))
    spool.acknowledged(T, 29)
    assert (spool.floor(T), spool.next_seq(T), spool.spooled()) == (30, 30, 0)
    assert len(segments(OS_FILES, tmp_path / "telemetry")) == 1
    again = opened(tmp_path, segment_bytes=300)
    assert (again.floor(T), again.next_seq(T), again.epoch) == (30, 30, spool.epoch)
    assert again.resumed == {T: 29, E: 0, B: 0}
    assert again.body(T, 29) is not None


def test_acknowledging_drops_whole_segments_and_ignores_what_it_never_had(tmp_path: Path) -> None:
    spool = opened(tmp_path, segment_bytes=300)
    fill(spool, range(1, 30))
    before = len(segments(OS_FILES, tmp_path / "telemetry"))
    spool.acknowledged(T, 15)
    assert len(segments(OS_FILES, tmp_path / "telemetry")) < before
    spool.acknowledged(T, 3)
    spool.acknowledged(T, 30)
    assert spool.floor(T) == 16
    assert content(spool) == {n: float(n) for n in range(16, 30)}


def test_old_messages_come_back_from_disk_when_memory_has_let_them_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.store.RECENT_BYTES", 400)
    spool = opened(tmp_path, segment_bytes=1000)
    for number in range(1, 60):  # reads between writes, so that the open segment is read piece by piece
        fill(spool, range(number, number + 1))
        if number % 7 == 0:
            assert content(spool, seq=number - 12) == {n: float(n) for n in range(max(1, number - 12), number + 1)}
    assert content(spool) == {n: float(n) for n in range(1, 60)}


def test_a_batch_too_large_for_a_message_is_split_in_order(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    many = [Reading(f"dev-{n:05d}", n, {"value": float(n)}) for n in range(30_000)]
    last = spool.append(T, many, 5)
    spool.commit()
    assert last > 1
    messages = spool.read(T, 1, 99, 1 << 24)
    assert [seq for seq, _ in messages] == list(range(1, last + 1))
    assert [value for _, body in messages for value in numbers(body)] == [float(n) for n in range(30_000)]
    noise = random.Random(1).randbytes(MAX_BODY)
    for compress in (False, True):
        assert len(columns_message(Header(1, 1, 1, 0), noise, compress=compress)) <= MAX_MESSAGE
    assert max(len(body) for _, body in messages) + HEAD.size < MAX_MESSAGE


def test_readings_that_no_frame_holds_are_counted_and_the_rest_goes_on(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    good, bad = reading(1), reading(2, device="line\nbreak")
    far = reading(3, at=1_000 + 60 * 86_400_000)  # 60 days later: another frame
    huge = Reading("x", 5, {"m" * MAX_MESSAGE: 1.0})
    spool.append(T, [good, bad, far, huge], 5)
    spool.commit()
    assert sorted(value for _, body in spool.read(T, 1, 99, 1 << 20) for value in numbers(body)) == [1.0, 3.0]
    assert spool.counters.values["dropped_total{reason=unencodable}"] == 1
    assert spool.counters.values["dropped_total{reason=oversized}"] == 1
    assert any("line" in text and "line break" in text for text in spool.counters.warnings)


# --- numbering ---


def test_another_board_begins_a_new_epoch_and_keeps_what_is_unsent(tmp_path: Path) -> None:
    spool = opened(tmp_path, "A")
    fill(spool, range(1, 6))
    spool.acknowledged(T, 2)
    clone = opened(tmp_path, "B")
    assert clone.epoch != spool.epoch
    assert 0 < clone.epoch <= MAX_SEQ
    assert clone.floor(T) == 3
    assert content(clone) == {3: 3.0, 4: 4.0, 5: 5.0}
    assert clone.resumed == dict.fromkeys(Lane, 0)
    assert clone.counters.values["epochs_total{reason=other_board}"] == 1
    assert opened(tmp_path, "B").epoch == clone.epoch


@pytest.mark.parametrize("wrong", [b"{", b"\xff\xfe", b'{"serial":"A"}', b'{"serial":"A","epoch":0}'])
def test_an_unreadable_meta_begins_a_new_epoch(tmp_path: Path, wrong: bytes) -> None:
    spool = opened(tmp_path)
    fill(spool, range(1, 4))
    (tmp_path / "meta.json").write_bytes(wrong)
    again = opened(tmp_path)
    assert again.epoch not in (0, spool.epoch)
    assert content(again) == {1: 1.0, 2: 2.0, 3: 3.0}


def test_a_lane_whose_segments_are_gone_begins_a_new_epoch(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    fill(spool, range(1, 4))
    (tmp_path / "telemetry" / segment_name(1)).unlink()
    again = opened(tmp_path)
    assert again.epoch != spool.epoch
    fill(again, range(1, 9))
    assert opened(tmp_path).floor(T) == 1  # an old mark of the floor must not outlive its messages


def test_losing_synced_records_begins_a_new_epoch(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    fill(spool, range(1, 4))
    path = tmp_path / "telemetry" / segment_name(1)
    path.write_bytes(path.read_bytes()[:-1])  # message 3 was synced, so it may have been sent
    again = opened(tmp_path)
    assert again.next_seq(T) == 3
    assert again.epoch != spool.epoch
    assert again.counters.values["epochs_total{reason=records_gone}"] == 1
    assert "torn end cut" in again.counters.warnings[0]


def test_connections_are_numbered_upwards_over_restarts_and_clock_steps(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    assert [spool.next_connection(0), spool.next_connection(0)] == [1, 2]
    again = opened(tmp_path)
    assert [again.next_connection(0), again.next_connection(1000), again.next_connection(5)] == [3, 1000, 1001]


def test_seeded_epochs_repeat_and_never_stay() -> None:
    first, second = seeded_epochs("gw-1/7"), seeded_epochs("gw-1/7")
    assert [first() for _ in range(3)] == [second() for _ in range(3)]
    spool = Spool(FOLDER, "A", LossyFiles(), draw_epoch=lambda: next(source))
    source = iter([5, 5, 6])
    spool.start()
    spool.new_epoch()
    assert spool.epoch == 6


# --- damage ---


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.write_bytes(data)


def test_damage_in_the_last_segment_loses_only_the_damaged_message(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    fill(spool, range(1, 6))
    size = (tmp_path / "telemetry" / segment_name(1)).stat().st_size // 5
    flip(tmp_path / "telemetry" / segment_name(1), 2 * size + OVERHEAD + 3)
    again = opened(tmp_path)
    fill(again, range(6, 8))
    assert [seq for seq, _ in again.read(T, 1, 99, 1 << 20)] == [1, 2]  # a gap ends a run
    again.acknowledged(T, 2)
    assert content(again) == {4: 4.0, 5: 5.0, 6: 6.0, 7: 7.0}
    assert again.floor(T) == 4
    assert again.counters.values["lost_total{reason=damaged}"] == 1
    assert "messages 3..3 cannot be read" in again.counters.warnings[-1]


def test_damage_in_an_old_segment_loses_only_the_damaged_messages(tmp_path: Path) -> None:
    spool = opened(tmp_path, segment_bytes=400)
    fill(spool, range(1, 20))
    found = segments(OS_FILES, tmp_path / "telemetry")
    path = tmp_path / "telemetry" / segment_name(found[1])
    flip(path, OVERHEAD + 1)
    again = opened(tmp_path, segment_bytes=400)
    again.acknowledged(T, found[1] - 1)
    assert content(again) == {n: float(n) for n in range(found[1] + 1, 20)}
    assert again.floor(T) == found[1] + 1


def test_a_missing_segment_is_stepped_over(tmp_path: Path) -> None:
    spool = opened(tmp_path, segment_bytes=400)
    fill(spool, range(1, 20))
    found = segments(OS_FILES, tmp_path / "telemetry")
    (tmp_path / "telemetry" / segment_name(found[1])).unlink()
    again = opened(tmp_path, segment_bytes=400)
    assert list(content(again)) == list(range(1, found[1]))
    again.acknowledged(T, found[1] - 1)
    assert list(content(again)) == list(range(found[2], 20))
    assert again.counters.values["lost_total{reason=damaged}"] == found[2] - found[1]


def test_a_lane_of_rubbish_only_goes_on(tmp_path: Path) -> None:
    spool = opened(tmp_path, segment_bytes=400)
    fill(spool, range(1, 20))
    for first in segments(OS_FILES, tmp_path / "telemetry"):
        path = tmp_path / "telemetry" / segment_name(first)
        path.write_bytes(b"\xa5" * path.stat().st_size)
    again = opened(tmp_path, segment_bytes=400)
    assert again.epoch != spool.epoch
    assert content(again) == {}
    assert again.floor(T) == again.next_seq(T)
    fill(again, range(1, 2))
    assert list(content(again).values()) == [1.0]


@given(st.lists(st.binary(max_size=60), max_size=6), st.binary(max_size=40), st.integers(0, 300))
@settings(max_examples=100, deadline=None)
def test_every_whole_record_is_found_around_rubbish(payloads: list[bytes], rubbish: bytes, at: int) -> None:
    packed = [pack(Record(seq, 5, 1, payload)) for seq, payload in enumerate(payloads, 1)]
    index = at % (len(packed) + 1)
    data = b"".join([*packed[:index], rubbish, *packed[index:]])
    assert [r.payload for r in whole_records(data, 1, 99)] == payloads


# --- eviction ---


def test_beyond_its_limit_the_oldest_telemetry_goes_and_is_counted(tmp_path: Path) -> None:
    spool = opened(tmp_path, limit_bytes=4000)
    fill(spool, range(1, 11), E)
    fill(spool, range(1, 200))
    assert spool.floor(E) == 1
    assert len(content(spool, E)) == 10
    kept = content(spool)
    assert list(kept) == list(range(spool.floor(T), 200))
    assert spool.counters.values["lost_total{reason=evicted}"] == spool.floor(T) - 1 > 100
    assert sum(f.stat().st_size for f in tmp_path.glob("*/*.seg")) <= 4000
    assert opened(tmp_path, limit_bytes=4000).floor(T) == spool.floor(T)


def test_events_are_evicted_when_nothing_else_is_left(tmp_path: Path) -> None:
    spool = opened(tmp_path, limit_bytes=4000)
    fill(spool, range(1, 5))
    fill(spool, range(1, 100), E)
    assert (spool.floor(T), spool.next_seq(T)) == (5, 5)
    assert spool.floor(E) > 1
    assert list(content(spool, E)) == list(range(spool.floor(E), 100))


def test_evicting_what_was_acknowledged_loses_nothing(tmp_path: Path) -> None:
    spool = opened(tmp_path, limit_bytes=4000)
    for number in range(1, 300):
        fill(spool, range(number, number + 1))
        spool.acknowledged(T, number)
    assert spool.counters.values["lost_total{reason=evicted}"] == 0


def test_a_full_disk_evicts_telemetry_and_takes_the_event() -> None:
    disk = LossyFiles()
    spool = opened(FOLDER, files=disk, segment_bytes=500)
    fill(spool, range(1, 30))
    disk.capacity = disk.used() + 10
    fill(spool, range(1, 4), E)
    assert content(spool, E) == {1: 1.0, 2: 2.0, 3: 3.0}
    assert 0 < spool.counters.values["lost_total{reason=evicted}"] == spool.floor(T) - 1 < 29
    fill(spool, range(30, 40))
    assert content(spool)[39] == 39.0


def test_a_disk_that_others_filled_takes_nothing_says_so_and_goes_on_later() -> None:
    disk = LossyFiles()
    spool = opened(FOLDER, files=disk)
    disk.capacity = disk.used()
    spool.append(T, [reading(1), reading(2)], 5)
    with pytest.raises(DiskFull, match="no space left"):
        spool.commit()
    assert spool.counters.values["dropped_total{reason=disk_full}"] == 2
    disk.capacity = None
    fill(spool, range(7, 9))
    assert content(spool) == {1: 7.0, 2: 8.0}
    assert spool.floor(T) == 1


def test_a_failed_sync_is_final() -> None:
    disk = LossyFiles()
    spool = opened(FOLDER, files=disk)
    disk.failing_syncs = 1
    spool.append(T, [reading(1)], 5)
    with pytest.raises(StorageError, match="Input/output error"):
        spool.commit()
    with pytest.raises(StorageError, match="must end"):
        fill(spool, range(2, 3))


# --- power loss ---


@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("append"), st.integers(1, 4)),
            st.tuples(st.just("acknowledge"), st.integers(1, 6)),
            st.tuples(st.sampled_from(["crash", "kill", "half"]), st.just(0)),
        ),
        max_size=40,
    ),
    seed=st.integers(0, 1000),
    segment_bytes=st.sampled_from([200, 900, 100_000]),
)
@settings(max_examples=150, deadline=None)
def test_power_loss_takes_nothing_that_was_committed(
    steps: list[tuple[str, int]], seed: int, segment_bytes: int
) -> None:
    disk = LossyFiles(seed)
    spool = opened(FOLDER, files=disk, segment_bytes=segment_bytes)
    epoch, count, acked = spool.epoch, 0, 0
    committed: dict[int, float] = {}
    for step, amount in steps:
        if step == "append":
            for _ in range(amount):
                count += 1
                committed[spool.append(T, [reading(count)], 5)] = float(count)
            spool.commit()
        elif step == "acknowledge":
            acked = min(acked + amount, max(committed, default=0))
            spool.acknowledged(T, acked)
        else:
            if step == "half":  # written, not synced: of this, anything may be there
                last = segment_name(segments(disk, FOLDER / "telemetry")[-1])
                record = pack(Record(spool.next_seq(T), 5, 1, columns_body([reading(-1)])))
                disk.files[FOLDER / "telemetry" / last].now += record
            if step != "kill":
                disk.crash()
            spool = opened(FOLDER, files=disk, segment_bytes=segment_bytes)
            if spool.next_seq(T) == len(committed) + 2:  # nobody was told of it, but it survived
                committed[spool.next_seq(T) - 1] = -1.0
        assert spool.epoch == epoch
        assert spool.next_seq(T) == max(committed, default=0) + 1
        assert spool.floor(T) <= acked + 1
        kept = content(spool)
        assert kept == {seq: value for seq, value in committed.items() if seq >= spool.floor(T)}


# --- the agent before it ---


class Due:
    """A source that gives what a test puts into it."""

    def __init__(self) -> None:
        self.due: list[tuple[Lane, Reading]] = []

    def poll(self, now_ms: int) -> list[tuple[Lane, Reading]]:
        due, self.due = self.due, []
        return due


def test_the_agent_batches_telemetry_and_passes_events_at_once(tmp_path: Path) -> None:
    spool, source = opened(tmp_path), Due()
    agent = Agent([source], spool)
    source.due = [(T, reading(n)) for n in range(3)]
    assert agent.step(0) == 3
    assert spool.next_seq(T) == 1
    agent.step(999)
    assert spool.next_seq(T) == 1
    agent.step(1000)
    assert spool.next_seq(T) == 2
    source.due = [(T, reading(n)) for n in range(250)]
    agent.step(1001)
    assert [len(numbers(body)) for _, body in spool.read(T, 1, 99, 1 << 20)] == [3, 100, 100, 50]
    source.due = [(E, reading(7)), (E, reading(8))]
    agent.step(1002)
    assert [numbers(body) for _, body in spool.read(E, 1, 99, 1 << 20)] == [[7.0, 8.0]]
    source.due = [(T, reading(1))]
    agent.step(1003)
    agent.flush(1003)
    assert spool.next_seq(T) == 6


# --- three lanes, ages, and what cannot be recovered ---


def test_pictures_are_evicted_before_telemetry_before_events(tmp_path: Path) -> None:
    spool = opened(tmp_path, segment_bytes=300)
    fill(spool, range(1, 30))
    fill(spool, range(1, 30), E)
    for number in range(1, 30):
        spool.put_blob(b"picture %d" % number, number)
        spool.commit()
    gone: list[Lane] = []
    while spool.spooled():
        before = {lane: spool.floor(lane) for lane in Lane}
        spool.limit_bytes = spool._bytes - 1
        spool.commit()
        gone += [lane for lane in Lane if spool.floor(lane) > before[lane]]
    assert list(dict.fromkeys(gone)) == [B, T, E]
    assert [spool.counters.values[f"evicted_total{{lane={lane.topic}}}"] for lane in Lane] == [29, 29, 29]
    assert spool.counters.values["lost_total{reason=evicted}"] == 87


def test_what_is_too_old_goes_in_whole_segments_and_the_floor_says_so(tmp_path: Path) -> None:
    day = 86_400_000
    now = 1_767_225_600_000
    spool = opened(tmp_path, segment_bytes=300)
    for number in range(1, 41):
        spool.append(T, [reading(number)], now + number * day)
        spool.commit()
    spool.expire(now + 40 * day)
    floor = spool.floor(T)
    assert 5 < floor <= 11, "nothing younger than 30 days went, and nearly all that is older"
    assert spool.counters.values["lost_total{reason=aged}"] == floor - 1
    assert spool.counters.values["evicted_total{lane=telemetry}"] == floor - 1
    again = opened(tmp_path, segment_bytes=300)
    again.expire(now + 200 * day)
    assert again.spooled() == 0, "also what an earlier process wrote, to the last segment"
    assert again.next_seq(T) == 41
    again.expire(now + 400 * day)
    fill(again, range(41, 42))
    assert content(again) == {41: 41.0}, "what was spooled before the clock was set has no age"
    again.expire(now + 400 * day)
    assert again.spooled() == 1


def test_a_lane_that_an_older_program_did_not_have_is_new_and_not_gone(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    fill(spool, range(1, 6))
    meta = f'{{"serial":"A","epoch":{spool.epoch},"connection":3,"v":1}}'
    (tmp_path / "meta.json").write_text(meta)
    for path in (tmp_path / "blob").iterdir():
        path.unlink()
    (tmp_path / "blob").rmdir()
    again = opened(tmp_path)
    assert again.epoch == spool.epoch
    again.put_blob(b"x", 1)
    again.next_connection(9)
    again.commit()
    for path in (tmp_path / "blob").iterdir():
        path.unlink()
    assert opened(tmp_path).epoch != spool.epoch, "from now on it is one that can be gone"


class BadBlocks(OsFiles):
    """A card on which some files cannot be read."""

    def __init__(self, bad: str) -> None:
        self.bad = bad

    def read(self, path: Path, start: int = 0, size: int = -1) -> bytes:
        if self.bad and self.bad in str(path):
            raise StorageError(f"{path}: Input/output error")
        return super().read(path, start, size)


def test_a_lane_that_cannot_be_recovered_is_set_aside_and_the_others_go_on(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    fill(spool, range(1, 6))
    fill(spool, range(1, 4), E)
    again = opened(tmp_path, files=BadBlocks("telemetry/0"))
    assert again.epoch != spool.epoch
    assert again.counters.values["errors_total{stage=recovery}"] == 1
    assert "Input/output error" in again.fault
    assert ".damaged-" in again.fault
    assert content(again, E) == {1: 1.0, 2: 2.0, 3: 3.0}
    (aside,) = tmp_path.glob("telemetry.damaged-*")
    assert segments(OS_FILES, aside) == [1]
    again._files = OS_FILES
    later = opened(tmp_path)
    fill(later, range(1, 3))
    assert (content(later), later.fault, later.epoch) == ({1: 1.0, 2: 2.0}, "", again.epoch)


def test_a_lane_that_is_a_file_is_set_aside(tmp_path: Path) -> None:
    (tmp_path / "event").write_text("what is this?")
    spool = opened(tmp_path)
    fill(spool, range(1, 3), E)
    assert content(spool, E) == {1: 1.0, 2: 2.0}
    assert spool.counters.values["errors_total{stage=recovery}"] == 1


def test_foreign_files_in_a_lane_are_left_alone(tmp_path: Path) -> None:
    fill(opened(tmp_path), range(1, 3))
    (tmp_path / "telemetry" / "notes.seg").write_text("mine")
    spool = opened(tmp_path)
    assert content(spool) == {1: 1.0, 2: 2.0}
    assert spool.fault == ""


def test_a_segment_that_cannot_be_read_is_given_up_and_what_is_behind_it_is_sent(tmp_path: Path) -> None:
    spool = opened(tmp_path, segment_bytes=300)
    fill(spool, range(1, 30))
    first, second, third = segments(OS_FILES, tmp_path / "telemetry")[:3]
    again = opened(tmp_path, files=BadBlocks(segment_name(second)), segment_bytes=300)
    assert list(content(again)) == list(range(first, second))
    again.acknowledged(T, second - 1)
    assert min(content(again)) == third
    assert again.counters.values["lost_total{reason=damaged}"] == third - second
    assert again.counters.values["errors_total{stage=read}"] >= 1


def test_telemetry_is_synced_together_and_events_at_once(tmp_path: Path) -> None:
    now = [0.0]
    spool = opened(tmp_path)
    paced = Paced(spool, lambda: now[0], 10.0)
    for _ in range(3):
        paced.append(T, [reading(1)], 5)
        paced.commit()
        now[0] += 4.0
    assert spool.next_seq(T) == 1
    paced.append(E, [reading(2)], 5)
    paced.commit()
    assert (spool.next_seq(T), spool.next_seq(E)) == (4, 2), "ten seconds are over"
    paced.append(T, [reading(1)], 5)
    paced.append(E, [reading(2)], 5)
    spool.put_blob(b"x", 5)
    paced.commit()
    assert (spool.next_seq(T), spool.next_seq(E), spool.next_seq(B)) == (4, 3, 2)
    paced.flush()
    assert spool.next_seq(T) == 5


READ_ONLY = """
import sys
import time
from pathlib import Path
from citybrain.errors import StorageError
from gateway.spool import Spool

try:
    Spool(Path(sys.argv[1]), "A").start()
except StorageError as error:
    print(error.exit_code, error)
"""


def test_a_card_that_became_read_only_is_said_and_nothing_is_set_aside(tmp_path: Path) -> None:
    """It is really mounted so, in a name space of its own."""
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-Urm", "true"], capture_output=True, check=False).returncode:
        if os.environ.get("CI") == "true":
            pytest.fail("this machine lets nobody mount a disk of his own")
        pytest.skip("this machine lets nobody mount a disk of his own")
    script = (
        'mount -t tmpfs -o size=3m tmpfs "$1" && "$2" -c "$3" "$1/spool" && mount -o remount,ro "$1" &&'
        ' "$2" -c "$3" "$1/spool" && ls "$1/spool"'
    )
    done = subprocess.run(
        [unshare, "-Urm", "sh", "-c", script, "sh", tmp_path, sys.executable, READ_ONLY],
        capture_output=True, text=True, check=True, timeout=60, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    said, *names = done.stdout.splitlines()
    assert said.startswith("5 ")
    assert "Read-only file system" in said
    assert names == ["blob", "event", "meta.json", "telemetry"]


class NoNewFile(LossyFiles):
    """A disk that is so full that not even an empty file can be made."""

    refuses = False

    def append(self, path: Path) -> LossyHandle:
        if self.refuses and path not in self.files:
            raise DiskFull(f"{path}: no space left on the device")
        return super().append(path)


def test_what_is_too_old_goes_later_where_not_even_an_empty_file_fits() -> None:
    disk = NoNewFile()
    spool = Spool(FOLDER, "A", disk, age_ms=1000)
    spool.start()
    spool.append(T, [reading(1)], CLOCK_SET_MS)
    spool.commit()
    disk.refuses = True
    spool.expire(CLOCK_SET_MS + 5000)
    assert spool.spooled() == 1
    disk.refuses = False
    spool.expire(CLOCK_SET_MS + 5000)
    assert spool.spooled() == 0
    assert spool.counters.values["lost_total{reason=aged}"] == 1


def test_a_new_epoch_that_cannot_be_written_leaves_the_old_one_in_force() -> None:
    disk = LossyFiles()
    spool = Spool(FOLDER, "A", disk, evicts=False)
    spool.start()
    fill(spool, range(1, 4))
    before, disk.capacity = spool.epoch, 0
    with pytest.raises(DiskFull):
        spool.new_epoch()
    disk.capacity = None
    spool.next_connection(5)
    again = Spool(FOLDER, "A", disk)
    again.start()
    assert (again.epoch, spool.epoch, again.continues) == (before, before, True)
    assert spool.counters.values["epochs_total{reason=restored}"] == 0


def test_a_segment_whose_entry_could_not_be_synced_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk made the file and could not sync its entry: it is neither written to nor left behind."""
    spool = opened(tmp_path, segment_bytes=1000)
    fill(spool, range(1, 6))
    epoch, last = spool.epoch, segments(OS_FILES, tmp_path / "telemetry")
    with monkeypatch.context() as full:
        full.setattr(os, "fsync", refuse)
        for number in range(6, 20):
            spool.append(T, [reading(number)], 5)
        with pytest.raises(DiskFull):
            spool.commit()
    assert segments(OS_FILES, tmp_path / "telemetry") == last
    fill(spool, range(6, 8))
    again = opened(tmp_path, segment_bytes=1000)
    assert (again.epoch, again.next_seq(T)) == (epoch, 8)


def refuse(_descriptor: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_million_messages_open_at_once(tmp_path: Path) -> None:
    """Only the last segment, and the one with the first open message, are read; `benchmarks.spool` has the figure."""
    spool = opened(tmp_path)
    for number in range(1, 1_000_001):
        spool.append_body(T, b"12345678", 1, number)
        if number % 10_000 == 0:
            spool.commit()
    spool.close()
    before_s = time.process_time()
    again = opened(tmp_path)
    took_s = time.process_time() - before_s
    assert again.spooled() == 1_000_000
    assert again.earliest(T, 1_000_000) == 1
    assert again.body(T, 777_777) == b"12345678"
    assert took_s < 1.0, "a Pi is five times slower, and this took 0.05 s"
