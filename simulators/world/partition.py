"""Cutting a piece of a lattice into connected parts of wanted sizes, the way a city is cut into areas."""

from __future__ import annotations

from collections.abc import Sequence

Node = tuple[int, int]  # (column, row); rows count from the north


def apportion(total: int, sizes: Sequence[float]) -> list[int]:
    """Return whole numbers with the sum `total`, each at least 1, in proportion to `sizes` (largest remainder)."""
    spare = total - len(sizes)
    exact = [spare * size / sum(sizes) for size in sizes]
    counts = [1 + int(share) for share in exact]
    remainders = sorted(range(len(sizes)), key=lambda i: (int(exact[i]) - exact[i], i))
    for index in remainders[: total - sum(counts)]:
        counts[index] += 1
    return counts


def connected(nodes: Sequence[Node]) -> bool:
    """Say whether one can walk from each node to each other one over sides, not over corners."""
    left = set(nodes)
    todo = [left.pop()]
    while todo:
        column, row = todo.pop()
        for node in ((column + 1, row), (column - 1, row), (column, row + 1), (column, row - 1)):
            if node in left:
                left.remove(node)
                todo.append(node)
    return not left


def split(nodes: Sequence[Node], weights: Sequence[float]) -> list[list[Node]]:
    """Return `nodes` cut into connected parts with sizes in proportion to `weights`, neighbours beside neighbours.

    Halves are cut across the longer side, again and again; a cut may have one step. `nodes` must be connected and not
    be fewer than the weights; raises ValueError where no cut leaves both sides connected.
    """
    if len(weights) == 1:
        return [list(nodes)]
    half = len(weights) // 2
    want = round(len(nodes) * sum(weights[:half]) / sum(weights))
    first, second = _cut(nodes, want, half, len(nodes) - (len(weights) - half))
    return split(first, weights[:half]) + split(second, weights[half:])


def _cut(nodes: Sequence[Node], want: int, low: int, high: int) -> tuple[list[Node], list[Node]]:
    columns, rows = ({node[axis] for node in nodes} for axis in (0, 1))
    across = sorted(nodes)
    down = sorted(nodes, key=lambda node: (node[1], node[0]))
    for order in (across, down) if len(columns) >= len(rows) else (down, across):
        for size in sorted(range(low, high + 1), key=lambda size: abs(size - want)):
            if connected(order[:size]) and connected(order[size:]):
                return order[:size], order[size:]
    raise ValueError(f"{len(nodes)} nodes cannot be cut in two connected parts of about {want}")
