"""Kinds of assets: what each measures, and what a clerk may call it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import msgspec

from citybrain.config import load_yaml
from citybrain.errors import UsageError

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


def metrics_of(kind: str, tags: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return (telemetry, events) of an asset; raises UsageError for a kind nobody knows."""
    for profile in profiles():
        if profile.kind == kind and (not profile.tag or profile.tag in tags):
            return profile.metrics, profile.events
    raise UsageError(f"kind {kind[:40]!r}: expected one of {', '.join(kinds())}")


def with_own(metrics: Sequence[str]) -> tuple[str, ...]:
    """Return a gateway's metrics with those that this release's boxes tell of themselves: its entry may be older."""
    own, _ = metrics_of("gateway", ())
    return (*metrics, *(name for name in own if name not in metrics))
