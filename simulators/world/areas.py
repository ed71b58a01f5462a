"""The areas of the reference district, one inside the other: street ⊃ workstation ⊃ grid ⊃ community ⊃ cell.

Their numbers are the reference city's (1+14+32+85+274); their outlines follow from the seed.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial

import msgspec

from citybrain.model import Area, Cell
from simulators.world import names
from simulators.world.city import CELL_M, DIVISION, Box, Metres
from simulators.world.partition import Node, apportion, split

STREETS, WORKSTATIONS, GRIDS, COMMUNITIES = 14, 32, 85, 274
CELLS_ACROSS = CELLS_DOWN = 60  # 36 km²
Maker = Callable[[str, int, str], Area]  # from street, number within it, and the code of the parent
UNEVEN = 0.3  # [U] how much areas of one kind differ in size: ± this share


class Ground(msgspec.Struct, frozen=True):
    """The areas and cells, and which cell lies where on the lattice of 100 m."""

    areas: tuple[Area, ...]
    cells: dict[Node, Cell]


def node_of(point: Metres) -> Node:
    """Return the lattice place of a point in metres from the origin, which is the north-west corner."""
    x, y = point
    return int(x // CELL_M), int(-y // CELL_M)


def box_of(node: Node) -> Box:
    """Return the outline of the cell at a lattice place."""
    column, row = node
    return column * CELL_M, -(row + 1) * CELL_M, (column + 1) * CELL_M, -row * CELL_M


class _Piece(msgspec.Struct, frozen=True):
    """An area, the codes from its street down to itself, and its lattice places."""

    area: Area
    lineage: tuple[str, ...]
    nodes: list[Node]


def survey(dice: random.Random) -> Ground:
    """Return the ground of a district, drawn from `dice`."""
    streets = _streets(dice)
    workstations = _inside(dice, streets, [_workstation] * WORKSTATIONS)
    grids = _inside(dice, workstations, [_grid] * GRIDS)
    homes = names.communities(dice, COMMUNITIES)
    communities = _inside(dice, grids, [partial(_community, name=name) for name in homes])
    pieces = [*streets, *workstations, *grids, *communities]
    cells = {node: cell for piece in communities for node, cell in _cells(piece)}
    return Ground(tuple(piece.area for piece in pieces), cells)


def _uneven(dice: random.Random, count: int) -> list[float]:
    return [dice.uniform(1 - UNEVEN, 1 + UNEVEN) for _ in range(count)]


def _streets(dice: random.Random) -> list[_Piece]:
    everything = [(column, row) for row in range(CELLS_DOWN) for column in range(CELLS_ACROSS)]
    parts = split(everything, _uneven(dice, STREETS))
    return [
        _Piece(Area(code, "street", zh, en, DIVISION), (code,), nodes)
        for code, (zh, en), nodes in zip(street_codes(), names.streets(), parts, strict=True)
    ]


def street_codes() -> list[str]:
    """Return the three digits of each street; 001-099 are streets, from 100 on there are towns [M]."""
    return [f"{number:03d}" for number in range(1, STREETS + 1)]


def _inside(dice: random.Random, parents: list[_Piece], makers: list[Maker]) -> list[_Piece]:
    """Cut each parent into its share of as many areas as there are makers; they are numbered within their street."""
    found = []
    numbers: Counter[str] = Counter()
    making = iter(makers)
    for parent, share in zip(parents, apportion(len(makers), [len(p.nodes) for p in parents]), strict=True):
        for nodes in split(parent.nodes, _uneven(dice, share)):
            street = parent.lineage[0]
            numbers[street] += 1
            area = next(making)(street, numbers[street], parent.area.code)
            found.append(_Piece(area, (*parent.lineage, area.code), nodes))
    return found


def _street_name(street: str) -> names.Name:
    zh, en = names.streets()[int(street) - 1]
    return zh.removesuffix("街道"), en.removesuffix(" Street")


def _workstation(street: str, number: int, parent: str) -> Area:
    zh, en = _street_name(street)
    code = f"{DIVISION}{street}-W{number:02d}"
    return Area(code, "workstation", f"{zh}第{number}街区工作站", f"{en} workstation {number}", parent)


def _grid(street: str, number: int, parent: str) -> Area:
    zh, en = _street_name(street)
    return Area(f"{DIVISION}{street}-G{number:02d}", "grid", f"{zh}第{number}责任网格", f"{en} grid {number}", parent)


def _community(street: str, number: int, parent: str, name: names.Name) -> Area:
    return Area(f"{DIVISION}{street}{number:03d}", "community", *name, parent)


def _cells(community: _Piece) -> Iterator[tuple[Node, Cell]]:
    """Number the cells of a community west to east, then north to south."""
    street, workstation, grid, code = community.lineage
    for sequence, node in enumerate(sorted(community.nodes, key=lambda node: (node[1], node[0])), start=1):
        yield node, Cell(f"{code}{sequence:03d}", grid, street, workstation, code)
