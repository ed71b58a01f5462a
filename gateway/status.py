"""`citybrain gateway status`: how the box is, from the heartbeat of its process."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from citybrain.cli import emit, language
from citybrain.clock import real_unix_ms
from citybrain.counters import Heartbeat, read_heartbeats
from citybrain.errors import EXIT_FAILED, EXIT_UNAVAILABLE
from citybrain.i18n import text


def arguments(_parser: argparse.ArgumentParser) -> None:
    """There are none beside `--data` and `--json`."""


def told(beat: Heartbeat | None, now_ms: int) -> dict[str, Any]:
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
        "warnings": beat.warnings[-10:],
    }


def _labelled(beat: Heartbeat, name: str) -> dict[str, int]:
    start = f"{name}{{"
    return {key[len(start) : -1]: value for key, value in beat.counters.items() if key.startswith(start)}


def lines(status: dict[str, Any], language: str) -> list[str]:
    """Return the status for a terminal."""
    if not status["running"]:
        return [text("gateway.not_running", language)]
    key = "gateway.online" if status["online"] else "gateway.offline"
    found = [text(key, language, broker=status["broker"], why=status["no_connection"] or "…")]
    numbers = ("spooled", "uptime_s", "clock_offset_s", "sent_bytes", "received_bytes")
    found += [text(f"gateway.{name}", language, value=status[name]) for name in numbers]
    if status["clock_unset"]:
        found.append(text("gateway.clock_unset", language))
    found += [text("gateway.wrong", language, what=what, why=why) for what, why in status["wrong"].items()]
    found += [text("gateway.lost", language, reason=why, count=count) for why, count in status["lost"].items()]
    return found + [f"! {warning}" for warning in status["warnings"]]


def run(args: argparse.Namespace) -> int:
    """Print it; return 0 where the gateway is online, 1 where it is not, 4 where its process does not run."""
    beats = {beat.process: beat for beat in read_heartbeats(args.data / "run")}
    status = told(beats.get("gateway"), real_unix_ms())
    if args.json:
        emit(status, as_json=True)
    else:
        sys.stdout.write("\n".join(lines(status, language(os.environ))) + "\n")
    if not status["running"]:
        return EXIT_UNAVAILABLE
    return 0 if status["online"] else EXIT_FAILED
