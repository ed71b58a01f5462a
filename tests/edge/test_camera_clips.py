"""Real clips of fixed cameras: what passes is no event, and what is planted into them is found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pytest

from edge.vision.frames import Image
from edge.vision.health import Trouble
from edge.vision.scene import Region
from edge.vision.watch import Event, Look, Watch, Watched

DATA = Path(__file__).parents[3] / "shared" / "data" / "camera_video"  # beside the project; absent: skipped
CARS, WORKER = "car-detection.mp4", "worker-zone-detection.gif"
WHOLE = ((0.02, 0.02), (0.98, 0.02), (0.98, 0.98), (0.02, 0.98))
ASIDE = ((0.75, 0.4), (1.0, 0.4), (1.0, 1.0), (0.75, 1.0))  # nobody is there in either clip
FPS, DWELL_S, PLANTED_S, ENDS_S = 5.0, 10.0, 30.0, 45.0


@cache
def frames(name: str) -> tuple[Image, ...]:
    """Return a clip's frames at five a second."""
    path = DATA / name
    if not path.exists():
        pytest.skip(f"no {path}: the shared clips are not on this machine")
    capture = cv2.VideoCapture(str(path))
    step = capture.get(cv2.CAP_PROP_FPS) / FPS
    found: list[Image] = []
    number = 0
    while capture.grab():
        if number >= len(found) * step:
            found.append(np.asarray(capture.retrieve()[1], np.uint8))
        number += 1
    return tuple(found)


def to_and_fro(name: str, duration_s: float) -> Iterator[tuple[float, Image]]:
    """Return (time, frame) of a clip that is played forward and back again, so that nothing jumps."""
    clip = frames(name)
    both = clip + clip[-2:0:-1]
    for number in range(round(duration_s * FPS)):
        yield number / FPS, both[number % len(both)]


def watch() -> Watch:
    regions = [
        Region("left", "garbage", WHOLE, 0.002),
        Region("lane", "lane", WHOLE, 0.02),
        Region("pavement", "stall", ASIDE, 0.1),
        Region("square", "crowd", WHOLE, 0.01),
    ]
    return Watch([Watched(region, 30.0 if region.sees == "stall" else DWELL_S) for region in regions], 320)


def looks(
    name: str,
    change: Callable[[float, Image], Image],
    until_s: float = 50.0,
    begun: Callable[[Watch, Event], object] | None = None,
) -> list[tuple[float, Look]]:
    """Return (time, look) of a clip that is changed; begun: called with each event of which evidence is due."""
    watching, found = watch(), []
    for at_s, image in to_and_fro(name, until_s):
        found.append((at_s, watching.look(change(at_s, image), at_s)))
        for event in found[-1][1].events:
            if begun is not None and event.seen is not None:
                begun(watching, event)
    return found


def while_planted(change: Callable[[Image], Image]) -> Callable[[float, Image], Image]:
    return lambda at_s, image: change(image) if PLANTED_S <= at_s < ENDS_S else image


def covered(image: Image) -> Image:
    return np.full_like(image, 70)


def blurred(image: Image) -> Image:
    return np.asarray(cv2.GaussianBlur(image, (0, 0), 8.0), np.uint8)


def turned(image: Image) -> Image:
    return np.asarray(np.roll(image, (60, 150), axis=(0, 1)), np.uint8)


def dark(image: Image) -> Image:
    return (image * 0.02).astype(np.uint8)


def rows_of(image: Image) -> int:
    return int(image.shape[0]) // 3


def bag(image: Image) -> Image:
    """Put a full bin bag onto the free ground at the left, under the light and exposure of the frame."""
    shown = image.copy()
    light = float(np.median(image[-rows_of(image) :, : image.shape[1] // 4])) / 100.0
    rows, columns = image.shape[:2]
    centre, size = (round(0.12 * columns), round(0.8 * rows)), (columns // 24, rows // 14)
    cv2.ellipse(shown, centre, size, 0, 0, 360, (light * 190, light * 205, light * 210), -1)
    cv2.ellipse(shown, centre, (size[0] // 2, size[1] // 2), 20, 0, 220, (light * 110, light * 120, light * 130), 3)
    return shown


@pytest.mark.parametrize("name", [CARS, WORKER])
def test_a_clip_has_a_plausible_picture_and_no_event(name: str) -> None:
    found = looks(name, lambda _, image: image, 80.0)
    assert {trouble for _, look in found for trouble in look.picture.troubles} == set()
    assert [(at_s, event) for at_s, look in found for event in look.events if event.value > 0.0] == []
    settled = [look.picture for at_s, look in found if at_s > 6.0]
    assert 0.2 < min(one.brightness for one in settled) < max(one.brightness for one in settled) < 0.7
    assert 0.8 < np.median([one.sharpness for one in settled if one.sharpness is not None]) < 1.3


@pytest.mark.parametrize(
    ("plant", "trouble"),
    [(covered, Trouble.BLURRED), (blurred, Trouble.BLURRED), (turned, Trouble.MOVED), (dark, Trouble.DARK)],
)
@pytest.mark.parametrize("name", [CARS, WORKER])
def test_a_planted_fault_is_found_within_two_seconds_and_over_within_two(
    name: str, plant: Callable[[Image], Image], trouble: Trouble
) -> None:
    found = looks(name, while_planted(plant))
    troubled = [at_s for at_s, look in found if trouble in look.picture.troubles]
    assert PLANTED_S <= troubled[0] <= PLANTED_S + 2.0
    assert troubled[-1] <= ENDS_S + 2.0


@pytest.mark.parametrize("name", [CARS, WORKER])
def test_a_frozen_clip_is_found_within_two_seconds(name: str) -> None:
    held: list[Image] = []

    def freeze(image: Image) -> Image:
        held.append(image)
        return held[0]

    found = looks(name, while_planted(freeze))
    troubled = [at_s for at_s, look in found if Trouble.FROZEN in look.picture.troubles]
    assert PLANTED_S <= troubled[0] <= PLANTED_S + 2.0
    assert troubled[-1] <= ENDS_S + 2.0
    assert all(look.picture.motion == 0.0 for at_s, look in found if at_s in troubled)


@pytest.mark.parametrize("name", [CARS, WORKER])
def test_a_bag_put_into_a_clip_is_told_at_its_dwell_and_its_end(name: str) -> None:
    found = looks(name, while_planted(bag))
    told = [(at_s, event) for at_s, look in found for event in look.events if event.metric == "garbage_s"]
    [begun] = [at_s for at_s, event in told if event.seen is not None]
    assert PLANTED_S + DWELL_S <= begun <= PLANTED_S + DWELL_S + 2.0
    [over] = [at_s for at_s, event in told if event.value == 0.0 and at_s > begun]
    assert ENDS_S < over <= ENDS_S + 3.0
