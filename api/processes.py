"""The processes of a run, by their heartbeats: which belong to it, who has which shard, what is missing."""

from __future__ import annotations

from collections.abc import Mapping

from citybrain.counters import Heartbeat, takes_of

PIPELINE = ("ingest", "worker", "desk")  # without each of these no reading becomes a case


def role_of(process: str) -> str:
    """Return what a process does, whichever of several it is.

    >>> role_of("worker-1"), role_of("worker-b"), role_of("desk")
    ('worker', 'worker', 'desk')
    """
    role = takes_of(process, 0)[0]
    first = role.partition("-")[0]
    return first if first in PIPELINE else role


def claim_of(beat: Heartbeat, shards: int) -> tuple[str, tuple[int, ...]]:
    """Return a process's role and shards: those it was dealt (docs/distributed.md), else by its name."""
    dealt = beat.details.get("assigned")
    return takes_of(beat.process, shards) if dealt is None else ("worker", tuple(dealt))


def of_this_run(beats: Mapping[str, Heartbeat], now_ms: int, shards: int) -> dict[str, Heartbeat]:
    """Leave out what earlier runs left behind: another division of the shards, and parts nobody supervises now."""
    run = beats.get("run")
    known = run.details.get("parts") if run is not None and run.live(now_ms) else None
    found = {}
    for name, beat in beats.items():
        role = role_of(name)
        if role in PIPELINE:
            spare = standing_by(beat) or "assigned" in beat.details  # a desk, or a worker that waits for a shard
            ours = beat in in_force(beats, role, shards) or (spare and beat.live(now_ms))
        else:
            ours = known is None or name in ("run", *known) or beat.live(now_ms)
        if ours:
            found[name] = beat
    return found


def not_live(beats: Mapping[str, Heartbeat], now_ms: int, shards: int) -> list[str]:
    """Return, in words, why the run is not live; an empty list when it is. `now_ms` is real time.

    Several processes may share the shards of a role: every shard needs one that has it.
    """
    missing: dict[str, None] = {}  # in order, each once
    for role in PIPELINE:
        for shard in range(shards):
            beat = in_charge(beats, role, shard, shards)
            if beat is None:
                nobody = not any(claim_of(beat, shards)[0] == role for beat in beats.values())
                missing[f"{role} has not started" if nobody else f"no {role} has shard {shard}"] = None
            elif not beat.live(now_ms):
                missing[f"{beat.process} was last heard {(now_ms - beat.at) / 1000:.0f} s ago"] = None
            elif not ready(beat):
                missing[f"{beat.process} is not ready ({_why(beat)})"] = None
    return list(missing)


def in_charge(beats: Mapping[str, Heartbeat], role: str, shard: int, shards: int) -> Heartbeat | None:
    """Return the process of a role that has a shard: who was heard last, since a run may divide them anew.

    A desk that stands by has none, as long as there is another.
    """
    claims = ((beat, *claim_of(beat, shards)) for beat in beats.values())
    having = [beat for beat, its, numbers in claims if its == role and shard in numbers]
    return max(having, key=lambda beat: (not standing_by(beat), beat.at), default=None)


def in_force(beats: Mapping[str, Heartbeat], role: str, shards: int) -> list[Heartbeat]:
    """Return the processes of a role that have its shards now, without those of an earlier division."""
    found = (in_charge(beats, role, shard, shards) for shard in range(shards))
    return list({beat.process: beat for beat in found if beat is not None}.values())


def standing_by(beat: Heartbeat) -> bool:
    """Return whether this is a desk that waits for the one that works to fall silent."""
    return beat.gauges.get("standby", 0.0) >= 1.0


def ready(beat: Heartbeat) -> bool:
    """Return whether a process does its work: ingest while the broker has it, worker and desk once they measure lag."""
    role = role_of(beat.process)
    if role == "ingest":
        return beat.gauges.get("connected", 0.0) >= 1.0
    return role not in PIPELINE or "lag_s" in beat.gauges


def _why(beat: Heartbeat) -> str:
    if standing_by(beat):
        return "it stands by, and no desk works"
    return "not connected to the broker" if role_of(beat.process) == "ingest" else "starting"
