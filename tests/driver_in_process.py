"""The driver of `tests.driver_in_thread`, in a process of its own."""

from __future__ import annotations

from tests.driver_in_thread import Config, make

__all__ = ["DEADLINE_S", "PROCESS", "Config", "make"]
PROCESS = True
DEADLINE_S = 2.0  # importing is part of it
