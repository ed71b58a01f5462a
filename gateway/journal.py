"""What the gateway writes for people: one line on stderr an event, with the priority that systemd's journal reads."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from citybrain.clock import iso, real_unix_ms
from citybrain.counters import Counters
from citybrain.errors import UsageError

LEVELS = {"error": 3, "warning": 4, "info": 6, "debug": 7}  # syslog's priorities, sd-daemon(3)


class JournalCounters(Counters):
    """Counters whose warnings are also log lines; a warning that repeats the one before it is not written again."""

    def __init__(self, process: str, folder: Path | None = None) -> None:
        super().__init__(process, folder)
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
        """Keep a warning, and write it."""
        if self.warnings[-1:] != [text]:
            self.say(text, "warning")
        super().warn(text)

    def say(self, text: str, level: str = "info") -> None:
        """Write a line where `level` is high enough."""
        if LEVELS[level] > LEVELS[self.level]:
            return
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
