"""One shard's log on its way into the server: read, render, write, mark.

The mark moves only when the server has taken, or refused value by value, everything before it; so after any crash some
points are written again, which changes nothing: a point's key is its device, metric and time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np

from citybrain.clock import monotonic_s
from citybrain.counters import Counters
from citybrain.errors import CityBrainError, ConfigError, Damaged
from citybrain.layout import Layout
from citybrain.segments import Record
from citybrain.storage import OS_FILES, Files
from streams.history.build import open_frame, registry_of
from streams.log import Kind
from streams.logs import LogStore
from streams.projection.lines import Lines, Values, joined
from streams.projection.server import Server
from streams.projection.trail import Trail
from streams.registry import Index, decode_registry

FRAME, CONTROL = int(Kind.FRAME), int(Kind.CONTROL)
POINT_BYTES = 100  # in the log: four values of 20 bytes, and a share of heads
LEAST_READ, MOST_READ = 64 * 1024, 8 * 1024 * 1024


class Mark(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far a server has a shard: everything before `offset`, after which `registry` was in force."""

    target: str
    offset: int = 0
    registry: str = ""
    version: int = 1


def mark_path(layout: Layout, shard: int) -> Path:
    """Return where a shard's mark stands."""
    return layout.root / "influx" / f"{shard}.json"


def read_mark(path: Path, target: str) -> Mark:
    """Return the mark, one at the log's beginning where there is none; raises Damaged, ConfigError."""
    if not path.exists():
        return Mark(target)
    try:
        mark = msgspec.json.decode(OS_FILES.read(path), type=Mark)
    except msgspec.DecodeError as error:
        raise Damaged(str(path), 0, f"{error}; remove it, and everything in the log is written again") from None
    if mark.version != 1:
        raise Damaged(str(path), 0, f"version {mark.version}: written by a later version of this program")
    if mark.target != target:
        what = f"it belongs to {mark.target}, not to {target}; remove it to write all that the log has to the new one"
        raise ConfigError(str(path), what)
    return mark


