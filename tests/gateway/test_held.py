"""A box that does not know what time it is: what it reads waits for its true time, loses nothing, delays no event."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from citybrain.clock import real_unix_ms
from citybrain.counters import Counters
from citybrain.model import Lane, Reading
from citybrain.storage import OS_FILES
from gateway.held import Given, Held
from gateway.times import HOLD_S, BoxClock
from tests.conftest import end, eventually, unused_port
from tests.gateway.test_gateway_service import Answering
from tests.gateway_box import GATEWAY, Process, config_text

SHUTDOWN_MS = 1_790_000_000_000
OLD_BOOT, NEW_BOOT = 1, 2
LOOK_S = 0.5
DEVICES = ("hyd-1", "hyd-2")


class Machine:
    """A machine without a battery, whose clock others set, and the box on it. True time is what a good clock says."""

    def __init__(self, folder: Path, wall_ms: int, away_s: float, most_bytes: int = 16 << 20) -> None:
        (folder / "clock").write_bytes(SHUTDOWN_MS.to_bytes(8, "little"))
        (folder / "clock.boot").write_bytes(OLD_BOOT.to_bytes(8, "little"))
        self.mono_s = 20.0  # since the boot
        self.wall_ms = wall_ms
        self.true_ms = SHUTDOWN_MS + round(away_s * 1000)
        self.kept = False
        self.counters = Counters("gateway")
        self.clock = BoxClock(
            folder / "clock", self.counters, OS_FILES, lambda: self.wall_ms, lambda: self.mono_s, lambda: self.kept,
            NEW_BOOT,
        )  # fmt: skip
        self.held = Held([self], self.clock, self.counters, most_bytes)
        self.truth: dict[tuple[str, float], int] = {}  # by device and number of the reading
        self.told: list[Given] = []
        self.waited: set[float] = set()  # numbers of the readings that did not come at once

    def poll(self, now_ms: int) -> list[Given]:
        """As a source: each device says its next number, and one an event."""
        number = float(len(self.truth))
        found = [(Lane.TELEMETRY, Reading(device, now_ms, {"value": number})) for device in DEVICES]
        for device in (*DEVICES, "button"):
            self.truth[device, number] = self.true_ms
        return [*found, (Lane.EVENT, Reading("button", now_ms, {"value": number}))]

    def run(self, seconds: float) -> None:
        """Let time pass; the box looks twice a second, at the clock once."""
        for look in range(round(seconds / LOOK_S)):
            self.mono_s += LOOK_S
            self.wall_ms += round(LOOK_S * 1000)
            self.true_ms += round(LOOK_S * 1000)
            if look % 2 == 0:
                self.clock.follow()
            number = float(len(self.truth))
            given = self.held.poll(self.clock.now_ms())
            assert (Lane.EVENT, "button", number) in [(lane, one.device, one.values["value"]) for lane, one in given]
            if not any(one.device == "hyd-1" and one.values["value"] == number for _, one in given):
                self.waited.add(number)
            self.told += given

    def unset(self) -> bool:
        return self.clock.unset

    def set(self) -> None:
        """NTP answers."""
        self.wall_ms = self.true_ms

    def of(self, device: str) -> list[Reading]:
        return [one for _, one in self.told if one.device == device]

    def wrong_ms(self, device: str) -> list[int]:
        return [one.observed_at - self.truth[device, one.values["value"]] for one in self.of(device)]


def test_what_was_read_before_ntp_answered_gets_its_true_time(tmp_path: Path) -> None:
    """The clock looks right: it goes on where it was when the power went, three hours ago."""
    box = Machine(tmp_path, SHUTDOWN_MS + 25_000, 3 * 3600)
    assert box.unset()
    box.run(60)
    assert not box.of("hyd-1")
    assert box.wrong_ms("button")[0] < -10_000_000, "an event does not wait; it comes with the time there is"
    box.set()
    box.run(20)
    assert not box.unset()
    assert len(box.of("hyd-1")) == 160
    assert {abs(wrong) <= 250 for wrong in box.wrong_ms("hyd-1")} == {True}
    assert box.counters.values["held_total{time=true}"] == 2 * len(box.waited)
    assert "held_total{time=as_stamped}" not in box.counters.values


def test_without_ntp_they_go_on_as_they_were_stamped(tmp_path: Path) -> None:
    box = Machine(tmp_path, SHUTDOWN_MS + 25_000, 3 * 3600)
    box.run(HOLD_S - 1)
    assert not box.of("hyd-2")
    box.run(5)
    assert len(box.of("hyd-2")) == (HOLD_S + 4) / LOOK_S
    assert set(box.wrong_ms("hyd-2")) == {25_000 - 3 * 3600 * 1000}
    assert box.counters.values["held_total{time=as_stamped}"] == 2 * len(box.waited)
    assert not box.unset(), "what the system says must do now"
    assert box.counters.values["clock_steps_total{way=assumed}"] == 1
    box.set()
    box.run(5)
    assert box.counters.values["clock_steps_total{way=forward}"] == 1
    assert abs(box.wrong_ms("hyd-2")[-1]) <= 250


def test_a_clock_that_only_runs_past_what_was_told_last_is_not_set(tmp_path: Path) -> None:
    """A time that is saved once an hour: the boot begins with less than this box told."""
    box = Machine(tmp_path, SHUTDOWN_MS - 15_000, 600)
    box.run(60)
    assert box.unset()
    box.set()
    box.run(5)
    assert {abs(wrong) <= 250 for wrong in box.wrong_ms("hyd-1")} == {True}


def test_a_kernel_that_says_the_clock_is_kept_is_believed(tmp_path: Path) -> None:
    box = Machine(tmp_path, SHUTDOWN_MS + 25_000, 25.0)
    box.run(10)
    assert not box.of("hyd-1")
    box.kept = True
    box.run(2)
    assert not box.unset()
    assert len(box.of("hyd-1")) == 24


@pytest.mark.parametrize("boot", [OLD_BOOT, NEW_BOOT])
def test_a_process_that_is_restarted_doubts_nothing_that_was_sure(tmp_path: Path, boot: int) -> None:
    """Where the machine ran on, or its own clock did (an RTC: the boot begins after the power was back)."""
    (tmp_path / "clock").write_bytes(SHUTDOWN_MS.to_bytes(8, "little"))
    (tmp_path / "clock.boot").write_bytes(OLD_BOOT.to_bytes(8, "little"))
    now_ms = SHUTDOWN_MS + (5_000 if boot == OLD_BOOT else 10_800_000)
    clock = BoxClock(
        tmp_path / "clock", Counters("gateway"), OS_FILES, lambda: now_ms, lambda: 20.0, lambda: False, boot
    )
    assert not clock.unset


def test_a_process_that_is_killed_while_it_holds_holds_again(tmp_path: Path) -> None:
    Machine(tmp_path, SHUTDOWN_MS + 25_000, 3600).run(70)  # long enough to mark how far time has come
    clock = BoxClock(
        tmp_path / "clock", Counters("gateway"), OS_FILES, lambda: SHUTDOWN_MS + 100_000, lambda: 95.0, lambda: False,
        NEW_BOOT,
    )  # fmt: skip
    assert clock.holding


def test_what_does_not_fit_goes_on_and_a_stop_loses_nothing(tmp_path: Path) -> None:
    box = Machine(tmp_path, SHUTDOWN_MS + 25_000, 3600, most_bytes=10 * 310)
    box.run(30)
    assert len(box.of("hyd-1") + box.of("hyd-2")) == 2 * 60 - 10
    box.told += box.held.release()
    assert [one.values["value"] for one in box.of("hyd-1")] == [3.0 * n for n in range(60)]
    assert box.counters.gauges["held"] == 0.0


def test_a_device_that_knows_the_time_keeps_its_own(tmp_path: Path) -> None:
    box = Machine(tmp_path, SHUTDOWN_MS + 25_000, 3600)
    box.run(10)
    true_ms = box.true_ms
    box.held._waiting.append(Reading("clever", true_ms, {"value": 1.0}))
    box.set()
    box.run(2)
    assert [one.observed_at for one in box.of("clever")] == [true_ms]


SCRIPTS = st.lists(
    st.tuples(
        st.floats(0.5, 60.0),
        st.one_of(
            st.just("right"), st.just("kept"), st.floats(-9e5, 9e5), st.sampled_from([-3e7, 3e7, -1.0, 1.0, -400.0])
        ),
    ),
    max_size=6,
)


@settings(max_examples=120, deadline=None)
@given(
    st.sampled_from(["1970", "2010", "saved", "stopped", "ahead"]), st.sampled_from([0.0, 30.0, 3600.0, 8e6]), SCRIPTS,
    st.sampled_from([3_100, 16 << 20]),
)  # fmt: skip
@example("stopped", 3600.0, [(30.0, "right")], 16 << 20)
@example("1970", 8e6, [(10.0, 1.0), (10.0, "right"), (10.0, -400.0), (10.0, "right")], 16 << 20)
@example("stopped", 30.0, [(110.0, 3e7), (5.0, "right")], 16 << 20)
def test_whatever_is_done_to_the_clock(
    tmp_path_factory: pytest.TempPathFactory, start: str, away_s: float, script: list[tuple[float, str | float]],
    most_bytes: int,
) -> None:  # fmt: skip
    """Each reading once, in the order of its reading, late by 2 min at most; events at once; times rise.

    Times go back only where the clock was set back by more than can be made up (10 min). Where the first thing that
    befell an unset clock is that it is put right, what waited has its true time.
    """
    walls = {"1970": 5_000, "2010": 1_262_304_000_000, "saved": SHUTDOWN_MS - 1_500_000}
    wall_ms = walls.get(start, SHUTDOWN_MS + (25_000 if start == "stopped" else 3_000_000))
    box = Machine(tmp_path_factory.mktemp("box"), wall_ms, away_s, most_bytes)
    for seconds, what in script:
        box.run(seconds)
        if what == "right":
            box.set()
        elif what == "kept":
            box.kept = True
        else:
            box.wall_ms += round(float(what) * 1000)
    box.run(HOLD_S + 5)
    backs = sum(box.counters.values[f"clock_steps_total{{way={way}}}"] for way in ("back", "set", "assumed"))
    for device in (*DEVICES, "button"):
        assert [one.values["value"] for one in box.of(device)] == [3.0 * n for n in range(len(box.truth) // 3)]
        falls = sum(after.observed_at < before.observed_at for before, after in pairwise(box.of(device)))
        assert falls <= backs
    assert all(number <= 3 * (HOLD_S + 1) / LOOK_S for number in box.waited)
    put_right = bool(script) and script[0][1] == "right" and start != "ahead" and (start, away_s) != ("stopped", 0.0)
    if put_right and most_bytes > 1 << 20:
        waited = [one for one in box.of("hyd-1") if one.values["value"] in box.waited]
        assert all(abs(one.observed_at - box.truth["hyd-1", one.values["value"]]) <= 250 for one in waited)
        assert waited


# --- the process --------------------------------------------------------------------------------------------------


@pytest.fixture
def platform(mosquitto: int) -> Iterator[Answering]:
    answering = Answering(mosquitto)
    yield answering
    answering.close()


class Clockless(Process):
    """The gateway's process on a machine that woke up `away_s` late and does not know it."""

    def __init__(self, folder: Path, away_s: float) -> None:
        self.folder, self.log = folder, folder.with_suffix(".log")
        self.off = folder.with_suffix(".off")
        self.off.write_text(str(-round(away_s * 1000)))
        (folder / "run").mkdir(exist_ok=True)
        last_ms = real_unix_ms() - round(away_s * 1000)
        (folder / "run" / "clock").write_bytes(last_ms.to_bytes(8, "little"))
        (folder / "run" / "clock.boot").write_bytes(OLD_BOOT.to_bytes(8, "little"))
        command = [sys.executable, "-m", "tests.clockless_gateway", str(folder), str(self.off)]
        with self.log.open("ab") as log:
            root = Path(__file__).parents[2]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=dict(os.environ), cwd=root)

    def held(self) -> float:
        beat = self.beat()
        return 0.0 if beat is None else beat.gauges.get("held", 0.0)


