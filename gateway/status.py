"""`citybrain gateway status`: how the box is, from the heartbeat of its process."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from citybrain.cli import emit, language
from citybrain.clock import iso, real_unix_ms
from citybrain.counters import Heartbeat
from citybrain.errors import EXIT_FAILED, EXIT_UNAVAILABLE
from citybrain.i18n import text
from edge.driver import Quality
from gateway.journal import last_heartbeat
from gateway.points import Seen, read_points, span


def arguments(_parser: argparse.ArgumentParser) -> None:
    """There are none beside `--data` and `--json`."""


def told(beat: Heartbeat | None, seen: Seen | None, now_ms: int) -> dict[str, Any]:
    """Return the status as one object; the keys are documented in docs/gateway.md."""
    if beat is None:
        return {"running": False}
    details: dict[str, Any] = beat.details.get("gateway", {})
    return {
        "running": beat.live(now_ms),
        "gateway": details.get("id", ""),
        "shard": details.get("shard"),
        "broker": details.get("broker", ""),
        "online": bool(beat.gauges.get("online")) and beat.live(now_ms),
        "no_connection": details.get("no_connection", ""),
        "spooled": int(beat.gauges.get("spooled", 0)),
        "uptime_s": max(beat.at - beat.started, 0) // 1000,
        "clock_unset": bool(details.get("clock_unset")),
        "clock_offset_s": beat.gauges.get("clock_offset_s", 0.0),
        "drivers": details.get("drivers", []),
        "wrong": details.get("wrong", {}),
        "lost": _labelled(beat, "lost_total"),
        "dropped": _labelled(beat, "dropped_total"),
        "sent_bytes": beat.counters.get("sent_bytes_total", 0),
        "received_bytes": beat.counters.get("received_bytes_total", 0),
        "silent_ms": _silent(seen, details.get("wrong", {})),
        "warnings": _warnings(beat)[-10:],
    }


def _silent(seen: Seen | None, wrong: dict[str, str]) -> dict[str, int]:
    """Return how long ago each device that is wrong told its last value; one that told none is left out."""
    ages = {what: seen.age_ms(what.removeprefix("device ")) for what in wrong} if seen is not None else {}
    return {what.removeprefix("device "): age for what, age in ages.items() if age is not None}


def _warnings(beat: Heartbeat) -> list[dict[str, str]]:
    """Return the warnings, each with when it was said ("" where that is not known)."""
    times = beat.details.get("warned_at", [])
    known = len(times) == len(beat.warnings)
    at = [iso(ms)[:19] for ms in times] if known else [""] * len(beat.warnings)
    return [{"at": when, "text": what} for when, what in zip(at, beat.warnings, strict=True)]


def _labelled(beat: Heartbeat, name: str) -> dict[str, int]:
    start = f"{name}{{"
    return {key[len(start) : -1]: value for key, value in beat.counters.items() if key.startswith(start)}


def lines(status: dict[str, Any], language: str) -> list[str]:
    """Return the status for a terminal: what is wrong stands first among what may be long."""
    key = "gateway.online" if status["online"] else "gateway.offline"
    found = [text(key, language, broker=status["broker"], why=status["no_connection"] or "…")]
    facts = {name: status[name] for name in ("gateway", "shard", "spooled", "clock_offset_s")}
    found.append(text("gateway.runs", language, uptime=span(1000 * status["uptime_s"]), **facts))
    moved = {name: _size(status[f"{name}_bytes"]) for name in ("sent", "received")}
    found.append(text("gateway.moved", language, **moved))
    if status["clock_unset"]:
        found.append(text("gateway.clock_unset", language))
    found += [_wrong(what, why, status["silent_ms"], language) for what, why in status["wrong"].items()]
    found += [text("gateway.lost", language, reason=why, count=count) for why, count in status["lost"].items()]
    dropped = ", ".join(f"{why.removeprefix('reason=')} {count}" for why, count in status["dropped"].items())
    found += [text("gateway.dropped", language, what=dropped)] if dropped else []
    return found + [f"! {one['at']} {one['text']}" for one in status["warnings"]]


def _wrong(what: str, why: str, silent_ms: dict[str, int], language: str) -> str:
    """Return what is wrong, and of a device since when it says nothing: its last words tell how long it has been so."""
    last = silent_ms.get(what.removeprefix("device "))
    return (
        "✗ "
        + worded(what, why, language)
        + (text("gateway.last", language, ago=span(last)) if last is not None else "")
    )


def worded(what: str, why: str, language: str) -> str:
    """Return a trouble of `Lines.wrong` for people: which driver or device, how far it can be trusted, the reason.

    >>> worded("device hyd-1", "no_answer: unit 1: nothing within 200 ms", "zh")
    '设备 hyd-1：无应答：unit 1: nothing within 200 ms'
    """
    kind, _, name = what.partition(" ")
    quality, _, reason = why.partition(": ")
    if quality.upper() not in Quality.__members__:
        return text(f"gateway.{kind}", language, name=name, why=why)
    known = text(f"quality.{quality.upper()}", language)
    return text(
        f"gateway.{kind}", language, name=name, why=text("gateway.because", language, what=known, why=reason or "-")
    )


def _size(amount: int) -> str:
    """Return bytes as people read them.

    >>> _size(900), _size(1_250_000)
    ('900 B', '1.2 MB')
    """
    for size, unit in ((1_000_000_000, "GB"), (1_000_000, "MB"), (1_000, "kB")):
        if amount >= size:
            return f"{amount / size:.1f} {unit}"
    return f"{amount} B"


def run(args: argparse.Namespace) -> int:
    """Print it; return 0 where the gateway is online, 1 where it is not, 4 where its process does not run."""
    folder, chosen = args.data / "run", language(os.environ)
    status = told(last_heartbeat(folder), read_points(folder), real_unix_ms())
    if args.json:
        emit(status, as_json=True)
    elif not status["running"]:
        sys.stdout.write(text("gateway.not_running", chosen, data=args.data) + "\n")
    else:
        sys.stdout.write("\n".join(lines(status, chosen)) + "\n")
    if not status["running"]:
        return EXIT_UNAVAILABLE
    return 0 if status["online"] else EXIT_FAILED
