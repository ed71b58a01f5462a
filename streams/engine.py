"""The engine of one shard: log records in, transitions out. It alone decides what a rule set makes of a log.

Nothing but the records moves it, so the same log gives the same transitions bit for bit, whatever the batches, and a
snapshot goes on where it was taken. docs/rules.md says what every kind does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from citybrain.errors import ConfigError
from citybrain.layout import Layout
from citybrain.model import Edge, Evidence, Transition
from citybrain.segments import Record
from streams.batch import FOREIGN, LATE, READINGS, USED, Frames, Times, lay, take_batch
from streams.kinds.absence import Watched
from streams.kinds.holding import I32
from streams.log import F64, I64, Control, Kind, Tick, decode_control, decode_tick
from streams.plan import Plan, Table, add_override, compile_mutes, compile_plan, compile_rules
from streams.registry import Index, decode_registry
from streams.ruleset import decode_ruleset
from streams.snapshot import Frozen, Header, Stored, load_snapshot, save_snapshot
from streams.watches import Conditions, Heartbeats, Silences, Watch

BATCH_VALUES = 65_536  # what a batch holds stays in the cache from kernel to kernel; never decides a result
PLATFORM = "absence_platform"
FRAME, TICK, CONTROL = int(Kind.FRAME), int(Kind.TICK), int(Kind.CONTROL)  # once a record: an enum is slow to compare
ANY = 2**32  # before a rule set is in force a frame may be of any gateway


class Cause(NamedTuple):
    """One row that a kernel handed back, with where it belongs among the transitions of the batch."""

    record: int
    position: int  # of the value in its frame; -1 where the record as a whole caused it
    device: int
    rule: int
    watch: Watch
    row: np.void


class InForce(NamedTuple):
    """What the engine runs with, and what it remembers by it."""

    registry: Index | None
    plan: Plan | None
    watches: dict[str, Watch]


class Engine:
    """One shard's detection. It reads no clock: time comes from the records alone.

    offset: the log offset it wants next. registry, ruleset: the names (blob hashes) in force, "" before the first.
    counts: `values` seen, of them `used`, `late`, `foreign` (another gateway's series), `inactive` (before a registry
    and a rule set were activated); `readings` used; `malformed` records; `transitions`.
    """

    def __init__(self, shard: int, layout: Layout) -> None:
        self.shard = shard
        self.layout = layout
        self.offset = 0
        self.registry = ""
        self.ruleset = ""
        self.counts: Counter[str] = Counter()
        self.warnings: list[str] = []
        self.index: Index | None = None
        self.plan: Plan | None = None
        self.times = Times.fresh(0, 0)
        self.watches: dict[str, Watch] = {}
        self.overrides: tuple[Control, ...] = ()
        self.faults: Counter[tuple[str, str]] = Counter()
        self._of_series: I32 = np.zeros(0, np.int32)

    def process(self, records: Sequence[Record]) -> list[Transition]:
        """Take log records in their order; return the transitions they cause, in theirs.

        Records before `offset` were taken already and are skipped. Raises NotFound or Damaged where a control record
        names content that is not there.
        """
        found: list[Transition] = []
        waiting: list[Record] = []
        size = 0
        for record in records:
            if record.offset < self.offset:
                continue
            self.offset = record.offset + 1
            if record.kind == CONTROL:
                found += self._run(waiting)
                found += self._control(record)
                waiting, size = [], 0
            elif record.kind in (FRAME, TICK):
                waiting.append(record)
                size += len(record.payload)
                if size > 20 * BATCH_VALUES:
                    found += self._run(waiting)
                    waiting, size = [], 0
        found += self._run(waiting)
        self.counts["transitions"] += len(found)
        return found

    # --- frames and ticks -------------------------------------------------------------------------------------------

    def _run(self, records: list[Record]) -> list[Transition]:
        if not records:
            return []
        frames = [place for place, record in enumerate(records) if record.kind == FRAME]
        laid = lay([records[place] for place in frames], len(self.times.stream) if self.plan is not None else ANY)
        watched = Watched(*np.zeros((4, len(records)), np.int64))
        of_frame = np.array(frames, np.int64)
        kept = of_frame[laid.kept == 1]
        watched.kind[kept], watched.gateway[kept] = 1, laid.gateway[laid.kept == 1]
        watched.at[kept] = laid.received[laid.kept == 1]
        for place in of_frame[laid.kept == 0].tolist():
            self._malformed(records[place], "frame")
        for place, record in enumerate(records):
            if record.kind == TICK and (tick := self._tick(record)) is not None:
                watched.kind[place], watched.at[place], watched.up[place] = 2, tick.at, tick.up_since
        causes = [*self._judge(laid, of_frame), *self._watch(watched)]
        return self._transitions(records, causes) if causes else []

    def _tick(self, record: Record) -> Tick | None:
        try:
            return decode_tick(record.payload)
        except msgspec.DecodeError:
            self._malformed(record, "tick")
            return None

    def _malformed(self, record: Record, what: str) -> None:
        self.counts["malformed"] += 1
        self.warnings.append(f"log {self.shard} offset {record.offset}: not a {what} record; skipped")

    def _judge(self, laid: Frames, of_frame: I64) -> Iterator[Cause]:
        """Run the kinds that look at values; yield what they found."""
        values = len(laid.value)
        self.counts["values"] += values
        if self.plan is None or self.index is None:
            self.counts["inactive"] += values
            return
        if not values:
            return
        batch, counts = take_batch(laid, self._of_series, self.index.series_device, self.times)
        for name, which in (("used", USED), ("late", LATE), ("foreign", FOREIGN), ("readings", READINGS)):
            self.counts[name] += int(counts[which])
        for watch in self.watches.values():
            if not isinstance(watch, (Conditions, Silences)):
                continue
            rows = watch.run(batch)
            frames = np.searchsorted(laid.start, rows["position"], "right") - 1
            for frame, row in zip(frames.tolist(), rows, strict=True):
                position = int(row["position"] - laid.start[frame])
                yield Cause(int(of_frame[frame]), position, *owner(watch.table, row["instance"]), watch, row)

    def _watch(self, watched: Watched) -> Iterator[Cause]:
        """Run what looks at whole records: gateways that fall silent and come back."""
        watch = self.watches.get(PLATFORM)
        if not isinstance(watch, Heartbeats):
            return
        for row in watch.run(watched):
            yield Cause(int(row["position"]), -1, *owner(watch.table, row["instance"]), watch, row)

    def _transitions(self, records: list[Record], causes: list[Cause]) -> list[Transition]:
        causes.sort(key=lambda cause: cause[:4])  # stable: one instance's rows of one value keep their order
        found = []
        for place, group in groupby(causes, key=lambda cause: cause.record):
            for index, cause in enumerate(group):
                found.append(self._transition(records[place], index, cause))
        return found

    def _transition(self, record: Record, index: int, cause: Cause) -> Transition:
        assert self.index is not None
        assert self.plan is not None
        row, compiled = cause.row, self.plan.rules[cause.rule]
        raised = bool(row["raised"])
        return Transition(
            shard=self.shard,
            source=record.offset,
            index=index,
            rule=compiled.rule.id,
            subject=self.index.devices[cause.device].id,
            edge=Edge.RAISE if raised else Edge.CLEAR,
            at_ms=int(row["at"]),
            received_at=record.received_at,
            evidence=Evidence(
                compiled.kind.metrics(compiled.parameters)[row["term"]],
                float(row["value"]),
                compiled.kind.limit(compiled.parameters, raised=raised),
                int(row["since"]),
                int(row["count"]),
            ),
            ruleset=self.ruleset,
        )

    # --- control records --------------------------------------------------------------------------------------------

    def _control(self, record: Record) -> list[Transition]:
        try:
            control = decode_control(record.payload)
        except msgspec.DecodeError:
            self._malformed(record, "control")
            return []
        if control.what == "fault":
            return self._fault(control, record)
        if control.what == "override":
            self.overrides = add_override(self.overrides, control)
            self._mute()
        elif control.what == "registry":
            return self._activate(control.content, self.ruleset, control.at, record)
        elif control.what == "ruleset":
            return self._activate(self.registry, control.content, control.at, record)
        return []

    def _fault(self, control: Control, record: Record) -> list[Transition]:
        """Turn what the platform noticed into a raise of the rule it names, where the rule set has it."""
        rules = self.plan.rules if self.plan is not None else ()
        if not any(it.rule.id == control.rule and it.rule.when["kind"] == "reported" for it in rules):
            return []
        self.faults[control.rule, control.subject] += 1
        for override in self.overrides:
            concerns = override.subject == control.subject and override.rule in ("*", control.rule)
            if concerns and override.from_ms <= control.at < override.until_ms:
                return []
        evidence = Evidence("", None, None, control.at, self.faults[control.rule, control.subject])
        where = (self.shard, record.offset, 0, control.rule, control.subject)
        return [Transition(*where, Edge.RAISE, control.at, record.received_at, evidence, self.ruleset)]

    def _activate(self, registry: str, ruleset: str, at_ms: int, record: Record) -> list[Transition]:
        """Go over to another registry or rule set. One that is wrong is refused and the present one stays."""
        if (registry, ruleset) == (self.registry, self.ruleset):
            return []
        try:
            index, plan = self._compile(registry, ruleset)
        except ConfigError as error:
            self.counts["malformed"] += 1
            self.warnings.append(f"log {self.shard} offset {record.offset}: not activated: {error}")
            return []
        before = InForce(self.index, self.plan, self.watches)
        self.registry, self.ruleset = registry, ruleset
        self._install(index, plan, record.received_at)
        gone = carry_over(before, InForce(index, plan, self.watches))
        self._settle()
        return self._gone(gone, at_ms, record)

    def _compile(self, registry: str, ruleset: str) -> tuple[Index | None, Plan | None]:
        if not registry:
            if ruleset:
                compile_rules(decode_ruleset(self.layout.get_blob(ruleset)))
            return None, None
        index = self.index if registry == self.registry else None
        index = index or Index(decode_registry(self.layout.get_blob(registry)), registry)
        if not ruleset:
            return index, None
        return index, compile_plan(decode_ruleset(self.layout.get_blob(ruleset)), index, self.shard)

    def _install(self, index: Index | None, plan: Plan | None, known_ms: int) -> None:
        """Put index and plan in force with fresh state; the times of series and gateways go on."""
        before = self.index
        self.index, self.plan, self.watches = index, plan, {}
        if index is None:
            return
        self._of_series = index.device_gateway[index.series_device]
        self.times = carry_times(self.times, before, index)
        for name, table in plan.tables.items() if plan is not None else ():
            if name == PLATFORM:
                self.watches[name] = Heartbeats(table, known_ms)
            elif table.kind.JUDGES:
                self.watches[name] = Conditions(table)
            else:
                self.watches[name] = Silences(table, index.device_gateway[table.device], self.times)
        self._settle()

    def _settle(self) -> None:
        for watch in self.watches.values():
            if isinstance(watch, Conditions):
                watch.know(self.times)
        self._mute()

    def _mute(self) -> None:
        if self.plan is not None and self.index is not None:
            for watch in self.watches.values():
                watch.mutes = compile_mutes(self.overrides, watch.table, self.plan, self.index)

    def _gone(self, gone: list[Gone], at_ms: int, record: Record) -> list[Transition]:
        """Clear what was raised and no longer exists: its rule or its device was taken out."""
        found = []
        for number, one in enumerate(sorted(gone)):
            evidence = Evidence("", None, None, at_ms)
            where = (self.shard, record.offset, number, one.rule, one.subject)
            found.append(Transition(*where, Edge.CLEAR, at_ms, record.received_at, evidence, self.ruleset))
        return found

    # --- snapshots --------------------------------------------------------------------------------------------------

    def freeze(self) -> Frozen:
        """Return a copy of everything the engine remembers; the only part of a snapshot the stream waits for."""
        header = Header(
            shard=self.shard,
            offset=self.offset,
            registry=self.registry,
            ruleset=self.ruleset,
            overrides=self.overrides,
            faults=[(*key, n) for key, n in sorted(self.faults.items())],
            counts=dict(self.counts),
        )
        arrays: dict[str, npt.NDArray[Any]] = {name: array.copy() for name, array in self.times._asdict().items()}
        for name, watch in self.watches.items():
            arrays |= {f"{name}.{part}": array for part, array in watch.freeze().items()}
        return Frozen(header, arrays)

    def snapshot(self) -> bytes:
        """Return everything the engine remembers: a zip of header.json and npy arrays."""
        return save_snapshot(*self.freeze())

    def restore(self, content: bytes) -> None:
        """Go on from a snapshot; raises StorageError where it is damaged, another version's or another shard's."""
        header, arrays = load_snapshot(content, self.shard)
        index, plan = self._compile(header.registry, header.ruleset)
        self.registry, self.ruleset, self.offset = header.registry, header.ruleset, header.offset
        self.overrides = header.overrides
        self.faults = Counter({(rule, subject): n for rule, subject, n in header.faults})
        self.counts = Counter(header.counts)
        self.index, self.times = None, Times.fresh(0, 0)
        self._install(index, plan, 0)
        for name, array in self.times._asdict().items():
            array[...] = Stored(arrays).array(name, array.dtype, array.shape)
        for name, watch in self.watches.items():
            watch.thaw(Stored(arrays, f"{name}."))
        self._settle()


def carry_times(times: Times, before: Index | None, index: Index) -> Times:
    """Return the times of gateways and series under another registry; by gateway id, by (device, metric)."""
    fresh = Times.fresh(len(index.gateways), index.n_series)
    if before is None or not before.devices:
        return fresh
    for g, gateway in enumerate(index.gateways):
        old = before.gateway_index.get(gateway.id)
        if old is not None:
            fresh.stream[g], fresh.live[g] = times.stream[old], times.live[old]
    device = np.array([before.device_index.get(d.id, -1) for d in index.devices], np.int64)[index.series_device]
    old_series = np.where(device >= 0, before.series_of[device, index.series_metric], -1)
    known = old_series >= 0
    fresh.last_t[known], fresh.last_v[known] = times.last_t[old_series[known]], times.last_v[old_series[known]]
    return fresh


def owner(table: Table, instance: int) -> tuple[int, int]:
    """Return the device and the rule of an instance, by their numbers."""
    return int(table.device[instance]), int(table.rule[instance])


class Gone(NamedTuple):
    """What was raised and exists no longer; they sort as the engine numbers its instances."""

    device: int
    order: int
    rule: str
    subject: str


def carry_over(old: InForce, new: InForce) -> list[Gone]:
    """Carry state over by table, rule id and subject; return what was raised and is gone."""
    if old.registry is None or old.plan is None:
        return []
    device_now, rule_now, same_rule = now_of(old, new)
    gone: list[Gone] = []
    for name, watch in old.watches.items():
        table, kept = watch.table, np.zeros(len(watch.table.rule), np.bool_)
        if name in new.watches and new.plan is not None:
            adopting = new.watches[name]
            pairs = instance_now(table, adopting.table, device_now, rule_now, len(new.plan.rules))
            kept = pairs >= 0
            theirs = np.flatnonzero(kept)
            adopting.adopt(pairs[theirs], watch, theirs, same_rule[table.rule[theirs]])
        for j in np.flatnonzero(watch.raised() & ~kept).tolist():
            device, rule = owner(table, j)
            gone.append(Gone(device, rule, old.plan.rules[rule].rule.id, old.registry.devices[device].id))
    return gone


def now_of(old: InForce, new: InForce) -> tuple[I32, I32, npt.NDArray[np.bool_]]:
    """Return, by old number: a device's and a rule's new one, -1 where it is gone; and whether the rule is the same."""
    assert old.registry is not None
    assert old.plan is not None
    index, rules = new.registry, new.plan.rules if new.plan is not None else ()
    places = index.device_index if index is not None else {}
    device = np.fromiter((places.get(d.id, -1) for d in old.registry.devices), np.int32, len(old.registry.devices))
    numbers = {it.rule.id: r for r, it in enumerate(rules)}
    rule = np.array([numbers.get(it.rule.id, -1) for it in old.plan.rules], np.int32)
    same = [r >= 0 and rules[r].key == it.key for r, it in zip(rule.tolist(), old.plan.rules, strict=True)]
    return device, rule, np.array(same, np.bool_)


def instance_now(old: Table, new: Table, device: I32, rule: I32, rules: int) -> I64:
    """Return, by old instance, the new one of the same device and rule, -1 where there is none."""
    keys = new.device.astype(np.int64) * rules + new.rule
    order = np.argsort(keys)
    d, r = device[old.device].astype(np.int64), rule[old.rule]
    wanted = np.where((d >= 0) & (r >= 0), d * rules + r, -1)
    at = np.minimum(np.searchsorted(keys, wanted, sorter=order), max(len(keys) - 1, 0))
    found = order[at] if len(keys) else np.zeros(len(wanted), np.int64)
    return np.where(keys[found] == wanted, found, -1) if len(keys) else np.full(len(wanted), -1, np.int64)


def latest_from_snapshot(content: bytes) -> tuple[str, int, I64, F64]:
    """Return (registry name, next log offset, last time, last value) of a snapshot, the arrays by series number.

    A series that never had a value has time -2**63 and value NaN.
    """
    header, arrays = load_snapshot(content)
    return header.registry, header.offset, arrays["last_t"], arrays["last_v"]