def drivers(port: int) -> str:
    return (
        f"drivers:\n  kit:\n    driver: json_lines\n    listen: {port}\n    devices: {{h1: hyd-1, h2: hyd-2}}\n"
        "    limits: [{metric: pressure_mpa, code: 1, below: 0.1, for: 10min}]\n"
        "    metrics: {b: {metric: fault_code, lane: event}}\n"
    )


@pytest.fixture
def port() -> int:
    return unused_port()


@pytest.fixture
def folder(tmp_path: Path, mosquitto: int, port: int) -> Path:
    made = tmp_path / "box"
    made.mkdir()
    (made / "gateway.yaml").write_text(config_text(mosquitto, drivers(port)))
    return made


def say(port: int, *lines: str) -> None:
    def sent() -> bool:
        try:
            with socket.create_connection(("127.0.0.1", port), 1) as line:
                line.sendall("".join(f"{one}\n" for one in lines).encode())
                line.shutdown(socket.SHUT_WR)
                line.recv(1)
        except OSError:
            return False
        return True

    eventually(sent, 20, "the line taken")


def values(platform: Answering, device: str, metric: str) -> list[tuple[float, int]]:
    return [
        (one.values[metric], one.observed_at)
        for one in list(platform.readings)
        if one.device == device and metric in one.values
    ]


