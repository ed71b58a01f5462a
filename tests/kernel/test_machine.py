"""The one state machine: order, guards, refusals, and its table."""

from __future__ import annotations

import doctest
from typing import Any

import pytest

import citybrain.config
import citybrain.machine
from citybrain.errors import TransitionError
from citybrain.machine import Machine, Moved, Step


def heavy(facts: Any) -> bool:
    return bool(facts and facts > 10)


GATE = Machine(
    "gate",
    "shut",
    [
        Step("shut", "push", "stuck", "too_heavy", heavy),
        Step("shut", "push", "open", "pushed"),
        Step("open", "close", "shut", "closed"),
    ],
)


def test_the_first_step_whose_guard_holds_is_taken() -> None:
    assert GATE.move("shut", "push", 11) == Moved("shut", "push", "stuck", "too_heavy")
    assert GATE.move("shut", "push", 10) == Moved("shut", "push", "open", "pushed")
    assert GATE.move("shut", "push") == Moved("shut", "push", "open", "pushed")


def test_there_is_no_step_that_the_table_does_not_have() -> None:
    for state in GATE.states:
        for event in GATE.events:
            in_table = any((step.state, step.event) == (state, event) for step in GATE.steps)
            assert (GATE.find(state, event, 0) is not None) == in_table


def test_a_refusal_names_what_is_possible() -> None:
    with pytest.raises(TransitionError, match=r"gate: no step 'push' from 'open'; possible: close"):
        GATE.move("open", "push")
    with pytest.raises(TransitionError, match=r"possible: none"):
        GATE.move("stuck", "close")


def test_its_documentation_is_its_table() -> None:
    assert GATE.table().splitlines()[2:] == [
        "| shut | push | stuck | too_heavy |",
        "| shut | push | open | pushed |",
        "| open | close | shut | closed |",
    ]
    assert GATE.states == ("shut", "stuck", "open")


@pytest.mark.parametrize("module", [citybrain.machine, citybrain.config])
def test_examples_in_docstrings_are_true(module: Any) -> None:
    results = doctest.testmod(module)
    assert results.attempted
    assert not results.failed
