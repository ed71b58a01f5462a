"""`citybrain status`: is the run live, and how does it do. It asks the API, and nothing else, so it is quick."""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from typing import Any

import msgspec

from citybrain.cli import Subcommand, emit
from citybrain.errors import Unavailable
from citybrain.layout import Layout, Run

TIMEOUT_S = 5.0
# What `--json` promises, in this order; the API's other keys follow.
KEYS = ("readings", "dropped", "alarms_open", "incidents_open", "cases", "delivered", "closed", "lag_s", "rescues",
        "maintenance", "processes")  # fmt: skip


def run_name(run: Run) -> str:
    """Return what tells this run from any other: we must not take another run's API for ours."""
    return hashlib.sha256(msgspec.json.encode(run)).hexdigest()[:16]


def ask(layout: Layout) -> dict[str, Any]:
    """Return the status of a live run; raises Unavailable where it is not live, saying why and what to do."""
    run = layout.read_run()
    url = f"http://{run.host}:{run.api_port}/v1/status"
    try:
        # Straight to loopback: a proxy in the environment has no business here.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(url, timeout=TIMEOUT_S) as answer:
            status: dict[str, Any] = msgspec.json.decode(answer.read(), type=dict[str, Any])
    except (urllib.error.URLError, OSError, HTTPException, msgspec.DecodeError) as error:
        reason = getattr(error, "reason", error)
        raise Unavailable(
            f"{layout.root}: not live: the API at {url} does not answer ({reason}); start it with `citybrain run`"
        ) from None
    if status.get("run") != run_name(run):
        raise Unavailable(
            f"{layout.root}: not live: port {run.api_port} is answered by another run; "
            f"start this one with `citybrain run --data {layout.root}`"
        )
    if not status["live"]:
        raise Unavailable(f"{layout.root}: not live: {'; '.join(status['missing'])}; logs are in {layout.run}")
    return {key: status[key] for key in KEYS} | {key: value for key, value in status.items() if key not in KEYS}


def language(environment: Mapping[str, str]) -> str:
    """Return "zh" where the terminal's language is Chinese, else "en"."""
    chosen = environment.get("LC_ALL") or environment.get("LC_MESSAGES") or environment.get("LANG") or ""
    return "zh" if chosen.lower().startswith("zh") else "en"


def lines(status: Mapping[str, Any], language: str) -> list[str]:
    """Return the status for a terminal."""
    from citybrain.i18n import text  # noqa: PLC0415  the catalogue costs more than the rest of this command

    dropped = ", ".join(f"{reason} {count}" for reason, count in status["dropped"].items()) or "0"
    gateways = status["gateways"]
    facts: dict[str, object] = {
        "readings": status["readings"],
        "dropped": dropped,
        "alarms_open": status["alarms_open"],
        "incidents_open": status["incidents_open"],
        "cases": text("status.of_which_open", language, total=status["cases"], open=status["cases_open"]),
        "rescues": text("status.of_which_open", language, total=status["rescues"], open=status["rescues_open"]),
        "maintenance": status["maintenance"],
        "closed": status["closed"],
        "delivered": text("status.waiting", language, total=status["delivered"], waiting=status["undelivered"]),
        "lag_s": f"{status['lag_s']:g} s",
        "gateways": text("status.of_online", language, online=gateways["online"], total=gateways["total"]),
    }
    found = [f"{text('status.' + key, language)}: {value}" for key, value in facts.items()]
    found.append(f"{text('status.processes', language)}:")
    for name, process in status["processes"].items():
        state = "ready" if process["ready"] else "live" if process["live"] else "silent"
        found.append(f"  {name:<10} {text('process.' + state, language)}  pid {process['pid']}")
    return found


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Say how a live run does. Exit code 4, and why, where it is not live."


def _run(args: argparse.Namespace) -> int:
    status = ask(Layout(args.data))
    if args.json:
        emit(status, as_json=True)
    else:
        sys.stdout.write("\n".join(lines(status, language(os.environ))) + "\n")
    return 0


command = Subcommand("say how a live run does (exit code 4 where it is not live)", _arguments, _run)
