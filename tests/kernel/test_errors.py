"""The tree of errors is drawn in its module: completely, and as it is."""

from __future__ import annotations

import re

import citybrain.errors
from citybrain.errors import CityBrainError


def drawn() -> dict[str, str]:
    """Return child → parent as the module's docstring draws them."""
    found: dict[str, str] = {}
    path: list[str] = []
    for line in (citybrain.errors.__doc__ or "").splitlines():
        match = re.match(r"^((?:│   |    )*)(?:[├└]── )?(\w+)(?:  |$)", line)
        if match is None or not hasattr(citybrain.errors, match[2]):
            continue
        depth = 0 if line[0] not in "│├└ " else len(match[1]) // 4 + 1
        path = [*path[:depth], match[2]]
        if depth:
            found[match[2]] = path[depth - 1]
    return found


def real() -> dict[str, str]:
    todo, found = [CityBrainError], {}
    while todo:
        parent = todo.pop()
        for child in parent.__subclasses__():
            if child.__module__ == citybrain.errors.__name__:
                found[child.__name__] = parent.__name__
                todo.append(child)
    return found


def test_every_error_is_drawn_where_it_stands() -> None:
    assert drawn() == real()


def test_exit_codes_are_those_of_the_command_line() -> None:
    codes = {getattr(citybrain.errors, name).exit_code for name in ("CityBrainError", *real())}
    assert codes == {1, 2, 3, 4, 5}
