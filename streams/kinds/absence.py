"""Kind `absence`: nothing was heard for a while. It says that the state is unknown; it never clears another rule.

`clock: gateway` (a device): its telemetry is silent for `timeout` of its gateway's live time, so a gateway that is cut
off or switched off ages nobody. `clock: platform` (a gateway): no frame of it came for `timeout` of platform time, told
by ticks and not counted while the platform itself was not listening.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import msgspec
import numpy as np

from citybrain.config import Duration, duration_text
from citybrain.model import Evidence
from streams.kinds.holding import NEVER, U16, Batch, Gateways, Links, Mutes, Structured
from streams.log import I64

JUDGES = False
METRIC = "silence_s"
SAMPLE = """\
when:
  kind: absence
  timeout: 5min
"""
RULE = np.dtype([("timeout", "i8")])
# `due`: live time at which the silence is too long. `heard`: time of the last value (or frame), -1 before the first.
STATE = np.dtype([("due", "i8"), ("heard", "i8"), ("raised", "i1")])


class Parameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`timeout`: how long the silence may last. `clock`: whose time it is measured in."""

    kind: str
    timeout: Duration
    clock: Literal["gateway", "platform"] = "gateway"


class Watched(NamedTuple):
    """Log records in order: 1 a frame of `gateway` received `at`, 2 a tick `at`, the platform up since `up`, 0 none."""

    kind: I64
    gateway: I64
    at: I64
    up: I64


def problems(parameters: Parameters) -> list[tuple[str, str]]:
    """Return what is wrong with the parameters, as (field, what)."""
    return [] if parameters.timeout > 0 else [("timeout", "expected a duration longer than 0")]


def metrics(parameters: Parameters) -> tuple[str, ...]:
    """Return what the evidence is called: seconds of silence."""
    return (METRIC,)


def limit(parameters: Parameters, *, raised: bool) -> float | None:
    """Return the silence allowed, in s."""
    return parameters.timeout / 1000


def silence(
    batch: Batch, links: Links, gateways: Gateways, mutes: Mutes, rule: U16, settings: Structured, state: Structured,
    out: Structured,
) -> tuple[Structured, int]:  # fmt: skip
    """Carry every device's absence over the batch; return (out, rows used). A raise's `at` is when it was too long."""
    rows = 0
    for p in range(len(batch.t)):
        if batch.used[p] == 0:
            continue
        series, t, live, stream = batch.series[p], batch.t[p], batch.live[p], batch.stream[p]
        gateway = batch.gateway[p]
        base, low = gateways.first[gateway], links.start[series]
        own = links.start[series + 1] - low
        scanned = 0
        if live > gateways.due[gateway]:
            scanned = gateways.first[gateway + 1] - base
            gateways.due[gateway] = NEVER  # the scan finds the next one
        for j in range(scanned + own):
            i = base + j if j < scanned else links.instance[low + j - scanned]
            s = state[i]
            edge, at = -1, t
            if j >= scanned:
                edge = 0 if s.raised == 1 else -1
            elif s.raised == 0 and live > s.due:
                at = stream - (live - s.due)
                for m in range(np.searchsorted(mutes.instance, i), len(mutes.instance)):
                    if mutes.instance[m] != i:
                        break
                    if mutes.begin[m] <= at < mutes.end[m]:
                        at = mutes.end[m]
                        s.due = live - (stream - at)
                edge = 1 if live > s.due else -1
            if edge >= 0:
                if rows == len(out):
                    bigger = np.empty(2 * len(out), out.dtype)
                    bigger[:rows] = out
                    out = bigger
                since = s.heard if s.heard >= 0 else at - settings[rule[i]].timeout
                row = out[rows]
                row.position, row.instance, row.raised, row.at = p, i, edge, at
                row.value, row.since, row.count, row.term = (at - since) / 1000, since, 1, 0
                s.raised = edge
                rows += 1
            if j >= scanned:
                s.heard, s.due = t, live + settings[rule[i]].timeout
                gateways.due[gateway] = min(gateways.due[gateway], s.due)
            elif s.raised == 0:
                gateways.due[gateway] = min(gateways.due[gateway], s.due)
    return out, rows


def watch(
    records: Watched, links: Links, mutes: Mutes, rule: U16, settings: Structured, state: Structured, out: Structured
) -> tuple[Structured, int]:
    """Carry every gateway's absence over the records; return (out, rows used). `links` is indexed by gateway."""
    rows = 0
    for p in range(len(records.kind)):
        if records.kind[p] == 0:
            continue
        frame = records.kind[p] == 1
        low = links.start[records.gateway[p]] if frame else 0
        high = links.start[records.gateway[p] + 1] if frame else len(state)
        for j in range(low, high):
            i = links.instance[j] if frame else j
            s = state[i]
            edge, at = -1, records.at[p]
            since = max(s.heard, records.up[p])
            if frame:
                since = s.heard
                edge = 0 if s.raised == 1 else -1
                s.heard = max(s.heard, at)
            elif s.raised == 0 and at - since > settings[rule[i]].timeout:
                at = since + settings[rule[i]].timeout
                for m in range(np.searchsorted(mutes.instance, i), len(mutes.instance)):
                    if mutes.instance[m] != i:
                        break
                    at = mutes.end[m] if mutes.begin[m] <= at < mutes.end[m] else at
                edge = 1 if at < records.at[p] else -1
            if edge >= 0:
                if rows == len(out):
                    bigger = np.empty(2 * len(out), out.dtype)
                    bigger[:rows] = out
                    out = bigger
                row = out[rows]
                row.position, row.instance, row.raised, row.at = p, i, edge, at
                row.value, row.since, row.count, row.term = (at - since) / 1000, since, 1, 0
                s.raised = edge
                rows += 1
    return out, rows


def explain(parameters: Parameters, evidence: Evidence, language: str) -> str:
    """Say why in a sentence, in `zh` or `en`."""
    allowed = duration_text(parameters.timeout)
    if language == "en":
        return f"nothing heard for {evidence.value or 0:g} s, {allowed} allowed"
    return f"已静默 {evidence.value or 0:g} s，允许 {allowed}"
