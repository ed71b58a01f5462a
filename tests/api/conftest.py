"""What tests of the desk share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.desk_city import City, invariants


@pytest.fixture
def city(tmp_path: Path, database: str) -> Iterator[City]:
    """A desk with its city, on each database; what must always hold is looked at in the end."""
    made = City(tmp_path, database=database)
    yield made
    invariants(made)
    made.close()
