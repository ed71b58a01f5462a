"""The hydraulics benchmark: events in a real solver's pressures, through the real path, the same for the same seed."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

wntr = pytest.importorskip("wntr", reason="WNTR is not installed: the networks cannot be solved")

from benchmarks.hydraulics.network import APART_S, DAY_S, Event, Network, Sensor  # noqa: E402
from benchmarks.hydraulics.run import Opened, device_of, measure, registry_of, score  # noqa: E402
from citybrain.errors import ConfigError  # noqa: E402
from citybrain.layout import Layout  # noqa: E402

NET3 = Path(str(wntr.__file__)).parent / "library" / "networks" / "Net3.inp"
has_net3 = pytest.mark.skipif(not NET3.exists(), reason="this WNTR brings no Net3.inp")

# A reservoir and a street of thin pipes with hydrants: what flows at its end is felt everywhere.
STREET = """[JUNCTIONS]
{junctions}
[RESERVOIRS]
 R 50
[PIPES]
{pipes}
[TIMES]
 Duration 24:00
 Hydraulic Timestep 1:00
 Pattern Timestep 1:00
[OPTIONS]
 Units LPS
 Headloss H-W
[COORDINATES]
{coordinates}
[END]
"""


@pytest.fixture(scope="module")
def street(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = [f"HY{n}" for n in range(1, 7)]
    path = tmp_path_factory.mktemp("net") / "street.inp"
    lines = {
        "junctions": "\n".join(f" {name} 10 0.5" for name in names),
        "pipes": "\n".join(f" P{n} {a} {b} 150 110 120 0 Open" for n, (a, b) in enumerate(zip(["R", *names], names))),  # noqa: B905
        "coordinates": "\n".join(f" {name} {n * 100} 0" for n, name in enumerate(["R", *names])),
    }
    path.write_text(STREET.format(**lines))
    return path


def test_named_hydrants_have_the_sensors(street: Path) -> None:
    network = Network(street, 1, 2, history_days=1, event_days=1)
    assert [sensor.node for sensor in network.sensors] == [f"HY{n}" for n in range(1, 7)]
    assert {sensor.zone for sensor in network.sensors} == {"zone-01"}
    assert network.quiet.shape == (2 * 288 + 1, 6)


def test_events_keep_their_distance_and_their_ranges(street: Path) -> None:
    network = Network(street, 5, 8, history_days=1, event_days=2)
    events = network.plan(8)
    assert events == Network(street, 5, 8, history_days=1, event_days=2).plan(8)
    assert events != Network(street, 6, 8, history_days=1, event_days=2).plan(8)
    assert [event.kind for event in events] == ["burst", "hydrant"] * 4
    assert events[0].start_s >= DAY_S
    assert events[-1].end_s <= network.days * DAY_S
    for event, following in itertools.pairwise(events):
        assert following.start_s >= event.end_s + APART_S
    for event in events:
        low, high = (10, 60) if event.kind == "burst" else (5, 30)
        assert low <= event.flow_lps <= high
        assert 1800 <= event.end_s - event.start_s <= 3 * 3600


def test_an_event_is_felt_while_it_lasts_and_leaves_no_trace(street: Path) -> None:
    network = Network(street, 1, 1, history_days=1, event_days=1)
    event = Event("burst", "HY6", 100_800, 104_400, 20.0)
    with_it = network.run([event])
    lower = network.quiet - with_it
    during = slice(event.start_s // 300, event.end_s // 300)
    assert lower[during].min(axis=0)[5] > 0.03
    assert np.abs(np.delete(lower, np.r_[during], axis=0)).max() < 1e-6
    assert np.array_equal(network.run([]), network.quiet)
    felt_mpa = network.felt_mpa(event, [], with_it)
    assert felt_mpa == pytest.approx(np.sort(lower[during], axis=1)[:, -3].max(), abs=0.003)


@has_net3
def test_a_week_of_timed_controls_goes_on() -> None:
    network = Network(NET3, 3, 4)
    assert (network.days, len(network.sensors)) == (14, 55)
    names = [name for name, _ in network.model.controls() if name.startswith("again-")]
    assert len(names) >= 14  # pump 10, twice a day, in the second week
    columns = network.columns
    first, second = (network.quiet[day * 288 : (day + 1) * 288, columns].mean() for day in (5, 12))
    assert abs(first - second) < 0.02
    assert network.quiet[:, columns].min() >= 0.2
    spread = network.quiet[:, columns].std(axis=0)
    assert spread.max() > 0.01  # demand varies


def test_pressures_become_cases_the_same_for_the_same_seed(street: Path, tmp_path: Path) -> None:
    found = []
    for name in ("one", "other"):
        network = Network(street, 4, 2, history_days=1, event_days=1)
        result, rows = measure(network, 2, Layout(tmp_path / name))
        found.append(({key: value for key, value in result.items() if not key.endswith("seconds")}, rows))
        assert result["dropped"] == 0
        assert result["readings"] == 2 * 288 * 6 + 2 * 1440
    (first, rows), (second, _) = found
    assert first | {"hydraulics_s": 0} == second | {"hydraulics_s": 0}
    assert first["causes"] == sum(row["counts"] for row in rows) >= 1
    assert first["found_15min"] >= 1
    assert first["false_cases_per_day"] == 0


def case(at_s: int) -> Opened:
    return Opened(at_s, "water_main_burst", "hyd-1")


def test_what_a_case_counts_for() -> None:
    day = 5 * DAY_S
    events = [Event("burst", "a", day + n * 20_000, day + n * 20_000 + 3600, 30.0) for n in range(4)]
    opened = [
        case(1000),  # in the history
        case(day + 600), case(day + 7000),  # two of the first: the second within 2 h after it
        case(day + 20_000 + 1200),  # of the second, too late for a quarter of an hour
        case(day + 40_000 - 1), case(day + 40_000 + 3600 + APART_S),  # before the third, and too long after it
        case(day + 60_000 + 300),  # of the fourth, which does not count
    ]  # fmt: skip
    assert score(events, [0.03, 0.025, 0.2, 0.01], opened, 9) == {
        "causes": 3, "found_15min": 1, "one_case": 1, "doubled": 1, "missed": 1, "false_cases_per_day": 0.222,
        "delay_s_median": 900, "events": 4, "small": 1, "small_found": 1, "history_cases": 1, "days": 14,
    }  # fmt: skip


def test_nothing_due_is_no_error() -> None:
    assert score([], [], [], 9)["delay_s_median"] is None


def test_the_registry_holds_zones_together() -> None:
    sensors = [Sensor(f"n {n}", f"zone-{1 + n % 2:02d}", n, float(n), 0.0) for n in range(50)]
    registry = registry_of(sensors)
    shards = {gateway.id: gateway.shard for gateway in registry.gateways}
    by_zone: dict[str, set[int]] = {}
    for device in registry.devices:
        if device.kind == "hydrant":
            by_zone.setdefault(device.zone, set()).add(shards[device.gateway])
    assert by_zone == {"zone-01": {0}, "zone-02": {1}}
    assert device_of(sensors[7]) == "hyd-n_7"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such network file"), ("[JUNCTIONS]\n A x\n", "cannot read"),
        (STREET.format(junctions=" A 200 1", pipes=" P R A 100 200 120 0 Open", coordinates=" A 0 0\n R 1 1"),
         "nowhere"),
    ],
)  # fmt: skip
def test_a_network_that_cannot_be_used_is_named(tmp_path: Path, content: str | None, words: str) -> None:
    path = tmp_path / "net.inp"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=words):
        Network(path, 1, 1, history_days=1, event_days=1)


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "benchmarks.hydraulics", "--inp", str(tmp_path / "none.inp"), "--json"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 3
    assert "none.inp" in done.stderr
    assert done.stdout == ""
