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
from streams.plan import (
    Plan,
    Table,
    add_override,
    compile_mutes,
    compile_plan,
    compile_rules,
    rows_in_force,
    unusual,
)
from streams.registry import METRIC_NAMES, Index, decode_registry
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
    order: int
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
        self.ticked_ms = 0  # platform time as the log tells it: overrides of rules end by it
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
                if record.kind == TICK:
                    tick = self._tick(record)
                    if tick is None:
                        continue
                    if self._ends(tick):
                        found += self._run(waiting)
                        self._end_overrides()
                        waiting, size = [], 0
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
            if record.kind == TICK:
                tick = decode_tick(record.payload)
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
                yield Cause(int(of_frame[frame]), position, *self._owner(watch.table, row["instance"]), watch, row)

    def _watch(self, watched: Watched) -> Iterator[Cause]:
        """Run what looks at whole records: gateways that fall silent and come back."""
        watch = self.watches.get(PLATFORM)
        if not isinstance(watch, Heartbeats):
            return
        for row in watch.run(watched):
            yield Cause(int(row["position"]), -1, *self._owner(watch.table, row["instance"]), watch, row)

    def _owner(self, table: Table, instance: int) -> tuple[int, int, int]:
        """Return an instance's device, its rule's place in the rule set, and the row it runs with."""
        assert self.plan is not None
        rule = int(table.rule[instance])
        return int(table.device[instance]), int(self.plan.orders[rule]), rule

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
            if self.index is not None and not len(self.index.under(control.subject)):
                where = f"log {self.shard} offset {record.offset}"
                self.warnings.append(
                    f"{where}: an override of {control.subject!r}: no such device or area; it mutes nobody"
                )
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
            concerns = override.rule in ("*", control.rule) and self._means(override.subject, control.subject)
            if concerns and override.from_ms <= control.at < override.until_ms:
                return []
        evidence = Evidence("", None, None, control.at, self.faults[control.rule, control.subject])
        where = (self.shard, record.offset, 0, control.rule, control.subject)
        return [Transition(*where, Edge.RAISE, control.at, record.received_at, evidence, self.ruleset)]

    def _means(self, subject: str, device: str) -> bool:
        """Return whether an override's subject is a device or an area the device is in."""
        number = self.index.device_index.get(device, -1) if self.index is not None else -1
        return subject == device or (self.index is not None and number in self.index.under(subject))

    def _ends(self, tick: Tick) -> bool:
        """Move platform time on; return whether an override of a rule ends with it."""
        before, self.ticked_ms = self.ticked_ms, max(self.ticked_ms, tick.at)
        variants = self.plan.variants if self.plan is not None else ()
        return any(before < variant.until_ms <= self.ticked_ms for variant in variants)

    def _end_overrides(self) -> None:
        """Go over to the parameters that hold now; what is raised stays raised and clears by its new limits."""
        assert self.plan is not None
        assert self.index is not None
        keys = key_numbers(self.plan)
        for watch in self.watches.values():
            table = watch.table
            now = rows_in_force(self.plan, table, self.index, self.ticked_ms)
            changed = np.flatnonzero(keys[now] != keys[table.rule])
            table.rule[:] = now
            watch.change(changed, self.times)

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
        self._wonder(record)
        return self._gone(gone, at_ms, record)

    def _wonder(self, record: Record) -> None:
        """Say what is probably not meant: a rule that selects nothing or everything, an override that is over."""
        if self.index is not None and self.ruleset:
            ruleset = decode_ruleset(self.layout.get_blob(self.ruleset))
            for rule, field, what in unusual(ruleset, self.index, self.ticked_ms):
                self.warnings.append(f"log {self.shard} offset {record.offset}: rule {rule} {field}: {what}")

    def _compile(self, registry: str, ruleset: str) -> tuple[Index | None, Plan | None]:
        if not registry:
            if ruleset:
                compile_rules(decode_ruleset(self.layout.get_blob(ruleset)))
            return None, None
        index = self.index if registry == self.registry else None
        index = index or Index(decode_registry(self.layout.get_blob(registry)), registry)
        if not ruleset:
            return index, None
        return index, compile_plan(decode_ruleset(self.layout.get_blob(ruleset)), index, self.shard, self.ticked_ms)

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
            ticked_ms=self.ticked_ms,
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
        self.ticked_ms = header.ticked_ms
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
    olds, news = shared_series(before, index)
    fresh.last_t[news], fresh.last_v[news] = times.last_t[olds], times.last_v[olds]
    return fresh


