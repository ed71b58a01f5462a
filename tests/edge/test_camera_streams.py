"""Streams as cameras give them: jittering, slow, upright, grey, short, very large, and of another size from now on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

from edge.driver import Quality
from edge.drivers.camera import Config
from edge.vision.frames import Image
from edge.vision.health import Trouble
from edge.vision.watch import Event, Watch
from simulators.lines.video import Planted, Street
from tests.edge.test_camera_driver import CAMERA, Site, clip
from tests.edge.test_camera_scene import DWELL_S, begun, over, watch

BAG_S, GONE_S, BLUR_S, CLEAR_S, ENDS_S = 8.0, 20.0, 26.0, 32.0, 36.0
PLANTED = (Planted("garbage", BAG_S, GONE_S), Planted("walker", 10.0, 13.0), Planted("blur", BLUR_S, CLEAR_S))


def evenly(fps: float) -> Iterator[float]:
    yield from (number / fps for number in range(round(ENDS_S * fps)))


def jittering() -> Iterator[float]:
    """Yield times as a busy network gives frames: bursts, and gaps of up to a second."""
    rng, at_s = np.random.default_rng(4), 0.0
    while at_s < ENDS_S:
        yield at_s
        at_s += float(rng.choice([0.02, 0.1, 0.2, 0.4, 1.0], p=[0.2, 0.3, 0.3, 0.1, 0.1]))


def large(image: Image) -> Image:
    return np.asarray(cv2.resize(image, (3840, 2160), interpolation=cv2.INTER_NEAREST), np.uint8)


def grey(image: Image) -> Image:
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), np.uint8)


def check(watching: Watch, frames: Iterator[tuple[float, Image]], within_s: float = 2.0) -> None:
    """Assert that the bag and the blur are found in time, are over in time, and that nothing else is said."""
    found: list[tuple[float, Event]] = []
    troubled: list[float] = []
    for at_s, image in frames:
        look = watching.look(image, at_s)
        found += [(at_s, event) for event in look.events]
        troubled += [at_s] if look.picture.troubles else []
        assert look.picture.troubles <= {Trouble.BLURRED}
    [bag_s] = begun(found, "garbage_s")
    assert BAG_S + DWELL_S <= bag_s <= BAG_S + DWELL_S + within_s
    [gone_s] = over(found, "garbage_s", bag_s)
    assert GONE_S < gone_s <= GONE_S + 1.5 + within_s
    assert BLUR_S < troubled[0] <= BLUR_S + within_s
    assert CLEAR_S - 1.0 <= troubled[-1] <= CLEAR_S + within_s


@pytest.mark.parametrize(
    ("columns", "rows", "change"),
    [(320, 180, np.asarray), (360, 640, np.asarray), (320, 180, grey), (320, 180, large)],
    ids=["usual", "upright", "grey", "4K"],
)
def test_a_bag_and_a_blur_are_found_in_pictures_of_any_kind(
    columns: int, rows: int, change: Callable[[Image], Image]
) -> None:
    street = Street(3, PLANTED, columns, rows)
    check(watch("garbage"), ((at_s, change(street.frame(at_s))) for at_s in evenly(5.0)))


def test_frames_that_come_when_they_like_are_judged_by_their_times() -> None:
    street = Street(3, PLANTED)
    check(watch("garbage"), ((at_s, street.frame(at_s)) for at_s in jittering()))


def test_a_camera_of_one_frame_a_second_is_watched_too() -> None:
    street = Street(3, PLANTED)
    check(watch("garbage"), ((at_s, street.frame(at_s)) for at_s in evenly(1.0)), within_s=3.0)


def test_a_stream_that_goes_over_to_another_size_goes_on() -> None:
    """A camera that adapts to the network sends half the size from the 12th second to the 17th; a bag stands there."""
    street = Street(3, PLANTED, 640, 360)

    def adapted() -> Iterator[tuple[float, Image]]:
        for at_s in evenly(5.0):
            image = street.frame(at_s)
            small = cv2.resize(image, (320, 180), interpolation=cv2.INTER_AREA)
            yield at_s, np.asarray(small if 12.0 <= at_s < 17.0 else image, np.uint8)

    check(watch("garbage"), adapted())


def test_a_clip_of_two_seconds_is_a_picture_and_then_a_lost_signal(tmp_path: Path) -> None:
    site = Site(Config(CAMERA, str(clip(tmp_path / "short.avi", 2.0)), folder=str(tmp_path / "kept")))
    try:
        site.until(lambda: 1.0 in site.values("signal") and 0.0 in site.values("signal"), what="both")
        site.until(lambda: site.hosts.qualities().get(CAMERA) is Quality.UNPLUGGED, what="the lost signal's quality")
        assert "has ended" in site.hosts.reasons()[CAMERA]
        assert site.values("sharpness") == [], "there was no time to learn what is usual"
        assert site.counters.values["restarts_total{driver=cam}"] == 0
    finally:
        site.hosts.stop(0, within_s=3.0)
    assert not list((tmp_path / "kept").glob("*.learned")), "nothing was learned from so little"
