"""Kernels are plain functions; numba compiles them when they are first needed, and keeps them beside their source.

No fast-math: the same log gives the same bits. A kernel calls no other kernel, because numba's cache would not notice
that the inner one changed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function compiled, or loaded from numba's cache."""
    import numba  # noqa: PLC0415  half a second and 60 MB that only the engine needs

    result: Callable[..., Any] = numba.njit(cache=True, nogil=True)(function)
    return result
