"""The supervisor of the drivers: starts each, takes what it says, starts it again when it ends or hangs.

A driver that hangs in a process of its own is killed. One in a thread cannot be: it is given up (its mailbox takes
nothing any more) and started anew beside; after three of them the box asks to be restarted itself (`exhausted`).
Nobody waits for a driver, and a trouble is said once, when it begins, changes or is over.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Sequence
from importlib import import_module
from math import isfinite

import msgspec

from citybrain.clock import Clock, monotonic_s, wait_s
from citybrain.counters import Counters
from citybrain.errors import CityBrainError, ConfigError
from citybrain.model import Lane, Reading
from edge.child import Asked, Child, Clocked, Stop
from edge.driver import Quality, Request
from edge.drivers import DRIVERS
from edge.latest import Latest
from edge.limits import Limit, Limits
from edge.mailbox import Answer, Blob, Dropped, Mailbox, MailboxHost, Put, Said, Upward
from edge.report import Report, Reporter
from edge.steps import Steps

FIRST_RETRY_S, MOST_RETRY_S = 1.0, 60.0
HEALTHY_S = 60.0  # a driver that ran that long begins with the first back-off again
MOST_ABANDONED = 3
QUALITY_HEARTBEAT_MS = 600_000  # where the driver has no heartbeat of its own
LINE_EVERY_S = 10.0  # a device that comes and goes has a log line at most that often
SAMPLE_EVERY_S = 60.0  # of what is dropped for one reason, one is shown that often

log = logging.getLogger("edge")


class Configured(msgspec.Struct, frozen=True):
    """One driver as `gateway.yaml` has it. config: the driver's own part, its module's `Config`."""

    name: str
    driver: str
    config: msgspec.Struct
    report: Report | None = None
    limits: tuple[Limit, ...] = ()


class Run:
    """One run of a driver: a thread of this process, which runs the driver or attends to its process."""

    def __init__(self, what: Configured, clock: Clock) -> None:
        self.mailbox = Mailbox()
        self.ended: str | None = None  # why, once it has
        self.child: Child | None = None
        self.started_s = monotonic_s()
        self._stopped_s: float | None = None
        self._what = what
        self._clock = clock
        module = import_module(DRIVERS.get(what.driver, what.driver))
        self.deadline_s = float(module.DEADLINE_S)
        if module.PROCESS:
            self.child = Child(what.driver, what.name, what.config, clock)
        self._module = module
        self._thread = threading.Thread(target=self._work, name=what.name, daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def _work(self) -> None:
        try:
            if self.child is not None:
                self.child.attend(self.mailbox)
            else:
                self._module.make(self._what.name, self._what.config).run(MailboxHost(self.mailbox, self._clock))
        except (CityBrainError, OSError) as error:
            self.ended = str(error)
        except Exception as error:  # noqa: BLE001  (a supervisor: it counts, says why, and starts the driver again)
            self.ended = f"{type(error).__name__}: {error}"
        else:
            self.ended = "it ended by itself"

    def hangs(self) -> bool:
        """Return whether its host has heard nothing, or it has not ended, for longer than it may."""
        since_s = self.mailbox.alive_until_s if self._stopped_s is None else self._stopped_s
        return monotonic_s() - since_s > self.deadline_s

    def ask(self, request: Request) -> None:
        """Pass a request on."""
        if self.child is not None:
            self.child.tell(Asked(request))
        else:
            self.mailbox.ask(request)

    def stop(self) -> None:
        """Tell it to end; what it still says is taken."""
        self._stopped_s = monotonic_s()
        self.mailbox.stop()
        if self.child is not None:
            self.child.tell(Stop())

    def give_up(self) -> bool:
        """Listen to it no more; a process is killed. Return whether a thread stays behind."""
        self.mailbox.stop(close=True)
        if self.child is not None:
            self.child.kill()
        return self.child is None and self.ended is None and self._thread.is_alive()

    def gone(self) -> bool:
        """Return whether its thread, and so its process, has ended."""
        return not self._thread.is_alive()


class Supervised:
    """A driver over its runs: when the next one is due, and what it has told."""

    def __init__(self, what: Configured) -> None:
        self.what = what
        self.devices: tuple[str, ...] = tuple(what.config.devices())  # type: ignore[attr-defined]
        self.run: Run | None = None
        self.left: list[Upward] = []  # said by a run that is over
        self.due_s = 0.0
        self.delay_s = FIRST_RETRY_S
        self.trouble = ""
        self.reporter = Reporter(what.report) if what.report is not None else None
        self.limits = Limits(what.limits) if what.limits else None
        self.heartbeat_ms = int(what.report.heartbeat) if what.report is not None else QUALITY_HEARTBEAT_MS
        self.qualities: dict[str, tuple[Quality, int]] = {}  # by device, with when it was told last
        self.whys: dict[str, str] = {}  # by device, what was said with it
        self.shown: dict[str, tuple[Quality, float]] = {}  # by device, what its last log line said, and when
        self.sampled: dict[str, float] = {}  # by reason, when what was dropped was shown last
        self.own_time: set[str] = set()  # devices that said last when they measured
        self.doubted: set[str] = set()  # devices that are distrusted because the driver failed

    def take(self) -> list[Upward]:
        """Return what was said since the last call."""
        said, self.left = self.left, []
        return said + (self.run.mailbox.drain() if self.run is not None else [])

    def over(self) -> None:
        """Let go of the present run; what it said is kept."""
        if self.run is not None:
            self.left += self.run.mailbox.drain()
        self.run = None


class Hosts:
    """All drivers of a gateway, as one `edge.agent.Source`. One thread calls it; only the drivers have their own.

    counters: `errors_total{stage=driver}`, `restarts_total{driver}`, `dropped_total{reason}`, `unchanged_total`,
    `abandoned_total`.
    """

    def __init__(self, drivers: Sequence[Configured], counters: Counters, clock: Clock) -> None:
        self.exhausted = ""  # why the whole process is to be restarted, once it is
        self._drivers = {one.name: Supervised(one) for one in drivers}
        self._counters = counters
        self._clock = clock
        self._jitter = random.Random()
        self._abandoned: list[Run] = []
        self._steps = Steps(clock)
        self._blobs: list[tuple[str, Blob]] = []
        self._answers: list[Answer] = []
        self._by_device: dict[str, str] = {}
        for name, one in self._drivers.items():
            for device in one.devices:
                if device in self._by_device:
                    raise ConfigError(f"drivers.{name}", f"device {device!r} is already of {self._by_device[device]}")
                self._by_device[device] = name
        self.latest = Latest(self._by_device)

    # --- the source ---

    def start(self) -> None:
        """Start all drivers."""
        self._supervise()

    def poll(self, now_ms: int) -> list[tuple[Lane, Reading]]:
        """Look after the drivers; return what they have said, of one device in its order, as it is to be told."""
        found: list[tuple[Lane, Reading]] = []
        self._follow_clock()
        for one in self._drivers.values():
            for message in one.take():
                self._take(one, message, now_ms, found)
        self._supervise()
        for one in self._drivers.values():
            self._tell_qualities(one, now_ms, found)
            self._log_changes(one)
        return found

    def blobs(self) -> list[tuple[str, Blob]]:
        """Return the evidence that came since the last call, with its driver's name."""
        found, self._blobs = self._blobs, []
        return found

    def answers(self) -> list[Answer]:
        """Return the answers that came since the last call."""
        found, self._answers = self._answers, []
        return found

    def _take(self, one: Supervised, message: Upward, now_ms: int, found: list[tuple[Lane, Reading]]) -> None:
        if isinstance(message, Put):
            self._put(one, message.lane, self._dated(one, message), now_ms, found)
        elif isinstance(message, Said):
            one.doubted.discard(message.device)
            self._say(one, message.device, message.quality, message.why, now_ms, found)
        elif isinstance(message, Dropped):
            self._counters.drop(message.reason, message.amount)
            now_s = monotonic_s()
            if message.sample and now_s - one.sampled.get(message.reason, -SAMPLE_EVERY_S) >= SAMPLE_EVERY_S:
                one.sampled[message.reason] = now_s
                self._counters.warn(f"{one.what.name}: {message.reason}: {message.sample}")
        elif isinstance(message, Blob):
            self._blobs.append((one.what.name, message))
        elif isinstance(message, Answer):
            self._answers.append(message)

    def _put(
        self, one: Supervised, lane: Lane, reading: Reading, now_ms: int, found: list[tuple[Lane, Reading]]
    ) -> None:
        finite = {name: value for name, value in reading.values.items() if isfinite(value)}
        if len(finite) < len(reading.values):
            self._counters.drop("not_finite")
            reading = Reading(reading.device, reading.observed_at, finite)
        if not finite:
            return
        self.latest.note(reading)
        if reading.device in one.doubted:
            one.doubted.discard(reading.device)
            self._say(one, reading.device, Quality.GOOD, "", now_ms, found)
        if lane is Lane.EVENT:
            found.append((lane, reading))
            return
        if one.limits is not None and (event := one.limits.judge(reading)) is not None:
            found.append((Lane.EVENT, event))
        told = one.reporter.filter(reading) if one.reporter is not None else reading
        self._counters.add("unchanged_total", len(reading.values) - (len(told.values) if told else 0))
        if told is not None:
            found.append((lane, told))

    def _dated(self, one: Supervised, message: Put) -> Reading:
        if message.own_time:
            one.own_time.add(message.reading.device)
            return message.reading
        one.own_time.discard(message.reading.device)
        return self._steps.under_way(message.reading)

    # --- how far devices can be trusted ---

    def _say(
        self, one: Supervised, device: str, quality: Quality, why: str, now_ms: int, found: list[tuple[Lane, Reading]]
    ) -> None:
        before = one.qualities.get(device)
        one.whys[device] = why
        if before is not None and before[0] is quality:
            return
        one.qualities[device] = (quality, now_ms)
        found.append((Lane.TELEMETRY, Reading(device, now_ms, {"quality": float(quality)})))

    def _log_changes(self, one: Supervised) -> None:
        """Say what changed; what befell several devices at once in one line."""
        now_s, changes = monotonic_s(), dict[tuple[Quality, str], list[str]]()
        for device, (quality, _) in one.qualities.items():
            said, said_s = one.shown.get(device, (Quality.GOOD, -LINE_EVERY_S))
            if quality is not said and now_s - said_s >= LINE_EVERY_S:
                one.shown[device] = (quality, now_s)
                changes.setdefault((quality, one.whys[device]), []).append(device)
        for (quality, why), devices in changes.items():
            who = ", ".join(devices[:3]) + (f" and {len(devices) - 3} more" if len(devices) > 3 else "")
            if quality is Quality.GOOD:
                log.info("%s: %s: good again", one.what.name, who)
            else:
                self._counters.warn(f"{one.what.name}: {who}: {quality.name.lower()}{': ' if why else ''}{why}")

    def _tell_qualities(self, one: Supervised, now_ms: int, found: list[tuple[Lane, Reading]]) -> None:
        for device, (quality, told_ms) in one.qualities.items():
            if not 0 <= now_ms - told_ms < one.heartbeat_ms:
                one.qualities[device] = (quality, now_ms)
                found.append((Lane.TELEMETRY, Reading(device, now_ms, {"quality": float(quality)})))
        if one.trouble and one.run is None:
            for device in one.devices:
                before = one.qualities.get(device)
                if before is None or before[0] is Quality.GOOD:
                    one.doubted.add(device)
                    self._say(one, device, Quality.NO_ANSWER, one.trouble, now_ms, found)

    # --- starting, ending, starting again ---

    def _supervise(self) -> None:
        for one in self._drivers.values():
            run = one.run
            if run is None:
                if monotonic_s() >= one.due_s:
                    self._begin(one)
            elif run.mailbox.stopping and run.gone():
                one.over()
            elif run.ended is not None and not run.mailbox.stopping:
                self._failed(one, run, run.ended)
            elif run.hangs():
                self._failed(one, run, f"hangs: nothing heard for {run.deadline_s:g} s")
            elif monotonic_s() - run.started_s > HEALTHY_S and one.trouble:
                log.info("%s: works again", one.what.name)
                one.trouble, one.delay_s = "", FIRST_RETRY_S
        self._forget_ended()

    def _begin(self, one: Supervised) -> None:
        one.run = Run(one.what, self._clock)
        one.run.start()

    def _failed(self, one: Supervised, run: Run, why: str) -> None:
        if run.give_up():
            self._abandoned.append(run)
            self._counters.add("abandoned_total")
            if len(self._abandoned) >= MOST_ABANDONED:
                self.exhausted = f"{len(self._abandoned)} drivers hang in threads that cannot be ended"
        one.over()
        if monotonic_s() - run.started_s > HEALTHY_S:
            one.trouble, one.delay_s = "", FIRST_RETRY_S
        one.due_s = monotonic_s() + one.delay_s * self._jitter.uniform(0.5, 1.0)
        one.delay_s = min(2 * one.delay_s, MOST_RETRY_S)
        self._counters.add("errors_total", stage="driver")
        self._counters.add("restarts_total", driver=one.what.name)
        if why != one.trouble:
            self._counters.warn(f"{one.what.name}: {why}")
            one.trouble = why

    def _forget_ended(self) -> None:
        for run in self._abandoned[:]:
            if run.mailbox.ignored:
                self._counters.drop("abandoned_driver", run.mailbox.ignored)
                run.mailbox.ignored = 0
            if run.gone():
                self._abandoned.remove(run)

    def _follow_clock(self) -> None:
        """Where the clock was moved, tell the processes, and let nothing last longer or shorter for it."""
        moved_ms = self._steps.look()
        if not moved_ms:
            return
        for one in self._drivers.values():
            if one.run is not None and one.run.child is not None:
                one.run.child.tell(Clocked(self._steps.ahead_ms))
            if one.limits is not None:
                one.limits.moved(moved_ms, one.own_time)
            if one.reporter is not None:
                one.reporter.moved(moved_ms, one.own_time)

    # --- from outside ---

    def names(self) -> tuple[str, ...]:
        """Return the drivers' names."""
        return tuple(self._drivers)

    def troubles(self) -> dict[str, str]:
        """Return what is wrong with which driver now: its last failure, until it has worked for a minute since."""
        return {name: one.trouble for name, one in self._drivers.items() if one.trouble}

    def qualities(self) -> dict[str, Quality]:
        """Return how far each device that was spoken of can be trusted now."""
        return {device: said[0] for one in self._drivers.values() for device, said in one.qualities.items()}

    def reasons(self) -> dict[str, str]:
        """Return why a device cannot be trusted now, for those that cannot."""
        return {
            device: f"{quality.name.lower()}{': ' if one.whys[device] else ''}{one.whys[device]}"
            for one in self._drivers.values()
            for device, (quality, _) in one.qualities.items()
            if quality is not Quality.GOOD
        }

    def ask(self, request: Request) -> bool:
        """Pass a request to the driver of its device, or to all where it names none; return whether one took it."""
        if request.device:
            one = self._drivers.get(self._by_device.get(request.device, ""))
            runs = [one.run] if one is not None else []
        else:
            runs = [one.run for one in self._drivers.values()]
        taking = [run for run in runs if run is not None]
        for run in taking:
            run.ask(request)
        return bool(taking)

    def restart(self, name: str) -> bool:
        """Start a driver anew as soon as it has ended; return whether there is one of that name.

        One that does not end when it is told to hangs, and is treated so.
        """
        one = self._drivers.get(name)
        if one is None:
            return False
        if one.run is not None:
            one.run.stop()
        one.due_s, one.delay_s, one.trouble = 0.0, FIRST_RETRY_S, ""
        self._counters.add("restarts_total", driver=name)
        return True

    def stop(self, now_ms: int, within_s: float = 2.0) -> list[tuple[Lane, Reading]]:
        """End all drivers; return their last readings. One that does not end in time is given up."""
        runs = [(one, one.run) for one in self._drivers.values() if one.run is not None]
        for _, run in runs:
            run.stop()
        until_s = monotonic_s() + within_s
        while monotonic_s() < until_s and not all(run.gone() for _, run in runs):
            wait_s(0.01)
        found: list[tuple[Lane, Reading]] = []
        for one, run in runs:
            run.give_up()
            one.over()
            one.due_s = float("inf")
            for message in one.take():
                self._take(one, message, now_ms, found)
        return found
