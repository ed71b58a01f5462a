"""What heartbeats, latest values and the disk say of the pipeline, gathered for whoever judges it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from api.disk import Disk
from api.fleet import endings_of, late_of, misplaced_of
from api.health import ELSEWHERE, Stage, Vitals
from api.processes import PIPELINE, in_charge, ready, role_of, standing_by
from api.site import Site
from citybrain.counters import Heartbeat

LABELLED = re.compile(r"^(?P<name>\w+)\{(?P<label>\w+)=(?P<value>.*)\}$")
ELSES = frozenset({"simulate", "platform", "operator"})  # what stands beside us; what they drop is not ours
STAGES = (*PIPELINE, "outbox")


def labelled(values: Mapping[str, float], name: str) -> dict[str, float]:
    """Return the counters `name{label=x}`, by x."""
    matches = ((LABELLED.match(key), amount) for key, amount in values.items())
    return {match["value"]: amount for match, amount in matches if match and match["name"] == name}


def ours(beats: Mapping[str, Heartbeat]) -> Iterable[Heartbeat]:
    """Return the heartbeats of our own processes, in the order of their names."""
    return (beat for name, beat in sorted(beats.items()) if role_of(name) not in ELSES)


def dropped(beats: Mapping[str, Heartbeat]) -> dict[str, int]:
    """Return what our own processes did not use since the first start, by reason."""
    found: Counter[str] = Counter()
    for beat in ours(beats):
        found.update({reason: int(amount) for reason, amount in labelled(beat.counters, "dropped_total").items()})
    return {reason: amount for reason, amount in sorted(found.items()) if amount}


def dropped_per_min(beats: Mapping[str, Heartbeat], now_ms: int) -> dict[str, float]:
    """Return what they did not use in the last minute, by reason."""
    found: dict[str, float] = {}
    for beat in ours(beats):
        for reason, amount in labelled(beat.per_minute, "dropped_total").items() if beat.live(now_ms) else ():
            found[reason] = round(found.get(reason, 0.0) + amount, 2)
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def errors_per_min(beats: Mapping[str, Heartbeat], now_ms: int) -> dict[str, float]:
    """Return the errors of the last minute by process and stage, but for those that are told otherwise."""
    return {
        f"{beat.process}: {stage}": amount
        for beat in ours(beats)
        for stage, amount in (labelled(beat.per_minute, "errors_total").items() if beat.live(now_ms) else ())
        if stage not in ELSEWHERE
    }


def taken(beats: Mapping[str, Heartbeat], now_ms: int, counter: str = "readings_total") -> tuple[int, float]:
    """Return how many readings (or values) ingest accepted since the first start, and in the last minute."""
    mine = [beat for beat in beats.values() if role_of(beat.process) == "ingest"]
    total = sum(beat.counters.get(counter, 0) for beat in mine)
    return total, sum(beat.per_minute.get(counter, 0.0) for beat in mine if beat.live(now_ms))


def stages(beats: Mapping[str, Heartbeat], speed: float, now_ms: int) -> dict[str, Stage]:
    """Return how far every stage is behind, by the slowest of its processes; a silent one by its silence."""
    found = dict.fromkeys(STAGES, Stage())
    for beat in beats.values():
        role = role_of(beat.process)
        if standing_by(beat):
            continue
        if role in PIPELINE:
            found[role] = max(found[role], _stage(beat, "lag_s", "lag_s", speed, now_ms), key=_slowness)
        if role == "desk":
            found["outbox"] = _stage(beat, "outbox_age_s", "outbox_s", speed, now_ms)
    return found


def _stage(beat: Heartbeat, gauge: str, delays: str, speed: float, now_ms: int) -> Stage:
    delay = beat.delays.get(delays)
    behind_s = beat.gauges.get(gauge, 0.0) / speed
    if not beat.live(now_ms):
        behind_s = max(behind_s, (now_ms - beat.at) / 1000)
    up_s = (now_ms - beat.started) / 1000
    if delay is None:
        return Stage(round(behind_s, 3), process=beat.process, up_s=up_s)
    now_s = max(behind_s, delay.latest) if gauge == "lag_s" else behind_s
    return Stage(round(now_s, 3), delay.p50, delay.p99, beat.process, up_s)


def _slowness(stage: Stage) -> tuple[float, float, bool]:
    return (stage.now_s, stage.p99_s, bool(stage.process))


def quarantine(beats: Mapping[str, Heartbeat]) -> tuple[int, dict[str, int]]:
    """Return how many messages wait for their device to be adopted, and the devices with most of them."""
    mine = [beat for beat in beats.values() if role_of(beat.process) == "ingest"]
    devices: dict[str, int] = {}
    for beat in mine:
        devices |= beat.details.get("quarantine", {})
    return sum(int(beat.gauges.get("quarantined", 0)) for beat in mine), dict(
        sorted(devices.items(), key=lambda item: (-item[1], item[0]))
    )


def restarts(beats: Mapping[str, Heartbeat]) -> dict[str, int]:
    """Return how often the supervisor had to start each process again."""
    run = beats.get("run")
    found = labelled(run.counters, "restarts_total") if run is not None else {}
    return {process: int(amount) for process, amount in sorted(found.items()) if amount}


def disk(site: Site) -> Disk | None:
    """Return how full the disk is, None where that cannot be read."""
    try:
        return site.disk.told()
    except OSError as error:
        site.counters.warn(f"{site.layout.root}: the disk cannot be measured: {error.strerror}")
        return None


def gather(site: Site, beats: Mapping[str, Heartbeat], now_ms: int, waiting: int) -> Vitals:
    """Return what `api.health.judge` is given. `now_ms` is real time; `waiting`: messages in the outbox."""
    found = stages(beats, site.run.clock.speed, now_ms)
    again = restarts(beats)
    fleet = site.fleet
    boxes = fleet.boxes(beats)
    return Vitals(
        missing=tuple(_missing(beats, now_ms, site.run.shards)),
        silent=tuple(name for name, beat in sorted(beats.items()) if _silent(name, beat, now_ms)),
        stages=found,
        gateways=len(boxes),
        spooled={box.gateway.id: box.spooled for box in boxes if box.spooled is not None},
        late=tuple(late_of(boxes, site.clock.now_ms())),
        values_per_min=taken(beats, now_ms, "values_total")[1],
        dropped_per_min=dropped_per_min(beats, now_ms),
        errors_per_min=errors_per_min(beats, now_ms),
        disk=disk(site),
        outbox_s=found["outbox"].now_s,
        outbox_waiting=waiting,
        endings=(*fleet.endings(now_ms), *endings_of(boxes, now_ms)),
        misplaced=tuple(misplaced_of(boxes)),
        restarted={name: (now_ms - beat.started) / 1000 for name, beat in beats.items() if name in again},
    )


def _missing(beats: Mapping[str, Heartbeat], now_ms: int, shards: int) -> Iterable[str]:
    for role in PIPELINE:
        having = {shard: in_charge(beats, role, shard, shards) for shard in range(shards)}
        names = {
            beat.process for beat in having.values() if beat is not None and not (beat.live(now_ms) and ready(beat))
        }
        orphans = [str(shard) for shard, beat in having.items() if beat is None]
        if orphans:
            names.add(role if len(orphans) == shards else "-".join([role, *orphans]))
        yield from sorted(names)


def _silent(name: str, beat: Heartbeat, now_ms: int) -> bool:
    return role_of(name) not in PIPELINE and not beat.live(now_ms)
