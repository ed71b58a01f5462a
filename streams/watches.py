"""What the instances of one table remember, and how a batch moves it on: the state side of the rule kinds."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from streams.batch import Times
from streams.kernels import compiled
from streams.kinds import absence, holding
from streams.kinds.holding import (
    CLEARING,
    I32,
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

NO_ROWS: Structured = np.empty(0, OUT)


class Watch(Protocol):
    """The state of one table. `arrays` is what a snapshot keeps, rows by instance."""

    table: Table
    mutes: Mutes
    arrays: dict[str, npt.NDArray[Any]]

    def adopt(self, mine: I64, old: Watch, theirs: I64, same: Mask) -> None: ...
    def raised(self) -> Mask: ...


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

    def __init__(self, table: Table, of_series: I32) -> None:
        self.table = table
        self.mutes = no_mutes()
        self.gateways = Gateways(of_series, table.first, np.zeros(len(table.first) - 1, np.int64))
        self.life = fresh_life(table)
        self.arrays: dict[str, npt.NDArray[Any]] = {
            name: array for name, array in self.life._asdict().items() if name != "side"
        }
        memory = getattr(table.kind, "MEMORY", None)
        self._memory: Structured = np.zeros(
            0 if memory is None else len(table.rule), np.int8 if memory is None else memory
        )
        if memory is not None:
            self.arrays["memory"] = self._memory
        # How many instances one series feeds at most: bounds the verdicts of a batch.
        self._fan = int(np.diff(table.links.start).max(initial=1))

    def run(self, batch: Batch) -> Structured:
        """Move on over a batch; return rows of OUT."""
        table, verdict = self.table, np.empty(len(batch.t) * self._fan, np.int8)
        kind: Any = table.kind
        compiled(kind.judge)(batch, table.links, table.judged, table.rule, table.numbers, self._memory, verdict)
        out, rows = compiled(holding.hold)(
            batch, table.links, self.gateways, self.mutes, verdict, table.rule, table.settings, self.life,
            np.empty(64, OUT),
        )  # fmt: skip
        found: Structured = out[:rows]
        return found

    def know(self, times: Times) -> None:
        """Take the guards' values from the last values of their series."""
        links, gate = self.table.links, self.life.gate
        gate[:] = np.nan
        guards = np.flatnonzero(links.role != MAIN)
        if len(guards):
            series = np.searchsorted(links.start, guards, "right") - 1
            gate[self.table.side[links.instance[guards]], links.role[guards] - UNLESS] = times.last_v[series]

    def adopt(self, mine: I64, old: Watch, theirs: I64, same: Mask) -> None:
        """Carry state over; of a rule whose parameters changed only that it is raised, so that it can still clear."""
        assert isinstance(old, Conditions)
        before, life = old.life, self.life
        for own, former in ((life.phase, before.phase), (life.state, before.state), (self._memory, old._memory)):
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

    def raised(self) -> Mask:
        return np.asarray((self.life.phase == RAISED) | (self.life.phase == CLEARING))


class Silences:
    """Devices whose absence runs on their gateway's live time."""

    def __init__(self, table: Table, of_series: I32, of_instance: I32, times: Times) -> None:
        self.table = table
        self.mutes = no_mutes()
        self.gateways = Gateways(of_series, table.first, np.full(len(table.first) - 1, -1, np.int64))
        state = np.zeros(len(table.rule), absence.STATE)
        state["due"] = times.live[of_instance] + table.settings["timeout"][table.rule]
        state["heard"] = -1
        self.arrays: dict[str, npt.NDArray[Any]] = {"state": state}

    def run(self, batch: Batch) -> Structured:
        """Move on over a batch; return rows of OUT."""
        out, rows = compiled(absence.silence)(
            batch, self.table.links, self.gateways, self.mutes, self.table.rule, self.table.settings,
            self.arrays["state"], np.empty(64, OUT),
        )  # fmt: skip
        found: Structured = out[:rows]
        return found

    def adopt(self, mine: I64, old: Watch, theirs: I64, same: Mask) -> None:
        """Carry state over; under another time-out the silence is counted anew, and what is raised stays raised."""
        before, state = old.arrays["state"][theirs], self.arrays["state"]
        state[mine[same]] = before[same]
        for name in ("heard", "raised"):
            state[name][mine] = before[name]

    def raised(self) -> Mask:
        return np.asarray(self.arrays["state"]["raised"] == 1)


class Heartbeats:
    """Gateways whose absence runs on platform time, told by ticks; `known_ms`: when they came under watch."""

    def __init__(self, table: Table, known_ms: int) -> None:
        self.table = table
        self.mutes = no_mutes()
        state = np.zeros(len(table.rule), absence.STATE)
        state["heard"] = known_ms
        self.arrays: dict[str, npt.NDArray[Any]] = {"state": state}

    def run(self, records: absence.Watched) -> Structured:
        """Move on over records; return rows of OUT, their positions being places among the records."""
        out, rows = compiled(absence.watch)(
            records, self.table.links, self.mutes, self.table.rule, self.table.settings, self.arrays["state"],
            np.empty(64, OUT),
        )  # fmt: skip
        found: Structured = out[:rows]
        return found

    def adopt(self, mine: I64, old: Watch, theirs: I64, same: Mask) -> None:
        """Carry over when they were last heard, and what is raised."""
        self.arrays["state"][mine] = old.arrays["state"][theirs]

    def raised(self) -> Mask:
        return np.asarray(self.arrays["state"]["raised"] == 1)
