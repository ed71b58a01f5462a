"""Kinds of assets: what each measures, and what a clerk may call it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import msgspec

from citybrain.config import load_yaml
from citybrain.errors import UsageError
from citybrain.model import CLOUD_PREFIX

FILE = Path(__file__).with_name("kinds.yaml")
NAMES = {
    "消火栓": "hydrant",
    "消防栓": "hydrant",
    "电梯": "elevator",
    "摄像机": "camera",
    "摄像头": "camera",
    "监控": "camera",
    "泵房": "pump_room",
    "网关": "gateway",
}


EDGE = "edge"  # the entries of what a box of ours adds; as a tag of an asset it says that there is one

Lists = tuple[tuple[str, ...], tuple[str, ...]]  # telemetry, events


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What assets of a kind, with a tag where one is given, measure: telemetry and events."""

    kind: str
    tag: str
    metrics: tuple[str, ...]
    events: tuple[str, ...] = ()


@cache
def profiles() -> tuple[Profile, ...]:
    """Return all profiles, in their order; raises ConfigError with path and line."""
    return load_yaml(FILE, tuple[Profile, ...])


def kinds() -> tuple[str, ...]:
    """Return the kinds of assets there are."""
    return tuple(dict.fromkeys(profile.kind for profile in profiles()))


def as_boxes_tell(kind: str, tags: Sequence[str], gateway: str, own: Lists) -> Lists:
    """Return an asset's lists, and behind a box what our drivers add to them; a metric keeps the lane it has.

    Every gateway is a box, but those of operators' clouds. Nobody has to say so in a sheet: what was forgotten there
    would be dropped as `unknown_metric`. What a box does not tell in the end is an empty series.
    """
    if EDGE not in tags and (not gateway or gateway.startswith(CLOUD_PREFIX)):
        return own
    known = {*own[0], *own[1]}
    added = [one for one in profiles() if one.kind == kind and one.tag == EDGE]
    metrics = [name for one in added for name in one.metrics if name not in known]
    events = [name for one in added for name in one.events if name not in known]
    return (*own[0], *metrics), (*own[1], *events)


def metrics_of(kind: str, tags: Sequence[str], gateway: str = "") -> Lists:
    """Return what an asset behind a gateway tells; raises UsageError for a kind nobody knows."""
    for profile in profiles():
        if profile.kind == kind and profile.tag != EDGE and (not profile.tag or profile.tag in tags):
            return as_boxes_tell(kind, tags, gateway, (profile.metrics, profile.events))
    raise UsageError(f"kind {kind[:40]!r}: expected one of {', '.join(kinds())}")


def with_own(metrics: Sequence[str]) -> tuple[str, ...]:
    """Return a gateway's metrics with those that this release's boxes tell of themselves: its entry may be older."""
    own, _ = metrics_of("gateway", ())
    return (*metrics, *(name for name in own if name not in metrics))
