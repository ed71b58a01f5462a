"""What systemd is told: that we are ready, that we live, and what we do (sd_notify(3), one datagram each)."""

from __future__ import annotations

import contextlib
import os
import socket

from citybrain.clock import monotonic_s


class Watchdog:
    """The notify socket that systemd names in the environment; without one every call does nothing."""

    def __init__(self, address: str | None = None, period_s: float | None = None) -> None:
        given = os.environ.get("NOTIFY_SOCKET", "") if address is None else address
        self._address = "\0" + given[1:] if given.startswith("@") else given
        usec = os.environ.get("WATCHDOG_USEC", "")
        timeout_s = int(usec) / 1e6 if usec.isdecimal() else 0.0
        self._period_s = timeout_s / 3 if period_s is None else period_s
        self._told_s = 0.0
        self._status = ""

    def ready(self) -> None:
        """We serve."""
        self._send("READY=1")

    def stopping(self) -> None:
        """We go, on purpose."""
        self._send("STOPPING=1")

    def alive(self) -> None:
        """The loop turned; told as often as systemd wants to hear it."""
        now_s = monotonic_s()
        if self._period_s and now_s - self._told_s >= self._period_s:
            self._told_s = now_s
            self._send("WATCHDOG=1")

    def status(self, text: str) -> None:
        """Say what `systemctl status` shows, when it changes."""
        if text != self._status:
            self._status = text
            self._send(f"STATUS={text}")

    def _send(self, text: str) -> None:
        if not self._address:
            return
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(0.5)
            sock.sendto(text.encode(), self._address)
