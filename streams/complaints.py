"""Warnings about what comes in from outside: one a minute and reason, with what and where of the first."""

from __future__ import annotations

from citybrain.clock import MINUTE_MS
from citybrain.counters import Counters


class Complaints:
    """Says what is refused, once a minute and reason: a stranger must not push every other warning out.

    Ask `due` first where the text costs something; what is not due is counted and told with the next one.
    """

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._said: dict[str, tuple[int, int]] = {}  # reason -> (count since, said at)

    def due(self, reason: str, now_ms: int) -> bool:
        """Return whether the last warning of this reason is a minute ago; where not, count one more."""
        count, said = self._said.get(reason, (0, now_ms - MINUTE_MS))
        if not 0 <= now_ms - said < MINUTE_MS:
            return True
        self._said[reason] = (count + 1, said)
        return False

    def say(self, reason: str, now_ms: int, text: str) -> None:
        """Warn, with how many of this reason nobody was told of since the last time."""
        count, _ = self._said.get(reason, (0, 0))
        self._said[reason] = (0, now_ms)
        self._counters.warn(f"{text} ({count} more since the last such warning)" if count else text)
