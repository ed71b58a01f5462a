"""The answers of `benchmarks.runtimes` in small: the same transitions and cases from every runtime, whoever dies."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from benchmarks.runtimes.answers import both, decided, measure, rows_that_differ
from benchmarks.runtimes.topics import SERIES, Shard, differences
from citybrain.clock import system_clock
from citybrain.layout import Layout, Run
from streams.engine import Engine
from streams.registry import encode_registry


@pytest.mark.parametrize(
    ("runtime", "workers"),
    [("kafka", 2), *(pytest.param(*one, marks=pytest.mark.soak) for one in (("kafka", 1), ("faust", 1), ("faust", 2)))],
)
def test_every_runtime_makes_the_same_transitions_and_cases(
    tmp_path: Path, kafka: str, runtime: str, workers: int
) -> None:
    found = measure(tmp_path / "run", kafka, 10 * SERIES, seed=3, kills=1, runtimes=(runtime,), workers=(workers,))
    assert (found["differs"], found["cases_differ"], found["kills"]) == (0, 0, 1)
    assert found["cases"] > 100
    assert found["rebalances"] >= workers + 2


def test_a_transition_that_is_missing_other_or_repeated_is_counted(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "run")
    layout.make()
    layout.write_run(Run(clock=system_clock(), shards=1))
    city = Shard(layout, 0, 300)
    expected = [Engine(0, layout).process([*city.controls, *city.passes(0, 2)])]
    registry = layout.put_blob(encode_registry(both([city.registry])))
    rows = decided(tmp_path / "desk", layout, registry, expected)
    (own,) = expected
    other = msgspec.structs.replace(own[-1], subject=own[0].subject + "x")
    for found in (own[:-1], [*own, own[-1]], [*own[:-1], other]):
        assert differences(expected, [found]) == 1
    fewer = decided(tmp_path / "fewer", layout, registry, [own[: len(own) // 2]])
    assert rows_that_differ(rows, fewer) > 0
    assert rows_that_differ(rows, decided(tmp_path / "again", layout, registry, expected)) == 0
