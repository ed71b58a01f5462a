"""The gateways of some shards over days, block by block: what they say, when they hand it over, when their line is cut.

For simulations that are in a hurry: the readings of half an hour are worked out at once and cut into the bodies of
messages. A quiet gateway hands over once a minute. One to which something happens does so each 10 s, and before each
second that brings an event: as live, an event overtakes what was measured in its own second and nothing older.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import pairwise

import msgspec
import numpy as np
import numpy.typing as npt

from citybrain.clock import HOUR_MS, MINUTE_MS, SECOND_MS
from citybrain.model import Lane, Transition
from gateway.spool import Spool
from simulators.causes import ANNOUNCED_MS, Cause, permits
from simulators.columns import Columns, Frames
from simulators.faults import Schedule
from simulators.noise import I64, bits, key, uniforms
from simulators.pipeline import Stream
from simulators.sensors import VITALS_MS, Sensors, dead, is_cloud
from streams.log import Control

Bools = npt.NDArray[np.bool_]

STEP_MS = 10 * SECOND_MS
BLOCK_MS = 30 * MINUTE_MS
QUIET_STEPS = 6
BEFORE_MS, BEGINS_MS, AFTER_MS = (
    MINUTE_MS,
    20 * MINUTE_MS,
    6 * MINUTE_MS,
)  # around begin and end of a cause it is lively
ACTOR = "simulator"

# An operator's cloud [U]: most pushes come at once, some fail and are pulled within a minute or two, a few come late.
FAILED_SHARE, LATE_SHARE = 0.03, 0.005
PUSH_MS, PULL_MS, LATE_MS = 3 * SECOND_MS, 2 * MINUTE_MS, 10 * MINUTE_MS


class Swap(msgspec.Struct, frozen=True):
    """From a time (Unix ms) on an asset has another sensor, and a registry (content hash) says so."""

    at_ms: int
    device: str
    wire: str
    registry: str


class Feed:
    """One gateway over a block of time."""

    def __init__(self, schedule: Schedule, gateway: str, number: int, swaps: Mapping[str, tuple[int, str]]) -> None:
        self.gateway = gateway
        self.sensors = Sensors(schedule.district, gateway, schedule, swaps=swaps)
        self.skew_ms = self.sensors.skew_ms
        self._schedule = schedule
        self._subjects = (*self.sensors.names, gateway)
        self._cloud = is_cloud(gateway)
        self._stagger = number % QUIET_STEPS
        self._key = key(schedule.district.seed, f"{gateway}/push")
        self._lanes: list[tuple[Lane, Frames]] = []
        self._spooled: list[int] = []  # where the telemetry says what waits
        self._points: list[list[tuple[int, ...]]] = []  # by step: up to which value of each lane it hands over
        self._cut: list[bool] = []
        self._done: tuple[int, ...] = ()

    def block(self, from_ms: int, to_ms: int) -> None:
        """Work out everything that is said in a block; steps are numbered from 0 within it."""
        ends = np.arange(from_ms + STEP_MS, to_ms + STEP_MS, STEP_MS)
        causes = self._schedule.around(self._subjects, from_ms, to_ms, AFTER_MS)
        lively = np.zeros(len(ends), bool)
        for cause in causes:
            begins = min(cause.start_ms + BEGINS_MS, cause.end_ms)
            lively |= (ends > cause.start_ms - BEFORE_MS) & (ends <= begins + AFTER_MS)
            lively |= (ends > cause.end_ms - BEFORE_MS) & (ends <= cause.end_ms + AFTER_MS)
        cuts = [c for c in causes if c.kind == "gateway_offline"]
        self._cut = [any(c.start_ms <= end < c.end_ms for c in cuts) for end in ends.tolist()]
        self._fill(from_ms, to_ms)
        self._plan(ends, lively)

    def _plan(self, ends: I64, lively: Bools) -> None:
        """Decide when in each step it hands over."""
        due = lively | (np.arange(len(ends)) % QUIET_STEPS == self._stagger)
        due[-1] = True
        times = [[end] if at_end else [] for end, at_end in zip(ends.tolist(), due.tolist(), strict=True)]
        events = [frames for lane, frames in self._lanes if lane is Lane.EVENT]
        seconds = np.unique(events[0].arrival // SECOND_MS * SECOND_MS) if events else np.empty(0, np.int64)
        for second, step in zip(seconds.tolist(), np.searchsorted(ends, seconds, "left").tolist(), strict=True):
            if step < len(ends) and lively[step] and not self._cut[step] and second > ends[step] - STEP_MS:
                times[step].append(second)
        flat = np.array([time for step in times for time in sorted(step)], np.int64)
        cuts = list(zip(*(frames.cut(flat) for _, frames in self._lanes), strict=True))
        bounds = np.cumsum([0, *(len(step) for step in times)]).tolist()
        self._points = [cuts[low:high] for low, high in pairwise(bounds)]
        self._done = (0,) * len(self._lanes)

    def _fill(self, from_ms: int, to_ms: int) -> None:
        begin = from_ms - (LATE_MS if self._cloud else 0)
        said = self.sensors.columns(begin, to_ms)
        self._lanes, self._spooled = [], []
        for lane in (Lane.EVENT, Lane.TELEMETRY):
            blocks = [block for block in said if block.lane is lane]
            arrivals = [self._arrival(block) for block in blocks] if self._cloud else [block.at for block in blocks]
            if lane is Lane.TELEMETRY:
                vitals = self._vitals(from_ms, to_ms)
                blocks, arrivals = [vitals, *blocks], [vitals.at, *arrivals]
            kept = [(b.rows(a >= from_ms), a[a >= from_ms]) for b, a in zip(blocks, arrivals, strict=True)]
            if not kept:
                continue
            frames = Frames([b for b, _ in kept], self.skew_ms, [a for _, a in kept])
            self._lanes.append((lane, frames))
            if lane is Lane.TELEMETRY:
                self._spooled = frames.places("spooled").tolist()

    def _arrival(self, block: Columns) -> I64:
        """Return when the cloud's readings get through: pushed, or pulled because the push was lost, or late."""
        mine = bits(np.full(len(block.at), self._key, np.uint64), block.device)
        luck, wait = uniforms(mine, block.at), uniforms(mine, block.at + 1)
        delay = np.where(luck < FAILED_SHARE, PULL_MS, PUSH_MS)
        delay = np.where(luck < LATE_SHARE, LATE_MS, delay)
        return block.at + (delay * wait).astype(np.int64)

    def _vitals(self, from_ms: int, to_ms: int) -> Columns:
        """Return the gateway's own readings; what waits in its spool is filled in when they are handed over."""
        first, last = from_ms + self.skew_ms, to_ms + self.skew_ms
        at = np.arange(first + (-first) % VITALS_MS, last, VITALS_MS)
        since = np.full(len(at), self._schedule.origin_ms)
        true = at - self.skew_ms
        for cause in self._schedule.around((self.gateway,), from_ms, to_ms, HOUR_MS * 24):
            if dead(cause):
                since[true >= cause.end_ms] = cause.end_ms
            if dead(cause) or (self._cloud and cause.kind == "gateway_offline"):
                true, since = (part[(true < cause.start_ms) | (true >= cause.end_ms)] for part in (true, since))
        values = np.stack(((true - since) / SECOND_MS, np.zeros(len(true))), axis=1)
        device = np.zeros(len(true), np.int64)
        return Columns(Lane.TELEMETRY, (self.gateway,), ("uptime_s", "spooled"), device, true, np.maximum(values, 0.0))

    def cut(self, step: int) -> bool:
        """Return whether the line is down at the end of a step."""
        return self._cut[step]

    def points(self, step: int) -> list[tuple[int, ...]]:
        """Return when in a step it hands over: each time, up to which value of each lane."""
        return self._points[step]

    def hand_over(self, point: tuple[int, ...], spool: Spool, now_ms: int) -> int:
        """Put what was said by then into the spool; return how many readings that were."""
        at_ms, taken, waiting = now_ms + self.skew_ms, 0, float(spool.spooled())
        for (lane, frames), start, end in zip(self._lanes, self._done, point, strict=True):
            if lane is Lane.TELEMETRY and waiting:
                low, high = bisect_left(self._spooled, start), bisect_left(self._spooled, end)
                frames.value[self._spooled[low:high]] = waiting
            for body, readings in frames.bodies(start, end):
                spool.append_body(lane, body, readings, at_ms)
                taken += readings
        self._done = point
        return taken


