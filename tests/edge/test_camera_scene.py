"""What stands in a region, on synthetic streets: found at its dwell, over when it is gone, and nothing else is."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from citybrain.units import METRICS
from edge.vision import scene
from edge.vision.frames import Image, shrink
from edge.vision.learned import Learned
from edge.vision.scene import Region, Sees, polygon_mask
from edge.vision.watch import Event, Watch, Watched
from simulators.lines.video import BINS, LANE, Planted, Street

FPS, DWELL_S = 5.0, 5.0


def watch(*sees: Sees, dwell_s: float = DWELL_S, learned: Learned | None = None) -> Watch:
    areas: dict[Sees, float] = {"garbage": 0.01, "stall": 0.1, "lane": 0.15, "crowd": 0.01}
    return Watch(
        [
            Watched(Region(one, one, LANE if one == "lane" else BINS, areas[one]), dwell_s)
            for one in sees or ("garbage", "stall", "lane", "crowd")
        ],
        320,
        learned,
    )


def told(street: Street, watching: Watch, until_s: float, from_s: float = 0.0) -> list[tuple[float, Event]]:
    frames = street.frames(until_s, FPS, from_s)
    return [(at_s, event) for at_s, image in frames for event in watching.look(image, at_s).events]


def begun(found: list[tuple[float, Event]], metric: str) -> list[float]:
    return [at_s for at_s, event in found if event.metric == metric and event.seen is not None]


def over(found: list[tuple[float, Event]], metric: str, after_s: float) -> list[float]:
    return [at_s for at_s, event in found if event.metric == metric and event.value == 0.0 and at_s > after_s]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_bag_that_is_left_is_told_at_its_dwell_and_when_it_is_taken_away(seed: int) -> None:
    found = told(Street(seed, [Planted("garbage", 8.0, 20.0)]), watch("garbage"), 26.0)
    [at_s] = begun(found, "garbage_s")
    assert 8.0 + DWELL_S <= at_s <= 8.0 + DWELL_S + 2.0
    [end_s] = over(found, "garbage_s", at_s)
    assert 20.0 < end_s <= 22.5
    assert all(event.value <= 12.5 for _, event in found)


@pytest.mark.parametrize("noise", ["walker", "rain", "light", "shake", "shadow"])
def test_a_bag_is_found_whatever_else_happens(noise: str) -> None:
    planted = [Planted("garbage", 8.0), Planted(noise, 9.0)]  # type: ignore[arg-type]
    found = told(Street(3, planted), watch("garbage"), 24.0)
    [at_s] = begun(found, "garbage_s")
    assert 8.0 + DWELL_S <= at_s <= 8.0 + DWELL_S + (5.0 if noise in ("walker", "light") else 2.0)
    assert over(found, "garbage_s", at_s) == []


def test_who_passes_in_front_of_a_bag_does_not_end_it() -> None:
    found = told(Street(3, [Planted("garbage", 8.0), Planted("walker", 14.0)]), watch("garbage"), 40.0)
    [at_s] = begun(found, "garbage_s")
    assert over(found, "garbage_s", at_s) == []


@pytest.mark.parametrize("what", ["walker", "rain", "light", "shake", "shadow", "lorry"])
def test_what_passes_is_nothing_left(what: str) -> None:
    found = told(Street(3, [Planted(what, 8.0, 24.0)]), watch("garbage", "lane"), 30.0)  # type: ignore[arg-type]
    assert begun(found, "garbage_s") == begun(found, "lane_blocked_s") == []
    assert {event.metric for _, event in found} == {"garbage_s", "lane_blocked_s"}, "0 at the start, and no more"


def test_who_stands_there_when_it_begins_is_no_background_and_no_thing_when_gone() -> None:
    found = told(Street(3, [Planted("lane", 0.0, 1.5), Planted("garbage", 0.0, 1.5)]), watch("garbage", "lane"), 24.0)
    assert begun(found, "garbage_s") == begun(found, "lane_blocked_s") == []


def test_people_who_pass_one_after_the_other_are_no_stall() -> None:
    passing = [Planted("lorry", start_s, start_s + 2.5) for start_s in np.arange(8.0, 50.0, 6.0)]
    found = told(Street(2, passing), watch("stall", dwell_s=20.0), 52.0)
    assert begun(found, "stall_s") == []


def test_a_shadow_that_wanders_over_a_square_is_no_crowd() -> None:
    found = told(Street(2, [Planted("shadow", 8.0)]), watch("crowd", "stall"), 36.0)
    assert begun(found, "crowd") == begun(found, "stall_s") == []


def test_nightfall_is_nothing_left_and_a_bag_is_found_in_it() -> None:
    found = told(Street(3, [Planted("night", 6.0), Planted("garbage", 75.0)]), watch("garbage", "lane", "crowd"), 86.0)
    assert [at_s for at_s in begun(found, "garbage_s") if at_s < 75.0] == []
    [at_s] = begun(found, "garbage_s")
    assert at_s <= 75.0 + DWELL_S + 4.0
    assert begun(found, "lane_blocked_s") == begun(found, "crowd") == []


def test_what_is_taken_away_is_no_thing_left() -> None:
    """The bag was there when the camera was set up."""
    watching = watch("garbage")
    found = told(Street(3, [Planted("garbage", 0.0, 10.0)]), watching, 26.0)
    assert begun(found, "garbage_s") == []


@pytest.mark.parametrize("seed", [1, 3])
def test_a_car_in_the_lane_is_told_with_its_time_each_half_minute(seed: int) -> None:
    found = told(Street(seed, [Planted("lane", 8.0, 48.0)]), watch("lane"), 54.0)
    [at_s] = begun(found, "lane_blocked_s")
    assert 13.0 <= at_s <= 15.0
    values = [(told_s, event.value) for told_s, event in found if event.value > 0.0]
    assert len(values) == 2
    assert all(abs(told_s - 8.0 - value) <= 2.0 for told_s, value in values)
    assert len(over(found, "lane_blocked_s", at_s)) == 1


def test_a_stall_is_people_and_things_together_and_a_pause_does_not_end_it() -> None:
    planted = [Planted("stall", 8.0, 20.0), Planted("stall", 25.0, 40.0)]
    found = told(Street(3, planted), watch("stall"), 56.0)
    assert len(begun(found, "stall_s")) == 1
    [end_s] = over(found, "stall_s", 20.0)
    assert 49.0 <= end_s <= 53.0


def test_a_crowd_is_told_as_a_level_and_ends() -> None:
    found = told(Street(3, [Planted("crowd", 8.0, 30.0)]), watch("crowd"), 50.0)
    assert len(begun(found, "crowd")) == 1
    assert max(event.value for _, event in found) >= 0.75
    assert found[-1][1].value == 0.0


def test_while_the_picture_is_no_good_nothing_is_said_and_nothing_forgotten() -> None:
    planted = [Planted("garbage", 8.0), Planted("blur", 16.0, 50.0)]
    found = told(Street(3, planted), watch("garbage"), 56.0)
    [at_s] = begun(found, "garbage_s")
    assert [told_s for told_s, _ in found if 17.0 < told_s < 50.0] == []
    assert over(found, "garbage_s", at_s) == []


def test_a_bag_from_before_a_restart_is_found_again() -> None:
    street, first = Street(3, [Planted("garbage", 8.0)]), watch("garbage")
    told(street, first, 16.0)
    learned = first.learned()
    assert learned is not None
    found = told(street, watch("garbage", learned=learned), 30.0, from_s=20.0)
    assert len(begun(found, "garbage_s")) == 1
    assert all(event.value > 0.0 for _, event in found), "it is not said to be gone in between"


def test_a_frame_of_another_size_begins_anew() -> None:
    watching = watch("garbage")
    told(Street(3), watching, 6.0)
    other = Street(3, columns=480, rows=360)
    assert watching.look(other.frame(6.0), 6.0).picture.sharpness is None


def person(image: Image, left: int) -> Image:
    """Put a person-high patch of a checkerboard, which nothing coarse would show, into a picture."""
    board = (np.indices((60, 20)).sum(axis=0) // 2 % 2 * 255).astype(np.uint8)
    image[200:260, left : left + 20] = board[:, :, None]
    return image


def test_evidence_shows_the_bag_and_nobody_who_moved() -> None:
    street, watching = Street(3, [Planted("garbage", 68.0)], 640, 360), watch("garbage")
    pictures = []
    for at_s, image in street.frames(80.0, FPS):
        shown = person(image, 60 + int(8 * (at_s - 70)) if at_s > 70 else 400)
        if 70 > at_s > 0:
            shown = image
        seen = [event.seen for event in watching.look(shown, at_s).events if event.seen is not None]
        pictures += [(watching.evidence(one), shown) for one in seen]
    [((masked, unmasked), shown)] = pictures
    both = cv2.imdecode(np.frombuffer(masked, np.uint8), cv2.IMREAD_COLOR)
    whole = cv2.imdecode(np.frombuffer(unmasked, np.uint8), cv2.IMREAD_COLOR)
    assert both is not None
    assert whole is not None
    assert len(masked) <= 200_000
    columns = np.flatnonzero((np.abs(np.diff(shown[230].astype(int), axis=0)) > 150).all(axis=1))
    left = int(columns[0])
    after = both[:, 640:]
    rough, clear = (np.abs(np.diff(one[205:255, left : left + 20].astype(int), axis=1)) for one in (after, whole))
    assert float(clear.mean()) > 60.0, "the board can be seen where nothing is masked"
    assert float(rough.mean()) < 0.15 * float(clear.mean())
    assert np.abs(after.astype(int) - both[:, :640].astype(int))[260:310, 110:150].mean() > 30.0, "the bag is shown"


def test_at_first_nothing_is_shown_that_might_be_somebody() -> None:
    watching = watch("garbage")
    assert watching.snapshot() is None
    for at_s, image in Street(3, columns=640, rows=360).frames(6.0, FPS):
        watching.look(person(image, 300), at_s)
    picture = watching.snapshot()
    assert picture is not None
    shown = cv2.imdecode(np.frombuffer(picture, np.uint8), cv2.IMREAD_COLOR)
    assert shown is not None
    assert np.abs(np.diff(shown[205:255, 300:320].astype(int), axis=1)).mean() < 10.0


def test_the_metrics_are_those_of_the_registry() -> None:
    assert set(scene.METRICS.values()) <= set(METRICS)


def test_a_polygon_covers_its_share() -> None:
    mask = polygon_mask(((0.0, 0.0), (0.5, 0.0), (0.5, 1.0), (0.0, 1.0)), (320, 180))
    assert 0.49 <= mask.mean() <= 0.52


def test_a_frame_is_never_made_larger() -> None:
    image = Street(1, columns=160, rows=90).frame(0.0)
    assert shrink(image, (160, 90)).shape == image.shape
