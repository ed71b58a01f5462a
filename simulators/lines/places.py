"""Random places that a fixed camera may look at, each unlike the others: ground, what is behind it, and the light.

place = draw(np.random.default_rng(1000))    # the same place for the same generator
"""

from __future__ import annotations

from typing import Literal

import cv2
import msgspec
import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.float32]
Corners = tuple[tuple[float, float], ...]
Light = Literal["noon", "cloudy", "dusk", "night", "infrared", "switch"]
Weather = Literal["dry", "rain", "snow"]
LIGHTS: tuple[Light, ...] = ("noon", "noon", "cloudy", "cloudy", "dusk", "night", "infrared", "switch")
GROUNDS = ("asphalt", "bricks", "grass", "slabs", "concrete")
SIZES = ((480, 270), (640, 360), (352, 288), (400, 300))
MARGIN = 0.3  # of the size, on each side: a camera that is turned sees it


class Place(msgspec.Struct, frozen=True):
    """What a camera looks at. sight: levels, (rows, columns, 3) with a margin; regions: shares of the picture.

    tall: how high a person is at the bottom, of the rows. across: vehicles pass from side to side, else towards it.
    noise: the sensor's, in levels by day. shake_px: by the wind. flicker: of the lamps. gain_s: of the exposure.
    """

    columns: int
    rows: int
    horizon: float
    tall: float
    across: bool
    light: Light
    weather: Weather
    sight: Field
    tree: tuple[int, int, int, int] | None  # left, top, right, bottom in `sight`
    lamps: tuple[tuple[float, float, float], ...]
    bins: Corners
    lane: Corners
    square: Corners
    noise: float
    shake_px: float
    flicker: float
    gain_s: float
    clouds: float  # how much of the light a cloud's shadow takes

    def tall_at(self, down: float) -> float:
        """Return how high a person is in pixels who stands at a share of the rows."""
        depth = max(0.0, (down - self.horizon) / (1.0 - self.horizon))
        return self.rows * max(0.05, self.tall * depth)


def draw(rng: np.random.Generator) -> Place:
    """Draw a place."""
    columns, rows = SIZES[rng.integers(len(SIZES))]
    horizon, across = float(rng.uniform(0.1, 0.32)), bool(rng.random() < 0.5)
    bins, lane, square = _across(rng, horizon) if across else _along(rng, horizon)
    if rng.random() < 0.5:
        bins, lane, square = (tuple((1.0 - x, y) for x, y in one) for one in (bins, lane, square))
    light = LIGHTS[rng.integers(len(LIGHTS))]
    sight = _sight(rng, columns, rows, horizon, lane)
    lamps = tuple(
        (float(rng.uniform(0.05, 0.95)), float(rng.uniform(horizon, 0.9)), float(rng.uniform(0.15, 0.4)))
        for _ in range(int(rng.integers(1, 4)))
    )
    by_day = light in ("noon", "cloudy", "dusk")
    weather: Weather = ("dry", "dry", "dry", "rain", "snow")[rng.integers(5)]
    return Place(
        columns, rows, horizon, float(rng.uniform(0.32, 0.5)), across, light, weather, sight,
        _tree(rng, sight, columns, rows), lamps, bins, lane, square,
        noise=float(rng.uniform(0.8, 5.0)) * (1.0 if by_day else 1.5),
        shake_px=float(rng.choice([0.0, 0.0, 0.3, 0.8, 1.5])),
        flicker=float(rng.choice([0.0, 0.0, 0.05, 0.5])),
        gain_s=float(rng.choice([0.3, 1.0, 3.0])),
        clouds=float(rng.choice([0.0, 0.2, 0.4])) if light == "noon" else 0.0,
    )  # fmt: skip


