"""The supervisor of the drivers: what one does wrong harms no other, is said once, and loses nothing that was said."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from citybrain.clock import ManualClock, system_clock
from citybrain.config import Duration
from citybrain.counters import Counters
from citybrain.errors import ConfigError
from citybrain.model import Lane, Reading
from edge.driver import Quality, Request
from edge.host import MOST_ABANDONED, Configured, Hosts
from edge.limits import Limit
from edge.mailbox import MOST_WAITING, Answer, Blob
from edge.report import Report
from tests import driver_in_thread
from tests.conftest import eventually

THREAD, PROCESS = "tests.driver_in_thread", "tests.driver_in_process"


class Box:
    """Hosts, and all they gave so far."""

    def __init__(self, *drivers: Configured) -> None:
        self.counters = Counters("gateway")
        self.hosts = Hosts(drivers, self.counters, system_clock())
        self.hosts.start()
        self.events: list[Reading] = []
        self.telemetry: list[Reading] = []

    def poll(self) -> None:
        for lane, reading in self.hosts.poll(system_clock().now_ms()):
            (self.events if lane is Lane.EVENT else self.telemetry).append(reading)

    def values(self, device: str, metric: str = "value") -> list[float]:
        return [one.values[metric] for one in self.telemetry if one.device == device and metric in one.values]

    def until(self, holds: object, within_s: float = 10.0, what: str = "the condition") -> None:
        assert callable(holds)

        def looked() -> object:
            self.poll()
            return holds()

        eventually(looked, within_s, what)

    def count(self, name: str) -> int:
        return self.counters.values[name]


@pytest.fixture
def boxes() -> Iterator[list[Box]]:
    made: list[Box] = []
    driver_in_thread.held.clear()
    yield made
    driver_in_thread.held.set()
    for box in made:
        box.hosts.stop(0, within_s=1.0)


def driver(name: str, behaviour: str = "count", module: str = THREAD, **more: object) -> Configured:
    config = driver_in_thread.Config(f"dev-{name}", behaviour)  # type: ignore[arg-type]
    return Configured(name, module, config, **more)  # type: ignore[arg-type]


def test_a_thread_and_a_process_give_readings_in_order(boxes: list[Box]) -> None:
    box = Box(driver("a"), driver("b", module=PROCESS))
    boxes.append(box)
    box.until(lambda: len(box.values("dev-a")) > 5 and len(box.values("dev-b")) > 5)
    for device in ("dev-a", "dev-b"):
        assert box.values(device) == [float(number) for number in range(1, len(box.values(device)) + 1)]
        events = len([one for one in box.events if one.device == device])
        assert events in (len(box.values(device)), len(box.values(device)) - 1)  # it may be between the two
    assert all(abs(one.observed_at - time.time() * 1000) < 5000 for one in box.telemetry)


@pytest.mark.parametrize("module", [THREAD, PROCESS])
def test_a_driver_that_crashes_again_and_again(boxes: list[Box], module: str) -> None:
    box = Box(driver("bad", "crash", module), driver("good"))
    boxes.append(box)
    box.until(lambda: box.count("restarts_total{driver=bad}") >= 2, what="two restarts")
    before = len(box.values("dev-good"))
    box.until(lambda: len(box.values("dev-good")) > before + 10, what="the other going on")
    assert box.count("errors_total{stage=driver}") == box.count("restarts_total{driver=bad}")
    assert box.counters.warnings.count("bad: /dev/ttyUSB9 is not there") == 1
    assert box.hosts.troubles() == {"bad": "/dev/ttyUSB9 is not there"}
    assert box.values("dev-bad")[:2] == [1.0, 1.0]  # what it said before it crashed is not lost
    assert Quality.NO_ANSWER in box.values("dev-bad", "quality")
    assert box.hosts.exhausted == ""
    assert "quality" not in {name for one in box.telemetry if one.device == "dev-good" for name in one.values}


def test_a_process_that_ends_without_a_word(boxes: list[Box]) -> None:
    box = Box(driver("gone", "exit", PROCESS))
    boxes.append(box)
    box.until(box.hosts.troubles)
    assert box.hosts.troubles() == {"gone": "its process ended with code 9"}


def test_a_process_that_hangs_is_killed(boxes: list[Box]) -> None:
    box = Box(driver("hung", "hang", PROCESS), driver("good"))
    boxes.append(box)
    box.until(lambda: box.values("dev-hung"))
    run = box.hosts._drivers["hung"].run
    assert run is not None
    assert run.child is not None
    process = run.child._process
    assert process is not None
    box.until(lambda: box.count("restarts_total{driver=hung}") == 1, what="the restart")
    eventually(lambda: process.poll() == -signal.SIGKILL, what="the kill")
    box.until(lambda: len(box.values("dev-hung")) == 2, what="the next run")
    assert box.count("abandoned_total") == 0
    assert box.values("dev-good") == sorted(box.values("dev-good"))


def test_a_thread_that_hangs_is_given_up_and_its_late_words_are_counted(boxes: list[Box]) -> None:
    box = Box(driver("hung", "hang"), driver("good"))
    boxes.append(box)
    box.until(lambda: box.count("abandoned_total") == MOST_ABANDONED, 20.0, "three given up")
    assert "3 drivers hang" in box.hosts.exhausted
    assert len(box.values("dev-good")) > 20
    assert box.counters.warnings.count("hung: hangs: nothing heard for 0.6 s") == 1
    driver_in_thread.held.set()
    box.until(lambda: box.count("dropped_total{reason=abandoned_driver}") >= MOST_ABANDONED, what="late words")
    assert -1.0 not in box.values("dev-hung")[:MOST_ABANDONED]


def test_a_child_ends_with_its_gateway(tmp_path: Path) -> None:
    program = tmp_path / "parent.py"
    program.write_text(
        "from citybrain.clock import system_clock, wait_s\n"
        "from citybrain.counters import Counters\n"
        "from edge.host import Configured, Hosts\n"
        "from tests.driver_in_process import Config\n"
        f"hosts = Hosts([Configured('a', '{PROCESS}', Config('d', 'hang'))], Counters('g'), system_clock())\n"
        "hosts.start()\n"
        "while not hosts.poll(0): wait_s(0.01)\n"
        "print(hosts._drivers['a'].run.child._process.pid, flush=True)\n"
        "wait_s(60)\n"
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    with subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE, cwd=root, env=environment) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.kill()
    eventually(lambda: not Path(f"/proc/{child}").exists() or "Z" in _state(child), what="the child's end")


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def test_a_full_queue_drops_the_oldest_telemetry_and_no_event(boxes: list[Box]) -> None:
    box = Box(driver("much", "flood"))
    boxes.append(box)
    run = box.hosts._drivers["much"].run
    assert run is not None
    eventually(lambda: len(run.mailbox._rest) >= 2, what="two floods")
    box.hosts.restart("much")
    eventually(run.gone, what="its end")
    box.poll()
    floods = len(box.events)
    assert floods >= 2
    assert len(box.values("dev-much")) == MOST_WAITING
    assert set(box.values("dev-much")) == {float(floods)}
    assert box.count("dropped_total{reason=driver_queue_full}") == floods * 10_000 - MOST_WAITING


@pytest.mark.parametrize("module", [THREAD, PROCESS])
def test_requests_are_answered_and_restarts_on_demand_are_no_errors(boxes: list[Box], module: str) -> None:
    box = Box(driver("a", module=module), driver("b"))
    boxes.append(box)
    box.until(lambda: box.values("dev-a"))
    assert box.hosts.ask(Request("r1", "sample", "dev-a"))
    assert not box.hosts.ask(Request("r2", "sample", "dev-unknown"))
    answers: list[Answer] = []

    def answered() -> bool:
        answers.extend(box.hosts.answers())
        return bool(answers)

    box.until(answered, what="the answer")
    assert answers == [Answer("r1", ok=True, text="dev-a")]
    assert box.hosts.blobs() == [("a", Blob(b"sample", unmasked=False)), ("a", Blob(b"dev-a", unmasked=True))]
    assert box.count("dropped_total{reason=rubbish}") == 2
    assert "a: rubbish: xyz" in box.counters.warnings
    assert "a: dev-a: garbled: noise" in box.counters.warnings
    assert box.values("dev-a", "quality") == [Quality.GARBLED]
    box.hosts.restart("a")
    box.until(lambda: box.values("dev-a").count(1.0) == 2, what="its beginning anew")
    assert box.count("errors_total{stage=driver}") == 0
    assert box.count("restarts_total{driver=a}") == 1
    assert not box.hosts.restart("nobody")


def test_what_is_no_number_is_left_out_and_counted(boxes: list[Box]) -> None:
    box = Box(driver("odd", "nan"))
    boxes.append(box)
    box.until(lambda: box.count("dropped_total{reason=not_finite}") > 2)
    assert all(set(one.values) == {"battery_v"} for one in box.telemetry)


def test_report_and_limits_of_a_driver(boxes: list[Box]) -> None:
    limits = (Limit("value", 7, above=3.5),)
    box = Box(driver("a", report=Report(Duration(600_000), {"value": 2.5}), limits=limits))
    boxes.append(box)
    box.until(lambda: len(box.values("dev-a")) >= 4)
    assert box.values("dev-a")[:4] == [1.0, 4.0, 7.0, 10.0]
    assert box.values("dev-a", "battery_v") == [3.6]
    alarms = [one for one in box.events if "local_alarm" in one.values]
    assert [one.values for one in alarms] == [{"local_alarm": 0.0}, {"local_alarm": 7.0}]
    box.hosts.stop(0)
    box.poll()
    given = sum(len(one.values) for one in box.telemetry)
    assert box.count("unchanged_total") + given == 2 * sum("fault_code" in one.values for one in box.events)


def test_quality_is_told_with_the_heartbeat_though_the_device_is_silent(boxes: list[Box]) -> None:
    box = Box(driver("bad", "crash", report=Report(Duration(60_000))))
    boxes.append(box)
    box.until(lambda: box.values("dev-bad", "quality") == [Quality.NO_ANSWER])
    clock = ManualClock(box.telemetry[-1].observed_at + 60_000)
    again = [reading for _, reading in box.hosts.poll(clock.now_ms()) if "quality" in reading.values]
    assert [(one.observed_at, one.values["quality"]) for one in again] == [(clock.now_ms(), Quality.NO_ANSWER)]


def test_a_device_that_comes_and_goes_does_not_flood_the_log(boxes: list[Box]) -> None:
    box = Box(driver("a", "flap"))
    boxes.append(box)
    box.until(lambda: len(box.values("dev-a", "quality")) >= 20)
    assert box.values("dev-a", "quality")[:4] == [1, 0, 1, 0]
    assert len(box.counters.warnings) <= 1  # none where every poll saw it good again
    assert all(one.startswith("a: dev-a: no_answer: try ") for one in box.counters.warnings)
    reasons = box.hosts.reasons()
    assert not reasons or reasons["dev-a"].startswith("no_answer: try ")


def test_one_device_of_two_drivers_is_refused() -> None:
    twice = (driver("a"), Configured("b", THREAD, driver_in_thread.Config("dev-a")))
    with pytest.raises(ConfigError, match=r"drivers\.b: device 'dev-a' is already of a"):
        Hosts(twice, Counters("gateway"), system_clock())


@pytest.mark.parametrize("module", [THREAD, PROCESS])
def test_what_is_asked_at_once_is_answered_as_soon_as_the_driver_is_there(boxes: list[Box], module: str) -> None:
    box = Box(driver("a", module=module))
    boxes.append(box)
    box.poll()
    assert box.hosts.ask(Request("early", "sample", "dev-a"))
    answers: list[Answer] = []

    def answered() -> bool:
        answers.extend(box.hosts.answers())
        return bool(answers)

    box.until(answered, what="the answer")
    assert [answer.request for answer in answers] == ["early"]
