"""What goes wrong from outside is said with what and where, counted, and loses nothing else.

docs/invariants.md lists the test of every kind of bad input; here are those that belong to no part alone.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from api.platforms.webhook import new_secret, read_secret, sign
from citybrain.clock import real_unix_s
from citybrain.counters import Counters
from citybrain.layout import Layout
from citybrain.model import Lane, Reading
from citybrain.segments import SUFFIX, Writer
from gateway.spool import Spool
from simulators.grid_cases import Book
from simulators.grid_platform import Platform as Grid
from streams.runtimes.shard_worker import ShardWorker
from tests.seeded_site import seeded
from tests.streams.test_ingest import NOW, VALUE_FAULTS, Platform, encoded, foreign, platform, reading

__all__ = ["platform"]  # a fixture
MINUTE_MS = 60_000

# --- values and numbers ---


@pytest.mark.parametrize(("reason", "bad"), VALUE_FAULTS)
def test_a_value_that_is_not_used_is_named(platform: Platform, reason: str, bad: Reading) -> None:
    platform.send(encoded([bad], 1))
    platform.ingest.commit()
    metric, number = next(iter(bad.values.items()))
    where = f"{bad.device} {metric} = {number:g} at {bad.observed_at}"
    assert platform.warned("gw-a telemetry epoch", f"seq 1: {reason}: {where}")


@pytest.mark.parametrize("columns", [True, False])
def test_a_time_that_is_set_back_is_named(platform: Platform, columns: bool) -> None:
    late = NOW + 3_600_000
    platform.send(encoded([reading(), reading("hyd-2", late)], 1, columns=columns))
    platform.ingest.commit()
    assert platform.warned("gw-a telemetry epoch", f"seq 1: future: hyd-2 pressure_mpa = 0.3 at {late}")


def test_one_reason_is_told_once_a_minute_and_hides_no_other(platform: Platform) -> None:
    for seq in range(1, 30):
        platform.send(encoded([foreign("no such metric"), reading(pressure_mpa=float("nan"))], seq))
    assert platform.ack() == 29
    assert platform.dropped("unknown_metric") == platform.dropped("not_a_number") == 29
    assert len(platform.counters.warnings) == 2
    platform.send(encoded([foreign("no such metric")], 30), now_ms=NOW + MINUTE_MS)
    assert platform.warned("unknown_metric", "28 more")


def test_numbers_that_are_missing_or_gone_are_named(platform: Platform) -> None:
    platform.send(encoded([reading()], 1))
    platform.send(encoded([reading()], 4))
    assert platform.ack() == 1
    assert platform.count("gap_total") == 1
    assert platform.warned("gw-a telemetry epoch", "seq 4: messages 2..3 are missing")
    platform.send(encoded([reading()], 6, 6))
    assert platform.ack() == 6
    assert platform.count("lost_total{reason=evicted}") == 4
    assert platform.warned("gw-a telemetry epoch", "seq 6: messages 2..5 are gone at the gateway")


# --- damage on disk is counted where it is said ---


def cut(folder: Path) -> Path:
    """Cut the end off the last segment in a folder."""
    path = max(folder.glob(f"*{SUFFIX}"))
    path.write_bytes(path.read_bytes()[:-7])
    return path


def test_a_torn_log_is_counted(platform: Platform) -> None:
    platform.send(encoded([reading()], 1))
    platform.ingest.commit()
    path = cut(platform.layout.log(0))
    platform.restart()
    assert platform.count("errors_total{stage=recovery}") == 1
    assert platform.warned(f"{path} at byte", "torn end cut")


def test_a_torn_spool_is_counted_and_the_rest_is_sent(tmp_path: Path) -> None:
    spool = Spool(tmp_path, "board")
    spool.start()
    for number in (1, 2, 3):
        spool.append(Lane.TELEMETRY, [Reading("d", number, {"flow_lps": 1.0})], number)
        spool.commit()
    spool.close()
    path = cut(tmp_path / "telemetry")
    again = Spool(tmp_path, "board")
    again.start()
    assert again.counters.values["errors_total{stage=recovery}"] == 1
    assert any(f"{path} at byte" in text for text in again.counters.warnings)
    assert [seq for seq, _ in again.read(Lane.TELEMETRY, 1, 9, 1 << 20)] == [1, 2]
    again.close()


def test_a_torn_transition_log_is_counted(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    layout.make()
    writer = Writer(layout.transitions(0))
    writer.start()
    writer.append(5, 1, b"half of a transition")
    writer.commit()
    writer.close()
    path = cut(layout.transitions(0))
    Writer(layout.log(0)).start()
    counters = Counters("worker", layout.run)
    shard = ShardWorker(0, layout, counters, 30.0)
    shard.start()
    assert counters.values["errors_total{stage=recovery}"] == 1
    assert str(path) in counters.warnings[0]
    shard.stop()


# --- webhooks ---


@pytest.mark.parametrize(
    ("how", "reason"), [("other secret", "wrong"), ("301 s old", "old"), ("301 s ahead", "old"), ("none", "missing")]
)
def test_the_grid_platform_counts_what_it_refuses_and_takes_the_next(tmp_path: Path, how: str, reason: str) -> None:
    site = seeded(tmp_path)
    counters = Counters("platform")
    book = Book(tmp_path / "platform", 1, 1.0)
    book.start()
    grid = Grid(site.layout, site.run, book, counters, failing=False)
    good = read_secret(site.layout.secrets / "platform.key")
    assert good is not None
    body, now_s = b'{"id":"w","source":"s","type":"other","specversion":"1.0","data":{}}', real_unix_s()
    away_s = {"301 s old": -301, "301 s ahead": 301}.get(how, 0)
    secret = new_secret() if how == "other secret" else good
    answer = grid.receive({} if how == "none" else sign(secret, "w", now_s + away_s, body), body)
    assert (answer.status, answer.body["error"]) == (401, f"signature_{reason}")
    assert "webhook" in answer.body["where"]
    assert answer.body["what"]
    assert counters.values[f"dropped_total{{reason=signature_{reason}}}"] == 1
    assert grid.receive(sign(good, "w", now_s, body), body).body["error"] == "unknown_type", "the signature is good"
    book.close()


# --- a full disk ---


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """Spool, log, database and heartbeat on a file system of 3 MiB in a name space of its own: `tests/full_disk.py`."""
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-Urm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody mount a disk of his own; the same with tests/faulty_files.py is tested")
    disk = tmp_path / "disk"
    disk.mkdir()
    script = 'mount -t tmpfs -o size=3m tmpfs "$1" && exec "$2" -m pytest -q -p no:cacheprovider "$3" --basetemp "$1/t"'
    program: list[str | Path] = [
        unshare,
        "-Urm",
        "sh",
        "-c",
        script,
        "sh",
        disk,
        sys.executable,
        Path(__file__).parents[1] / "full_disk.py",
    ]
    done = subprocess.run(
        program, capture_output=True, text=True, timeout=90, check=False, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "9 passed" in done.stdout