class Follower:
    """One shard: `fetch` reads what is next, `send` writes a batch of it. Neither waits for anybody."""

    def __init__(
        self,
        layout: Layout,
        logs: LogStore,
        shard: int,
        server: Server,
        counters: Counters,
        load: Callable[[str], Lines],
        files: Files = OS_FILES,
    ) -> None:
        self.shard = shard
        self.waits_since: int | None = None  # arrival (Unix ms) of the oldest record that the server does not have
        self.mark = read_mark(mark_path(layout, shard), server.target.name)
        self._layout, self._server, self._counters, self._files = layout, server, counters, files
        self._load = load
        self._lines: Lines | None = None
        self._logs = logs
        self._trail = Trail(layout, logs, shard, self.mark.offset, counters)
        self._marks: deque[tuple[float, Mark]] = deque([(monotonic_s(), self.mark)])  # since when each one held
        self._read_bytes = min(max(server.target.batch * POINT_BYTES, LEAST_READ), MOST_READ)
        self._todo: list[tuple[Lines, Values]] = []  # the next last
        self._next = self.mark
        if self.mark.registry:
            self._lines = load(self.mark.registry)

    # --- the log ----------------------------------------------------------------------------------------------------

    def fetch(self) -> bool:
        """Read what is next, unless something is being written; return whether something is to be written.

        Raises StorageError where the log cannot be read.
        """
        if self._next is not self.mark:
            return True
        records = self._trail.read(self._read_bytes)
        if not records:
            return False
        self.waits_since = records[0].received_at
        self._counters.add("received_total", len(records))
        pieces: list[tuple[Lines, Values]] = []
        expected = self.mark.offset
        frames: list[Values] = []
        for record in records:
            if record.offset != expected:
                self._cut(pieces, frames)
                self._missing(expected, record.offset)
            expected = record.offset + 1
            if record.kind == FRAME:
                frames += self._frame(record)
            elif record.kind == CONTROL and (name := registry_of(record.payload)):
                self._cut(pieces, frames)
                self._adopt(name, f"offset {record.offset}")
        self._cut(pieces, frames)
        self._todo = pieces[::-1]
        self._next = Mark(self._server.target.name, expected, self._lines.index.name if self._lines else "")
        return True

    def _cut(self, pieces: list[tuple[Lines, Values]], frames: list[Values]) -> None:
        """Make batches of the frames so far."""
        if frames and self._lines is not None:
            lines = self._lines
            pieces += [(lines, piece) for piece in lines.batches(joined(frames), self._server.target.batch)]
        frames.clear()

    def _frame(self, record: Record) -> Sequence[Values]:
        """Return a frame's values as one element, none where it has none that can be used."""
        opened = open_frame(record.payload, self._lines.index if self._lines else None)
        if opened is None:
            reason = "malformed" if self._lines else "inactive"
            self._counters.drop(reason)
            self._warn(f"offset {record.offset}: {'no frame' if self._lines else 'no registry is known here'}")
            return ()
        at, value, series = opened[1]
        finite = np.isfinite(value)
        if not finite.all():  # line protocol has no way to say it
            self._counters.drop("not_a_number", int((~finite).sum()))
            at, value, series = at[finite], value[finite], series[finite]
        return (Values(at, value, series, np.full(len(at), record.offset, np.int64)),) if len(at) else ()

    def _adopt(self, name: str, where: str) -> None:
        """Go over to a registry; one that cannot be had leaves frames unread, and says so."""
        try:
            self._lines = self._load(name)
        except CityBrainError as error:
            self._lines = None
            self._counters.add("errors_total", stage="registry")
            self._warn(f"{where}: registry {name[:12]}: {error}")

    def _missing(self, expected: int, found: int) -> None:
        """Records were removed before the server had them; which registry holds behind them only the history knows."""
        self._counters.add("missing_total", found - expected)
        self._warn(f"offsets {expected}..{found - 1} are no longer in the log; their values are not in the server")
        self._lines = None
        for part in self._trail.parts():
            if part.first == found and part.registry:
                self._adopt(part.registry, f"offset {found}")
            elif part.first < found < part.next and len(part.registries) == 1:
                self._adopt(part.registries[0], f"offset {found}")

    def _warn(self, text: str) -> None:
        self._counters.warn(f"shard {self.shard}: {text}")

    # --- the server -------------------------------------------------------------------------------------------------

    def send(self) -> bool:
        """Write one batch of what was read, and mark when all is written; return False where the server is to be waited
        for.

        Raises StorageError where the mark cannot be written: then it is tried again.
        """
        if self._todo and not self._write(*self._todo[-1]):
            return False
        if not self._todo and self._next is not self.mark:
            path = mark_path(self._layout, self.shard)
            self._files.make(path.parent)
            self._files.replace(path, msgspec.json.encode(self._next))
            self.mark, self.waits_since = self._next, None
            self._remember()
        return True

    def _remember(self) -> None:
        """Keep the marks of the last while that the server was there, and the one before."""
        since_s = self._server.there_s - self._server.target.again / 1000
        self._marks.append((monotonic_s(), self.mark))
        while len(self._marks) > 1 and self._marks[1][0] < since_s:
            self._marks.popleft()

    def rewind(self, since_s: float) -> None:
        """Write again what was written after `since_s` (monotonic): a crashed server may have lost what it took."""
        while len(self._marks) > 1 and self._marks[1][0] <= since_s:
            self._marks.popleft()
        mark = self._marks[0][1]
        self._counters.add("rewritten_total", self.mark.offset - mark.offset)
        self.mark = self._next = mark
        self._todo, self.waits_since = [], None
        self._lines = self._load(mark.registry) if mark.registry else None
        self._trail = Trail(self._layout, self._logs, self.shard, mark.offset, self._counters)
        self._marks = deque([(monotonic_s(), mark)])

    def _write(self, lines: Lines, values: Values) -> bool:
        body, points = lines.render(values)
        answer = self._server.write(body)
        if answer.what == "wait":
            self._counters.add("errors_total", stage="influx")
            self._counters.warn(answer.text)
            return False
        self._todo.pop()
        if answer.what == "written":
            self._counters.add("sent_total", points)
            self._counters.add("values_total", len(values.at))
        elif len(values.at) > 1:  # look for what it does not take; the rest is taken
            self._todo += [(lines, half) for half in reversed(values.halves())]
        else:
            device, metric = lines.series(int(values.series[0]))
            self._counters.drop("refused")
            self._warn(f"offset {int(values.offset[0])}: {device} {metric} refused: {answer.text}")
        return True


def loader(layout: Layout) -> Callable[[str], Lines]:
    """Return a function that gives the lines of a registry by its hash; the last few are remembered."""
    known: dict[str, Lines] = {}

    def load(name: str) -> Lines:
        if name not in known:
            while len(known) >= 4:
                known.pop(next(iter(known)))
            known[name] = Lines(Index(decode_registry(layout.get_blob(name)), name))
        return known[name]

    return load
