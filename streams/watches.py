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
    NEVER,
    OUT,
    RAISED,
    UNLESS,
    Batch,
    Gateways,
    Mutes,
    Structured,
)
from streams.log import I64
from streams.plan import Table

Mask = npt.NDArray[np.bool_]
NO_ROWS: Structured = np.empty(0, OUT)


class Watch(Protocol):
    """The state of one table. `arrays` is what a snapshot keeps, rows by instance."""

    table: Table
    mutes: Mutes
    arrays: dict[str, npt.NDArray[Any]]

    def adopt(self, mine: I64, old: Watch, theirs: I64, same: Mask) -> None: ...
    def raised(self) -> Mask: ...


def no_mutes(table: Table) -> Mutes:
    """Return that nothing is muted."""
    return Mutes(np.zeros(len(table.rule) + 1, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64))


def series_of_entries(table: Table) -> I64:
    """Return the series of every entry of the table's links."""
    start = table.links.start
    return np.repeat(np.arange(len(start) - 1), np.diff(start))


class Conditions:
    """Instances of a kind that judges single values."""

    def __init__(self, table: Table, of_series: I32) -> None:
        n = len(table.rule)
        self.table = table
        self.mutes = no_mutes(table)
        self.gateways = Gateways(of_series, table.first, np.zeros(len(table.first) - 1, np.int64))
        state = np.zeros(n, holding.STATE)
        state["deadline"] = NEVER
        width = int(table.settings["n"].max()) if n else 1
        self.arrays: dict[str, npt.NDArray[Any]] = {"state": state, "ring": np.zeros((n, width), np.int64)}
        # How many instances one series feeds at most: bounds the verdicts of a batch.
        own = series_of_entries(table)[table.links.role == MAIN]
        self._fan = int(np.bincount(own).max()) if len(own) else 1

    def run(self, batch: Batch) -> Structured:
        """Move on over a batch; return rows of OUT."""
        verdict = np.empty(len(batch.t) * self._fan, np.int8)
        kind: Any = self.table.kind
        compiled(kind.judge)(batch, self.table.links, self.table.judged, self.table.numbers, verdict)
        out, rows = compiled(holding.hold)(
            batch, self.table.links, self.gateways, self.mutes, verdict,
            self.table.settings, self.arrays["state"], self.arrays["ring"], np.empty(64, OUT),
        )  # fmt: skip
        found: Structured = out[:rows]
        return found

    def know(self, times: Times) -> None:
        """Take the guards' values from the last values of their series."""
        links, state = self.table.links, self.arrays["state"]
        state["gate_unless"] = state["gate_only"] = np.nan
        series = series_of_entries(self.table)
        for name, chosen in (("gate_unless", links.role == UNLESS), ("gate_only", links.role == holding.ONLY_WHILE)):
            state[name][links.instance[chosen]] = times.last_v[series[chosen]]

    def adopt(self, mine: I64, old: Watch, theirs: I64, same: Mask) -> None:
        """Carry state over; of a rule whose parameters changed only that it is raised, so that it can still clear."""
        before, state = old.arrays["state"][theirs], self.arrays["state"]
        state[mine[same]] = before[same]
        width = min(self.arrays["ring"].shape[1], old.arrays["ring"].shape[1])
        self.arrays["ring"][mine[same], :width] = old.arrays["ring"][theirs[same], :width]
        raised = ~same & np.isin(before["phase"], (RAISED, CLEARING))
        state["phase"][mine[raised]] = RAISED
        for name in ("since", "value"):
            state[name][mine[raised]] = before[name][raised]

    def raised(self) -> Mask:
        return np.isin(self.arrays["state"]["phase"], (RAISED, CLEARING))


class Silences:
    """Devices whose absence runs on their gateway's live time."""

    def __init__(self, table: Table, of_series: I32, of_instance: I32, times: Times) -> None:
        self.table = table
        self.mutes = no_mutes(table)
        self.gateways = Gateways(of_series, table.first, np.full(len(table.first) - 1, -1, np.int64))
        state = np.zeros(len(table.rule), absence.STATE)
        state["due"] = times.live[of_instance] + table.settings["timeout"]
        state["heard"] = -1
        self.arrays: dict[str, npt.NDArray[Any]] = {"state": state}

    def run(self, batch: Batch) -> Structured:
        """Move on over a batch; return rows of OUT."""
        out, rows = compiled(absence.silence)(
            batch, self.table.links, self.gateways, self.mutes,
            self.table.settings, self.arrays["state"], np.empty(64, OUT),
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
        self.mutes = no_mutes(table)
        state = np.zeros(len(table.rule), absence.STATE)
        state["heard"] = known_ms
        self.arrays: dict[str, npt.NDArray[Any]] = {"state": state}

    def run(self, records: absence.Watched) -> Structured:
        """Move on over records; return rows of OUT, their positions being places among the records."""
        out, rows = compiled(absence.watch)(
            records, self.table.links, self.mutes, self.table.settings, self.arrays["state"], np.empty(64, OUT)
        )
        found: Structured = out[:rows]
        return found

    def adopt(self, mine: I64, old: Watch, theirs: I64, same: Mask) -> None:
        """Carry over when they were last heard, and what is raised."""
        self.arrays["state"][mine] = old.arrays["state"][theirs]

    def raised(self) -> Mask:
        return np.asarray(self.arrays["state"]["raised"] == 1)
