"""Public clips with something put in at a random place and time: what is left, what covers, blurs and freezes."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from edge.vision.frames import Image
from edge.vision.health import Trouble
from tests.edge.test_camera_clips import CARS, DWELL_S, WORKER, frames, looks

SEEDS = (1, pytest.param(2, marks=pytest.mark.soak), pytest.param(3, marks=pytest.mark.soak))
LASTS_S = {"left": 18.0, "covered": 8.0, "blurred": 8.0, "frozen": 8.0}


class Planted:
    """One thing put into a clip, drawn from a seed."""

    def __init__(self, name: str, what: str, seed: int) -> None:
        self._rng = np.random.default_rng((seed, len(what), len(name)))
        self._what = what
        self._held: Image | None = None
        self.start_s = round(float(self._rng.uniform(12.0, 24.0)), 1)
        self.end_s = self.start_s + LASTS_S[what]
        self._at = self._free(name)
        self._size = float(self._rng.uniform(0.05, 0.11))
        self._grain = self._rng.normal(0.0, 14.0, (9, 9, 3)).astype(np.float32)
        self._darker = float(self._rng.choice([0.35, 1.8]))

    def _free(self, name: str) -> tuple[int, int]:
        """Return (column, row) of a place that nobody crosses in the clip."""
        stack: NDArray[np.float32] = np.array([one.mean(axis=2) for one in frames(name)[::2]], np.float32)
        busy = cv2.blur(np.ptp(stack, axis=0) / 255.0, (stack.shape[2] // 5, stack.shape[1] // 4))
        rows, columns = busy.shape
        places = self._rng.integers((columns // 8, rows // 3), (columns * 7 // 8, rows * 9 // 10), (60, 2))
        best = min(places, key=lambda place: float(busy[place[1], place[0]]))
        return int(best[0]), int(best[1])

    def change(self, at_s: float, image: Image) -> Image:
        """Return a frame of the clip with it in."""
        if not self.start_s <= at_s < self.end_s:
            return image
        match self._what:
            case "left":
                return self._leave(image)
            case "covered":
                shade = float(np.random.default_rng(self._at).uniform(20, 160))
                return np.full_like(image, round(shade))
            case "blurred":
                return np.asarray(cv2.GaussianBlur(image, (0, 0), image.shape[1] / 90), np.uint8)
            case _:
                self._held = image if self._held is None else self._held
                return self._held

    def _leave(self, image: Image) -> Image:
        """Put a carton there: the ground's light, another level, print of its own."""
        shown = image.copy()
        high = wide = round(self._size * image.shape[1])
        left, top = self._at[0] - wide // 2, self._at[1] - high // 2
        part = shown[max(0, top) : top + high, max(0, left) : left + wide]
        level = float(np.median(part)) * self._darker
        grain = cv2.resize(self._grain, (part.shape[1], part.shape[0]), interpolation=cv2.INTER_NEAREST)
        part[:] = np.clip(level + grain * (level / 60.0), 0, 255).astype(np.uint8)
        return shown


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", [CARS, WORKER])
def test_a_carton_at_a_random_place_and_time_is_told_at_its_dwell(name: str, seed: int) -> None:
    planted = Planted(name, "left", seed)
    found = looks(name, planted.change, planted.end_s + 4.0)
    told = [(at_s, event) for at_s, look in found for event in look.events if event.metric == "garbage_s"]
    [begun] = [at_s for at_s, event in told if event.seen is not None]
    assert planted.start_s + DWELL_S - 0.4 <= begun <= planted.start_s + DWELL_S + 2.0
    [over] = [at_s for at_s, event in told if event.value == 0.0 and at_s > begun]
    assert planted.end_s < over <= planted.end_s + 3.0


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("what", "trouble"),
    [
        pytest.param("covered", Trouble.BLURRED, marks=pytest.mark.soak),
        pytest.param("blurred", Trouble.BLURRED, marks=pytest.mark.soak),
        ("frozen", Trouble.FROZEN),
    ],
)
@pytest.mark.parametrize("name", [CARS, WORKER])
def test_a_fault_at_a_random_time_is_found_within_two_seconds_and_over_within_three(
    name: str, what: str, trouble: Trouble, seed: int
) -> None:
    planted = Planted(name, what, seed)
    found = looks(name, planted.change, planted.end_s + 4.0)
    troubled = [at_s for at_s, look in found if trouble in look.picture.troubles]
    assert planted.start_s <= troubled[0] <= planted.start_s + 2.0
    assert troubled[-1] <= planted.end_s + 3.0, "while a car fills most of what is seen nothing is judged"
