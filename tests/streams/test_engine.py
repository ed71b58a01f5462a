"""The engine against its reference in plain Python: random logs, random batches, random crashes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from citybrain.errors import NotFound, StorageError
from citybrain.layout import Layout
from citybrain.model import Edge, Lane, Transition
from citybrain.segments import Record
from streams.engine import Engine, latest_from_snapshot
from streams.log import FrameHead, Kind, pack_frame
from streams.ruleset import RuleSet, encode_ruleset
from streams.snapshot import load_snapshot, save_snapshot
from tests.engine_logs import OTHER_RULES, REGISTRIES, RULES, START, VARIED_RULES, Log, differs, make_rule
from tests.reference_engine import Reference


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    found = Layout(tmp_path)
    found.make()
    return found


@pytest.fixture
def log(layout: Layout) -> Log:
    found = Log(layout)
    found.registry(START, REGISTRIES[0])
    return found


def run(log: Log) -> list[Transition]:
    engine = Engine(0, log.layout)
    found = engine.process(log.records)
    assert found == Reference(0, log.layout).process(log.records)
    return found


def brief(found: list[Transition]) -> list[tuple[str, str, str, int]]:
    return [(t.rule, t.subject, t.edge.value, t.at_ms - START) for t in found]


# --- random logs ----------------------------------------------------------------------------------------------------

DEVICES = ("a1", "a2", "b1", "b2", "a0")
value_of = {
    "pressure_mpa": st.sampled_from([1.0, 2.5, 3.0, 4.0, 5.0, 6.0]),
    "flow_lps": st.sampled_from([0.0, 4.0, 4.5, 5.5, 7.0, 7.5]),
    "cap_open": st.sampled_from([0.0, 1.0]),
    "fault_code": st.sampled_from([0.0, 1.0, 2.0, 3.0, 4.0, 9.0]),
}
values_on = {
    Lane.TELEMETRY: st.sampled_from(["pressure_mpa", "flow_lps"]),
    Lane.EVENT: st.sampled_from(["cap_open", "fault_code"]),
}


@st.composite
def logs(draw: st.DrawFn) -> list[tuple[str, Any]]:
    """Steps of a log: what happens, how much platform time passes before."""
    lane = st.sampled_from([Lane.TELEMETRY, Lane.TELEMETRY, Lane.EVENT])
    steps: list[tuple[str, Any]] = []
    for _ in range(draw(st.integers(5, 45))):
        after = draw(st.sampled_from([0, 1000, 7000, 15000, 15000, 29000, 45000, 120000]))
        what = draw(
            st.sampled_from(
                ["frame"] * 12 + ["burst"] * 3 + ["tick"] * 4 + ["ruleset", "registry", "override", "fault"]
            )
        )
        more: Any = None
        if what == "frame":
            where = draw(lane)
            gateway = draw(st.sampled_from("aab"))
            one = st.tuples(
                st.sampled_from([d for d in DEVICES if d[0] == gateway] + ([gateway] if where == 0 else [])),
                st.sampled_from([-70000, -12000, -3000, -1, 0, 0, 0, 1, 500, 5000]),
                values_on[where],
            )
            chosen = draw(st.lists(one, min_size=0, max_size=7))
            more = (gateway, where, [(d, m, shift, draw(value_of[m])) for d, shift, m in chosen])
        elif what == "burst":
            metric = draw(st.sampled_from(["pressure_mpa", "flow_lps", "fault_code", "fault_code"]))
            spaced = draw(st.sampled_from([1000, 6000, 12000, 31000]))
            values = draw(st.lists(value_of[metric], min_size=2, max_size=8))
            more = (draw(st.sampled_from(["a1", "a2", "b1"])), metric, spaced, values)
        elif what == "tick":
            more = draw(st.sampled_from([0, 0, 30000]))
        elif what in ("ruleset", "registry"):
            more = draw(st.integers(0, 2 if what == "ruleset" else 1))
        elif what == "override":
            rule = draw(st.sampled_from(["*", "low", "quiet", "gone", "code"]))
            areas = ["zone:z1", "grid:g2", "street:s1", "building:h1", "gateway:b"]
            subject = draw(st.sampled_from([*DEVICES, "a", "b", *areas]))
            start, length = draw(st.integers(-60, 60)), draw(st.integers(1, 200))
            more = (subject, rule, start * 1000, length * 1000)
        steps.append((what, (after, more)))
    return steps


def write(log: Log, steps: list[tuple[str, Any]]) -> None:
    """Write a log's steps as records."""
    now = START
    log.registry(now, REGISTRIES[0])
    log.ruleset(now, *VARIED_RULES)
    for what, (after, more) in steps:
        now += after
        if what == "frame":
            gateway, lane, values = more
            named = [(d, "uptime_s" if d == gateway else m, now + shift, v) for d, m, shift, v in values]
            log.frame(now, gateway, lane, named)
        elif what == "burst":
            device, metric, spaced, values = more
            now += spaced * len(values)
            times = [now - spaced * n for n in range(len(values))][::-1]
            where = Lane.EVENT if metric == "fault_code" else Lane.TELEMETRY
            log.frame(now, device[0], where, [(device, metric, t, v) for t, v in zip(times, values, strict=True)])
        elif what == "tick":
            log.tick(now, START if more == 0 else now - more)
        elif what == "ruleset":
            log.ruleset(now, *(RULES, OTHER_RULES, VARIED_RULES)[more])
        elif what == "registry":
            log.registry(now, REGISTRIES[more])
        elif what == "override":
            subject, rule, start, length = more
            log.control(now, "override", subject=subject, rule=rule, from_ms=now + start, until_ms=now + start + length)
        else:
            log.control(now, "fault", subject="a", rule="conflict")


