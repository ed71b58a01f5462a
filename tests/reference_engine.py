"""The engine's meaning in plain Python: one value at a time, dictionaries, nothing shared with the kernels.

What `streams.engine` does with columns and compiled kernels must come out the same. Written from docs/rules.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import msgspec

from citybrain.config import duration_ms
from citybrain.layout import Layout
from citybrain.model import Device, Edge, Evidence, Registry, Transition
from citybrain.segments import Record
from streams.log import Control, Kind, decode_control, decode_tick, frame_arrays, frame_head
from streams.registry import Index, decode_registry
from streams.ruleset import Rule, Selector, decode_ruleset


@dataclass
class Instance:
    """One rule on one device."""

    rule: Rule
    device: Device
    when: dict[str, Any]  # the rule's, or what its first override in force makes of it
    phase: str = "idle"
    deadline: int | None = None
    since: int = 0
    value: float = 0.0
    began: list[int] = field(default_factory=list)
    raised: bool = False
    heard: int | None = None
    due: int = 0  # absence: live time (gateway) that must be passed
    metric: str = ""  # which metric `value` is of
    memory: dict[str, Any] = field(default_factory=dict)  # what a kind remembers between values

    @property
    def kind(self) -> str:
        return str(self.when["kind"]) + ("_platform" if self.when.get("clock") == "platform" else "")

    def ms(self, name: str) -> int:
        return duration_ms(self.when[name]) if name in self.when else 0

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(c["metric"] for c in conditions(self.when))) or (self.when.get("metric", ""),)

    @property
    def open(self) -> bool:
        return self.raised or self.phase in ("raised", "clearing")


class Reference:
    """The same interface as the engine's `process`."""

    def __init__(self, shard: int, layout: Layout) -> None:
        self.shard = shard
        self.layout = layout
        self.registry: Registry | None = None
        self.rules: tuple[Rule, ...] | None = None
        self.names = {"registry": "", "ruleset": ""}
        self.index: Index | None = None
        self.instances: list[Instance] = []
        self.stream: dict[str, int] = {}
        self.live: dict[str, int] = {}
        self.last: dict[tuple[str, str], tuple[int, float]] = {}
        self.overrides: list[Control] = []
        self.ticked = 0
        self.faults: dict[tuple[str, str], int] = {}
        self.late = 0
        self.found: list[tuple[tuple[int, int], Transition]] = []
        self.record: Record | None = None
        self.position = 0

    def process(self, records: list[Record]) -> list[Transition]:
        result: list[Transition] = []
        for record in records:
            self.record, self.found, self.position = record, [], -1
            if record.kind == Kind.TICK:
                self.ticked = max(self.ticked, decode_tick(record.payload).at)
            if record.kind == Kind.CONTROL:
                self._control(decode_control(record.payload))
            elif self.registry is not None and self.rules is not None:
                if record.kind == Kind.TICK:
                    self._expire(decode_tick(record.payload).at)
                    self._tick(record)
                else:
                    self._frame(record)
            ordered = sorted(self.found, key=lambda pair: pair[0])
            result += [msgspec.structs.replace(item, index=n) for n, (_, item) in enumerate(ordered)]
        return result

    # --- control ---

    def _control(self, control: Control) -> None:
        if control.what == "override":
            same = (control.subject, control.rule, control.from_ms)
            self.overrides = [o for o in self.overrides if (o.subject, o.rule, o.from_ms) != same]
            self.overrides.append(control)
        elif control.what == "fault":
            self._fault(control)
        elif control.what in self.names and self.names[control.what] != control.content:
            active = self.registry is not None and self.rules is not None
            self.names[control.what] = control.content
            content = self.layout.get_blob(control.content)
            if control.what == "registry":
                self.registry = decode_registry(content)
                self.index = Index(self.registry, control.content)
            else:
                self.rules = decode_ruleset(content).rules
            self._rebuild(control.at, active)

    def _rebuild(self, at: int, active: bool) -> None:
        if self.registry is None or self.rules is None or self.index is None or self.record is None:
            return
        before = {(i.rule.id, i.device.id, i.kind): i for i in self.instances}
        gateways = {g.id: g for g in self.registry.gateways}
        known = {(d.id, m) for d in self.registry.devices for m in (*d.metrics, *d.event_metrics)}
        self.last = {key: value for key, value in self.last.items() if key in known}
        self.stream = {g: t for g, t in self.stream.items() if g in gateways}
        self.live = {g: t for g, t in self.live.items() if g in gateways}
        self.instances = []
        for device in self.index.devices:
            if gateways[device.gateway].shard != self.shard:
                continue
            for rule in self.rules:
                new = Instance(rule, device, self._when(rule, device))
                if not self._watches(new, gateways):
                    continue
                old = before.pop((rule.id, device.id, new.kind), None)
                self.instances.append(self._carried(new, old))
        if active:
            for n, old in enumerate([i for i in before.values() if i.open]):
                self._emit(n, old, Edge.CLEAR, at, Evidence("", None, None, at))

    def _watches(self, new: Instance, gateways: dict[str, Any]) -> bool:
        device = new.device
        if new.kind == "reported" or not self._selects(new.rule.select, device):
            return False
        if new.kind == "absence_platform":
            return device.id in gateways
        if new.kind == "absence":
            return bool(device.metrics)
        has = {*device.metrics, *device.event_metrics}
        if new.kind == "composite":
            can = [c["metric"] in has or c.get("unknown") == "met" for c in conditions(new.when)]
            return sum(can) >= needed(new.when) and bool(has.intersection(new.metrics))
        return new.when["metric"] in has

    def _selects(self, select: Selector, device: Device) -> bool:
        wanted = {name: value for name, value in msgspec.structs.asdict(select).items() if value}
        tag = wanted.pop("tag", "")
        own = {"kind": device.kind, "zone": device.zone, "building": device.building, "device": device.id}
        own |= self._areas(device)
        return all(own[name] == value for name, value in wanted.items()) and (not tag or tag in device.tags)

    def _areas(self, device: Device) -> dict[str, str]:
        assert self.registry is not None
        cell = next((c for c in self.registry.cells if c.code == device.place.cell), None)
        return {"grid": cell.grid if cell else "", "street": cell.street if cell else ""}

    def _when(self, rule: Rule, device: Device) -> dict[str, Any]:
        for override in rule.overrides:
            if override.until_ms > self.ticked and self._selects(override.select, device):
                return {**rule.when, **override.when}
        return rule.when

    def _expire(self, at: int) -> None:
        self.ticked = max(self.ticked, at)
        for it in self.instances:
            when = self._when(it.rule, it.device)
            if when == it.when:
                continue
            it.when = when
            it.phase, it.deadline, it.began = ("raised" if it.phase in ("raised", "clearing") else "idle"), None, []
            self._recall(it)
            if it.kind == "absence":
                it.due = self.live.get(it.device.gateway, 0) + it.ms("timeout")

    def _carried(self, new: Instance, old: Instance | None) -> Instance:
        assert self.record is not None
        if new.kind == "absence":
            new.due = self.live.get(new.device.gateway, 0) + new.ms("timeout")
        if new.kind == "absence_platform":
            new.heard = self.record.received_at
        self._recall(new)
        if old is None:
            return new
        if old.when == new.when:
            old.rule, old.device = new.rule, new.device
            return old
        new.heard, new.raised = old.heard if old.heard is not None else new.heard, old.raised
        if old.phase in ("raised", "clearing"):
            new.phase, new.since, new.value = "raised", old.since, old.value
        return new

    def _recall(self, it: Instance) -> None:
        """A memory that is new begins with the last values."""
        it.memory = {}
        for metric in it.metrics if it.kind in JUDGES else ():
            if (it.device.id, metric) in self.last:
                JUDGES[it.kind](it, metric, *self.last[it.device.id, metric])

    def _fault(self, control: Control) -> None:
        ready = self.registry is not None and self.rules is not None
        rules = [r for r in self.rules or () if r.id == control.rule and r.when["kind"] == "reported"]
        if not rules or not ready or self.record is None:
            return
        key = (control.rule, control.subject)
        self.faults[key] = self.faults.get(key, 0) + 1
        if not self._muted(control.rule, control.subject, control.at):
            evidence = Evidence("", None, None, control.at, self.faults[key])
            item = Transition(
                self.shard, self.record.offset, 0, control.rule, control.subject, Edge.RAISE, control.at,
                self.record.received_at, evidence, self.names["ruleset"],
            )  # fmt: skip
            self.found.append(((0, 0), item))

    # --- ticks and frames ---

    def _tick(self, record: Record) -> None:
        tick = decode_tick(record.payload)
        for n, it in enumerate(self.instances):
            if it.kind != "absence_platform" or it.raised:
                continue
            assert it.heard is not None
            since = max(it.heard, tick.up_since)
            if tick.at - since > it.ms("timeout"):
                at = self._unmuted(it, since + it.ms("timeout"))
                if at < tick.at:
                    it.raised = True
                    self._emit(n, it, Edge.RAISE, at, self._silent(it, since, at))

    def _frame(self, record: Record) -> None:
        assert self.index is not None
        head = frame_head(record.payload)
        observed, value, series = frame_arrays(record.payload, head)
        gateway = self.index.gateways[head.gateway].id
        for n, it in enumerate(self.instances):
            if it.kind == "absence_platform" and it.device.id == gateway:
                assert it.heard is not None
                if it.raised:
                    it.raised = False
                    self._emit(n, it, Edge.CLEAR, record.received_at, self._silent(it, it.heard, record.received_at))
                it.heard = max(it.heard, record.received_at)
        for p in range(head.values):
            self.position = p
            device = self.index.devices[self.index.series_device[series[p]]]
            names = (*device.metrics, *device.event_metrics)
            metric = next(m for m in names if self.index.series(device.id, m) == series[p])
            t = min(int(observed[p]), record.received_at + 2000)
            self._value(device, metric, t, float(value[p]), telemetry=head.lane == 0)

    def _value(self, device: Device, metric: str, t: int, value: float, *, telemetry: bool) -> None:
        if (device.id, metric) in self.last and t < self.last[device.id, metric][0]:
            self.late += 1
            return
        gateway = device.gateway
        if telemetry and t > self.stream.get(gateway, -(10**18)):
            if gateway in self.stream:
                self.live[gateway] = self.live.get(gateway, 0) + min(t - self.stream[gateway], 30_000)
            self.stream[gateway] = t
        if gateway in self.stream:
            for n, it in enumerate(self.instances):
                if it.device.gateway == gateway:
                    self._deadline(n, it, self.stream[gateway])
                    self._absent(n, it, self.stream[gateway], self.live.get(gateway, 0))
        self.last[device.id, metric] = (t, value)
        for n, it in enumerate(self.instances):
            if it.device.id != device.id:
                continue
            if it.kind == "absence" and metric in device.metrics:
                self._heard(n, it, t)
            elif metric in it.metrics:
                self._deadline(n, it, t)
                self._judge(it, metric, t, value)
                self._deadline(n, it, t)

    # --- absence ---

    def _absent(self, n: int, it: Instance, stream: int, live: int) -> None:
        if it.kind != "absence" or it.raised or live <= it.due:
            return
        reached = stream - (live - it.due)
        at = self._unmuted(it, reached)
        it.due += at - reached
        if live > it.due:
            it.raised = True
            self._emit(n, it, Edge.RAISE, at, self._silent(it, it.heard, at))

    def _heard(self, n: int, it: Instance, t: int) -> None:
        if it.raised:
            it.raised = False
            self._emit(n, it, Edge.CLEAR, t, self._silent(it, it.heard, t))
        it.heard, it.due = t, self.live.get(it.device.gateway, 0) + it.ms("timeout")

    def _silent(self, it: Instance, since: int | None, at: int) -> Evidence:
        since = at - it.ms("timeout") if since is None else since
        return Evidence("silence_s", (at - since) / 1000, it.ms("timeout") / 1000, since)

    # --- conditions ---

    def _judge(self, it: Instance, metric: str, t: int, value: float) -> None:
        begins, ends = self._verdict(it, metric, t, value)
        it.metric, it.value = metric, value
        if it.phase == "pending" and (ends or self._guarded(it)):
            it.phase, it.deadline = "idle", None
        elif it.phase == "idle" and begins and not self._guarded(it):
            it.phase, it.since, it.deadline = "pending", t, t + it.ms("on_delay")
        elif it.phase == "held" and ends:
            it.phase = "idle"
        elif it.phase == "raised" and ends:
            it.phase, it.since, it.deadline = "clearing", t, t + it.ms("off_delay")
        elif it.phase == "clearing" and begins:
            it.phase, it.deadline = "raised", None

    def _verdict(self, it: Instance, metric: str, t: int, value: float) -> tuple[bool, bool]:
        when = it.when
        if it.kind in JUDGES:
            return JUDGES[it.kind](it, metric, t, value)
        if it.kind == "device_code":
            return value in when["codes"], value in when["clear"]
        if "above" in when:
            return value > when["above"], value <= when["above"] - when.get("deadband", 0.0)
        return value < when["below"], value >= when["below"] + when.get("deadband", 0.0)

    def _guarded(self, it: Instance) -> bool:
        unless, only = it.rule.unless, it.rule.only_while
        if unless and self.last.get((it.device.id, unless.metric), (0, -math.inf))[1] >= unless.at_least:
            return True
        return bool(only and self.last.get((it.device.id, only.metric), (0, -math.inf))[1] < only.at_least)

    def _deadline(self, n: int, it: Instance, now: int) -> None:
        if it.deadline is None or it.deadline > now:
            return
        at, it.deadline = it.deadline, None
        if it.phase == "clearing":
            it.phase = "idle"
            self._emit(n, it, Edge.CLEAR, at, self._measured(it, it.since, 1, raised=False))
        elif self._guarded(it) or self._muted(it.rule.id, it.device.id, at):
            it.phase = "idle"
        else:
            count = it.when.get("count")
            needed = count["n"] if count else 1
            it.began = [*it.began, it.since][-needed:]
            if len(it.began) == needed and (not count or it.began[0] >= it.since - duration_ms(count["within"])):
                it.phase = "raised"
                self._emit(n, it, Edge.RAISE, at, self._measured(it, it.began[0], needed, raised=True))
            else:
                it.phase = "held"

    def _measured(self, it: Instance, since: int, count: int, *, raised: bool) -> Evidence:
        when, limit = it.when, None
        if it.kind == "threshold":
            band = 0.0 if raised else when.get("deadband", 0.0)
            limit = when["above"] - band if "above" in when else when["below"] + band
        return Evidence(it.metric or it.metrics[0], it.value, limit, since, count)

    # --- both ---

    def _muted(self, rule: str, subject: str, at: int) -> bool:
        return any(
            self._means(o, subject) and o.rule in ("*", rule) and o.from_ms <= at < o.until_ms for o in self.overrides
        )

    def _means(self, override: Control, subject: str) -> bool:
        assert self.registry is not None
        device = next((d for d in self.registry.devices if d.id == subject), None)
        if override.subject == subject or device is None:
            return override.subject == subject
        areas = {"zone": device.zone, "building": device.building, "gateway": device.gateway, **self._areas(device)}
        field, _, code = override.subject.partition(":")
        return bool(code) and areas.get(field) == code

    def _unmuted(self, it: Instance, at: int) -> int:
        """The first time from `at` on that no override covers."""
        while True:
            ends = [
                o.until_ms for o in self.overrides
                if self._means(o, it.device.id) and o.rule in ("*", it.rule.id) and o.from_ms <= at < o.until_ms
            ]  # fmt: skip
            if not ends:
                return at
            at = max(ends)

    def _emit(self, n: int, it: Instance, edge: Edge, at: int, evidence: Evidence) -> None:
        assert self.record is not None
        item = Transition(
            self.shard, self.record.offset, 0, it.rule.id, it.device.id, edge, at, self.record.received_at, evidence,
            self.names["ruleset"],
        )  # fmt: skip
        self.found.append(((self.position, n), item))


