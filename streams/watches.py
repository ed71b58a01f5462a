"""What the instances of one table remember, and how a batch moves it on: the state side of the rule kinds."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from streams.batch import UNKNOWN, Times
from streams.kernels import compiled
from streams.kinds import absence, holding
from streams.kinds.holding import (
    CLEARING,
    I32,
    IDLE,
    MAIN,
    OUT,
    RAISED,
    UNLESS,
    Batch,
    Gateways,
    Life,
    Links,
    Mutes,
    Structured,
)
from streams.log import I64
from streams.plan import Table
from streams.registry import Mask
from streams.snapshot import Stored

NO_ROWS: Structured = np.empty(0, OUT)


class Watch(Protocol):
    """The state of one table. `freeze` copies what a snapshot keeps; `thaw` takes it back, or raises StorageError."""

    table: Table
    mutes: Mutes

    def freeze(self) -> dict[str, npt.NDArray[Any]]: ...
    def thaw(self, stored: Stored) -> None: ...
    def adopt(self, mine: I64, old: Watch, theirs: I64, same: Mask) -> None: ...
    def raised(self) -> Mask: ...
    def change(self, instances: I64, times: Times) -> None: ...


def no_mutes() -> Mutes:
    """Return that nothing is muted."""
    return Mutes(np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, np.int64))


def series_of_entries(links: Links) -> I64:
    """Return the series of every entry of the links."""
    return np.repeat(np.arange(len(links.start) - 1), np.diff(links.start))


def fresh_life(table: Table) -> Life:
    """Return that nothing holds and nothing is known."""
    beside = int(table.side.max()) + 1 if len(table.side) else 0
    width = int(table.settings["n"].max(initial=1)) if beside else 1
    return Life(
        np.zeros(len(table.rule), np.int8),
        np.zeros(len(table.rule), holding.STATE),
        table.side,
        np.full((beside, 2), np.nan),
        np.zeros((beside, width), np.int64),
        np.zeros(beside, np.int8),
    )


class Conditions:
    """Instances of a kind that judges single values."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self.mutes = no_mutes()
        self.gateways = Gateways(table.first, np.zeros(len(table.first) - 1, np.int64))
        self.life = fresh_life(table)
        remembers = getattr(table.kind, "MEMORY", None)
        self.memory: Structured = np.zeros(0 if remembers is None else len(table.rule), remembers or np.int8)
        self._blank: Mask = np.ones(len(self.memory), np.bool_)  # instances that remember nothing yet
        # How many instances one series feeds at most: bounds the verdicts of a batch.
        self._fan = int(np.diff(table.links.start).max(initial=1))

    def run(self, batch: Batch) -> Structured:
        """Move on over a batch; return rows of OUT."""
        if not len(self.table.rule):
            return NO_ROWS
        table, verdict = self.table, np.empty(len(batch.t) * self._fan, np.int8)
        kind: Any = table.kind
        compiled(kind.judge)(batch, table.links, table.judged, table.rule, table.numbers, self.memory, verdict)
        out, rows = compiled(holding.hold)(
            batch, table.links, self.gateways, self.mutes, verdict, table.rule, table.settings, self.life,
            np.empty(64, OUT),
        )  # fmt: skip
        found: Structured = out[:rows]
        return found

    def freeze(self) -> dict[str, npt.NDArray[Any]]:
        """Copy what is remembered; of an idle instance that is its phase alone, and the guards are `know`n again.

        Where many are not idle all are copied, because picking costs more: the stream waits for this.
        """
        life = self.life
        parts: dict[str, npt.NDArray[Any]] = {
            "phase": life.phase,
            "ring": life.ring,
            "seen": life.seen,
            "memory": self.memory,
        }
        few = np.count_nonzero(life.phase) * 8 < len(life.phase)
        state = life.state[np.flatnonzero(life.phase)] if few else life.state.copy()
        return {name: array.copy() for name, array in parts.items()} | {"picked" if few else "state": state}

    def thaw(self, stored: Stored) -> None:
        life = self.life
        for name, own in (("phase", life.phase), ("ring", life.ring), ("seen", life.seen), ("memory", self.memory)):
            own[...] = stored.array(name, own.dtype, own.shape)
        active = np.flatnonzero(life.phase) if stored.has("picked") else slice(None)
        kept = life.state[active]
        life.state[active] = stored.array("picked" if stored.has("picked") else "state", kept.dtype, kept.shape)

    def know(self, times: Times) -> None:
        """Take the guards' values from the last values of their series, and begin new memories with them."""
        self._recall(times)
        links, gate = self.table.links, self.life.gate
        gate[:] = np.nan
        guards = np.flatnonzero(links.role != MAIN)
        if len(guards):
            series = np.searchsorted(links.start, guards, "right") - 1
            gate[self.table.side[links.instance[guards]], links.role[guards] - UNLESS] = times.last_v[series]

    def _recall(self, times: Times) -> None:
        """Let instances that remember nothing see the last values of their series; no verdict comes of it."""
        table, blank = self.table, self._blank
        self._blank = np.zeros(len(blank), np.bool_)
        series = np.flatnonzero(times.last_t != UNKNOWN).astype(np.uint32) if blank.any() else np.zeros(0, np.uint32)
        if not len(series):
            return
        kind: Any = table.kind
        zeros, t = np.zeros(len(series), np.int64), times.last_t[series]
        ones = np.ones(len(series), np.int8)
        batch = Batch(zeros.astype(np.int32), t, times.last_v[series], series, ones, zeros, zeros)
        seen, verdict = np.zeros_like(self.memory), np.empty(len(series) * self._fan, np.int8)
        compiled(kind.judge)(batch, table.links, table.judged, table.rule, table.numbers, seen, verdict)
        self.memory[blank] = seen[blank]

    def adopt(self, mine: I64, old: Watch, theirs: I64, same: Mask) -> None:
        """Carry state over; of a rule whose parameters changed only that it is raised, so that it can still clear."""
        assert isinstance(old, Conditions)
        before, life = old.life, self.life
        for own, former in ((life.phase, before.phase), (life.state, before.state), (self.memory, old.memory)):
            if len(own):
                own[mine[same]] = former[theirs[same]]
        if len(life.side) and len(before.side):
            self._adopt_side(life.side[mine[same]], before, before.side[theirs[same]])
        phase = before.phase[theirs]
        raised = ~same & ((phase == RAISED) | (phase == CLEARING))
        life.phase[mine[raised]] = RAISED
        life.state[mine[raised]] = before.state[theirs[raised]]

    def _adopt_side(self, mine: I32, before: Life, theirs: I32) -> None:
        both = (mine >= 0) & (theirs >= 0)
        width = min(self.life.ring.shape[1], before.ring.shape[1])
        self.life.ring[mine[both], :width] = before.ring[theirs[both], :width]
        self.life.seen[mine[both]] = before.seen[theirs[both]]

    def change(self, instances: I64, times: Times) -> None:
        """Begin anew with instances whose parameters changed; what is raised stays raised."""
        life = self.life
        phase = life.phase[instances]
        life.phase[instances] = np.where((phase == RAISED) | (phase == CLEARING), RAISED, IDLE)
        if len(self.memory):
            self.memory[instances] = np.zeros(1, self.memory.dtype)
            self._blank[instances] = True
            self._recall(times)
        if len(life.side):
            side = life.side[instances]
            life.seen[side[side >= 0]] = 0

    def raised(self) -> Mask:
        return np.asarray((self.life.phase == RAISED) | (self.life.phase == CLEARING))


