"""Serial ports: opened for one driver alone, and an error that says what to do."""

from __future__ import annotations

import errno
import grp
import os
import termios
from pathlib import Path

import serial

_WHY = {
    errno.ENOENT: "is not there: is the adapter plugged in?",
    errno.EISDIR: "is no serial port",
    errno.EAGAIN: "is used by another driver or program",
    errno.EBUSY: "is used by another driver or program",
    errno.ENOTTY: "is no serial port",
    errno.EIO: "is gone",
    errno.ENXIO: "is gone",
}


def open_port(port: str, baud: int, parity: str = "N", stop_bits: int = 1) -> serial.Serial:
    """Open a port of 8 data bits, for non-blocking use of its file descriptor; raises OSError.

    parity: `N`, `E` or `O`. A `/dev/serial/by-id/` path stays the same whichever socket the adapter is in.
    """
    try:
        return serial.Serial(port, baud, parity=parity, stopbits=stop_bits, timeout=0, exclusive=True)
    except (OSError, termios.error, ValueError) as error:
        number = error.args[0] if error.args and isinstance(error.args[0], int) else getattr(error, "errno", None)
        if number is None and "Inappropriate ioctl" in str(error):
            number = errno.ENOTTY
        if number in (errno.EACCES, errno.EPERM):
            raise OSError(f"{port} may not be opened: {may_not(Path(port))}") from None
        why = f": {os.strerror(number)}" if isinstance(number, int) else f": {error}"
        raise OSError(f"{port} {_WHY[number]}" if number in _WHY else f"{port}{why}") from None


def may_not(port: Path) -> str:
    """Return what is to be done where a port may not be opened: join its group, or give it one that may be joined."""
    try:
        found = port.stat()
        group = grp.getgrgid(found.st_gid).gr_name
    except (OSError, KeyError):
        return "is the user in the group `dialout`?"
    if found.st_mode & 0o060 == 0o060 and group != "root":
        return f"is the user in the group `{group}`?"
    return f"its group `{group}` gives nobody a right to it ({found.st_mode & 0o777:o}): want a udev rule for `dialout`"
