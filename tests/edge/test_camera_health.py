"""A picture's health on synthetic streets: each fault is found and over within 2 s, and nothing else is one."""

from __future__ import annotations

import cv2
import msgspec
import numpy as np
import pytest

from edge.vision.frames import grey, shrink
from edge.vision.health import Health, Picture, Trouble
from edge.vision.learned import Learned, pack, unpack
from simulators.lines.video import Planted, Street, What

FPS, BEGINS_S, ENDS_S, OVER_S = 5.0, 8.0, 14.0, 18.0


def looked(street: Street, health: Health, until_s: float = OVER_S) -> list[tuple[float, Picture]]:
    return [(at_s, health.look(grey(shrink(image, (320, 180))), at_s)) for at_s, image in street.frames(until_s, FPS)]


@pytest.mark.parametrize(
    ("what", "trouble"),
    [
        ("occluded", Trouble.BLURRED),
        ("occluded", Trouble.MOVED),
        ("half_occluded", Trouble.MOVED),
        ("blur", Trouble.BLURRED),
        ("freeze", Trouble.FROZEN),
        ("dark", Trouble.DARK),
        ("bright", Trouble.BRIGHT),
        ("moved", Trouble.MOVED),
    ],
)
@pytest.mark.parametrize("seed", [1, 2])
def test_a_fault_is_found_within_two_seconds_and_over_within_two(what: What, trouble: Trouble, seed: int) -> None:
    pictures = looked(Street(seed, [Planted(what, BEGINS_S, ENDS_S)]), Health())
    troubled = [at_s for at_s, picture in pictures if trouble in picture.troubles]
    assert BEGINS_S < troubled[0] <= BEGINS_S + 2.0
    assert ENDS_S - 0.5 <= troubled[-1] <= ENDS_S + 2.0
    assert len(troubled) >= FPS * (troubled[-1] - troubled[0]), "without a gap"


@pytest.mark.parametrize(
    ("what", "metric", "low", "high"),
    [
        ("occluded", "sharpness", 0.0, 0.4),
        ("occluded", "view_shift", 0.3, 1.0),
        ("blur", "sharpness", 0.0, 0.4),
        ("blur", "view_shift", 0.0, 0.2),
        ("freeze", "motion", 0.0, 0.0),
        ("dark", "brightness", 0.0, 0.03),
        ("moved", "view_shift", 0.3, 1.0),
        ("moved", "sharpness", 0.6, 1.5),
    ],
)
def test_the_metrics_are_those_that_the_rules_read(what: What, metric: str, low: float, high: float) -> None:
    pictures = dict(looked(Street(3, [Planted(what, BEGINS_S)]), Health(), 11.0))
    assert low <= getattr(pictures[10.4], metric) <= high


@pytest.mark.parametrize("what", ["walker", "shadow", "light", "rain", "shake", "crowd", "lane", "garbage", "stall"])
def test_what_happens_on_a_street_is_no_fault(what: What) -> None:
    pictures = looked(Street(3, [Planted(what, 6.0)]), Health(), 16.0)
    assert {trouble for _, picture in pictures for trouble in picture.troubles} == set()
    assert all(picture.motion >= 0.002 for _, picture in pictures)


def test_nightfall_is_no_fault() -> None:
    pictures = looked(Street(3, [Planted("night", 6.0)]), Health(), 80.0)
    assert {trouble for _, picture in pictures for trouble in picture.troubles} == set()
    assert pictures[-1][1].brightness < 0.3 * pictures[0][1].brightness


def test_a_lorry_that_passes_is_over_when_it_has_passed() -> None:
    pictures = looked(Street(3, [Planted("lorry", 6.0, 10.0)]), Health(), 14.0)
    assert pictures[-1][1].troubles == set()


