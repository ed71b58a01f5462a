"""The small parts of the kernel: clock, units, layout, mailbox, counters, command line."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from citybrain import cli
from citybrain.clock import ManualClock, RunClock, from_iso, iso, real_unix_ms, system_clock, wait_s
from citybrain.counters import Counters, Heartbeat, read_heartbeats
from citybrain.errors import Damaged, NotFound
from citybrain.layout import Layout, Run
from citybrain.mailbox import Command, Mailbox, command
from citybrain.units import METRICS, metric

# --- clock ------------------------------------------------------------------------------------------------------


def test_a_run_clock_runs_at_its_speed_from_its_origin() -> None:
    clock = RunClock(origin_ms=1_000_000, started_ms=real_unix_ms() - 2_000, speed=60.0)
    assert 1_120_000 <= clock.now_ms() < 1_150_000
    assert abs(system_clock().now_ms() - real_unix_ms()) < 1_000


def test_a_manual_clock_may_step_back() -> None:
    clock = ManualClock(5)
    clock.set_ms(3)
    assert clock.now_ms() == 3


def test_waiting_ends_when_told() -> None:
    stop = threading.Event()
    assert wait_s(0.0, stop) is False
    stop.set()
    assert wait_s(60.0, stop) is True


@given(st.integers(0, 4_000_000_000_000))
def test_times_read_as_they_are_written(at_ms: int) -> None:
    assert from_iso(iso(at_ms)) == at_ms


def test_a_time_without_zone_is_utc() -> None:
    assert from_iso("2026-01-01T00:00:00") == from_iso("2026-01-01T08:00:00+08:00") == 1767225600000
    with pytest.raises(ValueError, match="yesterday"):
        from_iso("yesterday")


# --- units ------------------------------------------------------------------------------------------------------


def test_metrics_have_ranges_and_both_languages() -> None:
    assert all(each.low < each.high and each.zh and each.en for each in METRICS.values())
    assert metric("pressure_mpa").unit == "MPa"


def test_an_unknown_metric_says_which_there_are() -> None:
    with pytest.raises(NotFound, match=r"metric 'pressure': not one of .*pressure_mpa"):
        metric("pressure")


# --- layout -----------------------------------------------------------------------------------------------------


def test_what_a_run_agreed_on_is_found_again(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "data")
    assert layout.read_run() == Run(clock=system_clock())
    layout.make()
    run = Run(clock=RunClock(1, 2, 3.0), api_port=1234)
    layout.write_run(run)
    assert layout.read_run() == run


def test_a_damaged_run_file_says_so(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    layout.make()
    (layout.run / "run.json").write_bytes(b'{"clock": {"origin_ms": 1')
    with pytest.raises(Damaged, match=r"run\.json at byte 0: .*remove it"):
        layout.read_run()


def test_content_is_what_its_name_says(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    name = layout.put_blob(b"rules")
    assert layout.put_blob(b"rules") == name
    assert layout.get_blob(name) == b"rules"
    (layout.blobs / name).write_bytes(b"rulez")
    with pytest.raises(Damaged, match=name):
        layout.get_blob(name)
    with pytest.raises(NotFound, match="no such content"):
        layout.get_blob("0" * 64)


# --- mailbox ----------------------------------------------------------------------------------------------------


def test_commands_come_in_order_until_done(tmp_path: Path) -> None:
    box = Mailbox(tmp_path / "desk")
    assert box.take() == ([], [])
    for at in (30, 10, 20):
        box.put(command("acknowledge", "op", at, {"alarm": at}))
    items, broken = box.take()
    assert [item.at for _, item in items] == [10, 20, 30]
    assert broken == []
    assert box.take()[0] == items  # until its effect is durable a command is seen again
    for name, _ in items:
        box.done(name)
    assert box.take() == ([], [])


def test_at_most_so_many_at_once(tmp_path: Path) -> None:
    box = Mailbox(tmp_path)
    for at in range(5):
        box.put(Command(str(at), "confirm", "op", at))
    assert [item.id for _, item in box.take(most=3)[0]] == ["0", "1", "2"]


def test_a_broken_command_is_set_aside_and_the_rest_goes_on(tmp_path: Path) -> None:
    box = Mailbox(tmp_path)
    (tmp_path / "000000000000001-x.json").write_bytes(b'{"id": 1')
    (tmp_path / "000000000000001-y.json").write_bytes(b'{"id": "y"}')
    (tmp_path / ".000000000000001-z.json.7.new").write_bytes(b"half written")
    box.put(Command("good", "confirm", "op", 2))
    items, broken = box.take()
    assert [item.id for _, item in items] == ["good"]
    assert [Path(each.path).name for each in broken] == ["000000000000001-x.broken", "000000000000001-y.broken"]
    assert all("not a command" in each.what and Path(each.path).exists() for each in broken)
    assert box.take()[1] == []


# --- counters ---------------------------------------------------------------------------------------------------


def test_counters_go_on_from_the_last_heartbeat(tmp_path: Path) -> None:
    first = Counters("ingest", tmp_path)
    first.add("received_total", 3)
    first.drop("unknown_device", 2)
    first.drop("late", 0)
    first.publish(force=True)
    second = Counters("ingest", tmp_path)
    second.resume()
    second.drop("unknown_device")
    second.publish(force=True)
    (beat,) = read_heartbeats(tmp_path)
    assert beat.counters == {"received_total": 3, "dropped_total{reason=unknown_device}": 3}
    assert beat.live(real_unix_ms())
    assert not beat.live(real_unix_ms() + 10_000)


def test_a_broken_heartbeat_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "desk.heartbeat.json").write_bytes(b'{"process": "de')
    Counters("worker", tmp_path).publish(force=True)
    assert [beat.process for beat in read_heartbeats(tmp_path)] == ["worker"]
    fresh = Counters("desk", tmp_path)
    fresh.resume()
    assert fresh.values == {}


def test_heartbeats_are_not_written_more_than_once_a_second(tmp_path: Path) -> None:
    counters = Counters("worker", tmp_path)
    counters.publish()
    counters.add("received_total")
    counters.publish()
    beat = msgspec.json.decode((tmp_path / "worker.heartbeat.json").read_bytes(), type=Heartbeat)
    assert beat.counters == {}


def test_the_last_fifty_warnings_are_kept() -> None:
    counters = Counters("worker")
    for number in range(60):
        counters.warn(str(number))
    assert counters.warnings == [str(number) for number in range(10, 60)]


# --- command line -----------------------------------------------------------------------------------------------


def test_the_shell_names_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name}\n" in shown for name in cli.commands())
    assert cli.main([]) == 2
    assert cli.main(["frobnicate"]) == 2
    assert "no command 'frobnicate'" in capsys.readouterr().err


def test_python_m_citybrain_is_the_same_program() -> None:
    done = subprocess.run([sys.executable, "-m", "citybrain", "--help"], capture_output=True, check=True, timeout=30)
    assert done.stdout.startswith(b"usage: citybrain COMMAND")


def test_an_error_of_ours_is_one_line_and_its_exit_code(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["run", "--data", str(tmp_path), "--prepare", "--speed", "-1"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["citybrain run: --speed -1: expected more than 0, at most 10000"]


def test_results_are_one_json_object_or_lines(capsys: pytest.CaptureFixture[str]) -> None:
    cli.emit({"readings": 3, "of": {"a": 1}}, as_json=True)
    assert json.loads(capsys.readouterr().out) == {"readings": 3, "of": {"a": 1}}
    cli.emit({"readings": 3, "n": 1}, as_json=False)
    assert capsys.readouterr().out == "readings  3\nn         1\n"
