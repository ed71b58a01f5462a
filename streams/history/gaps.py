"""Where a chart must show a hole: intervals of a gateway's time in which nothing of it was received. Pure.

What counts is observed time, not arrival: a gateway that was cut off and sent its backlog later leaves no gap.
"""

from __future__ import annotations

import msgspec

from citybrain.clock import SECOND_MS
from citybrain.model import Lane
from streams.history.manifest import Gap, Stream
from streams.log import FrameHead

SILENT_MS = 90 * SECOND_MS  # [U] nine heartbeats; also when the API calls a gateway offline
REPLAYED_EPOCH = 0  # frames out of quarantine: not the gateway's own order


class Gaps:
    """Follows the frames of a shard in their order; `take` returns the gaps since the last call."""

    def __init__(self, streams: dict[str, Stream]) -> None:
        self.streams = {key: msgspec.structs.replace(each) for key, each in streams.items()}
        self._found: list[Gap] = []

    def frame(self, gateway: str, head: FrameHead, span: tuple[int, int] | None, *, beats: bool) -> None:
        """Take a frame of a gateway; span: the first and last time of its values, None where it has none.

        beats: the gateway reports about itself every few seconds, so that silence tells.
        """
        if head.epoch == REPLAYED_EPOCH:
            return
        known = self.streams.setdefault(f"{gateway}/{head.lane.topic}", Stream(head.epoch, head.seq - 1))
        if head.epoch == known.epoch:
            known.lost += max(head.seq - known.seq - 1, 0)
        known.epoch, known.seq = head.epoch, head.seq
        if span is None:
            return
        first, last = span
        silent = beats and head.lane is Lane.TELEMETRY and first - known.at_ms > SILENT_MS
        why = "missing" if known.broken else "evicted" if known.lost else "silent" if silent else ""
        if why and 0 <= known.at_ms < first:
            self._found.append(Gap(gateway, head.lane.topic, known.at_ms, first, why, known.lost))
        known.at_ms = max(known.at_ms, last)
        known.lost, known.broken = 0, False

    def missing(self) -> None:
        """Take that the log lost records here: nobody knows what any lane had said."""
        for known in self.streams.values():
            known.broken = True

    def take(self) -> tuple[Gap, ...]:
        """Return the gaps found since the last call."""
        found, self._found = tuple(self._found), []
        return found


def union(gaps: list[Gap], from_ms: int, to_ms: int) -> list[Gap]:
    """Return the gaps that touch [from_ms, to_ms), in order of their beginning, the same interval once."""
    touching = {(g.from_ms, g.until_ms, g.why): g for g in gaps if g.from_ms < to_ms and g.until_ms > from_ms}
    return [touching[key] for key in sorted(touching)]
