"""The engine of one shard: log records in, transitions out. It alone decides what a rule set makes of a log.

Nothing but the records moves it, so the same log gives the same transitions bit for bit, whatever the batches, and a
snapshot goes on where it was taken. docs/rules.md says what every kind does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from citybrain.errors import ConfigError
from citybrain.layout import Layout
from citybrain.model import Edge, Evidence, Transition
from citybrain.segments import Record
from streams.batch import FOREIGN, LATE, READINGS, USED, Frames, Times, lay, take_batch
from streams.causes import Causes, causes_of, in_order, transitions
from streams.handover import Gone, InForce, carry_over, carry_times, key_numbers
from streams.kinds.absence import Watched
from streams.kinds.holding import I32
from streams.log import F64, I64, Control, Kind, Tick, decode_control, decode_tick
from streams.plan import (
    Plan,
    add_override,
    compile_mutes,
    compile_plan,
    compile_rules,
    rows_in_force,
    spread,
    unusual,
)
from streams.registry import Index, decode_registry
from streams.ruleset import decode_ruleset
from streams.snapshot import Frozen, Header, Stored, load_snapshot, save_snapshot
from streams.watches import Conditions, Heartbeats, Silences, Watch

BATCH_VALUES = 65_536  # what a batch holds stays in the cache from kernel to kernel; never decides a result
PLATFORM = "absence_platform"
FRAME, TICK, CONTROL = int(Kind.FRAME), int(Kind.TICK), int(Kind.CONTROL)  # once a record: an enum is slow to compare
ANY = 2**32  # before a rule set is in force a frame may be of any gateway


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
        parts = [*self._judge(laid, of_frame), *self._watch(watched)]
        if not parts or self.plan is None or self.index is None:
            return []
        return transitions(self.shard, self.ruleset, self.plan, self.index, records, in_order(parts))

    def _tick(self, record: Record) -> Tick | None:
        try:
            return decode_tick(record.payload)
        except msgspec.DecodeError:
            self._malformed(record, "tick")
            return None

    def _malformed(self, record: Record, what: str) -> None:
        self.counts["malformed"] += 1
        self.warnings.append(f"log {self.shard} offset {record.offset}: not a {what} record; skipped")

    def _judge(self, laid: Frames, of_frame: I64) -> Iterator[Causes]:
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
            if isinstance(watch, (Conditions, Silences)) and len(rows := watch.run(batch)):
                frame = np.searchsorted(laid.start, rows["position"], "right") - 1
                position = rows["position"] - laid.start[frame]
                yield causes_of(self.plan, watch.table, rows, of_frame[frame], position)

    def _watch(self, watched: Watched) -> Iterator[Causes]:
        """Run what looks at whole records: gateways that fall silent and come back."""
        watch = self.watches.get(PLATFORM)
        if self.plan is not None and isinstance(watch, Heartbeats) and len(rows := watch.run(watched)):
            yield causes_of(self.plan, watch.table, rows, rows["position"], np.full(len(rows), -1, np.int64))

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
            alike: dict[tuple[str, str], list[str]] = {}
            for rule, field, what in unusual(ruleset, self.index, self.ticked_ms):
                alike.setdefault((field, what), []).append(rule)
            for (field, what), rules in alike.items():
                where = f"log {self.shard} offset {record.offset}: rule {', '.join(rules)}"
                self.warnings.append(f"{where} {field}: {what}")

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
            muted = spread(self.overrides, self.plan, self.index)
            for watch in self.watches.values():
                watch.mutes = compile_mutes(muted, watch.table, self.plan)

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


def latest_from_snapshot(content: bytes) -> tuple[str, int, I64, F64]:
    """Return (registry name, next log offset, last time, last value) of a snapshot, the arrays by series number.

    A series that never had a value has time -2**63 and value NaN.
    """
    header, arrays = load_snapshot(content)
    return header.registry, header.offset, arrays["last_t"], arrays["last_v"]
