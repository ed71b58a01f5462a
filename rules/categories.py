"""Categories: what a case can be, its codes per edition of the standard, its handling unit and its clock.

They are configuration (`rules/library/categories.yaml`): codes and deadlines differ from city to city.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

import msgspec

from citybrain.config import load_yaml

FILE = Path(__file__).with_name("library") / "categories.yaml"


class Clock(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How long the handling unit has. `urgent_hour` runs through nights and holidays; `work_*` only in working time."""

    type: Literal["urgent_hour", "work_hour", "work_day", "natural_day"]
    amount: float


class Category(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One category. `codes`: class code per edition, absent where the edition has none; `unit`: handling unit code."""

    zh: str
    en: str
    unit: str
    clock: Clock
    source: str
    codes: dict[str, str] = {}


@cache
def load_categories(path: Path = FILE) -> dict[str, Category]:
    """Return every category by its id; raises ConfigError with path and line."""
    return load_yaml(path, dict[str, Category])
