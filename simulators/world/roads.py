"""The roads of the reference district: a net of main roads about 500 m apart, one or two lesser roads in each block.

Roads run straight, west-east or north-south. 246 of them, as in the reference city, are 240 km: 6.7 km a km².
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

import msgspec
import numpy as np
from numpy.typing import NDArray

from citybrain.model import Road
from simulators.world import names
from simulators.world.areas import CELLS_ACROSS
from simulators.world.city import CELL_M, DIVISION, Metres

ROADS = 246
BLOCK_M = 500.0
SIDE_M = CELLS_ACROSS * CELL_M  # of the square that the district is
BLOCKS = round(SIDE_M / BLOCK_M)  # along a side
MAIN = 2 * (BLOCKS - 1)
BEND_M = 40.0  # a main road is off the block's edge by up to this much
END_M = 20.0  # nothing stands nearer to a road's end
HOUSE_M = 10.0  # between two house numbers of one side
EDGE_M = 2.0  # nothing stands nearer to a cell's edge: rounding must not move it into the next cell


Track = tuple[int, float, float, float]  # axis, across, start, end


class Line(msgspec.Struct, frozen=True):
    """A straight road. `axis` is 0 when it runs west-east (along x), 1 when it runs north-south.

    `across` is its fixed coordinate, `start` < `end` the other one at its ends; metres from the origin.
    """

    road: Road
    axis: int
    across: float
    start: float
    end: float

    def point(self, along: float, aside: float = 0.0) -> Metres:
        """Return the point at coordinate `along`, `aside` metres to the north or east of the centre line."""
        return (along, self.across + aside) if self.axis == 0 else (self.across + aside, along)

    @property
    def ends(self) -> tuple[Metres, Metres]:
        return self.point(self.start), self.point(self.end)


class Spot(msgspec.Struct, frozen=True):
    """A place beside a road: where, at which road (its index), the house's number.

    `clear_m` is how far the nearest other road is.
    """

    at: Metres
    line: int
    along: float
    house: int
    clear_m: float


def lay(dice: random.Random) -> list[Line]:
    """Return the roads, main ones first."""
    mains = _main_tracks(dice)
    tracks = mains + _block_tracks(dice, mains)
    titles = names.roads(dice, MAIN, ROADS - MAIN)
    chiefs = names.people(dice, ROADS)
    return [
        Line(Road(f"{DIVISION}-R{index + 1:03d}", zh, en, 1 if index < MAIN else 2, chiefs[index]), *track)
        for index, (track, (zh, en)) in enumerate(zip(tracks, titles, strict=True))
    ]


def _main_tracks(dice: random.Random) -> list[Track]:
    places = [number * BLOCK_M for number in range(1, BLOCKS)]
    down = [(0, -place + dice.uniform(-BEND_M, BEND_M), 0.0, SIDE_M) for place in places]
    return down + [(1, place + dice.uniform(-BEND_M, BEND_M), -SIDE_M, 0.0) for place in places]


def _block_tracks(dice: random.Random, mains: list[Track]) -> list[Track]:
    """One road through each block between main roads, and a second one across it in as many as make up the number."""
    rows = [-SIDE_M, *sorted(across for axis, across, _, _ in mains if axis == 0), 0.0]
    columns = [0.0, *sorted(across for axis, across, _, _ in mains if axis == 1), SIDE_M]
    blocks = [((x1, x2), (y1, y2)) for y1, y2 in pairwise(rows) for x1, x2 in pairwise(columns)]
    crossed = set(dice.sample(range(len(blocks)), ROADS - MAIN - len(blocks)))
    found = []
    for index, sides in enumerate(blocks):
        first = dice.randrange(2)
        for axis in (first, 1 - first) if index in crossed else (first,):
            low, high = sides[1 - axis]
            found.append((axis, dice.uniform(0.65 * low + 0.35 * high, 0.35 * low + 0.65 * high), *sides[axis]))
    return found


def spots(lines: Sequence[Line], places: Sequence[tuple[int, float, float]]) -> list[Spot]:
    """Return the spots at (index of the road, coordinate along it, metres aside of its centre line)."""
    at = [_settled(lines[line].point(along, aside)) for line, along, aside in places]
    clear = _clearances(lines, np.array(at).reshape(-1, 2), np.array([line for line, _, _ in places], np.int64))
    return [
        Spot(point, line, along, 2 * int((along - lines[line].start) // HOUSE_M) + (1 if aside > 0 else 2), room)
        for (line, along, aside), point, room in zip(places, at, clear.tolist(), strict=True)
    ]


def anywhere(dice: random.Random, lines: Sequence[Line], count: int, aside_m: float) -> list[Spot]:
    """Return `count` spots drawn evenly over the length of all roads, `aside_m` beside them on either side."""
    found = []
    for index in dice.choices(range(len(lines)), [line.end - line.start for line in lines], k=count):
        line = lines[index]
        found.append((index, dice.uniform(line.start + END_M, line.end - END_M), dice.choice((-aside_m, aside_m))))
    return spots(lines, found)


def _settled(point: Metres) -> Metres:
    x, y = (c // CELL_M * CELL_M + min(max(c % CELL_M, EDGE_M), CELL_M - EDGE_M) for c in point)
    return x, y


def _clearances(lines: Sequence[Line], at: NDArray[np.float64], own: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return how far each point is from the nearest road that is not its own."""
    level = np.array([line.axis == 0 for line in lines])
    across, start, end = (np.array([getattr(line, name) for line in lines]) for name in ("across", "start", "end"))
    x, y = at[:, :1], at[:, 1:]
    along, beside = np.where(level, x, y), np.where(level, y, x)
    beyond = np.maximum(np.maximum(start - along, along - end), 0.0)
    distance = np.hypot(beyond, beside - across)
    distance[np.arange(len(own)), own] = np.inf
    nearest: NDArray[np.float64] = distance.min(axis=1)
    return nearest