def shared_series(before: Index, after: Index) -> tuple[I64, I64]:
    """Return the numbers of the series that both have, (device, metric) by (device, metric)."""
    places, count = before.device_index, len(after.devices)
    device = np.fromiter((places.get(d.id, -1) for d in after.devices), np.int64, count)[after.series_device]
    metrics = len(METRIC_NAMES)
    keys = before.series_device.astype(np.int64) * metrics + before.series_metric
    wanted = np.where(device >= 0, device * metrics + after.series_metric, -1)
    if not len(keys):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    sorter = np.argsort(keys)
    found = sorter[np.minimum(np.searchsorted(keys, wanted, sorter=sorter), len(keys) - 1)]
    new = np.flatnonzero(keys[found] == wanted)
    return found[new], new


class Gone(NamedTuple):
    """What was raised and exists no longer; they sort as transitions do."""

    device: int
    order: int
    rule: str
    subject: str


def carry_over(old: InForce, new: InForce) -> list[Gone]:
    """Carry state over by table, rule id and subject; return what was raised and is gone."""
    if old.registry is None or old.plan is None:
        return []
    gone: list[Gone] = []
    for name, watch in old.watches.items():
        table, kept = watch.table, np.zeros(len(watch.table.rule), np.bool_)
        if name in new.watches and new.plan is not None and new.registry is not None:
            adopting = new.watches[name]
            now = instances_now(old, table, new, adopting.table)
            kept = now >= 0
            theirs, mine = np.flatnonzero(kept), now[kept]
            known: dict[bytes, int] = {}
            before, after = key_numbers(old.plan, known), key_numbers(new.plan, known)
            same = before[table.rule[theirs]] == after[adopting.table.rule[mine]]
            adopting.adopt(mine, watch, theirs, same)
        for j in np.flatnonzero(watch.raised() & ~kept).tolist():
            device, rule = int(table.device[j]), old.plan.rules[table.rule[j]]
            gone.append(Gone(device, rule.order, rule.rule.id, old.registry.devices[device].id))
    return gone


def key_numbers(plan: Plan, known: dict[bytes, int] | None = None) -> I64:
    """Return, by row, a number that is equal where the condition is; `known`: the numbers given so far."""
    known = {} if known is None else known
    return np.array([known.setdefault(it.key, len(known)) for it in plan.rules], np.int64)


def instances_now(old: InForce, before: Table, new: InForce, after: Table) -> I64:
    """Return, by old instance, the new one of the same device and rule, -1 where there is none."""
    assert old.registry is not None
    assert old.plan is not None
    assert new.registry is not None
    assert new.plan is not None
    places, rules = new.registry.device_index, {it.rule.id: it.order for it in new.plan.rules}
    device = np.fromiter((places.get(d.id, -1) for d in old.registry.devices), np.int64, len(old.registry.devices))
    order = np.array([rules.get(it.rule.id, -1) for it in old.plan.rules], np.int64)
    d, r = device[before.device], order[before.rule]
    wanted = np.where((d >= 0) & (r >= 0), d * len(new.plan.rules) + r, -1)
    keys = after.device.astype(np.int64) * len(new.plan.rules) + new.plan.orders[after.rule]
    sorter = np.argsort(keys)
    if not len(keys):
        return np.full(len(wanted), -1, np.int64)
    found = sorter[np.minimum(np.searchsorted(keys, wanted, sorter=sorter), len(keys) - 1)]
    return np.where(keys[found] == wanted, found, -1)


def latest_from_snapshot(content: bytes) -> tuple[str, int, I64, F64]:
    """Return (registry name, next log offset, last time, last value) of a snapshot, the arrays by series number.

    A series that never had a value has time -2**63 and value NaN.
    """
    header, arrays = load_snapshot(content)
    return header.registry, header.offset, arrays["last_t"], arrays["last_v"]