class Field:
    """Some shards of a district on their way through a `Stream`, block by block."""

    def __init__(self, stream: Stream, schedule: Schedule, swaps: Sequence[Swap]) -> None:
        self.stream = stream
        self.readings = 0
        self._schedule = schedule
        self._swaps = swaps
        by_device = {swap.device: (swap.at_ms, swap.wire) for swap in swaps}
        self._feeds = [
            Feed(schedule, gateway.id, number, by_device)
            for number, gateway in enumerate(schedule.district.registry.gateways)
            if gateway.shard in stream.shards
        ]
        self._offline: set[str] = set()

    def start(self, now_ms: int) -> None:
        """Switch all gateways on: they tell how things stand."""
        for feed in self._feeds:
            self._power_up(feed, now_ms)

    def _power_up(self, feed: Feed, now_ms: int) -> None:
        standing = [reading for _, reading in feed.sensors.power_up(now_ms)]
        self.stream.append(feed.gateway, Lane.EVENT, standing, now_ms + feed.skew_ms)
        self.readings += len(standing)

    def block(self, from_ms: int, to_ms: int) -> list[Transition]:
        """Let the gateways live through a block of time; return the transitions of their shards, by `received_at`."""
        for feed in self._feeds:
            feed.block(from_ms, to_ms)
        for step, now_ms in enumerate(range(from_ms + STEP_MS, to_ms + STEP_MS, STEP_MS)):
            self.stream.control(self._controls(now_ms), now_ms)
            for feed in self._feeds:
                self._step(feed, step, now_ms)
            self.stream.tick(now_ms)
            self.stream.exchange(now_ms)
        return self.stream.detect()

    def _step(self, feed: Feed, step: int, now_ms: int) -> None:
        cut = feed.cut(step)
        if cut != (feed.gateway in self._offline):
            self.stream.online(feed.gateway, not cut, now_ms)
            (self._offline.add if cut else self._offline.discard)(feed.gateway)
            if not cut and any(dead(c) and c.end_ms > now_ms - STEP_MS for c in self._ended(feed.gateway, now_ms)):
                self._power_up(feed, now_ms)
        points = feed.points(step)
        for number, point in enumerate(points, 1):
            self.readings += feed.hand_over(point, self.stream.spool(feed.gateway), now_ms)
            if number < len(points):
                self.stream.exchange(now_ms, feed.gateway)

    def _ended(self, gateway: str, now_ms: int) -> list[Cause]:
        return [c for c in self._schedule.around((gateway,), now_ms, now_ms, MINUTE_MS) if c.end_ms <= now_ms]

    def _controls(self, now_ms: int) -> list[Control]:
        """Return what is entered in the registers in the step that ends now: sensors replaced, permits."""
        swapped = [s for s in self._swaps if now_ms - STEP_MS < s.at_ms <= now_ms]
        found = [Control("registry", now_ms, ACTOR, swap.registry) for swap in swapped]
        return found + announced(self._schedule, now_ms)


def announced(schedule: Schedule, now_ms: int) -> list[Control]:
    """Return the overrides that are entered in the step that ends now."""
    coming = schedule.causes(now_ms + ANNOUNCED_MS - STEP_MS, now_ms + ANNOUNCED_MS)
    return [
        Control("override", now_ms, ACTOR, "", one.subject, one.rule, one.from_ms, one.until_ms, one.reason)
        for cause in coming
        for one in permits(cause, schedule.district)
    ]
