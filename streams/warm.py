"""Run every kernel once on a registry of one gateway, so that numba compiles it or finds it in its cache."""

from __future__ import annotations

import tempfile
from pathlib import Path

import msgspec
import numpy as np
import yaml

from citybrain.config import Lines, convert
from citybrain.layout import Layout
from citybrain.model import Device, Gateway, Lane, Place, Registry
from citybrain.segments import Record
from citybrain.units import METRICS
from streams.engine import Engine
from streams.kinds import KINDS
from streams.log import Control, FrameHead, Kind, Tick, pack_frame
from streams.registry import encode_registry
from streams.ruleset import Rule, RuleSet, encode_ruleset


def warm_engine() -> None:
    """Take one frame and one tick through an engine that has a rule of every kind."""
    place = Place(0.0, 0.0, "0" * 15)
    devices = (
        Device("d", "device", "g", place, tuple(sorted(METRICS.keys() - {"fault_code"})), ("fault_code",)),
        Device("g", "gateway", "g", place, ("uptime_s",)),
    )
    registry = Registry((Gateway("g", 0, place),), devices)
    with tempfile.TemporaryDirectory() as folder:
        layout = Layout(Path(folder))
        layout.make()
        engine = Engine(0, layout)
        controls = (("registry", encode_registry(registry)), ("ruleset", encode_ruleset(sample_ruleset())))
        payloads = [
            (Kind.CONTROL, msgspec.json.encode(Control(what, 0, "warm", content=layout.put_blob(content))))
            for what, content in controls
        ]
        head = FrameHead(0, Lane.TELEMETRY, 1, 1, 0, 2, 0)
        frame = pack_frame(head, np.zeros(2, np.int64), np.zeros(2), np.array([0, 1], np.uint32))
        payloads += [(Kind.FRAME, frame), (Kind.TICK, msgspec.json.encode(Tick(0, 0)))]
        engine.process([Record(offset, 0, kind, payload) for offset, (kind, payload) in enumerate(payloads)])


def sample_ruleset() -> RuleSet:
    """Return a rule set with every kind's sample, and an absence on platform time."""
    whens = [yaml.safe_load(kind.SAMPLE)["when"] for kind in KINDS.values()]
    whens.append({"kind": "absence", "timeout": "90s", "clock": "platform"})
    return RuleSet(tuple(sample_rule(f"sample_{number}", when) for number, when in enumerate(whens)))


def sample_rule(name: str, when: dict[str, object]) -> Rule:
    """Return a rule with this condition on everything, or on gateways where it needs one."""
    rule = {
        "id": name,
        "title": {"zh": name, "en": name},
        "select": {"kind": "gateway" if "clock" in when else "device"},
        "when": when,
        "urgency": "normal",
        "correlate": {"by": "device", "cause": name, "within": "30min"},
        "confirm": {"policy": "at_once"},
        "case": {"kind": "case", "category": name},
        "source": "sample",
        "owner": "sample",
    }
    return convert(rule, Rule, Lines(name, None))