def _across(rng: np.random.Generator, horizon: float) -> tuple[Corners, Corners, Corners]:
    """Return a pavement's two regions and a lane, one beside the other from side to side."""
    deep = float(rng.uniform(0.26, 0.34))
    if rng.random() < 0.5:  # the pavement is nearer
        top = horizon + float(rng.uniform(0.08, 0.14))
        lane, (high, low) = (top, top + deep), (top + deep + 0.03, 0.97)
    else:
        lane, (high, low) = (0.98 - deep, 0.98), (horizon + 0.1, 0.98 - deep - 0.03)
    slant = float(rng.uniform(0.0, 0.06))
    split = float(rng.uniform(0.4, 0.55))
    return (
        ((0.04, high), (split - slant, high), (split, low), (0.04, low)),
        ((0.15, lane[0]), (0.85, lane[0]), (0.9, lane[1]), (0.1, lane[1])),
        ((split + 0.05, high), (0.96, high), (0.96, low), (split + 0.05, low)),
    )


def _along(rng: np.random.Generator, horizon: float) -> tuple[Corners, Corners, Corners]:
    """Return a lane that comes towards the camera, and a pavement at each side of it."""
    vanishing, left = float(rng.uniform(0.35, 0.65)), float(rng.uniform(0.3, 0.36))
    right, top = left + float(rng.uniform(0.34, 0.4)), horizon + 0.35 * (1.0 - horizon)

    def edge(bottom: float, down: float) -> float:
        return vanishing + (bottom - vanishing) * (down - horizon) / (1.0 - horizon)

    return (
        ((0.02, top), (edge(left, top) - 0.02, top), (edge(left, 0.97) - 0.02, 0.97), (0.02, 0.97)),
        ((edge(left, top), top), (edge(right, top), top), (edge(right, 0.98), 0.98), (edge(left, 0.98), 0.98)),
        ((edge(right, top) + 0.02, top), (0.98, top), (0.98, 0.97), (edge(right, 0.97) + 0.02, 0.97)),
    )


