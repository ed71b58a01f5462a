"""Serial ports: opened for one driver alone, and an error that says what to do."""

from __future__ import annotations

import errno
import termios

import serial

_WHY = {
    errno.ENOENT: "is not there: is the adapter plugged in?",
    errno.EACCES: "may not be opened: is the user in the group `dialout`?",
    errno.EPERM: "may not be opened: is the user in the group `dialout`?",
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
        raise OSError(f"{port} {_WHY[number]}" if number in _WHY else f"{port}: {error}") from None
