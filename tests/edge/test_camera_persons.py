"""Who keeps still is masked all the same: on the person of a public clip, and by the shape of what stands there."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from edge.vision.frames import Image, Mask
from edge.vision.persons import may_be_somebody, persons
from edge.vision.watch import Event, Watch
from tests.edge.test_camera_clips import CARS, WORKER, frames, looks

SIZE = (320, 180)


def test_a_person_who_is_wholly_in_the_picture_is_found_and_cars_are_none() -> None:
    worker = [persons(image, SIZE) for image in frames(WORKER)[::3]]
    assert np.mean([mask.any() for mask in worker]) >= 0.5, "in a third of the frames the person is cut off"
    assert all(mask.mean() < 0.3 for mask in worker)
    assert np.mean([persons(image, SIZE).any() for image in frames(CARS)[::10]]) <= 0.2


def test_who_stands_still_in_a_garbage_region_for_the_dwell_is_masked_in_the_evidence() -> None:
    """The clip's last frame is held, with the sensor's noise: the person stands there and is taken for a thing."""
    last, rng = frames(WORKER)[-1], np.random.default_rng(1)

    def still(at_s: float, image: Image) -> Image:
        noise = rng.normal(0.0, 2.0, image.shape)
        empty = np.asarray(np.median(frames(WORKER)[::4], axis=0), np.float32)
        return np.clip((last if at_s > 20.0 else empty) + noise, 0, 255).astype(np.uint8)

    pictures: list[bytes] = []

    def keep(watch: Watch, event: Event) -> None:
        assert event.seen is not None
        if event.metric == "garbage_s":
            pictures.append(watch.evidence(event.seen)[0])

    looks(WORKER, still, 40.0, keep)
    assert pictures, "it is told: what it is, a person decides"
    for picture in pictures:
        shown = cv2.imdecode(np.frombuffer(picture, np.uint8), cv2.IMREAD_GRAYSCALE)
        assert shown is not None
        plain = cv2.resize(cv2.cvtColor(last, cv2.COLOR_BGR2GRAY), (640, shown.shape[0]), interpolation=cv2.INTER_AREA)
        head = persons(last, (640, shown.shape[0])) & (np.arange(shown.shape[0])[:, None] < 0.5 * shown.shape[0])
        one, other = (fine(np.asarray(half, np.uint8))[head] for half in (shown[:, 640:], plain))
        assert np.corrcoef(one, other)[0, 1] < 0.3, "nothing of what a face is known by is left"


def fine(picture: Image) -> NDArray[np.float32]:
    levels = picture.astype(np.float32)
    return np.asarray(levels - cv2.GaussianBlur(levels, (0, 0), 3.0), np.float32)


@pytest.mark.parametrize(("rows", "columns", "somebody"), [(60, 20, True), (20, 20, False), (20, 60, False)])
def test_what_stands_upright_may_be_somebody(rows: int, columns: int, somebody: bool) -> None:
    thing: Mask = np.zeros((180, 320), np.bool_)
    nobody = thing.copy()
    thing[50 : 50 + rows, 100 : 100 + columns] = True
    assert may_be_somebody(thing, nobody) is somebody
    assert may_be_somebody(thing, thing)


def test_a_small_and_an_odd_picture_can_be_searched() -> None:
    for shape in ((40, 300, 3), (300, 40, 3), (1, 1, 3)):
        assert persons(np.zeros(shape, np.uint8), (32, 16)).shape == (16, 32)