def _sight(rng: np.random.Generator, columns: int, rows: int, horizon: float, lane: Corners) -> Field:
    wide, high = round(columns * (1 + 2 * MARGIN)), round(rows * (1 + 2 * MARGIN))
    left, top = round(columns * MARGIN), round(rows * MARGIN)
    line = top + round(horizon * rows)
    sight = np.zeros((high, wide, 3), np.float32)
    _behind(rng, sight[:line])
    contrast = float(rng.uniform(0.5, 1.3))
    _pave(rng, sight[line:], GROUNDS[rng.integers(len(GROUNDS))], contrast)
    road = sight.copy()
    _pave(rng, road[line:], "asphalt", contrast)
    mask = np.zeros((high, wide), np.uint8)
    corners = np.array([(left + x * columns, top + y * rows) for x, y in lane], np.float32)
    spread = corners.mean(axis=0) + (corners - corners.mean(axis=0)) * (1.5, 1.0)  # it goes on at both ends
    cv2.fillPoly(mask, [np.round(spread).astype(np.int32)], 1)
    sight = np.where(mask[:, :, None] > 0, road, sight)
    cv2.polylines(sight, [np.round(spread).astype(np.int32)], True, (190, 190, 185), max(1, rows // 120))
    for _ in range(int(rng.integers(2, 7))):  # posts and signs
        x, y, tall = int(rng.integers(0, wide)), int(rng.integers(line, high)), int(rng.uniform(0.1, 0.4) * rows)
        shade = float(rng.uniform(30, 220))
        cv2.rectangle(sight, (x, y - tall), (x + max(2, columns // 120), y), (shade, shade, shade), -1)
    return np.clip(cv2.GaussianBlur(sight, (0, 0), 0.6), 4.0, 245.0).astype(np.float32)


def _behind(rng: np.random.Generator, part: Field) -> None:
    """Draw what stands behind the ground: fronts with windows, a hedge, a plain or a dark wall."""
    high, wide = part.shape[:2]
    kind = int(rng.integers(4))
    base = np.array([float(rng.uniform(25, 60) if kind == 3 else rng.uniform(80, 170))] * 3) + rng.normal(0, 10, 3)
    part[:] = base
    if kind == 1:
        part[:] = (50, 80, 60)
        part += _grain(rng, high, wide, 2.5, 55.0)
    elif kind != 2:
        unit = int(rng.integers(10, 26))
        for x in range(unit // 2, wide, 2 * unit):
            for y in range(unit // 2, high, 2 * unit):
                shade = float(rng.uniform(20, 220)) * (0.4 if kind == 3 else 1.0)
                cv2.rectangle(part, (x, y), (x + unit, y + round(1.2 * unit)), (shade, shade, 0.9 * shade), -1)
                cv2.rectangle(part, (x, y), (x + unit, y + round(1.2 * unit)), (0.5 * base).tolist(), 1)
    part += _grain(rng, high, wide, 1.2, 6.0)


def _pave(rng: np.random.Generator, part: Field, ground: str, contrast: float) -> None:
    """Cover the ground."""
    high, wide = part.shape[:2]
    level = float(rng.uniform(70, 150))
    part[:] = (50, 95, 75) if ground == "grass" else (level, level * 1.01, level * 1.03)
    if ground == "grass":
        part += _grain(rng, high, wide, 1.0, 30.0 * contrast) + _grain(rng, high, wide, 8.0, 15.0)
    elif ground == "bricks":
        part[:] = (70, 85, 140)
        _joints(rng, part, int(rng.integers(8, 16)), 45.0 * contrast)
    elif ground == "slabs":
        _joints(rng, part, int(rng.integers(25, 60)), 30.0 * contrast)
    part += _grain(rng, high, wide, 1.2, (9.0 if ground != "concrete" else 4.0) * contrast)
    part += _grain(rng, high, wide, 12.0, 8.0 * contrast)


def _joints(rng: np.random.Generator, part: Field, unit: int, depth: float) -> None:
    """Draw joints that become narrower with the distance."""
    high, wide = part.shape[:2]
    vanishing, y, step = wide * float(rng.uniform(0.3, 0.7)), 0.0, 2.0
    shade = np.zeros(part.shape[:2], np.float32)
    while y < high:
        cv2.line(shade, (0, round(y)), (wide, round(y)), depth, 1)
        step += unit / 12
        y += step
    for x in range(-wide, 2 * wide, unit * 2):
        cv2.line(shade, (round(vanishing + 0.3 * (x - vanishing)), 0), (x, high), depth, 1)
    part -= shade[:, :, None]


def _grain(rng: np.random.Generator, high: int, wide: int, sigma: float, levels: float) -> Field:
    field = cv2.GaussianBlur(rng.normal(0.0, 1.0, (high, wide)).astype(np.float32), (0, 0), sigma)
    return np.asarray(field / max(1e-6, float(np.std(field))) * levels, np.float32)[:, :, None]


def _tree(rng: np.random.Generator, sight: Field, columns: int, rows: int) -> tuple[int, int, int, int] | None:
    """Draw a crown into an upper corner of what is seen, now and then; return where it sways."""
    if rng.random() < 0.5:
        return None
    wide, high = round(columns * rng.uniform(0.15, 0.35)), round(rows * rng.uniform(0.2, 0.5))
    left = round(columns * MARGIN) + (0 if rng.random() < 0.5 else columns - wide)
    top = round(rows * MARGIN)
    crown = np.zeros((high, wide), np.uint8)
    for _ in range(12):
        centre = int(rng.uniform(0.15, 0.85) * wide), int(rng.uniform(0.1, 0.7) * high)
        cv2.circle(crown, centre, round(0.22 * min(wide, high)), 1, -1)
    leaves = np.array((45, 90, 65), np.float32) + _grain(rng, high, wide, 1.8, 35.0)
    part = sight[top : top + high, left : left + wide]
    part[:] = np.where(crown[:, :, None] > 0, np.clip(leaves, 8, 220), part)
    return left, top, left + wide, top + high