def test_a_codec_that_repeats_frames_is_not_frozen_and_a_frozen_one_still_is() -> None:
    """Compressed video of a quiet street repeats a frame until the next key frame, here each 2 s."""
    street, health = Street(3, columns=320, rows=180), Health()
    found = {}
    for number in range(round(40 * FPS)):
        at_s = number / FPS
        shown_s = min(at_s - at_s % 2.0, 28.0)
        found[at_s] = health.look(grey(street.frame(shown_s)), at_s).troubles
    assert all(Trouble.FROZEN not in troubles for at_s, troubles in found.items() if 6.0 < at_s < 28.0)
    assert Trouble.FROZEN in found[34.0], "twice its longest rest is none"


def test_a_frozen_picture_that_is_encoded_again_and_again_is_found() -> None:
    """The codec still refines a few pixels of it by a level; something moving would be life."""
    street, health, rng = Street(3), Health(), np.random.default_rng(2)
    found = {}
    for number in range(round(30 * FPS)):
        at_s = number / FPS
        image = grey(street.frame(min(at_s, 24.0))).copy()
        if at_s > 24.0:
            image[rng.random(image.shape) < 0.02] += 1
        found[at_s] = health.look(image, at_s).troubles
    assert all(not troubles for at_s, troubles in found.items() if at_s < 24.4)
    assert Trouble.FROZEN in found[26.0]


def test_a_bus_that_waits_at_the_lights_is_no_moved_camera_but_what_hangs_there_is() -> None:
    """It hides two fifths of the view, in which there is as much to see as before."""
    panes = np.random.default_rng(1).integers(20, 220, (12, 9, 3)).astype(np.uint8)
    bus = cv2.resize(panes, (128, 180), interpolation=cv2.INTER_NEAREST)
    pictures, health = {}, Health()
    for at_s, image in Street(3).frames(90.0, FPS):
        if at_s >= 10.0:
            image[:, :128] = bus
        pictures[at_s] = health.look(grey(image), at_s)
    assert pictures[30.0].view_shift is not None
    assert 0.3 < pictures[30.0].view_shift < 0.5
    assert Trouble.MOVED not in pictures[30.0].troubles
    assert Trouble.MOVED in pictures[80.0].troubles


def test_a_street_without_anything_to_recognise_has_no_view_shift() -> None:
    rng, health = np.random.default_rng(1), Health()
    for number in range(40):
        picture = health.look(rng.normal(90.0, 2.0, (180, 320)).astype(np.uint8), number / FPS)
    assert picture.view_shift is None
    assert picture.sharpness is None
    assert picture.troubles == set()


def test_what_was_learned_finds_a_fault_that_began_while_the_box_was_off() -> None:
    street, before = Street(3), Health()
    looked(street, before, 8.0)
    assert before.reference is not None
    content = pack(Learned(before.normal, before.reference, shrink(street.frame(0.0), (320, 180))), "rtsp://a/1")
    learned = unpack(content, "rtsp://a/1")
    after = Health(learned.normal, learned.reference)
    pictures = looked(Street(3, [Planted("blur", 0.0)]), after, 3.0)
    assert Trouble.BLURRED in pictures[-1][1].troubles


def test_a_learned_file_that_cannot_be_used_is_refused_with_a_reason() -> None:
    picture = np.full((180, 320), 90.0, np.float32)
    content = pack(Learned(Health().normal, picture, np.zeros((180, 320, 3), np.uint8)), "a")
    with pytest.raises(ValueError, match="another source"):
        unpack(content, "b")
    with pytest.raises(ValueError, match="damaged"):
        unpack(content[:-40], "a")
    newer = msgspec.msgpack.encode(msgspec.msgpack.decode(content) | {"version": 3})
    with pytest.raises(ValueError, match="version 3"):
        unpack(newer, "a")
    broken = msgspec.msgpack.encode(msgspec.msgpack.decode(content) | {"reference": b"\x89PNG"})
    with pytest.raises(ValueError, match="cannot be read"):
        unpack(broken, "a")
