"""A serial port as `citybrain gateway doctor` looks at it: is it there, may we, does nobody else, and will it stay.

It is never opened: that would toggle its control lines, and many a board resets by them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from edge.serial_port import may_not

SERIAL = Path("/dev/serial")  # udev's names that stay: by-id of an adapter, by-path of a socket
CONSOLES = Path("/proc/consoles")
PROCESSES = Path("/proc")
PSEUDO = Path("/dev/pts")  # a simulated line: its other end is a program too
PASSING = ("ttyUSB", "ttyACM")  # numbered in the order in which they are plugged in
Level = Literal["good", "mind", "wrong"]


def look_at(port: Path, gateway: int) -> tuple[Level, str, dict[str, str]]:
    """Return what is to be said of a port: level, code in the catalogue, facts. gateway: the pid that may have it."""
    if not port.exists():
        there = ", ".join(map(str, _named())) or "-"
        return "wrong", "port_missing", {"there": there}
    if not os.access(port, os.R_OK | os.W_OK):
        return "wrong", "port_denied", {"why": may_not(port)}
    device = port.resolve()
    if device.name in _consoles():
        return "wrong", "port_console", {}
    for pid, program in [] if PSEUDO in device.parents else _holders(device):
        if pid != gateway and _parent(pid) != gateway:
            return "wrong", "port_held", {"pid": str(pid), "program": program}
    if port.name.startswith(PASSING):
        lasting = next((one for one in _named() if one.resolve() == device), None)
        if lasting is not None:
            return "mind", "port_name", {"lasting": str(lasting)}
    return "good", "port", {}


def _named() -> list[Path]:
    """Return the names that stay; an adapter's before its socket's."""
    return [
        one for kind in ("by-id", "by-path") if (SERIAL / kind).is_dir() for one in sorted((SERIAL / kind).iterdir())
    ]


def _consoles() -> set[str]:
    """Return the ports on which the system itself talks, such as a Pi's built-in one until raspi-config frees it."""
    with contextlib.suppress(OSError):
        return {line.split()[0] for line in CONSOLES.read_text(encoding="ascii").splitlines() if line.strip()}
    return set()


def _holders(device: Path) -> Iterator[tuple[int, str]]:
    """Yield who has a device open, as far as this user may see: (pid, program)."""
    for process in PROCESSES.iterdir():
        if process.name.isdecimal():
            with contextlib.suppress(OSError):  # it ended meanwhile, or is another user's
                if any(_leads_to(one, device) for one in (process / "fd").iterdir()):
                    yield int(process.name), (process / "comm").read_text(encoding="utf-8").strip()


def _leads_to(descriptor: Path, device: Path) -> bool:
    with contextlib.suppress(OSError):
        return str(descriptor.readlink()) == str(device)
    return False


def _parent(pid: int) -> int:
    with contextlib.suppress(OSError, IndexError, ValueError):
        return int((PROCESSES / str(pid) / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
    return 0
