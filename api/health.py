"""How the pipeline does, in one word and the reasons that matter: `well`, `degraded` or `down`. Pure.

`judge` is given what is known (`Vitals`) and returns the reasons, the most pressing first; the page, `citybrain status`
and `/v1/status` all say what stands here. All limits are in `Limits`, each with its reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import inf
from typing import Literal

import msgspec

from api.disk import Disk
from citybrain.i18n import text

Level = Literal["well", "degraded", "down"]
LEVELS: tuple[Level, ...] = ("well", "degraded", "down")


class Limits(msgspec.Struct, frozen=True):
    """From where on a person should know. Seconds are real ones."""

    lag_s: float = 10.0  # a trapped passenger is told within 10 s: a stage that far behind breaks that promise
    lag_down_s: float = 300.0  # what is urgent is told within 5 min
    lag_p99_s: float = 2.0  # what we promise of ordinary days (docs/measurements.md)
    settled_s: float = 360.0  # up for so long, none of the last 5 minutes is what had piled up while it started
    gateway_silent_ms: int = 90_000  # platform time, as the rule gateway_offline has it
    gateways_down_share: float = 0.5  # so many at once are not gateways, but the line, the broker or ingest
    drop_share: float = 0.01  # [U] our choice: a device nobody provisioned is less, a wrong unit or clock is more
    drop_least_per_min: float = 5.0  # [U] our choice: a share of next to nothing says nothing
    disk_low_share: float = 0.90  # [U] our choice: time to order a disk
    disk_full_share: float = 0.98  # [U] our choice: the next peak fills it, and gateways begin to spool
    disk_days: float = 3.0  # over a weekend
    outbox_s: float = (
        60.0  # a case that its platform does not know of for a minute; the shortest deadline is half an hour
    )
    restart_s: float = 600.0  # [U] our choice: who looks every ten minutes sees each of them
    certificate_days: float = 14.0  # of a box or service: renewed four months before its end, so by now that has failed
    tended_days: float = 30.0  # [U] of what the centre renews itself: 60 (list) or 122 days (server) before its end
    authority_days: float = 365.0  # from then on what it signs ends before its year is over
    clock_s: float = 10.0  # [U] our choice: NTP keeps a box within 0.1 s; 10 s put an event behind its consequence
    backlog: int = 1000  # [U] our choice: of a box that is heard: some hours of a quiet one, minutes of a busy one
    errors_per_min: float = 1.0  # an error a minute goes on; a single one is a line in the log


LIMITS = Limits()
# Drops that are no loss, and how things are meant to go.
HARMLESS = {
    "late": "the value is in the history; its rule has seen a newer one",
    "repeated": "the desk has this transition already",
    "no_open_alarm": "the end of an alarm that its incident's end had closed",
    "no_active_alarm": "the end of an alarm that had ended",
    "ack_repeated": "an acknowledgement that came twice",
}
# Errors with a reason of their own here, or of one request.
ELSEWHERE = frozenset({"delivery", "request", "recovery"})


class Stage(msgspec.Struct, frozen=True):
    """How far a stage is behind now, and how long things took in the last 5 minutes (real seconds)."""

    now_s: float = 0.0
    p50_s: float = 0.0
    p99_s: float = 0.0
    process: str = ""  # the slowest of the stage's processes
    up_s: float = inf  # how long that is up


class Late(msgspec.Struct, frozen=True):
    """A gateway that is not heard: for how long (platform seconds), and what its spool held when it last said so.

    late_s is None where it was never heard.
    """

    id: str
    late_s: float | None
    spooled: int | None


class Ending(msgspec.Struct, frozen=True):
    """Something that holds until a time: `authority`, `list` (of revocations), `server`, `service` or `gateway`.

    left_s: real seconds until then, below 0 afterwards.
    """

    kind: str
    name: str
    left_s: float


class Misplaced(msgspec.Struct, frozen=True):
    """A box that by its commissioning sheet stands elsewhere than the ledger has it."""

    id: str
    distance_m: float


class Vitals(msgspec.Struct, frozen=True):
    """What is judged. Rates are per minute of real time."""

    missing: tuple[str, ...] = ()  # roles or processes of the pipeline that do not work
    silent: tuple[str, ...] = ()  # other processes
    stages: Mapping[str, Stage] = {}
    gateways: int = 0
    spooled: Mapping[str, int] = {}  # messages in each gateway's spool, as it last said
    late: tuple[Late, ...] = ()
    values_per_min: float = 0.0
    dropped_per_min: Mapping[str, float] = {}
    errors_per_min: Mapping[str, float] = {}  # "ingest: log" → how many
    disk: Disk | None = None
    outbox_s: float = 0.0
    outbox_waiting: int = 0
    restarted: Mapping[str, float] = {}  # process → seconds since it was started again
    endings: tuple[Ending, ...] = ()
    misplaced: tuple[Misplaced, ...] = ()


class Reason(msgspec.Struct, frozen=True):
    """One thing that is not as it should be. `facts` fill in the catalogue's `health.<code>`; seconds are spans."""

    level: Level
    code: str
    facts: Mapping[str, str | float] = {}

    def text(self, language: str) -> str:
        """Return it in words."""
        facts = {name: span(x, language) if isinstance(x, float) else x for name, x in self.facts.items()}
        if self.code == "dropped":
            facts["reason"] = _named(f"drop.{facts['reason']}", str(facts["reason"]), language)
        return text(f"health.{self.code}", language, **facts)


