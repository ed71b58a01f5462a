"""Hours of the district through the whole product in one process: what is due is ordered, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from citybrain.cli import main
from citybrain.clock import DAY_MS, HOUR_MS, MINUTE_MS
from citybrain.errors import UsageError
from citybrain.layout import Layout
from citybrain.segments import Reader
from rules.files import library
from simulators.causes import Cause
from simulators.district import District, build
from simulators.faults import Schedule, read_truth
from simulators.field import BLOCK_MS, Field, Swap
from simulators.offline import ORIGIN_MS, LazyFiles, blocks, run_offline
from simulators.pipeline import Stream, prepare
from simulators.score import evaluate, read_orders
from simulators.sensors import VITALS_MS, Sensors
from streams.log import Kind, frame_head
from streams.registry import encode_registry
from streams.ruleset import Rule, RuleSet

DAYS, SEED = 0.25, 506  # six hours with many kinds of causes
HOURS, CITY_SEED = 2, 43  # of the reference district


class Only(Schedule):
    """A schedule of given causes alone."""

    def __init__(self, district: District, *causes: Cause) -> None:
        super().__init__(district, district.seed, ORIGIN_MS)
        self._given = causes

    def causes(self, from_ms: int, to_ms: int) -> list[Cause]:
        return [cause for cause in self._given if from_ms <= cause.start_ms < to_ms]

    def _plan_block(self, block: int) -> tuple[Cause, ...]:
        return self._given if block == 0 else ()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("offline")
    result = run_offline(Layout(path), build(SEED), DAYS)
    assert result["readings"] > 350_000 * DAYS
    return path


def test_all_that_is_due_is_ordered_once_and_nothing_else(folder: Path) -> None:
    score = evaluate(read_truth(folder / "truth.jsonl"), read_orders(folder / "city.db"))
    assert len(score["by_kind"]) >= 10
    assert score["causes_due"] >= 8
    assert score["lookalikes"] >= 3
    assert score["wrong"] == {"missed": [], "multiple": [], "false": []}
    assert score["rescues"] == score["rescues_due"] > 0
    assert (score["place_right_share"], score["class_right_share"], score["unit_right_share"]) == (1.0, 1.0, 1.0)


def test_every_value_is_in_the_log(folder: Path) -> None:
    district = build(SEED)
    end_ms = ORIGIN_MS + round(DAYS * DAY_MS)
    schedule = Schedule(district, SEED, ORIGIN_MS, until_ms=end_ms)
    said = sum(
        len(reading.values)
        for gateway in district.registry.gateways
        for start_ms in range(ORIGIN_MS, end_ms, HOUR_MS)
        for _, reading in Sensors(district, gateway.id, schedule).between(start_ms, min(start_ms + HOUR_MS, end_ms))
    )
    for gateway in district.registry.gateways:
        said += sum(len(r.values) for _, r in Sensors(district, gateway.id, schedule).power_up(ORIGIN_MS))
    vitals = 5 * 2 * round(DAYS * DAY_MS / VITALS_MS)
    frames = [r for shard in (0, 1) for r in Reader(Layout(folder).log(shard)) if r.kind == Kind.FRAME]
    assert said + vitals - 10 <= sum(frame_head(frame.payload).values for frame in frames) <= said + vitals


def bare(rule: Rule) -> Rule:
    """Return the rule under a name that no permit knows, taking no notice of the service mode."""
    kept = [condition for condition in rule.when.get("all", ()) if condition["metric"] != "service_mode"]
    return replace(rule, id=f"bare_{rule.id}", unless=None, when=rule.when | ({"all": kept} if kept else {}))


def test_without_guards_and_permits_the_look_alikes_are_taken_for_real(tmp_path: Path) -> None:
    run_offline(Layout(tmp_path), build(SEED), DAYS, RuleSet(tuple(bare(rule) for rule in library().rules)))
    score = evaluate(read_truth(tmp_path / "truth.jsonl"), read_orders(tmp_path / "city.db"))
    assert score["recall"] == 1.0
    assert score["lookalike_cases"] >= 2  # the permitted use; a door failure during the inspection
    assert score["precision"] < 0.95


def test_processes_change_nothing(folder: Path, tmp_path: Path) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    for path, processes in ((alone, 0), (shared, 2)):
        run_offline(Layout(path), build(SEED), DAYS / 3, processes=processes)
    assert read_truth(alone / "truth.jsonl") == read_truth(shared / "truth.jsonl")
    assert read_orders(alone / "city.db") == read_orders(shared / "city.db") != []
    told, expected = ([list(Reader(Layout(p).transitions(shard))) for shard in (0, 1)] for p in (shared, alone))
    assert told == expected
    assert any(told)


def test_hours_of_the_city(tmp_path: Path) -> None:
    district = build(CITY_SEED, "reference")
    result = run_offline(Layout(tmp_path), district, HOURS / 24, processes=0)
    assert result["readings"] > 100_000 * HOURS
    score = evaluate(read_truth(tmp_path / "truth.jsonl"), read_orders(tmp_path / "city.db"))
    assert score["causes_due"] >= 3
    assert score["wrong"] == {"missed": [], "multiple": [], "false": []}
    assert score["place_right_share"] == score["class_right_share"] == 1.0


def test_a_replaced_sensor_goes_on_as_its_asset(tmp_path: Path) -> None:
    district, layout = build(CITY_SEED, "reference"), Layout(tmp_path)
    registry, end_ms = district.registry, ORIGIN_MS + HOUR_MS
    device = next(d for d in registry.devices if d.kind == "hydrant" and "mains" in d.tags)
    shard = next(g.shard for g in registry.gateways if g.id == device.gateway)
    active = prepare(layout, registry, library(), ORIGIN_MS, CITY_SEED)
    later = replace(registry, devices=tuple(replace(d, sensor="new") if d is device else d for d in registry.devices))
    swap = Swap(ORIGIN_MS + 20 * MINUTE_MS, device.id, "new", layout.put_blob(encode_registry(later)))
    stream = Stream(layout, registry, (shard,), files=LazyFiles())
    stream.start(ORIGIN_MS, active)
    field = Field(stream, Schedule(district, CITY_SEED, ORIGIN_MS, until_ms=end_ms), (swap,))
    field.start(ORIGIN_MS)
    for start_ms, to_ms in blocks(end_ms):
        field.block(start_ms, to_ms)
    said_twice = field.readings - stream.ingested.values["readings_total"]  # in one message they are one reading
    assert 0 < said_twice < 0.006 * field.readings
    assert not [name for name in stream.ingested.values if name.startswith(("dropped", "quarantined"))]
    stream.close()


def test_a_backlog_traps_nobody(tmp_path: Path) -> None:
    """A line that comes back tells hours of events and of telemetry, in two rows: no ride becomes a rescue."""
    district, layout = build(21, "reference"), Layout(tmp_path)
    gateway = next(gateway for gateway in district.registry.gateways if gateway.id == "gw-32")
    start_ms = ORIGIN_MS + 95 * HOUR_MS
    cut = Cause("cut", "gateway_offline", start_ms + 3_279_000, start_ms + 4_803_825, gateway.id, (gateway.id,))
    stream = Stream(layout, district.registry, (gateway.shard,), files=LazyFiles(), seed=21)
    stream.start(start_ms, prepare(layout, district.registry, library(), start_ms, 21))
    field = Field(stream, Only(district, cut), ())
    field.start(start_ms)
    halves = range(start_ms, start_ms + 2 * HOUR_MS, BLOCK_MS)
    told = [(t.rule, t.subject) for from_ms in halves for t in field.block(from_ms, from_ms + BLOCK_MS)]
    assert set(told) == {("gateway_offline", gateway.id)}
    stream.close()


def test_the_command_line_scores_the_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", str(folder), "--json"]) == 0
    assert '"recall":1.0' in capsys.readouterr().out


def test_a_folder_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UsageError, match="not empty"):
        run_offline(Layout(tmp_path), build(SEED), 1)
    with pytest.raises(UsageError, match="--days 0"):
        run_offline(Layout(tmp_path / "new"), build(SEED), 0)


def test_lazy_files_are_read_back_before_and_after_they_are_synced(tmp_path: Path) -> None:
    files = LazyFiles()
    handle = files.append(tmp_path / "some")
    handle.write(b"one")
    handle.sync()
    assert files.read(tmp_path / "some") == b"one"
    files.flush()
    handle.close()
    assert files.read(tmp_path / "some") == b"one"
