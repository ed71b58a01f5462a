"""Rule kinds: one file each, and one line here.

A kind has `Parameters` (what `when:` may hold), `problems`, `SAMPLE`, `explain`, and its kernels: plain functions that
`streams.kernels.compiled` hands to numba when the engine first needs them, so that whoever only explains an alarm never
loads a compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from citybrain.model import Evidence
from streams.kinds import absence, composite, device_code, rate, reported, shift, stuck, threshold


class Kind(Protocol):
    """What every kind's module offers. `JUDGES`: it judges single values, and `streams.kinds.holding` does the rest.

    One that judges has `TABLE` and `row` (what a rule compares with), `judge`, and, where its instances remember
    something, `MEMORY`: a dtype whose zeros are an instance that knows nothing yet. One that judges several metrics has
    `places` (which field names each) and `enough` (which devices it can hold for, when they lack some).
    """

    JUDGES: bool
    SAMPLE: str

    @property
    def Parameters(self) -> type[Any]: ...  # noqa: N802  a struct of the module
    @property
    def problems(self) -> Callable[[Any], list[tuple[str, str]]]: ...
    @property
    def metrics(self) -> Callable[[Any], tuple[str, ...]]: ...
    @property
    def limit(self) -> Callable[..., float | None]: ...
    @property
    def explain(self) -> Callable[[Any, Evidence, str], str]: ...


KINDS: dict[str, Kind] = {
    "absence": absence,
    "composite": composite,
    "device_code": device_code,
    "rate": rate,
    "reported": reported,
    "shift": shift,
    "stuck": stuck,
    "threshold": threshold,
}
