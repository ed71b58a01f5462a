"""Rules, registries and logs that the tests of engine and worker share."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from citybrain.clock import iso
from citybrain.config import Lines, convert
from citybrain.layout import Layout
from citybrain.model import Cell, Device, Gateway, Lane, Place, Registry
from citybrain.segments import Record
from streams.log import Control, FrameHead, Kind, Tick, pack_frame
from streams.registry import Index, encode_registry
from streams.ruleset import Override, Rule, RuleSet, encode_ruleset

PLACE = Place(121.4, 31.2, "310107001001001")
THERE = Place(121.5, 31.2, "310107002001001")
CELLS = (Cell(PLACE.cell, "g1", "s1"), Cell(THERE.cell, "g2", "s1"))
START = 1_767_225_600_000


def make_rule(name: str, when: dict[str, Any], kind: str = "hydrant", **more: Any) -> Rule:
    """Return a rule of which only id, selection, condition and guards matter here."""
    text = {
        "id": name,
        "title": {"zh": name, "en": name},
        "select": {"kind": kind},
        "when": when,
        "urgency": "normal",
        "correlate": {"by": "device", "cause": name, "within": "30min"},
        "confirm": {"policy": "at_once"},
        "case": {"kind": "case", "category": "battery"},
        "source": "test",
        "owner": "test",
    }
    return convert(text | more, Rule, Lines(name, None))


def differs(select: dict[str, str], minutes: int, **when: Any) -> dict[str, Any]:
    """Return an override of a rule, in force until so many minutes after START."""
    until = iso(START + minutes * 60_000)
    return {"select": select, "when": when, "until": until, "reason": "test", "source": "test"}


LOW = {"kind": "threshold", "metric": "pressure_mpa", "below": 3, "deadband": 2, "on_delay": "20s", "off_delay": "30s"}
RULES = (
    make_rule("low", LOW),
    make_rule("flow", {"kind": "threshold", "metric": "flow_lps", "above": 5, "deadband": 1}),
    make_rule(
        "flows", {"kind": "threshold", "metric": "flow_lps", "above": 6, "on_delay": "5s",
                  "count": {"n": 3, "within": "4min"}}, unless={"metric": "cap_open", "at_least": 1},
    ),
    make_rule("code", {"kind": "device_code", "metric": "fault_code", "codes": [3, 4], "clear": [0, 1]}, "hydrant",
              only_while={"metric": "cap_open", "at_least": 1}),
    make_rule("codes", {"kind": "device_code", "metric": "fault_code", "codes": [2, 3], "clear": [0],
                        "count": {"n": 2, "within": "90s"}, "on_delay": "10s"}),
    make_rule("quiet", {"kind": "absence", "timeout": "50s"}),
    make_rule("gone", {"kind": "absence", "timeout": "40s", "clock": "platform"}, "gateway"),
    make_rule("conflict", {"kind": "reported"}, "gateway"),
    make_rule("drops", {"kind": "rate", "metric": "pressure_mpa", "fall": 2, "within": "40s", "settle": "15s"}),
    make_rule("climbs", {"kind": "rate", "metric": "flow_lps", "rise": 3, "within": "20s", "bridge": "1min",
                         "recover": 0.8, "off_delay": "6s"}),
    make_rule("same", {"kind": "stuck", "metric": "flow_lps", "tolerance": 0.5, "reports": 3, "lasting": "20s"}),
    make_rule("jumps", {"kind": "shift", "metric": "pressure_mpa", "shape": "level", "up": 1.5, "down": 2, "reports": 2,
                        "spreads": 2, "accept": "2min"}, only_while={"metric": "cap_open", "at_least": 1}),
    make_rule("spikes", {"kind": "shift", "metric": "flow_lps", "shape": "spike", "up": 1, "down": 1, "reports": 2}),
    make_rule("both", {"kind": "composite", "on_delay": "5s", "all": [
        {"metric": "pressure_mpa", "below": 4, "deadband": 1, "fresh": "40s"},
        {"metric": "flow_lps", "above": 4, "deadband": 0.5}]}),
    make_rule("either", {"kind": "composite", "any": [
        {"metric": "fault_code", "codes": [3, 4], "clear": [0, 1], "fresh": "1min"},
        {"metric": "flow_lps", "above": 7}, {"metric": "battery_v", "below": 3}]}),
    make_rule("two", {"kind": "composite", "off_delay": "5s", "at_least": {"k": 2, "of": [
        {"metric": "pressure_mpa", "below": 3}, {"metric": "pressure_mpa", "below": 5},
        {"metric": "cap_open", "above": 0.5, "fresh": "30s", "unknown": "met"}]}}),
)  # fmt: skip
OVERRIDES: dict[str, list[dict[str, Any]]] = {
    "low": [
        differs({"zone": "z1"}, 4, below=2.6, on_delay="7s"),
        differs({"device": "a1"}, 9, below=4.5, off_delay="5s"),
    ],
    "flows": [differs({"grid": "g2"}, 6, count={"n": 2, "within": "9min"})],
    "quiet": [differs({"street": "s1", "tag": "far"}, 5, timeout="25s")],
    "gone": [differs({"device": "b"}, 8, timeout="3min")],
    "drops": [differs({"zone": "z1"}, 7, fall=1.5)],
    "same": [differs({"building": "h1"}, 5, reports=4), differs({"kind": "hydrant"}, 9, lasting="5s")],
    "two": [differs({"zone": "z1"}, 3, off_delay="20s")],
}
VARIED_RULES = tuple(
    msgspec.structs.replace(rule, overrides=convert(OVERRIDES.get(rule.id, []), tuple[Override, ...], Lines("", None)))
    for rule in RULES
)
OTHER_RULES = (
    make_rule("low", {**LOW, "below": 4}),
    RULES[1],
    make_rule("code", {"kind": "device_code", "metric": "fault_code", "codes": [4], "clear": [0]}),
    RULES[4],
    make_rule("quiet", {"kind": "absence", "timeout": "70s"}),
    make_rule("gone", {"kind": "absence", "timeout": "60s", "clock": "platform"}, "gateway"),
    RULES[8],
    RULES[11],
    make_rule("both", {"kind": "composite", "all": [
        {"metric": "pressure_mpa", "below": 4}, {"metric": "cap_open", "above": 0}]}),
    RULES[14],
    RULES[15],
)  # fmt: skip


def make_registry(devices: tuple[str, ...]) -> Registry:
    """Return hydrants `<gateway><n>` behind gateways a, b (shard 0) and c (shard 1)."""
    gateways = tuple(Gateway(g, 1 if g == "c" else 0, PLACE) for g in "abc")
    metrics, events = ("pressure_mpa", "flow_lps"), ("cap_open", "fault_code")
    hydrants = tuple(
        Device(d, "hydrant", d[0], THERE if d[1] == "2" else PLACE, metrics, events, zone="z1" if d[1] == "1" else "z2",
               building="h1" if d[0] == "a" else "", tags=("far",) if d == "a2" else ())
        for d in devices
    )  # fmt: skip
    own = tuple(Device(g.id, "gateway", g.id, PLACE, ("uptime_s",)) for g in gateways)
    return Registry(gateways, (*hydrants, *own), CELLS)


REGISTRIES = (make_registry(("a1", "a2", "b1", "c1")), make_registry(("a0", "a2", "b1", "b2", "c1")))


class Log:
    """Builds records the way ingest does."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.records: list[Record] = []
        self.index = Index(REGISTRIES[0], "")

    def add(self, kind: Kind, received_at: int, payload: bytes) -> None:
        self.records.append(Record(len(self.records), received_at, kind, payload))

    def control(self, at: int, what: str, **more: Any) -> None:
        self.add(Kind.CONTROL, at, msgspec.json.encode(Control(what, at, "test", **more)))

    def registry(self, at: int, registry: Registry) -> None:
        self.index = Index(registry, "")
        self.control(at, "registry", content=self.layout.put_blob(encode_registry(registry)))

    def ruleset(self, at: int, *rules: Rule) -> None:
        self.control(at, "ruleset", content=self.layout.put_blob(encode_ruleset(RuleSet(rules))))

    def tick(self, at: int, up_since: int) -> None:
        self.add(Kind.TICK, at, msgspec.json.encode(Tick(at, up_since)))

    def frame(self, at: int, gateway: str, lane: Lane, values: list[tuple[str, str, int, float]]) -> None:
        """Add a frame of (device, metric, observed_at, value); what the registry does not know is left out."""
        known = [v for v in values if v[0] in self.index.device_index]
        series = [self.index.series(device, metric) for device, metric, _, _ in known]
        head = FrameHead(self.index.gateway_index[gateway], lane, 1, len(self.records) + 1, at, len(known), 0)
        times = np.array([t for _, _, t, _ in known], np.int64)
        numbers = np.array([v for _, _, _, v in known], np.float64)
        self.add(Kind.FRAME, at, pack_frame(head, times, numbers, np.array(series, np.uint32)))
