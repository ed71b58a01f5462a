"""Matching orders with causes, on inputs made by hand: each test shows a way to be wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from citybrain.clock import MINUTE_MS
from citybrain.db.schema import alarms, cases, incidents, metadata
from citybrain.db.store import open_store
from citybrain.errors import Damaged, NotFound
from simulators.faults import Due, Spot, Truth, read_truth, write_truth
from simulators.score import Order, evaluate, matches, percentile, read_orders, wilson_low

T0 = 1_767_225_600_000
PLACE = Spot("990101001001001", "001", "G1")


def cause(kind: str = "low_pressure", **other: Any) -> Truth:
    facts: dict[str, Any] = {
        "id": f"{kind}-1",
        "kind": kind,
        "start_ms": T0,
        "end_ms": T0 + 20 * MINUTE_MS,
        "subjects": ("hyd-1",),
        "place": PLACE,
        "unit": "water",
        "due": Due(case=1),
        "category": "hydrant_no_pressure",
        "lookalike": False,
    }
    return Truth(**(facts | other))


def order(number: int = 1, kind: str = "case", subject: str = "hyd-1", **other: Any) -> Order:
    facts: dict[str, Any] = {
        "id": number,
        "kind": kind,
        "subject": subject,
        "members": frozenset({subject}),
        "category": "hydrant_no_pressure",
        "cell": PLACE.cell,
        "street": PLACE.street,
        "grid": PLACE.grid,
        "unit": "water",
        "observed_at": T0 + 3 * MINUTE_MS,
        "opened_at": T0 + 3 * MINUTE_MS + 500,
    }
    return Order(**(facts | other))


CUT = cause(
    "power_cut_occupied",
    subjects=("lift-1", "lift-2", "lift-3"),
    due=Due(rescues=("lift-1", "lift-2")),
    category="elevator_trapped",
)
PERMITTED = cause("authorised_use", due=Due(), category=None, lookalike=True)


def test_a_cause_with_its_one_case_is_perfect() -> None:
    score = evaluate([cause()], [order()])
    assert (score["recall"], score["precision"], score["single_case_share"]) == (1.0, 1.0, 1.0)
    assert (score["place_right_share"], score["class_right_share"], score["unit_right_share"]) == (1.0, 1.0, 1.0)
    assert score["delay_s_median"] == 180.5
    assert score["wrong"] == {"missed": [], "multiple": [], "false": []}


@pytest.mark.parametrize(
    ("at_ms", "expected"),
    [
        (T0 - 2 * MINUTE_MS, True),
        (T0 - 2 * MINUTE_MS - 1, False),
        (T0 + 50 * MINUTE_MS, True),
        (T0 + 50 * MINUTE_MS + 1, False),
    ],
)
def test_the_window_reaches_from_two_minutes_before_to_thirty_after(at_ms: int, expected: bool) -> None:
    assert matches(order(observed_at=at_ms), cause()) is expected


def test_a_member_of_the_incident_is_enough_for_a_match_and_a_stranger_is_not() -> None:
    assert matches(order(subject="hyd-9", members=frozenset({"hyd-9", "hyd-1"})), cause())
    assert not matches(order(subject="hyd-9"), cause())


def test_a_missed_cause_and_a_false_case_are_counted_apart() -> None:
    score = evaluate([cause()], [order(subject="hyd-9")])
    assert (score["found"], score["recall"], score["false_cases"], score["precision"]) == (0, 0.0, 1, 0.0)
    assert score["wrong"]["missed"] == ["low_pressure-1"]
    assert score["delay_s_median"] is None


def test_two_cases_for_one_cause_are_true_but_not_single() -> None:
    score = evaluate([cause()], [order(1), order(2)])
    assert (score["recall"], score["precision"], score["single_case_share"]) == (1.0, 1.0, 0.0)
    assert score["wrong"]["multiple"] == ["low_pressure-1"]


def test_a_maintenance_order_is_no_case() -> None:
    score = evaluate([cause()], [order(kind="maintenance")])
    assert (score["found"], score["false_cases"]) == (0, 1)


def test_a_maintenance_cause_wants_a_maintenance_order() -> None:
    battery = cause("battery_low", due=Due(maintenance=1), category="battery", unit="sensor-ops")
    assert evaluate([battery], [order()])["found"] == 0
    score = evaluate([battery], [order(kind="maintenance", category="battery", unit="sensor-ops")])
    assert (score["found"], score["maintenance_due"], score["maintenance_found"]) == (1, 1, 1)


def test_every_occupied_car_needs_its_own_rescue() -> None:
    one = order(1, "rescue", "lift-1", category="elevator_trapped")
    two = order(2, "rescue", "lift-2", category="elevator_trapped", opened_at=T0 + 30_000)
    half = evaluate([CUT], [one])
    assert (half["found"], half["rescues_due"], half["rescues"]) == (0, 2, 1)
    whole = evaluate([CUT], [one, two])
    assert (whole["found"], whole["rescues"], whole["single_case_share"]) == (1, 2, 1.0)
    assert whole["delay_s_median"] == 180.5  # until the last of them was ordered


def test_a_rescue_for_an_empty_car_is_false_even_though_its_building_is_dark() -> None:
    score = evaluate([CUT], [order(1, "rescue", "lift-3", members=frozenset({"lift-1", "lift-3"}))])
    assert score["false_cases"] == 1


def test_a_second_rescue_for_a_car_is_not_single() -> None:
    orders = [order(1, "rescue", "lift-1"), order(2, "rescue", "lift-2"), order(3, "rescue", "lift-1")]
    score = evaluate([CUT], orders)
    assert (score["found"], score["single_case_share"], score["rescues"]) == (1, 0.0, 3)


def test_a_case_for_a_look_alike_is_false_and_named_so() -> None:
    score = evaluate([PERMITTED], [order(category="hydrant_illegal_use")])
    assert (score["lookalikes"], score["lookalike_cases"], score["false_cases"], score["causes_due"]) == (1, 1, 1, 0)
    assert evaluate([PERMITTED], [])["lookalike_cases"] == 0


def test_a_true_case_near_a_look_alike_is_not_held_against_it() -> None:
    assert evaluate([PERMITTED, cause()], [order()])["lookalike_cases"] == 0


def test_an_order_belongs_to_the_cause_that_began_last() -> None:
    early = cause(id="early", start_ms=T0 - 40 * MINUTE_MS, end_ms=T0 - 10 * MINUTE_MS)
    score = evaluate([early, cause()], [order()])
    assert score["wrong"]["missed"] == ["early"]


def test_wrong_cell_wrong_class_and_wrong_unit_show() -> None:
    wrong = order(cell="990101001001002", category="hydrant_damaged", unit="fire")
    score = evaluate([cause()], [wrong])
    assert (score["place_right_share"], score["class_right_share"], score["unit_right_share"]) == (0.0, 0.0, 0.0)


def test_where_a_cause_is_wide_its_grid_is_what_counts() -> None:
    burst = cause("mains_burst", subjects=("hyd-1", "hyd-2"), category="water_main_burst")
    near = order(subject="hyd-2", cell="990101001001002")
    assert evaluate([burst], [near])["place_right_share"] == 1.0
    assert evaluate([burst], [order(subject="hyd-2", grid="G2")])["place_right_share"] == 0.0


def test_the_lower_bound_is_below_the_share_and_grows_with_evidence() -> None:
    assert wilson_low(0, 0) == 0.0
    assert wilson_low(10, 10) == pytest.approx(0.7225, abs=1e-4)
    assert wilson_low(98, 100) == pytest.approx(0.9300, abs=1e-4)
    assert wilson_low(10, 10) < wilson_low(100, 100) < 1.0


def test_percentiles_are_numbers_that_occurred() -> None:
    assert percentile([], 0.95) is None
    assert percentile([5.0], 0.95) == 5.0
    assert percentile([float(n) for n in range(1, 101)], 0.95) == 95.0


def test_a_truth_file_comes_back_as_it_was_written(tmp_path: Path) -> None:
    truths = [cause(), CUT, PERMITTED]
    write_truth(tmp_path / "truth.jsonl", truths)
    assert read_truth(tmp_path / "truth.jsonl") == truths
    keys = msgspec.json.decode((tmp_path / "truth.jsonl").read_bytes().splitlines()[0]).keys()
    expected = {"id", "kind", "start_ms", "end_ms", "subjects", "place", "unit", "due", "category", "lookalike"}
    assert keys == expected


def test_a_broken_truth_file_is_named_with_its_byte(tmp_path: Path) -> None:
    path = tmp_path / "truth.jsonl"
    with pytest.raises(NotFound, match=r"truth\.jsonl"):
        read_truth(path)
    write_truth(path, [cause()])
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + b'{"id": 3}\n')
    with pytest.raises(Damaged, match=rf"at byte {size}: line 2"):
        read_truth(path)


def test_orders_come_from_the_database_with_their_incidents_members(tmp_path: Path) -> None:
    store = open_store(tmp_path / "city.db")
    with store.begin() as connection:
        metadata.create_all(connection)
        connection.execute(incidents.insert().values(_row(incidents, id=4)))
        connection.execute(alarms.insert().values(_row(alarms, id=1, subject="hyd-1", incident=4)))
        connection.execute(alarms.insert().values(_row(alarms, id=2, subject="hyd-2", incident=4, open=0)))
        connection.execute(
            cases.insert().values(_row(cases, id=7, kind="case", incident=4, alarm=1, subject="hyd-1", observed_at=T0))
        )
    store.dispose()
    (found,) = read_orders(tmp_path / "city.db")
    assert (found.id, found.kind, found.subject, found.observed_at) == (7, "case", "hyd-1", T0)
    assert found.members == {"hyd-1", "hyd-2"}


def _row(table: Any, **known: Any) -> dict[str, Any]:
    """Return a row with something in every column that must not be empty."""
    blank = {
        column.name: "x" if column.type.python_type is str else 1
        for column in table.columns
        if not column.nullable and column.name not in known
    }
    return blank | known
