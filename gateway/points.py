"""`citybrain gateway points`: what each point said last, when, and how far its device can be trusted; a line a point.

The running gateway writes it beside its heartbeat; nothing is asked of a device for it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import msgspec

from citybrain.cli import emit, language
from citybrain.clock import real_unix_ms
from citybrain.errors import EXIT_FAILED, EXIT_UNAVAILABLE
from citybrain.i18n import text
from citybrain.storage import replace_unsynced
from citybrain.units import METRICS
from edge.driver import Quality
from edge.host import Hosts
from gateway.journal import LIVE, last_heartbeat

FILE = "gateway.points.json"
SPANS = ((86_400, "d"), (3600, "h"), (60, "min"))


class Seen(msgspec.Struct, frozen=True):
    """The file. at: gateway time, Unix ms. devices: the quality of each, None while nothing was heard of it.
    points: (device, metric, value, observed_at)."""

    at: int
    devices: dict[str, int | None]
    points: tuple[tuple[str, str, float, int], ...]

    def age_ms(self, device: str) -> int | None:
        """Return how old the newest value of a device is, None where it has none."""
        times = [at for name, _, _, at in self.points if name == device]
        return self.at - max(times) if times else None


def write_points(folder: Path | None, hosts: Hosts, now_ms: int) -> None:
    """Write what is known now; a disk that fails is said by the heartbeat beside it."""
    if folder is None:
        return
    known = hosts.qualities()
    devices: dict[str, int | None] = {device: known.get(device) for device in hosts.latest.devices}
    seen = Seen(now_ms, devices, tuple(hosts.latest.points()))
    with contextlib.suppress(OSError):
        replace_unsynced(folder / FILE, msgspec.json.encode(seen))


def read_points(run: Path) -> Seen | None:
    """Return what the gateway whose folder `run` is wrote last, None where there is nothing."""
    for folder in (run / LIVE, run):
        with contextlib.suppress(OSError, msgspec.DecodeError):
            return msgspec.json.decode((folder / FILE).read_bytes(), type=Seen)
    return None


def span(ms: int) -> str:
    """Return a time in its largest unit, as a person says it.

    >>> span(5_400_000), span(42_000), span(-3000)
    ('1.5 h', '42 s', '-3 s')
    """
    seconds = ms / 1000
    for size, unit in SPANS:
        if abs(seconds) >= size:
            return f"{seconds / size:.1f} {unit}".replace(".0 ", " ")
    return f"{seconds:.0f} s"


def _rows(seen: Seen, chosen: str) -> list[tuple[str, str, str, str, str]]:
    """Return device, metric, value, age and quality of each point; a device that has none has a line too."""
    rows = []
    for device, quality in seen.devices.items():
        word = "" if quality is None else text(f"quality.{Quality(quality).name}", chosen)
        mine = [(metric, value, at) for name, metric, value, at in seen.points if name == device]
        rows += [(device, metric, _shown(metric, value), span(seen.at - at), word) for metric, value, at in mine]
        if not mine:
            rows.append((device, "-", "-", "-", word))
    return rows


def _shown(metric: str, value: float) -> str:
    known = METRICS.get(metric)
    return f"{value:.6g}{known.suffix if known is not None else ''}"


def arguments(parser: argparse.ArgumentParser) -> None:
    """`points [DEVICE]`."""
    parser.add_argument("device", nargs="?", default="", help="only this one")


def run(args: argparse.Namespace) -> int:
    """Print them; return 0, 1 where there is no such device, 4 where the process does not run."""
    folder, chosen = args.data / "run", language(os.environ)
    beat, seen = last_heartbeat(folder), read_points(folder)
    if beat is None or not beat.live(real_unix_ms()) or seen is None:
        sys.stderr.write(text("gateway.not_running", chosen, data=args.data) + "\n")
        return EXIT_UNAVAILABLE
    if args.device:
        devices = {name: quality for name, quality in seen.devices.items() if name == args.device}
        seen = Seen(seen.at, devices, tuple(point for point in seen.points if point[0] == args.device))
    if args.json:
        emit(_told(seen), as_json=True)
    elif seen.devices:
        sys.stdout.write(
            "\n".join(f"{a:<16} {b:<20} {c:>14} {d:>9}  {e}".rstrip() for a, b, c, d, e in _rows(seen, chosen))
        )
        sys.stdout.write("\n")
    if not seen.devices:
        sys.stderr.write(text("points.none", chosen, device=args.device or "*") + "\n")
        return EXIT_FAILED
    return 0


def _told(seen: Seen) -> dict[str, Any]:
    points = [
        {"device": device, "metric": metric, "value": value, "at": at, "age_s": (seen.at - at) / 1000}
        for device, metric, value, at in seen.points
    ]
    names = {device: None if quality is None else Quality(quality).name for device, quality in seen.devices.items()}
    return {"at": seen.at, "devices": names, "points": points}