def test_the_process_holds_telemetry_sends_events_and_dates_what_it_held(
    folder: Path, port: int, platform: Answering
) -> None:
    away_s = 7200.0
    box = Clockless(folder, away_s)
    try:
        before_ms = real_unix_ms()
        say(
            port,
            '{"d":"h1","m":{"pressure_mpa":0.31}}',
            '{"d":"h1","m":{"b":7}}',
            '{"d":"h2","m":{"pressure_mpa":0.05}}',
        )
        eventually(lambda: values(platform, "hyd-1", "fault_code"), 20, "the event")
        assert abs(values(platform, "hyd-1", "fault_code")[0][1] - (before_ms - away_s * 1000)) < 20_000
        eventually(lambda: box.held() >= 2, 20, "telemetry held")
        assert not values(platform, "hyd-1", "pressure_mpa")
        read_ms = real_unix_ms()
        box.off.unlink()  # NTP
        eventually(lambda: values(platform, "hyd-1", "pressure_mpa"), 20, "the held reading")
        say(port, '{"d":"h1","m":{"pressure_mpa":0.32}}', '{"d":"h2","m":{"pressure_mpa":0.06}}')
        eventually(lambda: len(values(platform, "hyd-2", "pressure_mpa")) == 2, 20, "what came after")
        eventually(lambda: len(values(platform, GATEWAY, "uptime_s")) >= 2, 20, "its own readings")
        assert box.stop() == 0
    finally:
        end(box.process)
    (held, held_ms), (after, after_ms) = values(platform, "hyd-1", "pressure_mpa")
    assert (held, after) == (0.31, 0.32)
    assert before_ms - 500 <= held_ms <= read_ms + 500 < after_ms + 2000
    assert held_ms < after_ms
    assert [code for code, _ in values(platform, "hyd-2", "local_alarm")] in ([], [0.0]), "10 min have not passed"
    assert "clock set" in box.said()
    assert [quality for quality, _ in values(platform, GATEWAY, "quality")][:1] == [7.0]
    own = [at_ms for _, at_ms in values(platform, GATEWAY, "uptime_s")]
    assert all(before_ms - 500 <= before < after for before, after in pairwise(own)), "true, and in order"


def test_a_clean_stop_while_it_holds_loses_nothing(folder: Path, port: int, platform: Answering) -> None:
    box = Clockless(folder, 3600)
    try:
        lines = [f'{{"d":"h1","m":{{"pressure_mpa":0.{300 + n}}}}}' for n in range(50)]
        say(port, *lines)
        eventually(lambda: box.held() >= 50, 20, "telemetry held")
        box.process.send_signal(signal.SIGTERM)
        assert box.process.wait(20) == 0
    finally:
        end(box.process)
    again = Process(folder)
    try:
        eventually(lambda: len(values(platform, "hyd-1", "pressure_mpa")) == 50, 20, "all of it")
    finally:
        again.stop()
    assert [value for value, _ in values(platform, "hyd-1", "pressure_mpa")] == [(300 + n) / 1000 for n in range(50)]
