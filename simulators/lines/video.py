"""A street as a fixed camera sees it, with what is planted in it: the same frames for the same seed and time.

street = Street(seed=3, planted=[Planted("garbage", 20.0, 60.0)])
image = street.frame(21.4)      # (rows, columns, 3) BGR, with the sensor's noise
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import cv2
import msgspec
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
What = Literal[
    "garbage", "removed", "lane", "stall", "crowd", "walker", "lorry", "shadow", "light", "rain", "night",
    "occluded", "half_occluded", "blur", "freeze", "dark", "bright", "moved", "shake",
]  # fmt: skip
BINS = ((0.08, 0.55), (0.40, 0.55), (0.40, 0.95), (0.08, 0.95))  # the pavement where rubbish is left
LANE = ((0.50, 0.55), (0.95, 0.55), (0.95, 0.95), (0.50, 0.95))  # the way for fire engines
NOISE = 2.0  # levels: a usual sensor by day


class Planted(msgspec.Struct, frozen=True):
    """Something in the picture from `start_s` until before `end_s`. strength: how much of it, 1 is much."""

    what: What
    start_s: float
    end_s: float = float("inf")
    strength: float = 1.0


class Street:
    """A scene of house fronts, a pavement and a lane. rows, columns: its size; noise: the sensor's, in levels."""

    def __init__(
        self, seed: int, planted: Iterable[Planted] = (), columns: int = 320, rows: int = 180, noise: float = NOISE
    ) -> None:
        self.columns = columns
        self.rows = rows
        self._seed = seed
        self._planted = tuple(planted)
        sheet = np.random.default_rng((seed, 1)).normal(0.0, noise, (2 * rows, 2 * columns, 3))
        self._sheet: NDArray[np.float32] = sheet.astype(np.float32)
        self._wide = _scene(np.random.default_rng(seed), columns, rows)  # half as wide again as what is seen

    def frame(self, at_s: float) -> Image:
        """Return what the camera gives at a time."""
        here = [one for one in self._planted if one.start_s <= at_s < one.end_s]
        frozen = next((one for one in here if one.what == "freeze"), None)
        if frozen is not None:
            at_s = frozen.start_s
            here = [one for one in self._planted if one.start_s <= at_s < one.end_s]
        rng = np.random.default_rng((self._seed, round(at_s * 1000)))
        image = self._view(here, rng)
        for one in here:
            self._put(image, one, at_s, rng)
        for one in here:
            image = self._light(image, one, at_s, rng)
        for one in here:
            image = self._lens(image, one)
        image += self._grain(rng)
        return np.clip(image, 0, 255).astype(np.uint8)

    def frames(self, duration_s: float, fps: float, from_s: float = 0.0) -> Iterator[tuple[float, Image]]:
        """Return (time, frame) from `from_s` until before `duration_s`."""
        for number in range(math.ceil(from_s * fps), round(duration_s * fps)):
            yield number / fps, self.frame(number / fps)

    def _grain(self, rng: np.random.Generator) -> NDArray[np.float32]:
        """Return the sensor's noise: another part of a larger sheet each time, which is quicker than drawing it."""
        across, down = int(rng.integers(0, self.columns)), int(rng.integers(0, self.rows))
        return self._sheet[down : down + self.rows, across : across + self.columns]

    def _view(self, here: list[Planted], rng: np.random.Generator) -> NDArray[np.float32]:
        right = down = 0
        for one in here:
            if one.what == "moved":
                right, down = round(0.2 * one.strength * self.columns), round(0.08 * one.strength * self.rows)
            elif one.what == "shake":
                right, down = (int(offset) for offset in rng.integers(-1, 2, 2))
        left, top = self.columns // 4 + right, self.rows // 4 + down
        return self._wide[top : top + self.rows, left : left + self.columns].astype(np.float32)

    def _put(self, image: NDArray[np.float32], one: Planted, at_s: float, rng: np.random.Generator) -> None:
        """Put a thing, a vehicle or people into the scene."""
        passed_s = at_s - one.start_s
        match one.what:
            case "garbage":
                for number in range(max(1, round(3 * one.strength))):
                    self._bag(image, 0.18 + 0.05 * number, 0.80)
            case "removed":  # an advertising stand that is there except meanwhile
                pass
            case "lane":
                self._box(image, 0.60, 0.62, 0.30, 0.26, (60, 50, 170))
                self._box(image, 0.64, 0.64, 0.20, 0.07, (40, 35, 30))
            case "stall":
                self._box(image, 0.14, 0.62, 0.16, 0.16, (40, 120, 200))
                self._person(image, 0.20 + 0.03 * np.sin(passed_s), 0.74, (90, 60, 40))
            case "crowd":
                for number in range(round(40 * one.strength)):
                    across, down = 0.1 + 0.29 * (number % 8) / 7, 0.58 + 0.3 * (number // 8) / 4
                    sway = 0.006 * np.sin(passed_s * 1.3 + number)
                    self._person(image, across + sway, down, (30 + 5 * number, 120 - number, 60 + 3 * number))
            case "walker":
                self._person(image, (passed_s * 0.10) % 1.1 - 0.05, 0.72, (50, 60, 150))
            case "lorry":
                self._box(image, (passed_s * 0.25) % 1.8 - 0.7, 0.30, 0.6, 0.55, (180, 170, 160))
            case "rain":
                for across, down in rng.integers(0, (self.columns, self.rows), (round(120 * one.strength), 2)):
                    cv2.line(image, (int(across), int(down)), (int(across) + 2, int(down) + 12), (200, 200, 200), 1)
            case _:
                pass

    def _box(
        self,
        image: NDArray[np.float32],
        left: float,
        top: float,
        wide: float,
        high: float,
        colour: tuple[int, int, int],
    ) -> None:
        corner = round(left * self.columns), round(top * self.rows)
        other = round((left + wide) * self.columns), round((top + high) * self.rows)
        cv2.rectangle(image, corner, other, colour, -1)
        middle = (corner[1] + other[1]) // 2
        cv2.line(image, (corner[0], middle), (other[0], middle), tuple(0.6 * part for part in colour), 3)

    def _bag(self, image: NDArray[np.float32], across: float, down: float) -> None:
        centre = round(across * self.columns), round(down * self.rows)
        size = round(0.035 * self.columns), round(0.055 * self.rows)
        cv2.ellipse(image, centre, size, 0, 0, 360, (35, 30, 28), -1)
        cv2.ellipse(image, centre, (size[0] // 3, size[1] // 2), 30, 0, 200, (90, 90, 95), 2)

    def _person(
        self, image: NDArray[np.float32], across: float, down: float, colour: tuple[float, float, float]
    ) -> None:
        centre = round(across * self.columns), round(down * self.rows)
        size = round(0.018 * self.columns), round(0.10 * self.rows)
        cv2.ellipse(image, centre, size, 0, 0, 360, colour, -1)
        cv2.circle(image, (centre[0], centre[1] - size[1]), max(2, size[0] // 2), (130, 160, 200), -1)

    def _light(
        self, image: NDArray[np.float32], one: Planted, at_s: float, rng: np.random.Generator
    ) -> NDArray[np.float32]:
        passed_s = at_s - one.start_s
        match one.what:
            case "shadow":  # of a house, wandering over the pavement
                reach = round(self.columns * min(0.35, 0.1 + 0.01 * passed_s) * one.strength)
                image[self.rows // 2 :, :reach] *= 0.6
            case "light":  # a cloud, or the exposure of the camera
                image *= 1.0 - 0.35 * one.strength * min(1.0, passed_s / 2.0)
            case "night":  # dusk within a minute, then lamps
                image *= 1.0 - 0.8 * one.strength * min(1.0, passed_s / 60.0)
                image += self._grain(rng)
            case _:
                pass
        return image

    def _lens(self, image: NDArray[np.float32], one: Planted) -> NDArray[np.float32]:
        match one.what:
            case "occluded":
                image[:] = (70, 75, 80)
            case "half_occluded":
                image[:, : round(0.55 * self.columns)] = (70, 75, 80)
            case "blur":
                return np.asarray(cv2.GaussianBlur(image, (0, 0), 6.0 * one.strength * self.columns / 640), np.float32)
            case "dark":
                image *= 0.03
            case "bright":
                image += 230.0
            case _:
                pass
        return image


def _scene(rng: np.random.Generator, columns: int, rows: int) -> Image:
    """Return house fronts with windows above, a paved pavement left and an asphalt lane right below."""
    wide, high = columns * 3 // 2, rows * 3 // 2
    image = np.zeros((high, wide, 3), np.float32)
    image[: high // 2] = (120, 130, 150)
    image[high // 2 :] = (140, 142, 145)
    image[high // 2 :, wide // 2 :] = (95, 95, 98)
    unit = wide // 40
    for left in range(unit, wide - 2 * unit, 3 * unit):
        for top in range(unit, high // 2 - 2 * unit, 3 * unit):
            shade = float(rng.integers(30, 220))
            cv2.rectangle(image, (left, top), (left + 2 * unit, top + 2 * unit), (shade, shade * 0.9, shade * 0.8), -1)
            cv2.rectangle(image, (left, top), (left + 2 * unit, top + 2 * unit), (60, 60, 60), 2)
    for across in range(0, wide // 2, unit * 2):
        cv2.line(image, (across, high // 2), (across - unit, high), (115, 117, 120), 2)
    for down in range(high // 2, high, unit * 2):
        cv2.line(image, (0, down), (wide // 2, down), (115, 117, 120), 2)
    for down in range(high // 2, high, unit * 3):
        cv2.line(image, (wide * 5 // 8, down), (wide * 5 // 8, down + unit), (210, 210, 205), 3)
        cv2.line(image, (wide * 7 // 8, down), (wide * 7 // 8, down + unit), (210, 210, 205), 3)
    grain = cv2.GaussianBlur(rng.normal(0.0, 14.0, (high, wide)).astype(np.float32), (0, 0), 1.2)
    return np.clip(image + np.asarray(grain)[:, :, None] * 1.5, 0, 255).astype(np.uint8)


def write_video(path: Path, frames: Iterable[Image], fps: float, codec: str = "FFV1") -> None:
    """Write frames as an AVI: losslessly (FFV1), so that the noise of the sensor survives, or MJPG; raises OSError."""
    writer = None
    for image in frames:
        if writer is None:
            size = (image.shape[1], image.shape[0])
            writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), fps, size)
            if not writer.isOpened():
                raise OSError(f"{path}: cannot be written as {codec}")
        writer.write(image)
    if writer is not None:
        writer.release()