def _named(key: str, otherwise: str, language: str) -> str:
    try:
        return text(key, language)
    except KeyError:
        return otherwise


def span(seconds: float, language: str) -> str:
    """Return a length of time as a person says it.

    >>> [span(seconds, "en") for seconds in (0.25, 45, 840, 20_000, 200_000)]
    ['0.25 s', '45 s', '14 min', '6 h', '2 d']
    """
    decimals = 2 if seconds < 1 else 1 if seconds < 10 else 0
    for limit, unit_s, name in ((90, 1, "s"), (5400, 60, "min"), (129_600, 3600, "h")):
        if seconds < limit:
            return text(f"span.{name}", language, amount=f"{seconds / unit_s:.{decimals}f}")
    return text("span.d", language, amount=f"{seconds / 86_400:.0f}")


def level_of(reasons: Iterable[Reason]) -> Level:
    """Return the worst level."""
    return max((reason.level for reason in reasons), key=LEVELS.index, default="well")


def judge(vitals: Vitals, limits: Limits = LIMITS) -> list[Reason]:
    """Return what a person should know, the most pressing first; nothing where all is well."""
    found = [
        *(Reason("down", "missing", {"process": name}) for name in vitals.missing),
        *_disk(vitals.disk, limits),
        *_lag(vitals.stages, limits),
        *_gateways(vitals, limits),
        *_endings(vitals.endings, limits),
        *_errors(vitals.errors_per_min, limits),
        *_dropped(vitals, limits),
        *_outbox(vitals, limits),
        *(Reason("degraded", "silent", {"process": name}) for name in vitals.silent),
        *_restarted(vitals.restarted, limits),
        *_misplaced(vitals.misplaced),
    ]
    return sorted(found, key=lambda reason: -LEVELS.index(reason.level))  # stable: as pressing as they stand above


def _disk(disk: Disk | None, limits: Limits) -> Iterable[Reason]:
    if disk is None:
        return
    percent = f"{disk.used_share * 100:.0f}"
    if disk.used_share >= limits.disk_full_share:
        yield Reason("down", "disk", {"percent": percent})
    elif disk.used_share >= limits.disk_low_share:
        yield Reason("degraded", "disk", {"percent": percent})
    if disk.full_in_days is not None and disk.full_in_days < limits.disk_days:
        yield Reason("degraded", "disk_soon", {"left": disk.full_in_days * 86_400.0})


