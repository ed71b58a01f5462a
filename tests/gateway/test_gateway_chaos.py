"""The gateway's chaos in small: processes killed, a disk really full, a line really cut; and that it would tell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gateway_chaos.run import Verdict, may_mount
from streams.runtimes.broker import mosquitto


def run(*words: str) -> dict[str, Any]:
    """Run the benchmark; return what it says."""
    if mosquitto() is None:
        if os.environ.get("CI") == "true":
            pytest.fail("mosquitto is not installed")
        pytest.skip("mosquitto is not installed")
    argv = [sys.executable, "-m", "benchmarks.gateway_chaos", "--json", *words]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=900, check=False, cwd=Path(__file__).parents[2])
    assert done.stdout, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def told(found: dict[str, Any]) -> tuple[int, int, int]:
    return found["lost"], found["repeated"], found["disordered"]


def test_ten_kills_a_full_disk_and_a_cut_lose_and_double_nothing() -> None:
    found = run("--seed", "5", "--kills", "10", "--full-disks", "1", "--cuts", "1", "--pause-s", "0.2")
    assert told(found) == (0, 0, 0), found
    assert found["produced"] == found["logged"] + found["evicted"] > 500
    assert found["full_disks"] == (1 if may_mount() else 0)


@pytest.mark.soak
def test_two_hundred_kills() -> None:
    found = run("--seed", "3", "--kills", "200")
    assert told(found) == (0, 0, 0), found


def test_a_backlog_drains_while_events_overtake() -> None:
    found = run("--drain-days", "0.25")
    assert told(found) == (0, 0, 0), found
    assert found["readings"] == 6 * 60 * 64
    assert found["event_delay_s_max"] < 10.0


@pytest.mark.parametrize(
    ("messages", "lost", "evicted", "repeated", "disordered"),
    [
        ([(1, [1, 2]), (2, [3])], 0, 0, 0, 0),
        ([(1, [1, 2]), (2, [4])], 1, 0, 0, 0),
        ([(1, [1, 3])], 1, 0, 0, 0),
        ([(1, [2])], 1, 0, 0, 0),
        ([(1, [1, 2]), (4, [9])], 0, 6, 0, 0),
        ([(1, [1, 2]), (2, [2, 3])], 0, 0, 1, 0),
        ([(1, [1]), (2, [10]), (3, [2])], 8, 0, 0, 1),
    ],
)
def test_the_judge_tells_what_is_wrong(
    messages: list[tuple[int, list[int]]], lost: int, evicted: int, repeated: int, disordered: int
) -> None:
    verdict = Verdict()
    for seq, numbers in messages:
        verdict.message(seq, numbers)
    assert (verdict.lost, verdict.evicted, verdict.repeated, verdict.disordered) == (
        lost,
        evicted,
        repeated,
        disordered,
    )
