"""pyarrow without pandas: it imports pandas, where that is installed, to ask of its first array whether it is a Series.

Nothing here uses it, and it takes 60 MB of each process. pyarrow asks once; we see to it that the answer is no. Whoever
calls `to_pandas` later gets it all the same.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

import pyarrow as pa


class _NoPandas(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == "pandas":
            raise ModuleNotFoundError(fullname)
        return None


def ask_without_pandas() -> None:
    """Let pyarrow ask its question while pandas is not to be found; does nothing where it has been asked before."""
    finder = _NoPandas()
    sys.meta_path.insert(0, finder)
    try:
        pa.array([0])
    finally:
        sys.meta_path.remove(finder)