def _lag(stages: Mapping[str, Stage], limits: Limits) -> Iterable[Reason]:
    """The outbox has limits of its own: who is slow there is the platform."""
    for name, stage in stages.items():
        who = {"process": stage.process or name}
        if name == "outbox":
            continue
        if stage.now_s >= limits.lag_s:
            level: Level = "down" if stage.now_s >= limits.lag_down_s else "degraded"
            yield Reason(level, "lag", {**who, "behind": float(stage.now_s)})
        elif stage.p99_s > limits.lag_p99_s and stage.up_s >= limits.settled_s:
            yield Reason("degraded", "lag_p99", {**who, "behind": float(stage.p99_s)})


def _gateways(vitals: Vitals, limits: Limits) -> Iterable[Reason]:
    if not vitals.late:
        return
    most = max(vitals.late, key=lambda gateway: (gateway.late_s is None, gateway.late_s or 0.0))
    down = len(vitals.late) >= max(2, vitals.gateways * limits.gateways_down_share)
    level: Level = "down" if down else "degraded"
    facts: dict[str, str | float] = {"count": f"{len(vitals.late)}", "gateway": most.id}
    if most.late_s is None:
        yield Reason(level, "gateways_unheard", facts)
    else:
        yield Reason(level, "gateways_late", {**facts, "late": float(most.late_s)})


def _endings(endings: Iterable[Ending], limits: Limits) -> Iterable[Reason]:
    """What locks everybody out when it ends has a reason of its own; boxes are told together."""
    days = {"authority": limits.authority_days, "list": limits.tended_days, "server": limits.tended_days}
    boxes = []
    for one in sorted(endings, key=lambda each: each.left_s):
        if one.left_s >= days.get(one.kind, limits.certificate_days) * 86_400:
            continue
        if one.kind == "gateway":
            boxes.append(one)
        elif one.left_s <= 0:
            yield Reason("down", f"{one.kind}_ended", {"name": one.name})
        else:
            yield Reason("degraded", f"{one.kind}_ends", {"name": one.name, "left": float(one.left_s)})
    if boxes:
        first, count = boxes[0], f"{len(boxes)}"
        if first.left_s <= 0:
            yield Reason("degraded", "gateway_ended", {"count": count, "gateway": first.name})
        else:
            yield Reason("degraded", "gateway_ends", {"count": count, "gateway": first.name, "left": first.left_s})


def _misplaced(misplaced: Sequence[Misplaced]) -> Iterable[Reason]:
    if misplaced:
        most = max(misplaced, key=lambda each: each.distance_m)
        facts: dict[str, str | float] = {"count": f"{len(misplaced)}", "gateway": most.id}
        yield Reason("degraded", "misplaced", {**facts, "distance": f"{most.distance_m:.0f}"})


def _errors(errors: Mapping[str, float], limits: Limits) -> Iterable[Reason]:
    for where, amount in errors.items():
        if amount >= limits.errors_per_min:
            yield Reason("degraded", "errors", {"where": where, "count": f"{amount:.0f}"})


def _dropped(vitals: Vitals, limits: Limits) -> Iterable[Reason]:
    dropped = {reason: amount for reason, amount in vitals.dropped_per_min.items() if reason not in HARMLESS}
    amount = sum(dropped.values())
    share = amount / (amount + vitals.values_per_min) if amount else 0.0
    if amount >= limits.drop_least_per_min and share >= limits.drop_share:
        most = max(dropped, key=lambda reason: dropped[reason])
        yield Reason("degraded", "dropped", {"percent": f"{share * 100:.0f}", "reason": most})


def _outbox(vitals: Vitals, limits: Limits) -> Iterable[Reason]:
    if vitals.outbox_s >= limits.outbox_s:
        facts: dict[str, str | float] = {"count": f"{vitals.outbox_waiting}", "waits": float(vitals.outbox_s)}
        yield Reason("degraded", "outbox", facts)


def _restarted(restarted: Mapping[str, float], limits: Limits) -> Iterable[Reason]:
    for process, ago_s in sorted(restarted.items(), key=lambda item: item[1]):
        if ago_s <= limits.restart_s:
            yield Reason("degraded", "restarted", {"process": process, "ago": float(ago_s)})
