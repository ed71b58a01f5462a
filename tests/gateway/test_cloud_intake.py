"""The intake's core: what is new is stored once, whatever is repeated and wherever it is interrupted."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from citybrain.clock import DAY_MS, HOUR_MS
from citybrain.counters import Counters
from citybrain.errors import Damaged, DiskFull, StorageError, Unavailable
from citybrain.model import Lane, Reading
from citybrain.storage import OS_FILES, Files
from citybrain.wire import Header, columns_message, open_message, readings_of
from gateway.clouds.devices import Devices
from gateway.clouds.intake import BATCH_READINGS, Intake, Receipt
from gateway.clouds.mapping import Said, Taken
from gateway.clouds.seen import KEEP_DAYS, SWEPT_AT_ONCE, Seen, day_of, key_of
from gateway.spool import Spool
from tests.cloud_site import imei, registry
from tests.faulty_files import LossyFiles

NOW = 1_767_225_600_000
DEVICES = Devices("hash", registry())
OWN = ["cloud-0", "cloud-1"]


def said(device: int | str = 0, at_ms: int = NOW, pressure: float = 0.31, **events: float) -> Said:
    name = device if isinstance(device, str) else imei(device)
    return Said(name, at_ms, ({"pressure_mpa": pressure}, events))


class Place:
    """A data folder's intake, to be opened again and again."""

    def __init__(self, folder: Path, files: Files = OS_FILES, limit_bytes: int = 1 << 28) -> None:
        self.folder = folder
        self.files = files
        self.limit_bytes = limit_bytes
        self.now_ms = NOW
        self.open()

    def open(self) -> None:
        self.counters = Counters("cloud")
        self.seen = Seen(self.folder / "seen.db", self.counters)
        self.seen.start()
        self.intake = Intake(self.seen, self.counters)
        for gateway in OWN:
            spool = Spool(
                self.folder / gateway, "x", self.files, self.limit_bytes, 8192, counters=self.counters, evicts=False
            )
            self.intake.open(gateway, spool, self.now_ms)

    def close(self) -> None:
        self.seen.close()
        for spool in self.intake.spools.values():
            spool.close()

    def take(self, *content: Said, own: list[str] = OWN) -> Receipt:
        return self.intake.take("ctwing", own, DEVICES, Taken(list(content), len(content)), self.now_ms)

    def push(self, *content: Said, own: list[str] = OWN) -> Receipt:
        receipt = self.take(*content, own=own)
        self.intake.commit(self.now_ms)
        self.intake.save(self.now_ms)
        return receipt

    def spooled(self) -> list[tuple[str, Lane, Reading]]:
        found = []
        for gateway, spool in self.intake.spools.items():
            for lane in Lane:
                for seq, body in spool.read(lane, 1, 10_000, 1 << 30):
                    message = open_message(columns_message(Header(1, seq, 1, 0), body))
                    found += [(gateway, lane, reading) for reading in readings_of(message)]
        return found

    def count(self, name: str) -> int:
        return self.counters.values[name]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


# --- once ---


def test_readings_go_to_their_devices_gateway_and_lane(place: Place) -> None:
    assert place.push(said(0, tilt_deg=2.0), said(1)).accepted == 2
    assert place.spooled() == [
        ("cloud-0", Lane.TELEMETRY, Reading(imei(0), NOW, {"pressure_mpa": 0.31})),
        ("cloud-0", Lane.EVENT, Reading(imei(0), NOW, {"tilt_deg": 2.0})),
        ("cloud-1", Lane.TELEMETRY, Reading(imei(1), NOW, {"pressure_mpa": 0.31})),
    ]