def pieces(records: list[Record], cuts: list[int]) -> Iterator[list[Record]]:
    edges = [0, *sorted({cut % (len(records) + 1) for cut in cuts}), len(records)]
    for low, high in pairwise(edges):
        yield records[low:high]


@settings(max_examples=60, deadline=None)
@given(logs(), st.lists(st.integers(0, 60), max_size=8), st.lists(st.integers(0, 60), max_size=4))
def test_any_log_in_any_batches_with_any_restarts_gives_what_plain_python_gives(
    steps: list[tuple[str, Any]], cuts: list[int], crashes: list[int]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        layout = Layout(Path(folder))
        layout.make()
        log = Log(layout)
        write(log, steps)
        reference = Reference(0, layout)
        expected = reference.process(log.records)
        whole = Engine(0, layout)
        assert whole.process(log.records) == expected
        assert whole.counts["malformed"] == 0
        assert whole.counts["late"] == reference.late
        engine, found = Engine(0, layout), []
        for number, piece in enumerate(pieces(log.records, [*cuts, *crashes])):
            found += engine.process(piece)
            if number in crashes or len(crashes) > 2:
                content = engine.snapshot()
                engine = Engine(0, layout)
                engine.restore(content)
        assert found == expected
        assert engine.counts == whole.counts
        assert latest_from_snapshot(engine.snapshot())[:2] == (whole.registry, len(log.records))


# --- what single cases mean -------------------------------------------------------------------------------------------


def feed(log: Log, metric: str, values: list[tuple[int, float]], device: str = "a1") -> None:
    """Add a frame per (second, value), received when it was observed."""
    lane = Lane.EVENT if metric in ("cap_open", "fault_code") else Lane.TELEMETRY
    for second, value in values:
        log.frame(START + second * 1000, device[0], lane, [(device, metric, START + second * 1000, value)])


def test_a_threshold_raises_after_its_delay_and_clears_behind_its_deadband(log: Log) -> None:
    log.ruleset(START, RULES[0])
    feed(log, "pressure_mpa", [(0, 2), (10, 2.5), (30, 4), (40, 5), (50, 3.5), (60, 6), (95, 6)])
    found = run(log)
    assert brief(found) == [("low", "a1", "raise", 20_000), ("low", "a1", "clear", 70_000)]
    assert msgspec.structs.astuple(found[0].evidence) == ("pressure_mpa", 2.5, 3.0, START, 1)
    assert msgspec.structs.astuple(found[1].evidence) == ("pressure_mpa", 6.0, 5.0, START + 40_000, 1)
    assert found[0].ruleset == log.layout.put_blob(encode_ruleset(RuleSet((RULES[0],))))


def test_a_condition_lost_before_its_delay_raises_nothing(log: Log) -> None:
    log.ruleset(START, RULES[0])
    feed(log, "pressure_mpa", [(0, 2), (19, 5), (21, 2), (40, 5), (100, 5)])
    assert run(log) == []


def test_a_deadline_fires_while_its_own_series_is_silent(log: Log) -> None:
    log.ruleset(START, RULES[0])
    feed(log, "pressure_mpa", [(0, 2)])
    feed(log, "uptime_s", [(10, 1), (20, 2)], "a")
    assert brief(run(log)) == [("low", "a1", "raise", 20_000)]


def test_another_gateways_time_fires_nothing(log: Log) -> None:
    log.ruleset(START, RULES[0])
    feed(log, "pressure_mpa", [(0, 2)])
    feed(log, "uptime_s", [(10, 1), (90, 2)], "b")
    assert run(log) == []


def test_a_count_needs_beginnings_and_a_window(log: Log) -> None:
    log.ruleset(START, RULES[4])
    feed(log, "fault_code", [(0, 2), (20, 3), (60, 0), (100, 2), (115, 0)])  # 2 then 3: one trouble; 100 s apart
    feed(log, "fault_code", [(150, 2), (160, 2), (170, 0)])
    found = run(log)
    assert brief(found) == [("codes", "a1", "raise", 160_000), ("codes", "a1", "clear", 170_000)]
    assert msgspec.structs.astuple(found[0].evidence) == ("fault_code", 2.0, None, START + 100_000, 2)


def test_guards_stop_a_beginning_and_never_clear(log: Log) -> None:
    log.ruleset(START, RULES[3])
    feed(log, "fault_code", [(0, 4)])  # nobody in the car as far as we know
    feed(log, "cap_open", [(5, 1)])
    feed(log, "fault_code", [(10, 4)])
    feed(log, "cap_open", [(15, 0)])
    feed(log, "fault_code", [(20, 4), (30, 0)])
    assert brief(run(log)) == [("code", "a1", "raise", 10_000), ("code", "a1", "clear", 30_000)]


def test_a_future_clock_is_clamped_and_cannot_run_ahead(log: Log) -> None:
    log.ruleset(START, RULES[0])
    log.frame(START, "a", Lane.TELEMETRY, [("a1", "pressure_mpa", START + 3_600_000, 2.0)])
    feed(log, "pressure_mpa", [(10, 2), (25, 2)])
    assert brief(run(log)) == [("low", "a1", "raise", 22_000)]


def test_a_device_that_is_silent_is_absent_but_not_while_its_gateway_is_cut_off(log: Log) -> None:
    log.ruleset(START, RULES[5])
    feed(log, "flow_lps", [(0, 1)], "a2")
    feed(log, "uptime_s", [(0, 1), (7200, 2), (7210, 3)], "a")  # two hours cut off count for 30 s
    assert run(log) == []
    feed(log, "uptime_s", [(7225, 4)], "a")
    feed(log, "flow_lps", [(7230, 1)], "a2")
    found = run(log)
    assert brief(found) == [("quiet", d, "raise", 7_220_000) for d in ("a1", "a2")] + [
        ("quiet", "a2", "clear", 7_230_000)
    ]
    assert found[1].evidence.since_ms == START


def test_silence_clears_nothing_else(log: Log) -> None:
    log.ruleset(START, RULES[0], RULES[5])
    feed(log, "pressure_mpa", [(0, 2), (20, 2)])
    feed(log, "uptime_s", [(second, 1) for second in range(30, 400, 10)], "a")
    assert [(t.rule, t.edge) for t in run(log) if t.subject == "a1"] == [("low", Edge.RAISE), ("quiet", Edge.RAISE)]


def test_a_gateway_is_absent_on_platform_time_but_not_while_the_platform_was_down(log: Log) -> None:
    log.ruleset(START, RULES[6])
    feed(log, "uptime_s", [(0, 1)], "a")
    log.tick(START + 40_000, START)
    log.tick(START + 300_000, START + 280_000)
    assert run(log) == []
    log.tick(START + 330_000, START + 280_000)
    feed(log, "uptime_s", [(335, 1)], "a")
    found = run(log)
    assert brief(found) == [("gone", g, "raise", 320_000) for g in "ab"] + [("gone", "a", "clear", 335_000)]


def test_an_override_mutes_until_it_ends(log: Log) -> None:
    log.ruleset(START, RULES[1], RULES[5])
    window = {"from_ms": START + 10_000, "until_ms": START + 100_000}
    log.control(START, "override", subject="a1", rule="*", **window)
    feed(log, "flow_lps", [(10, 9)])
    feed(log, "uptime_s", [(second, 1) for second in range(15, 135, 5)], "a")
    feed(log, "flow_lps", [(135, 9)])
    found = [t for t in brief(run(log)) if t[1] == "a1"]
    assert found == [
        ("quiet", "a1", "raise", 100_000),
        ("flow", "a1", "raise", 135_000),
        ("quiet", "a1", "clear", 135_000),
    ]


@pytest.mark.parametrize("subject", ["zone:z1", "building:h1", "gateway:a", "grid:g1", "street:s1"])
def test_an_override_of_an_area_mutes_its_devices(log: Log, subject: str) -> None:
    log.ruleset(START, RULES[1])
    log.control(START, "override", subject=subject, rule="flow", from_ms=START, until_ms=START + 60_000)
    log.control(START, "fault", subject="a", rule="conflict")
    for device in ("a1", "a2", "b1"):
        feed(log, "flow_lps", [(10, 9)], device)
    expected = {"zone:z1": {"a2"}, "grid:g1": {"a2"}, "street:s1": set()}.get(subject, {"b1"})
    assert {t.subject for t in run(log)} == expected


def test_an_override_of_nobody_is_told(log: Log) -> None:
    log.ruleset(START, RULES[1])
    for subject in ("zone:none", "none", "zone:", "cell:x"):
        log.control(START, "override", subject=subject, rule="*", from_ms=START, until_ms=START + 60_000)
    engine = Engine(0, log.layout)
    engine.process(log.records)
    assert [text.partition(": ")[2] for text in engine.warnings] == [
        f"an override of {subject!r}: no such device or area; it mutes nobody"
        for subject in ("zone:none", "none", "zone:", "cell:x")
    ]


FLOW = {"kind": "threshold", "metric": "flow_lps", "above": 5, "deadband": 1, "off_delay": "10s"}


def test_an_override_of_a_rule_ends_with_the_first_tick_after_it(log: Log) -> None:
    log.ruleset(START, make_rule("flow", FLOW, overrides=[differs({"device": "a1"}, 1, above=8)]))
    feed(log, "flow_lps", [(10, 7), (59, 7)])
    log.tick(START + 59_000, START)
    feed(log, "flow_lps", [(70, 7)])  # it is over, but the log has not said so yet
    log.tick(START + 75_000, START)
    feed(log, "flow_lps", [(80, 7)])
    assert brief(run(log)) == [("flow", "a1", "raise", 80_000)]


def test_what_is_raised_stays_raised_when_an_override_ends(log: Log) -> None:
    log.ruleset(START, make_rule("flow", FLOW, overrides=[differs({"zone": "z1"}, 1, above=2)]))
    for device in ("a1", "a2"):
        feed(log, "flow_lps", [(10, 4.5)], device)
    log.tick(START + 61_000, START)
    feed(log, "flow_lps", [(70, 4.5), (75, 3.5), (90, 3.5)])
    found = run(log)
    assert brief(found) == [("flow", "a1", "raise", 10_000), ("flow", "a1", "clear", 85_000)]
    assert [t.evidence.limit for t in found] == [2.0, 4.0]


def test_overrides_change_with_the_rule_set_and_keep_whoever_they_do_not_concern(log: Log) -> None:
    slow = {**FLOW, "on_delay": "30s"}
    log.ruleset(START, make_rule("flow", slow))
    for device in ("a1", "a2"):
        feed(log, "flow_lps", [(0, 9)], device)
    log.ruleset(START + 10_000, make_rule("flow", slow, overrides=[differs({"device": "a1"}, 60, above=7)]))
    feed(log, "uptime_s", [(40, 1)], "a")
    assert brief(run(log)) == [("flow", "a2", "raise", 30_000)]  # a1 began anew, with its next value


def test_a_rule_that_selects_nothing_or_everything_is_told_and_breaks_nothing(log: Log) -> None:
    log.ruleset(
        START,
        make_rule("flow", FLOW),
        make_rule("cars", FLOW, "elevator"),
        make_rule("moving", {**FLOW, "metric": "moving"}),
        make_rule("all", {"kind": "absence", "timeout": "1h"}, select={"street": "s1"}),
        make_rule("over", FLOW, overrides=[differs({"zone": "none"}, -1, above=3)]),
    )
    feed(log, "flow_lps", [(10, 9)])
    engine = Engine(0, log.layout)
    engine.process([Record(0, START, Kind.TICK, msgspec.json.encode({"at": START, "up_since": START}))])
    engine.offset = 0
    assert {t.rule for t in engine.process(log.records)} == {"flow", "over"}
    assert [text.partition("rule ")[2] for text in engine.warnings] == [
        "cars select: selects none of 7 devices",
        "moving select: selects 4 of 7 devices, and none of them has moving",
        "all select: selects 7 of all 7 devices, of several kinds",
        "over overrides[0].until: is over since 2025-12-31T23:59:00.000Z; it does nothing",
        "over overrides[0].select: selects none of the rule's devices",
    ]


def test_a_late_value_is_counted_and_ignored(log: Log) -> None:
    log.ruleset(START, RULES[1])
    feed(log, "flow_lps", [(10, 1)])
    log.frame(START + 20_000, "a", Lane.TELEMETRY, [("a1", "flow_lps", START + 9_999, 9.0)])
    engine = Engine(0, log.layout)
    assert engine.process(log.records) == []
    assert (engine.counts["late"], engine.counts["used"]) == (1, 1)


def test_a_shard_watches_its_own_gateways_only(log: Log) -> None:
    log.ruleset(START, RULES[6])
    log.tick(START + 60_000, START)
    assert {t.subject for t in run(log)} == {"a", "b"}


def test_an_alarm_of_a_rule_that_is_taken_out_is_cleared(log: Log) -> None:
    log.ruleset(START, RULES[1], RULES[0])
    feed(log, "flow_lps", [(0, 9)])
    log.ruleset(START + 5_000, RULES[0])
    assert brief(run(log)) == [("flow", "a1", "raise", 0), ("flow", "a1", "clear", 5_000)]


def test_a_rule_whose_limit_changes_keeps_its_alarm_and_does_not_raise_it_again(log: Log) -> None:
    log.ruleset(START, RULES[1])
    feed(log, "flow_lps", [(0, 9)])
    log.ruleset(
        START + 5_000, make_rule("flow", {"kind": "threshold", "metric": "flow_lps", "above": 8, "deadband": 1})
    )
    feed(log, "flow_lps", [(10, 9), (20, 7)])
    assert brief(run(log)) == [("flow", "a1", "raise", 0), ("flow", "a1", "clear", 20_000)]


def test_nothing_happens_before_a_registry_and_a_rule_set_are_there(layout: Layout) -> None:
    log = Log(layout)
    feed(log, "flow_lps", [(0, 9)])
    engine = Engine(0, layout)
    assert engine.process(log.records) == []
    assert engine.counts["inactive"] == 1
    assert latest_from_snapshot(engine.snapshot())[:2] == ("", 1)


# --- bad input ------------------------------------------------------------------------------------------------------


def test_records_that_are_none_are_counted_and_the_rest_goes_on(log: Log) -> None:
    log.ruleset(START, RULES[1])
    log.add(Kind.FRAME, START, b"short")
    log.add(Kind.FRAME, START, log.records[0].payload * 3)
    log.add(Kind.TICK, START, b"{}")
    log.add(Kind.CONTROL, START, b"[")
    foreign = FrameHead(1, Lane.TELEMETRY, 1, 1, START, 2, 0)
    arrays = np.full(2, START), np.zeros(2), np.array([0, 999], np.uint32)
    log.add(Kind.FRAME, START, pack_frame(foreign, *arrays))
    feed(log, "flow_lps", [(0, 9)])
    engine = Engine(0, log.layout)
    assert [t.rule for t in engine.process(log.records)] == ["flow"]
    assert (engine.counts["malformed"], engine.counts["foreign"]) == (4, 2)
    assert "log 0 offset 2: not a frame record; skipped" in engine.warnings
    assert len(engine.warnings) == 4


def test_a_rule_set_that_is_wrong_is_refused_and_the_present_one_stays(log: Log) -> None:
    log.ruleset(START, RULES[1])
    log.ruleset(START, make_rule("flow", {"kind": "treshold", "metric": "flow_lps"}))
    feed(log, "flow_lps", [(0, 9)])
    engine = Engine(0, log.layout)
    assert [t.rule for t in engine.process(log.records)] == ["flow"]
    assert "offset 2: not activated" in engine.warnings[0]
    assert "did you mean 'threshold'" in engine.warnings[0]
    assert engine.counts["malformed"] == 1


def test_content_that_is_missing_stops_the_engine(log: Log) -> None:
    log.control(START, "ruleset", content="0" * 64)
    with pytest.raises(NotFound, match="0000"):
        Engine(0, log.layout).process(log.records)


def test_a_snapshot_of_another_version_shard_or_that_is_damaged_is_refused(log: Log) -> None:
    log.ruleset(START, *RULES)
    engine = Engine(0, log.layout)
    engine.process(log.records)
    content = engine.snapshot()
    with pytest.raises(StorageError, match="shard 0, not 1"):
        Engine(1, log.layout).restore(content)
    header, arrays = load_snapshot(content)
    with pytest.raises(StorageError, match="format 9"):
        Engine(0, log.layout).restore(save_snapshot(msgspec.structs.replace(header, format=9), arrays))
    for broken in (b"", content[:-40], content[:2000] + b"?" * 50 + content[2050:]):
        with pytest.raises(StorageError, match="snapshot"):
            Engine(0, log.layout).restore(broken)


def test_a_frozen_engine_is_not_moved_by_what_comes_after(log: Log) -> None:
    log.ruleset(START, *RULES)
    feed(log, "pressure_mpa", [(0, 2), (10, 2), (30, 4), (40, 6)])
    cut = len(log.records)
    feed(log, "pressure_mpa", [(60, 6), (75, 6), (90, 2), (120, 2)])
    engine = Engine(0, log.layout)
    before = engine.process(log.records[:cut])
    frozen = engine.freeze()
    after = engine.process(log.records[cut:])
    again = Engine(0, log.layout)
    again.restore(save_snapshot(*frozen))
    assert again.offset == cut
    assert again.process(log.records) == after
    assert [t.edge for t in [*before, *after] if t.rule == "low"] == [Edge.RAISE, Edge.CLEAR, Edge.RAISE]


def test_the_latest_values_are_read_from_a_snapshot(log: Log) -> None:
    log.ruleset(START, *RULES)
    feed(log, "flow_lps", [(0, 9), (7, 8)])
    engine = Engine(0, log.layout)
    engine.process(log.records)
    registry, offset, last_t, last_v = latest_from_snapshot(engine.snapshot())
    series = log.index.series("a1", "flow_lps")
    assert (registry, offset) == (engine.registry, len(log.records))
    assert (last_t[series], last_v[series]) == (START + 7_000, 8.0)
    assert np.isnan(last_v).sum() == log.index.n_series - 1
