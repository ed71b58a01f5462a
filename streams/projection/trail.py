"""A shard's log from an offset on, read from the history where retention has taken it from the log."""

from __future__ import annotations

import duckdb
import pyarrow as pa

from citybrain.counters import Counters
from citybrain.errors import CityBrainError, Damaged
from citybrain.layout import Layout
from citybrain.segments import Record
from streams.history import frames
from streams.history.manifest import Part, history_folder, read_manifest
from streams.history.query import report_damage
from streams.logs import LogStore

PIECE = 2000  # records told again at a time: a part is opened for each, so that none is held while it is merged away


class Trail:
    """Reads like a `streams.logs.LogReader`. `offset` is what comes next, whether it is still to be had or not."""

    def __init__(self, layout: Layout, logs: LogStore, shard: int, offset: int, counters: Counters) -> None:
        self.offset = offset
        self._layout, self._shard, self._counters = layout, shard, counters
        self._log = logs.reader("log", shard, offset)
        self._ahead: list[Record] = []  # of the log, while what is before them comes from the history

    def read(self, most_bytes: int) -> list[Record]:
        """Return the next committed records, [] where there are none; offsets that nobody has any more are skipped.

        Raises Damaged and Unavailable of the log; what of the history cannot be read is counted and skipped.
        """
        if not self._ahead:
            self._ahead = self._log.read(most_bytes)
        while self._ahead and self.offset < self._ahead[0].offset:
            if found := self._told_again(self._ahead[0].offset):
                return found
        taken, self._ahead = self._ahead, []
        if taken:
            self.offset = taken[-1].offset + 1
        return taken

    def parts(self) -> tuple[Part, ...]:
        """Return the parts of the history, none where it cannot be read (which is counted)."""
        try:
            return read_manifest(history_folder(self._layout, self._shard)).parts
        except Damaged as error:
            self._counters.add("errors_total", stage="history")
            self._counters.warn(f"shard {self._shard}: {error}")
            return ()

    def _told_again(self, behind: int) -> list[Record]:
        """Return some records of the history before `behind`, and go on behind them, or behind what it has not."""
        part = next((part for part in self.parts() if part.next > self.offset), None)
        if part is None or part.first >= behind:
            self.offset = behind
            return []
        first = max(part.first, self.offset)
        self.offset = until = min(first + PIECE, part.next, behind)
        try:
            return list(frames(self._layout, self._shard, first, until))
        except (CityBrainError, OSError, pa.ArrowException, duckdb.Error) as error:
            self._counters.add("errors_total", stage="history")
            self._counters.warn(f"shard {self._shard}: history of offsets {first}..{until - 1}: {error}")
            report_damage(self._layout, self._shard, part.values_file)
            return []