# --- what the kinds with a memory say of a value: (begins, ends) ---


def rate(it: Instance, metric: str, t: int, value: float) -> tuple[bool, bool]:
    """The value against the highest of the window behind it; slices are 1/8 of it, a bridged report stands till now."""
    when, memory = it.when, it.memory
    sign, amount = (1.0, when["fall"]) if "fall" in when else (-1.0, when["rise"])
    value *= sign
    slice_ms = it.ms("within") // 8
    said = memory.setdefault("said", [])  # (time, value) of what was said, or stood until the next report
    if said and t - memory["at"] <= it.ms("bridge"):
        said.append((t, memory["last"]))
    said.append((t, value))
    memory["at"], memory["last"] = t, value
    highest = max(v for at, v in said if at // slice_ms > t // slice_ms - 8)
    if highest - value >= amount:
        memory["fell"] = t
        memory.setdefault("start", highest)
    elif "start" in memory and t - memory["fell"] >= it.ms("settle"):
        del memory["start"]
    if "start" in memory and memory["start"] - value <= amount * (1.0 - when.get("recover", 0.5)):
        del memory["start"]
    return "start" in memory, "start" not in memory


def stuck(it: Instance, metric: str, t: int, value: float) -> tuple[bool, bool]:
    """The run of reports that differ by no more than the tolerance, this one included."""
    run = it.memory.setdefault("run", [])
    values = [v for _, v in run] + [value]
    if max(values) - min(values) > it.when.get("tolerance", 0.0):
        run.clear()
    run.append((t, value))
    holds = len(run) >= it.when["reports"] and t - run[0][0] >= it.ms("lasting")
    return holds, not holds


def shift(it: Instance, metric: str, t: int, value: float) -> tuple[bool, bool]:
    """The value against the median of the last nine that were not away from it."""
    when, memory = it.when, it.memory
    learned, away = memory.setdefault("learned", []), memory.setdefault("away", [])  # values; times
    most, spike = when.get("reports", 3), when["shape"] == "spike"
    if len(learned) < 5:
        learned.append(value)
        return False, True
    median = sorted(learned)[len(learned) // 2]
    spread = sorted(abs(v - median) for v in learned)[len(learned) // 2] * (when.get("spreads", 0.0) * 1.4826)
    up, down = max(when.get("up", math.inf), spread), max(when.get("down", math.inf), spread)
    back = when.get("back", 0.5)
    begins = False
    if not away:
        if value - median > up or value - median < -down:
            away.append(t)
    elif -back * down <= value - median <= back * up:
        begins = spike and len(away) <= most
        away.clear()
    else:
        away.append(t)
    if away and ((spike and len(away) > most) or (it.ms("accept") and t - away[0] >= it.ms("accept"))):
        learned.clear()
        away.clear()
    if not away:
        memory["learned"] = [*learned, value][-9:]
    begins = begins or (not spike and len(away) >= most)
    return begins, not begins


def conditions(when: dict[str, Any]) -> list[dict[str, Any]]:
    """The conditions of a composite; none for another kind."""
    found = when.get("all") or when.get("any") or when.get("at_least", {}).get("of", [])
    return list(found) if when["kind"] == "composite" else []


def needed(when: dict[str, Any]) -> int:
    """How many conditions of a composite must be met."""
    return int(when["at_least"]["k"]) if "at_least" in when else len(when.get("all", [])) or 1


def composite(it: Instance, metric: str, t: int, value: float) -> tuple[bool, bool]:
    """How many conditions are met, and how many would be if the stale ones still were."""
    met = stale = 0
    latest = t
    for c, condition in enumerate(conditions(it.when)):
        if condition["metric"] == metric:
            before = it.memory.get(f"{c}", (t, False))[1]
            it.memory[f"{c}"] = (t, simple(condition, value, before=before))
        at, holds = it.memory.get(f"{c}", (None, False))
        latest = max(latest, t if at is None else at)
        fresh = duration_ms(condition["fresh"]) if "fresh" in condition else 0
        if at is None or (fresh and t - at > fresh):
            if condition.get("unknown") == "met":
                met += 1
            elif holds:
                stale += 1
        elif holds:
            met += 1
    return met >= needed(it.when) and t >= latest, met + stale < needed(it.when)


def simple(condition: dict[str, Any], value: float, *, before: bool) -> bool:
    """Whether one condition is met by a value, having been so before or not."""
    if "codes" in condition:
        return value in condition["codes"] or (before and value not in condition["clear"])
    band = condition.get("deadband", 0.0)
    if "above" in condition:
        return value > condition["above"] or (before and not value <= condition["above"] - band)
    return value < condition["below"] or (before and not value >= condition["below"] + band)


JUDGES = {"rate": rate, "stuck": stuck, "shift": shift, "composite": composite}
