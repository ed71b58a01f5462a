"""What the gateway writes for people: one line on stderr an event, with the priority that systemd's journal reads.

And how it is: a heartbeat and the last value of each point, once a second, in memory where systemd gives a folder there
(`RuntimeDirectory=`). A card would wear by them: each is a rename, which ext4 brings to the disk at once. There the
counters are kept every ten minutes, and at the end.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from pathlib import Path

import msgspec

from citybrain.clock import iso, monotonic_s, real_unix_ms
from citybrain.counters import Counters, Heartbeat, read_heartbeats
from citybrain.errors import UsageError
from citybrain.storage import replace_unsynced

PROCESS = "gateway"
LIVE = "live"  # in `DIR/run`: the link to the folder in memory
KEEP_EVERY_S = 600.0
LEVELS = {"error": 3, "warning": 4, "info": 6, "debug": 7}  # syslog's priorities, sd-daemon(3)


class JournalCounters(Counters):
    """Counters whose warnings are also log lines; a warning that repeats the one before it is not written again.

    live: where heartbeat and points are written, `folder` unless systemd gave one in memory.
    """

    def __init__(self, process: str, folder: Path | None = None) -> None:
        self.live = live_folder(folder) if folder is not None else None
        super().__init__(process, self.live)
        self._kept = folder / f"{process}.heartbeat.json" if folder is not None and self.live != folder else None
        self._kept_s = monotonic_s()
        self._warned_ms: list[int] = []  # when, of each of `warnings`
        self.level = "info"
        self._journald = "JOURNAL_STREAM" in os.environ  # it adds the time itself
        edge = logging.getLogger("edge")
        edge.handlers[:] = [_Lines(self)]
        edge.setLevel(logging.DEBUG)
        edge.propagate = False

    def set_level(self, level: str) -> None:
        """Say how much is written from now on; raises UsageError."""
        if level not in LEVELS:
            raise UsageError(f"level {level[:40]!r}: expected one of {', '.join(LEVELS)}")
        self.level = level

    def warn(self, text: str) -> None:
        """Keep a warning, and write it, on one line: it may quote what came from outside."""
        text = _printable(text)
        if self.warnings[-1:] != [text]:
            self.say(text, "warning")
            self._warned_ms.append(real_unix_ms())
        super().warn(text)
        del self._warned_ms[: -len(self.warnings)]
        self.details["warned_at"] = self._warned_ms

    def resume(self) -> Heartbeat | None:
        """Go on counting from the last heartbeat; from the one on the card where the power was away since."""
        last = super().resume()
        if last is None and self._kept is not None and self._kept.exists():
            with contextlib.suppress(msgspec.DecodeError):
                last = msgspec.json.decode(self._kept.read_bytes(), type=Heartbeat)
                self.values.update(last.counters)
        return last

    def publish(self, *, force: bool = False) -> None:
        """Write the heartbeat; see `citybrain.counters`."""
        super().publish(force=force)
        if force or monotonic_s() - self._kept_s >= KEEP_EVERY_S:
            self.keep()

    def keep(self) -> None:
        """Copy the heartbeat to the card; not synced, it only saves counters over a power cut."""
        self._kept_s = monotonic_s()
        if self._kept is not None and self._path is not None:
            try:
                replace_unsynced(self._kept, self._path.read_bytes())
            except OSError as error:
                self.add("errors_total", stage="heartbeat")
                self.warn(f"{self._kept}: {error.strerror or error}")

    def say(self, text: str, level: str = "info") -> None:
        """Write a line where `level` is high enough."""
        if LEVELS[level] > LEVELS[self.level]:
            return
        text = _printable(text)
        before = f"<{LEVELS[level]}>" if self._journald else f"{iso(real_unix_ms())} {level:<7} "
        sys.stderr.write(f"{before}{text}\n")
        sys.stderr.flush()


class _Lines(logging.Handler):
    """Writes what the drivers' host logs; its warnings and errors come by `warn` as well, and are written there."""

    def __init__(self, journal: JournalCounters) -> None:
        super().__init__()
        self._journal = journal

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.WARNING:
            self._journal.say(record.getMessage(), "info" if record.levelno >= logging.INFO else "debug")


def _printable(text: str) -> str:
    r"""Return a text of which no terminal makes more than one line.

    >>> _printable("a\n\x1b[2Jb°")
    'a\\x0a\\x1b[2Jb°'
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def live_folder(run: Path) -> Path:
    """Return where what changes every second is written, and let a link in `run` lead there for who looks."""
    given = os.environ.get("RUNTIME_DIRECTORY", "")
    if not given or not Path(given).is_dir():
        return run
    link = run / LIVE
    with contextlib.suppress(OSError):  # a card that cannot be written: whoever has the folder is told by `sole`
        if not link.is_symlink() or str(link.readlink()) != given:
            run.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(given)
    return Path(given)


def last_heartbeat(run: Path) -> Heartbeat | None:
    """Return the newest heartbeat of the gateway whose folder `run` is, in memory or on the card."""
    beats = [beat for folder in (run, run / LIVE) for beat in read_heartbeats(folder) if beat.process == PROCESS]
    return max(beats, key=lambda beat: beat.at, default=None)
