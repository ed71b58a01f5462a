"""Code tables of lift controllers: what a region's numbers mean, as data with their sources."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Literal

import msgspec

from citybrain.config import load_yaml
from citybrain.errors import NotFound

HIGHEST_CODE = 999
FOLDER = Path(__file__).parent


class Code(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One code as a controller sends it; `means` is the number that the platform's rules know it by, where it differs.

    kind: `fault` lasts until it is over, `event` happens, `alarm` concerns a person and is told at once, each time.
    """

    code: int
    kind: Literal["fault", "event", "alarm"]
    zh: str
    en: str
    means: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.code <= HIGHEST_CODE or not 1 <= self.number <= HIGHEST_CODE:
            raise ValueError(f"code: expected 1 to {HIGHEST_CODE}, got {self.code}")

    @property
    def number(self) -> int:
        """What the platform is told."""
        return self.code if self.means is None else self.means


class CodeTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The codes of a region: a standard's edition and what the region adds. confidence: H, M or U (docs/domain.md)."""

    standard: str
    edition: str
    source: str
    confidence: Literal["H", "M", "U"]
    codes: tuple[Code, ...]
    includes: str = ""

    def __post_init__(self) -> None:
        numbers = [one.code for one in self.codes]
        if twice := sorted({one for one in numbers if numbers.count(one) > 1}):
            raise ValueError(f"codes: {twice[0]} stands there twice")


def known_tables() -> tuple[str, ...]:
    """Name the tables that come along."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


@lru_cache
def load_table(name: str) -> CodeTable:
    """Read a table; raises NotFound, naming those there are, and ConfigError with file, line and field."""
    if name not in known_tables():
        raise NotFound(f"code table {name!r}: not one of {', '.join(known_tables())}")
    return load_yaml(FOLDER / f"{name}.yaml", CodeTable)


def codes_of(name: str) -> dict[int, Code]:
    """Return what a controller's codes mean in a region, with those of the table it includes.

    >>> codes_of("regional_11")[11].number, codes_of("regional_93")[93].number, 11 in codes_of("regional_93")
    (93, 93, False)
    """
    table = load_table(name)
    found = codes_of(table.includes) if table.includes else {}
    return found | {one.code: one for one in table.codes}
