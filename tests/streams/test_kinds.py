"""Every rule kind passes the same checks; the docs know every kind, field and rule."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from citybrain.config import Lines, convert
from citybrain.layout import Layout
from citybrain.model import Evidence, Lane
from rules.files import library
from streams.engine import Engine
from streams.kinds import KINDS, Kind
from streams.kinds.absence import METRIC
from streams.ruleset import Rule, problems
from streams.warm import sample_rule, sample_ruleset
from tests.engine_logs import REGISTRIES, START, Log, make_rule
from tests.reference_engine import Reference

DOCS = (Path(__file__).parents[2] / "docs" / "rules.md").read_text(encoding="utf-8")

kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))


def parameters_of(kind: Kind) -> object:
    return convert(yaml.safe_load(kind.SAMPLE)["when"], kind.Parameters, Lines("sample", None))


@kinds
def test_the_sample_is_valid(kind: Kind) -> None:
    assert kind.problems(parameters_of(kind)) == []
    assert [rule for rule in sample_ruleset().rules if problems(rule)] == []


@kinds
def test_the_explanation_comes_in_two_languages_and_names_the_number(kind: Kind) -> None:
    parameters = parameters_of(kind)
    metric = next(iter(kind.metrics(parameters)), "")
    evidence = Evidence(metric, 41.5, 0.14, 0, 7)
    texts = {language: kind.explain(parameters, evidence, language) for language in ("zh", "en")}
    assert texts["zh"] != texts["en"]
    assert all("41.5" in text or "7" in text for text in texts.values())
    unknown = kind.explain(parameters, Evidence(metric, None, None, 0), "zh")
    assert unknown


@kinds
def test_the_docs_describe_the_kind_and_its_fields(kind: Kind) -> None:
    name = next(name for name, module in KINDS.items() if module is kind)
    assert f"\n### {name}\n" in DOCS
    for field in kind.Parameters.__struct_fields__:
        assert field == "kind" or f"`{field}`" in DOCS, field


def test_the_docs_describe_every_field_of_a_rule_and_every_rule_we_ship() -> None:
    assert [name for name in Rule.__struct_fields__ if f"`{name}`" not in DOCS] == []
    assert [rule.id for rule in library().rules if f"`{rule.id}`" not in DOCS] == []
    assert METRIC in DOCS


LOW = {"metric": "pressure_mpa", "below": 0.14}
WET = {"metric": "water_present", "above": 0.5}


@pytest.mark.parametrize(
    ("when", "field", "what"),
    [
        ({"kind": "threshold", "metric": "flow_lps"}, "when", "exactly one of above, below"),
        ({"kind": "threshold", "metric": "flow_lps", "above": 1, "below": 2}, "when.above", "exactly one"),
        ({"kind": "threshold", "metric": "flow_lps", "above": 1, "deadband": -1}, "when.deadband", "0 or more"),
        (
            {"kind": "threshold", "metric": "flow_lps", "above": 1, "deadband": float("nan")},
            "when.deadband",
            "0 or more",
        ),
        ({"kind": "threshold", "metric": "flow_lp", "above": 1}, "when.metric", "did you mean 'flow_lps'"),
        (
            {"kind": "threshold", "metric": "flow_lps", "above": 1, "count": {"n": 17, "within": "1min"}},
            "when.count.n",
            "2..16",
        ),
        ({"kind": "threshold", "metric": "flow_lps", "above": 1, "on_dealy": "1s"}, "when.on_dealy", "'on_delay'"),
        ({"kind": "threshold", "metric": "flow_lps", "above": 1, "on_delay": "15 sec"}, "when.on_delay", "15 sec"),
        ({"kind": "device_code", "metric": "fault_code", "codes": [], "clear": [0]}, "when.codes", "at least one"),
        (
            {"kind": "device_code", "metric": "fault_code", "codes": [1], "clear": [1]},
            "when.clear",
            "stands in codes",
        ),
        ({"kind": "absence", "timeout": "0s"}, "when.timeout", "longer than 0"),
        ({"kind": "rate", "metric": "flow_lps", "within": "5min"}, "when", "exactly one of fall, rise"),
        ({"kind": "rate", "metric": "flow_lps", "fall": 1, "rise": 1, "within": "5min"}, "when.fall", "exactly one"),
        ({"kind": "rate", "metric": "flow_lps", "rise": -1, "within": "5min"}, "when.rise", "above 0"),
        ({"kind": "rate", "metric": "flow_lps", "rise": 1, "within": "0s"}, "when.within", "8 ms or more"),
        ({"kind": "rate", "metric": "flow_lps", "rise": 1, "within": "1s", "recover": 0}, "when.recover", "above 0"),
        ({"kind": "rate", "metric": "flow_lps", "rise": 1}, "when", "within"),
        ({"kind": "stuck", "metric": "flow_lps", "reports": 2, "lasting": "1h"}, "when.reports", "equal by chance"),
        ({"kind": "stuck", "metric": "flow_lps", "reports": 9, "lasting": "0s"}, "when.lasting", "longer than 0"),
        (
            {"kind": "stuck", "metric": "flow_lps", "reports": 9, "lasting": "1h", "tolerance": -1},
            "when.tolerance",
            "0 or more",
        ),
        ({"kind": "shift", "metric": "flow_lps", "shape": "level"}, "when", "at least one of up, down"),
        ({"kind": "shift", "metric": "flow_lps", "shape": "step", "up": 1}, "when.shape", "step"),
        ({"kind": "shift", "metric": "flow_lps", "shape": "level", "up": 0}, "when.up", "above 0"),
        ({"kind": "shift", "metric": "flow_lps", "shape": "level", "up": 1, "back": 2}, "when.back", "at most 1"),
        ({"kind": "shift", "metric": "flow_lps", "shape": "level", "up": 1, "spreads": -1}, "when.spreads", "0 or"),
        ({"kind": "shift", "metric": "flow_lps", "shape": "level", "up": 1, "reports": 0}, "when.reports", "1..1000"),
        (
            {"kind": "shift", "metric": "flow_lps", "shape": "spike", "up": 1, "accept": "1h"},
            "when.accept",
            "only with shape level",
        ),
        ({"kind": "composite"}, "when", "exactly one of all, any, at_least"),
        ({"kind": "composite", "all": [LOW, WET], "any": [LOW, WET]}, "when.any", "exactly one of all, any, at_least"),
        ({"kind": "composite", "all": [LOW]}, "when.all", "2..8 conditions, got 1"),
        ({"kind": "composite", "any": [LOW] * 9}, "when.any", "2..8 conditions, got 9"),
        ({"kind": "composite", "at_least": {"k": 3, "of": [LOW, WET]}}, "when.at_least.k", "1..2, got 3"),
        ({"kind": "composite", "all": [LOW, {"metric": "flow_lps"}]}, "when.all[1]", "exactly one of above, below"),
        (
            {"kind": "composite", "all": [LOW, WET | {"metric": "water"}]},
            "when.all[1].metric",
            "unknown metric 'water'",
        ),
        ({"kind": "composite", "all": [LOW, WET | {"deadband": -1}]}, "when.all[1].deadband", "0 or more"),
        ({"kind": "composite", "all": [LOW, WET | {"limit": 1}]}, "when.all[1].limit", "unknown field"),
        ({"kind": "composite", "any": [LOW, {"metric": "fault_code", "codes": [1]}]}, "when.any[1].clear", "together"),
        (
            {"kind": "composite", "any": [LOW, {"metric": "fault_code", "codes": [1], "clear": [1]}]},
            "when.any[1].clear",
            "stands in codes",
        ),
        ({"kind": "absense", "timeout": "1s"}, "when.kind", "did you mean 'absence'"),
        ({"metric": "flow_lps"}, "when.kind", "got missing"),
        ({"kind": "reported", "metric": "x"}, "when.metric", "unknown field"),
    ],
)
def test_wrong_parameters_are_named(when: dict[str, object], field: str, what: str) -> None:
    rule = msgspec.structs.replace(sample_rule("sample", {"kind": "reported"}), when=when)
    found = problems(rule)
    assert len(found) == 1
    assert found[0].where == f"rule sample:1 {field}"
    assert what in found[0].what


def test_explaining_loads_no_compiler() -> None:
    code = "import sys, streams.kinds, streams.ruleset, streams.engine; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_kernels_can_be_compiled_ahead() -> None:
    done = subprocess.run([sys.executable, "-m", "streams.kinds"], check=True, capture_output=True, text=True)
    assert done.stdout.startswith("kernels compiled: engine")


# --- kinds with a memory, against plain Python, whatever the intervals and the batches --------------------------------

amounts = st.sampled_from([0.5, 1.0, 2.0])
spans = st.sampled_from(["8ms", "30s", "4min", "1h"])
waits = st.sampled_from(["0s", "20s", "5min"])


def with_one_of(base: st.SearchStrategy[dict[str, Any]], *fields: str) -> st.SearchStrategy[dict[str, Any]]:
    """Return dictionaries of `base` with one amount more."""
    return st.tuples(base, st.sampled_from(fields), amounts).map(lambda it: it[0] | {it[1]: it[2]})


limits = with_one_of(
    st.fixed_dictionaries(
        {"metric": st.sampled_from(["pressure_mpa", "flow_lps", "cap_open"])},
        optional={"deadband": amounts, "fresh": spans, "unknown": st.just("met")},
    ),
    "above",
    "below",
)
coded = st.just({"metric": "fault_code", "codes": [1, 2], "clear": [0]})
several = st.lists(st.one_of(limits, coded), min_size=2, max_size=4)
WHENS = {
    "rate": with_one_of(
        st.fixed_dictionaries(
            {"metric": st.just("pressure_mpa"), "within": spans},
            optional={"bridge": spans, "settle": waits, "recover": st.sampled_from([0.2, 1.0]), "on_delay": waits},
        ),
        "fall",
        "rise",
    ),
    "stuck": st.fixed_dictionaries(
        {"metric": st.just("pressure_mpa"), "reports": st.integers(3, 5), "lasting": spans},
        optional={"tolerance": amounts, "off_delay": waits},
    ),
    "shift": st.fixed_dictionaries(
        {"metric": st.just("pressure_mpa"), "shape": st.just("level"), "up": amounts},
        optional={"down": amounts, "spreads": st.sampled_from([1.0, 3.0]), "back": st.sampled_from([0.3, 1.0]),
                  "reports": st.integers(1, 4), "accept": spans, "on_delay": waits},
    ),
    "spike": st.fixed_dictionaries(
        {"metric": st.just("pressure_mpa"), "shape": st.just("spike"), "down": amounts},
        optional={"up": amounts, "reports": st.integers(1, 4), "count": st.just({"n": 2, "within": "1h"})},
    ),
    "composite": st.one_of(
        several.map(lambda of: {"all": of}),
        several.map(lambda of: {"any": of, "off_delay": "20s"}),
        several.map(lambda of: {"at_least": {"k": 2, "of": of}, "on_delay": "5min"}),
    ),
}  # fmt: skip
gaps = st.sampled_from([0, 1, 20_000, 60_000, 60_000, 240_000, 3_600_000, 14_400_000])
levels = st.sampled_from([0.0, 0.5, 1.0, 1.0, 1.0, 1.5, 3.0])
names = st.sampled_from(["pressure_mpa"] * 4 + ["flow_lps", "cap_open", "fault_code"])


@pytest.mark.parametrize("name", WHENS)
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_kind_with_a_memory_does_what_plain_python_does(name: str, data: st.DataObject) -> None:
    when = {"kind": {"spike": "shift"}.get(name, name)} | data.draw(WHENS[name])
    said = data.draw(st.lists(st.tuples(gaps, names, levels), min_size=10, max_size=60))
    with tempfile.TemporaryDirectory() as folder:
        layout = Layout(Path(folder))
        layout.make()
        log, now = Log(layout), START
        log.registry(now, REGISTRIES[0])
        log.ruleset(now, make_rule("it", when))
        for gap, metric, value in said:
            now += gap
            lane = Lane.EVENT if metric in ("cap_open", "fault_code") else Lane.TELEMETRY
            log.frame(now, "a", lane, [("a1", metric, now, value if metric != "fault_code" else value // 1)])
        expected = Reference(0, layout).process(log.records)
        assert Engine(0, layout).process(log.records) == expected
        cut = data.draw(st.integers(0, len(log.records)))
        first, found = Engine(0, layout), []
        found += first.process(log.records[:cut])
        second = Engine(0, layout)
        second.restore(first.snapshot())
        assert found + second.process(log.records[cut:]) == expected


# --- what they mean -------------------------------------------------------------------------------------------------


@pytest.fixture
def city(tmp_path: Path) -> Log:
    layout = Layout(tmp_path)
    layout.make()
    return Log(layout)


def tell(log: Log, when: dict[str, Any], said: Sequence[tuple[float, float]]) -> list[str]:
    """Return what a rule makes of (minute, value) of the pressure, as `raise 3`; the reference must agree."""
    log.records.clear()
    log.registry(START, REGISTRIES[0])
    log.ruleset(START, make_rule("it", when))
    for minute, value in said:
        at = START + round(minute * 60_000)
        log.frame(at, "a", Lane.TELEMETRY, [("a1", "pressure_mpa", at, value)])
    found = Engine(0, log.layout).process(log.records)
    assert found == Reference(0, log.layout).process(log.records)
    return [f"{t.edge.value} {(t.at_ms - START) / 60_000:g}" for t in found]


RATE = {"kind": "rate", "metric": "pressure_mpa", "fall": 1, "within": "8min"}


def test_a_slow_fall_is_no_rate_and_a_fast_one_is_whatever_the_interval(city: Log) -> None:
    slow = [(minute, 5 - minute * 0.05) for minute in range(0, 60, 2)]
    fast = [(60, 2), (60.1, 1), (120, 2), (121, 2), (123, 0.9)]
    assert tell(city, RATE, slow + fast) == ["raise 60.1", "clear 120", "raise 123"]


def test_a_report_that_comes_alone_has_no_rate_unless_bridged(city: Log) -> None:
    said = [(0.0, 5.0), (240.0, 3.0), (480.0, 3.0)]
    assert tell(city, RATE, said) == []
    assert tell(city, RATE | {"bridge": "5h"}, [(at + 500, value) for at, value in said]) == ["raise 740", "clear 980"]


def test_a_rate_ends_at_its_new_level_or_where_it_came_from(city: Log) -> None:
    settled = [(0, 5), (1, 3), *((minute, 3) for minute in range(2, 30))]
    assert tell(city, RATE | {"settle": "15min"}, settled) == ["raise 1", "clear 22"]  # 8 min, and 15 since minute 7
    back = [(100, 5), (101, 3), (102, 3.9), (103, 4.4), (104, 4.5)]
    assert tell(city, RATE | {"settle": "15min"}, back) == ["raise 101", "clear 104"]


STUCK = {"kind": "stuck", "metric": "pressure_mpa", "tolerance": 0.1, "reports": 4, "lasting": "1h"}


def test_stuck_needs_reports_and_time_and_counts_no_silence(city: Log) -> None:
    assert tell(city, STUCK, [(minute, 3) for minute in range(50)]) == []  # 50 reports, too short
    assert tell(city, STUCK, [(100, 3), (400, 3.1), (700, 3.05)]) == []  # 10 h, but three reports
    assert tell(city, STUCK, [(800, 5), (810, 5.1), (820, 5.05), (850, 5), (860, 5), (900, 5.3)]) == [
        "raise 860",
        "clear 900",
    ]


SHIFT = {"kind": "shift", "metric": "pressure_mpa", "shape": "level", "up": 1.0, "reports": 3}


def test_a_level_raises_at_its_third_report_and_ends_when_it_is_back(city: Log) -> None:
    usual = [(minute, 3 + 0.2 * (minute % 3)) for minute in range(9)]
    away = [(10, 4.5), (11, 4.6), (12, 4.5), (13, 4.0), (14, 3.6)]
    assert tell(city, SHIFT, usual + away) == ["raise 12", "clear 14"]


def test_a_level_is_never_learned_unless_it_is_accepted(city: Log) -> None:
    said = [(minute, 3.0) for minute in range(9)] + [(minute, 6.0) for minute in range(10, 100)]
    assert tell(city, SHIFT, said) == ["raise 12"]
    again = [(at + 200, value) for at, value in said]
    assert tell(city, SHIFT | {"accept": "30min"}, again) == ["raise 212", "clear 240"]


def test_a_median_follows_a_rhythm_and_not_four_wild_values(city: Log) -> None:
    rising = [(float(minute), minute * 0.1) for minute in range(100)]
    assert tell(city, SHIFT | {"shape": "level", "reports": 1}, rising) == []
    wild = [(200.0 + n, 0.5 if n % 2 else 1.4) for n in range(9)] + [(210, 2.6)]
    assert tell(city, SHIFT | {"reports": 1}, wild) == ["raise 210"]


def test_a_spike_is_told_when_it_comes_back_and_a_level_is_none(city: Log) -> None:
    when = SHIFT | {"shape": "spike", "reports": 2}
    usual = [(minute, 3.0) for minute in range(9)]
    assert tell(city, when, [*usual, (10, 5), (11, 5), (12, 3), (13, 3)]) == ["raise 12", "clear 13"]
    assert tell(city, when, [(at + 100, v) for at, v in [*usual, (10, 5), (11, 5), (12, 5), (13, 3), (14, 3)]]) == []


def test_robust_spreads_widen_the_limit_of_a_noisy_series(city: Log) -> None:
    noisy = [(minute, 3.0 + minute * 7 % 9 / 4) for minute in range(9)]  # 3 to 5, half of it within 0.5 of 4
    said = [*noisy, (10, 5.6), (11, 7.0)]
    assert tell(city, SHIFT | {"reports": 1, "up": 1.5}, said) == ["raise 10"]
    assert tell(city, SHIFT | {"reports": 1, "up": 1.5, "spreads": 3}, said) == ["raise 11"]


def test_what_is_unknown_begins_nothing_and_what_grew_stale_ends_nothing(city: Log) -> None:
    when = {
        "kind": "composite",
        "all": [
            {"metric": "pressure_mpa", "below": 2, "fresh": "10min"},
            {"metric": "flow_lps", "above": 1},
        ],
    }
    log = city
    log.registry(START, REGISTRIES[0])
    log.ruleset(START, make_rule("it", when))
    for minute, metric, value in [
        (0, "flow_lps", 3), (1, "pressure_mpa", 1), (20, "flow_lps", 3), (30, "pressure_mpa", 5),
        (31, "pressure_mpa", 1), (50, "flow_lps", 0), (60, "flow_lps", 3), (61, "pressure_mpa", 1),
    ]:  # fmt: skip
        at = START + minute * 60_000
        log.frame(at, "a", Lane.TELEMETRY, [("a1", metric, at, value)])
    found = Engine(0, log.layout).process(log.records)
    assert found == Reference(0, log.layout).process(log.records)
    told = [(t.edge.value, (t.at_ms - START) // 60_000, t.evidence.metric, t.evidence.value) for t in found]
    assert told == [
        ("raise", 1, "pressure_mpa", 1.0),  # the last one completes it
        ("clear", 30, "pressure_mpa", 5.0),  # not at 20, when the pressure had grown old
        ("raise", 31, "pressure_mpa", 1.0),
        ("clear", 50, "flow_lps", 0.0),  # stale or not, one of two is gone for certain
        ("raise", 61, "pressure_mpa", 1.0),  # not at 60: the pressure is old
    ]


def test_a_device_that_lacks_a_metric_is_watched_where_the_rule_can_hold_without_it(city: Log) -> None:
    lacking = {"metric": "battery_v", "below": 3}
    has = {"metric": "pressure_mpa", "below": 2}
    assert tell(city, {"kind": "composite", "all": [has, lacking]}, [(0, 1)]) == []
    assert tell(city, {"kind": "composite", "any": [lacking, has]}, [(1, 1)]) == ["raise 1"]
    met = lacking | {"unknown": "met"}
    assert tell(city, {"kind": "composite", "all": [met, has]}, [(2, 1)]) == ["raise 2"]


def test_a_rule_that_changes_while_it_is_raised_knows_what_was_said_before(city: Log) -> None:
    of = [{"metric": "pressure_mpa", "below": 2}, {"metric": "flow_lps", "above": 1}]
    city.registry(START, REGISTRIES[0])
    city.ruleset(START, make_rule("it", {"kind": "composite", "all": of}))
    city.frame(START, "a", Lane.TELEMETRY, [("a1", "pressure_mpa", START, 1), ("a1", "flow_lps", START, 3)])
    city.ruleset(START, make_rule("it", {"kind": "composite", "all": of, "off_delay": "1min"}))
    later = START + 60_000
    city.frame(later, "a", Lane.TELEMETRY, [("a1", "pressure_mpa", later, 1)])  # still low, and the flow is known
    found = Engine(0, city.layout).process(city.records)
    assert found == Reference(0, city.layout).process(city.records)
    assert [t.edge.value for t in found] == ["raise"]
