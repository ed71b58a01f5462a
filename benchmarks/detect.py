"""Measure the kernels of detection: `threshold` with deadband and delays, judged and held as the engine does it.

    python -m benchmarks.detect --json

instance_updates_per_s   one rule instance taking one value, per second of one core, where the values come
    local                gateway by gateway, as frames bring them
    random               in random order over all series of the shard
    hot                  in gateway order, while every other value is of one and the same device

One core: the seconds are those this process computed (`time.process_time`), best of `--repeat`. Every `--beyond`-th
value passes a limit and comes back with the next one.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.engine import GATEWAY_DEVICES, METRICS, PASS_MS, START, make_index, make_ruleset
from streams.engine import BATCH_VALUES
from streams.kinds.holding import Batch
from streams.plan import compile_plan
from streams.registry import Index
from streams.watches import Conditions

U32 = npt.NDArray[np.uint32]


def order_of(name: str, series: int, dice: np.random.Generator) -> U32:
    """Return the series in the order in which one pass over the city brings their values."""
    order = np.arange(series, dtype=np.uint32)
    if name == "random":
        dice.shuffle(order)
    if name == "hot":
        order[1::2] = order[1::2] % len(METRICS)  # the four series of the first device
    return order


def batches(order: U32, at_ms: int, values: npt.NDArray[np.float64]) -> list[Batch]:
    """Return one pass as batches of the engine's size."""
    found = []
    gateway = (order // (len(METRICS) * GATEWAY_DEVICES)).astype(np.int32)
    for low in range(0, len(order), BATCH_VALUES):
        part = slice(low, low + BATCH_VALUES)
        n = len(order[part])
        t = np.full(n, at_ms, np.int64)
        found.append(Batch(gateway[part].copy(), t, values[part].copy(), order[part].copy(), np.ones(n, np.int8), t, t))
    return found


def rate(watch: Conditions, name: str, index: Index, repeat: int, beyond: int) -> float:
    """Return values/s of the best of several passes."""
    dice = np.random.default_rng(7)
    order, best = order_of(name, index.n_series, dice), float("inf")
    for number in range(repeat + 1):
        values = np.where(dice.integers(0, beyond, index.n_series) == 0, 9.0, dice.random(index.n_series))
        work = batches(order, START + number * PASS_MS, values)
        began = time.process_time()
        for batch in work:
            watch.run(batch)
        if number:  # the first pass touches memory for the first time
            best = min(best, time.process_time() - began)
    return index.n_series / best


def run(series: int, rules: int, repeat: int, beyond: int) -> dict[str, Any]:
    """Measure the three orders, each from fresh state."""
    index = make_index(series)
    table = compile_plan(make_ruleset(rules), index, 0).tables["threshold"]
    per_s = {}
    for name in ("local", "random", "hot"):
        watch = Conditions(table)
        per_s[name] = round(rate(watch, name, index, repeat, beyond) * rules)
    return {
        "instance_updates_per_s": per_s,
        "series": index.n_series,
        "instances": len(table.rule),
        "batch_values": BATCH_VALUES,
        "beyond": beyond,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--series", type=int, default=1_000_000)
    parser.add_argument("--rules", type=int, default=3, help="rule instances a value")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--beyond", type=int, default=1000, help="one value in so many passes a limit")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    result = run(options.series, options.rules, options.repeat, options.beyond)
    print(json.dumps(result) if options.json else "\n".join(f"{key:24} {value}" for key, value in result.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