def test_a_batch_that_is_pushed_for_a_day_adds_nothing(place: Place) -> None:
    batch = [said(number % 10, NOW - 60_000 * (number // 10)) for number in range(100)]
    assert place.push(*batch).accepted == 100
    before = place.spooled()
    for _ in range(24 * 60):
        place.now_ms += 60_000
        assert place.push(*batch).repeated == 100
    assert place.spooled() == before
    assert place.count("repeated_total") == 24 * 60 * 100
    assert place.count("accepted_total") == place.seen.rows == 100


def test_a_repeat_is_known_by_value_and_not_by_batch(place: Place) -> None:
    place.push(said(0))
    receipt = place.push(said(0, tilt_deg=1.0), said(0, NOW + 1), said(0, pressure=0.32), said(0))
    assert (receipt.accepted, receipt.repeated) == (3, 1)
    assert len(place.spooled()) == 4


def test_what_is_repeated_within_a_commit_counts_once(place: Place) -> None:
    one, other = place.take(said(0), said(0)), place.take(said(0))
    place.intake.commit(NOW)
    assert (one.accepted, one.repeated, other.accepted, other.repeated) == (1, 1, 0, 1)
    assert len(place.spooled()) == 1


def test_what_comes_in_disorder_keeps_its_time_and_is_put_in_order(place: Place) -> None:
    times = [NOW - 5000, NOW - 9000, NOW + 3_600_000, NOW - 7 * DAY_MS]
    place.push(*(said(0, at_ms) for at_ms in times))
    assert [reading.observed_at for _, _, reading in place.spooled()] == sorted(times)


def test_an_unknown_device_goes_up_always_the_same_way(place: Place) -> None:
    for at_ms in range(NOW, NOW + 10):
        assert place.push(said("nobody-knows", at_ms)).accepted == 1
    assert len({gateway for gateway, _, _ in place.spooled()}) == 1


def test_a_device_of_another_operator_is_refused_and_the_rest_is_taken(place: Place) -> None:
    receipt = place.push(said(0), said(1), said(19), own=["cloud-0"])
    assert receipt.accepted == 1
    assert receipt.taken.dropped == {"foreign_device": 2}
    assert [problem["where"] for problem in receipt.taken.problems] == [imei(1), imei(19)]
    assert place.count("dropped_total{reason=foreign_device}") == 2
    assert len(place.spooled()) == 1


def test_a_large_body_becomes_several_messages(place: Place) -> None:
    place.push(*(said(0, NOW + number) for number in range(BATCH_READINGS + 1)))
    assert place.intake.spools["cloud-0"].next_seq(Lane.TELEMETRY) == 3


def test_without_a_gateway_nothing_is_taken(place: Place) -> None:
    with pytest.raises(Unavailable, match="no gateway in the registry"):
        place.take(said(0), own=[])


@given(
    pushes=st.lists(
        st.lists(
            st.builds(
                said, st.integers(0, 19) | st.just("new"), st.integers(NOW, NOW + 3), st.sampled_from([0.1, -0.0, 0.0])
            ),
            max_size=8,
        ),
        max_size=8,
    ),
    breaks=st.sets(st.integers(0, 8)),
    unsaved=st.sets(st.integers(0, 8)),
)
@settings(max_examples=40, deadline=None)
def test_every_reading_is_accepted_repeated_or_counted(
    tmp_path_factory: pytest.TempPathFactory, pushes: list[list[Said]], breaks: set[int], unsaved: set[int]
) -> None:
    """Also where the power fails, and where it fails before the table followed."""
    disk = LossyFiles()
    place = Place(tmp_path_factory.mktemp("place"), disk)
    totals = dict.fromkeys(
        ("received_total", "accepted_total", "repeated_total", "dropped_total{reason=foreign_device}"), 0
    )
    for number, content in enumerate(pushes):
        place.take(*content)
        place.intake.commit(NOW)
        if number not in unsaved:
            place.intake.save(NOW)
        if number in breaks:
            for name in totals:
                totals[name] += place.count(name)
            place.close()
            disk.crash()
            place.open()
    for name in totals:
        totals[name] += place.count(name)
    received = totals.pop("received_total")
    assert received == sum(map(len, pushes)) == sum(totals.values())
    told = {
        (s.device, s.observed_at, s.values[0]["pressure_mpa"] + 0.0)
        for content in pushes
        for s in content
        if s.device != imei(19)
    }
    stored = [(r.device, r.observed_at, r.values["pressure_mpa"] + 0.0) for _, _, r in place.spooled()]
    assert sorted(stored) == sorted(told)
    place.close()


# --- interrupted ---


def test_a_restart_forgets_nothing(place: Place) -> None:
    place.push(said(0), said(1))
    place.close()
    place.open()
    assert place.push(said(0), said(1)).repeated == 2
    assert len(place.spooled()) == 2


def test_between_spool_and_table_a_crash_is_made_good_from_the_spool(place: Place) -> None:
    place.push(said(0))
    place.take(said(1, tilt_deg=1.0), said(2))
    for lot_of, lot in place.intake._lots.items():
        place.intake.spools[lot_of[0]].append(lot_of[1], lot.readings, NOW)
    for spool in place.intake.spools.values():
        spool.commit()
    place.close()  # the table was never told
    place.open()
    assert place.push(said(0), said(1, tilt_deg=1.0), said(2)).repeated == 3
    assert len(place.spooled()) == 4


KILLED = """
import os, signal, sys
from pathlib import Path
from gateway.clouds.seen import Seen
from tests.gateway.test_cloud_intake import NOW, Place, said
place = Place(Path(sys.argv[1]))
at = int(sys.argv[2])
save, calls = Seen.save, 0
def killed(self, day):
    global calls
    calls += 1
    if calls == at:
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, day)
Seen.save = killed
for number in range(20):
    place.push(*(said(device, NOW + number) for device in range(10)))
"""


@pytest.mark.parametrize("at", [1, 7, 20])
def test_kill_9_between_spool_and_table(tmp_path: Path, at: int) -> None:
    """The process dies where the spool has a push that the table has not; it comes again, and counts once."""
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path, str(at)], cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == -signal.SIGKILL
    place = Place(tmp_path)
    accepted = sum(place.push(*(said(d, NOW + number) for d in range(10))).accepted for number in range(20))
    assert accepted == 200 - 10 * at
    stored = [(reading.device, reading.observed_at) for _, _, reading in place.spooled()]
    assert len(stored) == len(set(stored)) == 200
    place.close()


def test_a_spool_that_was_lost_does_not_confuse_the_table(place: Place) -> None:
    place.push(*(said(0, NOW + number) for number in range(5)))
    place.close()
    for path in (place.folder / "cloud-0").rglob("*"):
        if path.is_file():
            path.unlink()
    place.open()
    assert place.push(said(0)).repeated == 1
    assert place.push(said(0, NOW + 100)).accepted == 1


def test_a_table_that_is_damaged_is_kept_aside_and_said(place: Place) -> None:
    place.push(said(0))
    place.close()
    (place.folder / "seen.db").write_bytes(b"rubbish" * 1000)
    place.open()
    assert any("seen.damaged" in text for text in place.counters.warnings)
    assert place.count("errors_total{stage=recovery}") == 1
    assert place.push(said(0)).repeated == 1  # learnt from the spool


def test_a_table_of_a_newer_program_is_refused(place: Place) -> None:
    place.close()
    db = sqlite3.connect(place.folder / "seen.db")
    db.execute("PRAGMA user_version = 9")
    db.close()
    with pytest.raises(Damaged, match="version 9, this program knows 1"):
        place.open()


# --- a full disk ---


def test_on_a_full_disk_a_push_is_refused_and_nothing_of_it_counts(tmp_path: Path) -> None:
    files = LossyFiles()
    place = Place(tmp_path, files)
    assert place.push(said(0)).stored
    files.capacity = files.used()
    full = place.push(said(0, NOW + 1), said(1))
    assert not full.stored
    assert place.push(said(0)).stored, "what is only repeated needs no room"
    assert place.count("errors_total{stage=disk_full}") == 2, "one a gateway"
    assert place.count("lost_total{reason=evicted}") == 0, "what was promised is kept"
    files.capacity = None
    again = place.push(said(0, NOW + 1), said(1))
    assert (again.stored, again.accepted) == (True, 2)
    assert len(place.spooled()) == 3
    assert place.count("received_total") == 4


def test_a_push_that_repeats_one_that_found_no_room_is_refused_too(tmp_path: Path) -> None:
    files = LossyFiles()
    place = Place(tmp_path, files)
    files.capacity = files.used()
    one, other = place.take(said(0)), place.take(said(0))
    place.intake.commit(NOW)
    assert not one.stored
    assert not other.stored
    assert place.push(said(0)).accepted == 1


def test_where_one_lane_finds_room_and_the_other_not_neither_doubles(tmp_path: Path) -> None:
    files = LossyFiles()
    place = Place(tmp_path, files)
    files.capacity = files.used() + 160  # the event lane is first, and small
    content = [said(0, NOW + number, **({"tilt_deg": 1.0} if number == 0 else {})) for number in range(20)]
    assert not place.push(*content).stored
    assert [lane for _, lane, _ in place.spooled()] == [Lane.EVENT]
    files.capacity = None
    assert place.push(*content).stored
    lanes = [lane for _, lane, _ in place.spooled()]
    assert (lanes.count(Lane.EVENT), lanes.count(Lane.TELEMETRY)) == (1, 20)


def test_where_the_table_finds_no_room_it_catches_up(place: Place) -> None:
    place.push(said(0))
    db = place.seen._connection
    pages = db.execute("PRAGMA page_count").fetchone()[0]
    db.execute(f"PRAGMA max_page_count = {pages}")
    content = [said(0, NOW + number) for number in range(1, 3000)]
    assert place.push(*content).stored, "it is in the spool"
    assert place.seen.full
    with pytest.raises(Unavailable, match=r"seen\.db: no space left"):
        place.take(said(1))
    db.execute("PRAGMA max_page_count = 100000")
    place.intake.save(NOW)
    assert place.push(*content).repeated == len(content)


def test_a_spool_beyond_its_limit_takes_no_more(tmp_path: Path) -> None:
    place = Place(tmp_path, limit_bytes=20_000)
    number = 0
    while not place.intake.spools["cloud-0"].full:
        number += 1
        place.push(*(said(0, NOW + 1000 * number + n) for n in range(100)))
    with pytest.raises(Unavailable, match="the spool is full"):
        place.take(said(0))
    assert place.count("lost_total{reason=evicted}") == 0
    spool = place.intake.spools["cloud-0"]
    spool.acknowledged(Lane.TELEMETRY, spool.next_seq(Lane.TELEMETRY) - 1)
    assert place.push(said(0)).stored


def test_a_disk_that_fails_ends_the_process(tmp_path: Path) -> None:
    files = LossyFiles()
    place = Place(tmp_path, files)
    place.take(said(0))
    files.failing_syncs = 1
    with pytest.raises(StorageError) as raised:
        place.intake.commit(NOW)
    assert not isinstance(raised.value, DiskFull)


# --- the table ---


@given(
    st.lists(
        st.tuples(st.text(max_size=4), st.sampled_from(["a", "b"]), st.integers(0, 2**53), st.floats(allow_nan=False)),
        unique=True,
        max_size=50,
    )
)
def test_keys_tell_values_apart(values: list[tuple[str, str, int, float]]) -> None:
    keys = {key_of(*value) for value in values}
    assert len(keys) == len({(d, m, t, v + 0.0) for d, m, t, v in values})
    assert all(0 <= key < 2**63 for key in keys)


def test_any_key_is_found_again(tmp_path: Path) -> None:
    seen = Seen(tmp_path / "seen.db", Counters("cloud"))
    seen.start()
    keys = [-(2**63), -1, 0, 1, 2**53 + 1, 2**63 - 1]
    seen.hold(keys, {}, {})
    assert seen.known([*keys, 5, -7], 1) == set(keys)
    seen.save(1)
    assert seen.known([*keys, 5, -7], 1) == set(keys)
    seen.close()


def test_what_is_told_again_is_kept_and_the_rest_expires_after_a_week(place: Place) -> None:
    place.push(said(0), said(1))
    for _ in range(KEEP_DAYS + 1):
        place.now_ms += DAY_MS
        assert place.push(said(0)).repeated == 1
        place.seen.expire(day_of(place.now_ms))
    assert place.seen.rows == 1
    assert place.push(said(0)).repeated == 1
    place.now_ms += (KEEP_DAYS + 1) * DAY_MS
    assert place.seen.expire(day_of(place.now_ms)) == 1


def test_a_value_costs_about_twenty_bytes(tmp_path: Path) -> None:
    seen = Seen(tmp_path / "seen.db", Counters("cloud"))
    seen.start()
    hours, a_hour = 24, 4000
    for hour in range(hours):
        seen.hold((key_of("d", f"m{n}", NOW + hour * HOUR_MS + n, 0.5) for n in range(a_hour)), {}, {})
        seen.save(day_of(NOW))
    seen.close()
    size = (tmp_path / "seen.db").stat().st_size
    assert 15 < size / (hours * a_hour) < 30


def test_the_whole_table_is_swept(tmp_path: Path) -> None:
    seen = Seen(tmp_path / "seen.db", Counters("cloud"))
    seen.start()
    for day in (0, 100):
        seen.hold(range(day // 100, 30_000, 2), {}, {})
        seen.save(day)
    assert sum(seen.expire(100) for _ in range(30_000 // SWEPT_AT_ONCE)) == 15_000
    assert seen.rows == 15_000
    assert seen.known(list(range(31_000)), 100) == set(range(1, 30_000, 2))
    seen.close()
