"""The water network of the reference district: pressure zones of some blocks each, and the pipes under their roads.

A zone has pipes of its own under every road in it and around it, joined at the crossings; none joins two zones ([U] our
choice: real zones are kept apart by closed valves, so a burst shows in one zone).
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations, pairwise

import numpy as np
from numpy.typing import NDArray

from simulators.world.areas import node_of
from simulators.world.city import CELL_M, Metres
from simulators.world.partition import Node, split
from simulators.world.roads import BEND_M, BLOCK_M, BLOCKS, Line

ZONES, SHARDS = 48, 4  # 42 hydrants a zone on average; a zone lies in one shard
ZONES_A_SHARD = ZONES // SHARDS
CELLS_A_BLOCK = round(BLOCK_M / CELL_M)
REACH_M = BEND_M + 10.0  # a zone has a pipe under a road this far outside its edge
STEP_M = 10.0  # no hydrant stands so near a crossing that a zone could miss its pipe

Pipe = tuple[int, float, float]  # index of the road, coordinates along it at two neighbouring crossings


def zone_name(index: int) -> str:
    """Return the code of zone 0..47."""
    return f"zone-{index + 1:02d}"


def zones(dice: random.Random) -> dict[Node, int]:
    """Return the zone (0..47) of each cell; zones that follow each other are neighbours, so a shard is a quarter."""
    blocks = [(column, row) for row in range(BLOCKS) for column in range(BLOCKS)]
    parts = split(blocks, [1.0] * ZONES)
    inside = range(CELLS_A_BLOCK)
    return {
        (column * CELLS_A_BLOCK + right, row * CELLS_A_BLOCK + down): zone
        for zone, part in enumerate(parts)
        for column, row in part
        for right in inside
        for down in inside
    }


class Network:
    """The pipes of each zone, ready to be asked for distances along them."""

    def __init__(self, lines: Sequence[Line], zone_of: dict[Node, int]) -> None:
        self._lines = lines
        self._pipes: dict[int, list[Pipe]] = defaultdict(list)
        for index, along in enumerate(crossings(lines)):
            for start, end in pairwise(along):
                for zone in zones_beside(lines[index], start, end, zone_of):
                    self._pipes[zone].append((index, start, end))

    def distances(self, zone: int, hydrants: Sequence[tuple[int, float]]) -> NDArray[np.float64]:
        """Return how far hydrants are from each other along the zone's pipes, in metres.

        A hydrant is given as (index of its road, coordinate along it).
        """
        number: dict[Metres, int] = {}  # of the crossings, after those of the hydrants
        edges: list[tuple[int, int, float]] = []
        for index, start, end in self._pipes[zone]:
            first, last = (
                number.setdefault(self._lines[index].point(along), len(hydrants) + len(number))
                for along in (start, end)
            )
            on = sorted(
                (along, h) for h, (road, along) in enumerate(hydrants) if road == index and start <= along < end
            )
            chain = [(start, first), *on, (end, last)]
            edges += [(one, other, to - at) for (at, one), (to, other) in pairwise(chain)]
        return shortest(len(hydrants) + len(number), edges)[: len(hydrants), : len(hydrants)]


def crossings(lines: Sequence[Line]) -> list[list[float]]:
    """Return of each road where others meet or cross it, with its two ends: ascending coordinates along it."""
    found = [{line.start, line.end} for line in lines]
    for (i, one), (j, other) in combinations(enumerate(lines), 2):
        if one.axis != other.axis and one.start <= other.across <= one.end and other.start <= one.across <= other.end:
            found[i].add(other.across)
            found[j].add(one.across)
    return [sorted(along) for along in found]


def zones_beside(line: Line, start: float, end: float, zone_of: dict[Node, int]) -> set[int]:
    """Return the zones on both sides of a stretch of road."""
    steps = np.linspace(start, end, max(2, round((end - start) / STEP_M)) + 1)[1:-1].tolist()
    points = (line.point(along, aside) for along in steps for aside in (-REACH_M, REACH_M))
    return {zone_of[node] for node in map(node_of, points) if node in zone_of}


def shortest(count: int, edges: Sequence[tuple[int, int, float]]) -> NDArray[np.float64]:
    """Return the shortest ways between all of `count` nodes (Floyd, Algorithm 97, 1962); inf where there is none."""
    ways = np.full((count, count), np.inf)
    np.fill_diagonal(ways, 0.0)
    for one, other, length in edges:
        ways[one, other] = ways[other, one] = min(length, ways[one, other])
    for via in range(count):
        np.minimum(ways, ways[:, via, None] + ways[None, via], out=ways)
    return ways
