"""People, vehicles and things as a fixed camera sees them from some way off, drawn onto a canvas of levels.

A `foot` is where something stands, (across, down) in pixels; `tall` is how high a person is there, in pixels.
"""

from __future__ import annotations

import math

import cv2
import numpy as np
from numpy.typing import NDArray

Canvas = NDArray[np.float32]  # (rows, columns, 3) BGR, levels
Colour = tuple[float, float, float]
Foot = tuple[float, float]

CAR_LONG, CAR_HIGH, CAR_WIDE = 2.6, 0.9, 1.1  # of a person's height
BUS_LONG, BUS_HIGH, BUS_WIDE = 6.5, 1.8, 1.5


def colour_of(rng: np.random.Generator, low: float = 20.0, high: float = 230.0) -> Colour:
    """Return a colour as clothes and cars have them: mostly greyish."""
    level, tint = float(rng.uniform(low, high)), rng.normal(0.0, 22.0, 3)
    return tuple(float(np.clip(level + part, 5.0, 245.0)) for part in tint)  # type: ignore[return-value]


def shadow(canvas: Canvas, foot: Foot, wide: float, high: float, depth: float) -> None:
    """Darken the ground beneath something."""
    left, top = max(0, round(foot[0] - wide)), max(0, round(foot[1] - high))
    part = canvas[top : max(top, round(foot[1] + high)), left : max(left, round(foot[0] + wide))]
    if part.size:
        spot = np.ones(part.shape[:2], np.float32)
        centre = (round(foot[0]) - left, round(foot[1]) - top)
        cv2.ellipse(spot, centre, (max(1, round(wide)), max(1, round(high))), 0, 0, 360, 1.0 - depth, -1)
        part *= spot[:, :, None]


def person(canvas: Canvas, foot: Foot, tall: float, clothes: tuple[Colour, Colour], stride: float) -> None:
    """Draw somebody; stride: where in a step, in radians."""
    x, y = foot
    shadow(canvas, foot, 0.25 * tall, 0.05 * tall, 0.3)
    thick = max(1, round(0.11 * tall))
    swing = 0.14 * tall * math.sin(stride)
    for side in (swing, -swing):
        _line(canvas, (x, y - 0.48 * tall), (x + side, y), clothes[1], thick)
    middle, size = _at((x, y - 0.66 * tall)), (max(1, round(0.14 * tall)), max(1, round(0.21 * tall)))
    cv2.ellipse(canvas, middle, size, 0, 0, 360, clothes[0], -1)
    _line(canvas, (x, y - 0.8 * tall), (x - 0.8 * swing, y - 0.5 * tall), clothes[0], max(1, thick // 2))
    cv2.circle(canvas, _at((x, y - 0.92 * tall)), max(1, round(0.075 * tall)), (110, 140, 185), -1)


def vehicle(canvas: Canvas, foot: Foot, tall: float, colour: Colour, *, side: bool, bus: bool, lit: bool) -> None:
    """Draw a car or a bus, from its side or from its front."""
    long, high, wide = (BUS_LONG, BUS_HIGH, BUS_WIDE) if bus else (CAR_LONG, CAR_HIGH, CAR_WIDE)
    half, high = tall * (long if side else wide) / 2, tall * high
    x, y = foot
    shadow(canvas, (x, y), 1.05 * half, 0.12 * tall, 0.5)
    body = y - (high if bus else 0.6 * high if side else 0.75 * high)
    _box(canvas, x - half, body, x + half, y - 0.08 * tall, colour)
    glass: Colour = (60, 50, 45)
    if bus:
        panes = 7 if side else 1
        pane = 2 * half / panes
        for number in range(panes):
            left = x - half + pane * number
            _box(canvas, left + 0.08 * pane, y - 0.85 * high, left + 0.92 * pane, y - 0.45 * high, glass)
        _box(canvas, x - half, y - 0.36 * high, x + half, y - 0.3 * high, (0.5 * colour[0], 0.5 * colour[1], 200))
    else:
        narrow = 0.55 if side else 0.8
        _box(canvas, x - narrow * half, y - high, x + narrow * half, body + 1, colour)
        _box(canvas, x - 0.85 * narrow * half, y - 0.94 * high, x + 0.85 * narrow * half, body, glass)
    for end in (-0.62, 0.62):
        cv2.circle(canvas, _at((x + end * half, y - 0.1 * tall)), max(1, round(0.16 * tall)), (20, 20, 20), -1)
        if lit:
            cv2.circle(
                canvas, _at((x + 1.4 * end * half, y - 0.3 * tall)), max(1, round(0.1 * tall)), (250, 255, 255), -1
            )


def bag(canvas: Canvas, foot: Foot, size: float, colour: Colour, shape: int) -> None:
    """Draw a thing that was left, `size` pixels across: a full bag, a carton, or a heap of both."""
    x, y = foot
    dark: Colour = (0.6 * colour[0], 0.6 * colour[1], 0.6 * colour[2])
    shadow(canvas, foot, 0.6 * size, 0.12 * size, 0.3)
    if shape == 0:
        cv2.ellipse(canvas, _at((x, y - 0.5 * size)), (round(0.5 * size), round(0.5 * size)), 0, 0, 360, colour, -1)
        _line(
            canvas,
            (x - 0.2 * size, y - 0.7 * size),
            (x + 0.15 * size, y - 0.2 * size),
            dark,
            max(1, round(0.08 * size)),
        )
    elif shape == 1:
        _box(canvas, x - 0.5 * size, y - 0.8 * size, x + 0.5 * size, y, colour)
        _line(
            canvas, (x - 0.5 * size, y - 0.5 * size), (x + 0.5 * size, y - 0.5 * size), dark, max(1, round(0.08 * size))
        )
    else:
        _box(canvas, x - 0.7 * size, y - 0.6 * size, x, y, colour)
        cv2.ellipse(
            canvas, _at((x + 0.3 * size, y - 0.35 * size)), (round(0.4 * size), round(0.35 * size)), 0, 0, 360, dark, -1
        )


def table(canvas: Canvas, foot: Foot, tall: float, colour: Colour) -> None:
    """Draw a stall: a table with goods beneath an awning."""
    x, y = foot
    _box(canvas, x - 0.8 * tall, y - 0.5 * tall, x + 0.8 * tall, y, (70, 80, 95))
    for number in range(6):
        shade = 40.0 + 30.0 * number
        left = x - 0.75 * tall + 0.25 * tall * number
        _box(canvas, left, y - 0.6 * tall, left + 0.2 * tall, y - 0.45 * tall, (shade, 200.0 - shade, 120.0))
    _box(canvas, x - 0.9 * tall, y - 0.95 * tall, x + 0.9 * tall, y - 0.75 * tall, colour)


def _line(canvas: Canvas, one: Foot, other: Foot, colour: Colour, thick: int) -> None:
    cv2.line(canvas, _at(one), _at(other), colour, thick)


def _box(canvas: Canvas, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
    cv2.rectangle(canvas, _at((left, top)), _at((right, bottom)), colour, -1)


def _at(foot: Foot) -> tuple[int, int]:
    return round(foot[0]), round(foot[1])