class Silences:
    """Devices whose absence runs on their gateway's live time."""

    def __init__(self, table: Table, of_instance: I32, times: Times) -> None:
        self.table = table
        self.mutes = no_mutes()
        self.gateways = Gateways(table.first, np.full(len(table.first) - 1, -1, np.int64))
        self._of_instance = of_instance
        state = np.zeros(len(table.rule), absence.STATE)
        state["due"] = times.live[of_instance] + table.settings["timeout"][table.rule]
        state["heard"] = -1
        self.state: Structured = state

    def run(self, batch: Batch) -> Structured:
        """Move on over a batch; return rows of OUT."""
        if not len(self.table.rule):
            return NO_ROWS
        out, rows = compiled(absence.silence)(
            batch, self.table.links, self.gateways, self.mutes, self.table.rule, self.table.settings,
            self.state, np.empty(64, OUT),
        )  # fmt: skip
        found: Structured = out[:rows]
        return found

    def freeze(self) -> dict[str, npt.NDArray[Any]]:
        return {"state": self.state.copy()}

    def thaw(self, stored: Stored) -> None:
        self.state[...] = stored.array("state", self.state.dtype, self.state.shape)

    def adopt(self, mine: I64, old: Watch, theirs: I64, same: Mask) -> None:
        """Carry state over; under another time-out the silence is counted anew, and what is raised stays raised."""
        assert isinstance(old, Silences)
        before, state = old.state[theirs], self.state
        state[mine[same]] = before[same]
        for name in ("heard", "raised"):
            state[name][mine] = before[name]

    def change(self, instances: I64, times: Times) -> None:
        """Count the silence anew where the time-out changed; what is raised stays raised."""
        timeout = self.table.settings["timeout"][self.table.rule[instances]]
        self.state["due"][instances] = times.live[self._of_instance[instances]] + timeout
        self.gateways.due[:] = -1

    def raised(self) -> Mask:
        return np.asarray(self.state["raised"] == 1)


class Heartbeats:
    """Gateways whose absence runs on platform time, told by ticks; `known_ms`: when they came under watch."""

    def __init__(self, table: Table, known_ms: int) -> None:
        self.table = table
        self.mutes = no_mutes()
        state = np.zeros(len(table.rule), absence.STATE)
        state["heard"] = known_ms
        self.state: Structured = state

    def run(self, records: absence.Watched) -> Structured:
        """Move on over records; return rows of OUT, their positions being places among the records."""
        out, rows = compiled(absence.watch)(
            records, self.table.links, self.mutes, self.table.rule, self.table.settings, self.state,
            np.empty(64, OUT),
        )  # fmt: skip
        found: Structured = out[:rows]
        return found

    def freeze(self) -> dict[str, npt.NDArray[Any]]:
        return {"state": self.state.copy()}

    def thaw(self, stored: Stored) -> None:
        self.state[...] = stored.array("state", self.state.dtype, self.state.shape)

    def adopt(self, mine: I64, old: Watch, theirs: I64, same: Mask) -> None:
        """Carry over when they were last heard, and what is raised."""
        assert isinstance(old, Heartbeats)
        self.state[mine] = old.state[theirs]

    def change(self, instances: I64, times: Times) -> None:
        """Do nothing: when they were last heard is all there is."""

    def raised(self) -> Mask:
        return np.asarray(self.state["raised"] == 1)
