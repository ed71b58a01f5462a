"""`citybrain …` on a data folder, as tests of a process call it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from citybrain.counters import Heartbeat, read_heartbeats
from citybrain.layout import Layout
from tests.conftest import end


@contextmanager
def running(program: str, layout: Layout, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start a command; it is ended with the block."""
    argv = [sys.executable, "-m", "citybrain", program, *words, "--data", str(layout.root)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            end(process)


def run_to_end(program: str, layout: Layout, *words: str, within_s: float) -> tuple[int, str, str]:
    """Run a command to its end; return its exit code and what it said."""
    with running(program, layout, *words) as process:
        out, err = process.communicate(timeout=within_s)
        return process.returncode, out.decode(), err.decode()


def beat_of(process: str, layout: Layout) -> Heartbeat | None:
    """Return what a process said last of itself."""
    return next((each for each in read_heartbeats(layout.run) if each.process == process), None)
