"""`citybrain status`: is the run live, and how does it do. It asks the API, and nothing else, so it is quick."""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections.abc import Mapping
from typing import Any

import msgspec

from api.calls import Api
from citybrain.cli import Subcommand, emit, language
from citybrain.errors import Unavailable
from citybrain.layout import Layout, Run

# What `--json` promises, in this order; the API's other keys follow.
KEYS = ("readings", "dropped", "alarms_open", "incidents_open", "cases", "delivered", "closed", "lag_s", "rescues",
        "maintenance", "processes")  # fmt: skip


def run_name(run: Run) -> str:
    """Return what tells this run from any other: we must not take another run's API for ours."""
    return hashlib.sha256(msgspec.json.encode(run)).hexdigest()[:16]


def ask(layout: Layout) -> dict[str, Any]:
    """Return the status of this run, live or not; raises Unavailable where nobody, or another run, answers."""
    run = layout.read_run()
    try:
        status = Api(layout).get("/v1/status")
    except Unavailable as error:
        raise Unavailable(f"{layout.root}: not live: {str(error).removeprefix(f'{layout.root}: ')}") from None
    if status.get("run") != run_name(run):
        raise Unavailable(
            f"{layout.root}: not live: port {run.api_port} is answered by another run; "
            f"start this one with `citybrain run --data {layout.root}`"
        )
    return {key: status[key] for key in KEYS} | {key: value for key, value in status.items() if key not in KEYS}


def lines(status: Mapping[str, Any], language: str) -> list[str]:
    """Return the status for a terminal: how it does first, then why, then the numbers."""
    words = Words(language)
    found = verdict(status["health"], language)
    for name, value in (*pipeline(status, words), *work(status, words)):
        found.append(f"{words('status.' + name)}: {value}")
    found.append(f"{words('status.processes')}:")
    for name, process in status["processes"].items():
        state = "ready" if process["ready"] else "live" if process["live"] else "silent"
        if process["live"] and process.get("standby"):
            state = "standby"
        again = "  " + words("status.restarts", count=process["restarts"]) if process["restarts"] else ""
        found.append(f"  {name:<10} {words('process.' + state)}  pid {process['pid']}{again}")
    return found


class Words:
    """The catalogue in one language."""

    def __init__(self, language: str) -> None:
        from citybrain.i18n import catalogue  # noqa: PLC0415  it costs more than the rest of this command

        self.language = language
        self._catalogue = catalogue()

    def __call__(self, key: str, **facts: object) -> str:
        return self._catalogue[key](self.language, **facts)

    def drop(self, reason: str) -> str:
        """Return why something was not used; the code itself where it has no text."""
        return self(f"drop.{reason}") if f"drop.{reason}" in self._catalogue else reason

    def amounts(self, drops: Mapping[str, float]) -> str:
        """Return how much was not used, by reason."""
        return ", ".join(f"{self.drop(reason)} {amount:g}" for reason, amount in drops.items()) or "0"


SIGNS = {"well": "●", "degraded": "▲", "down": "■"}


def verdict(health: Mapping[str, Any], language: str) -> list[str]:
    """Return the one line that matters, with its two most pressing reasons, and a line for each further one."""
    reasons = [reason["text"][language] for reason in health["reasons"]]
    first = " · ".join(reasons[:2])
    line = f"{SIGNS[health['level']]} {health['text'][language]}"
    return [f"{line}: {first}" if first else line, *(f"  {reason}" for reason in reasons[2:])]


def pipeline(status: Mapping[str, Any], words: Words) -> list[tuple[str, str]]:
    """Return what an operator of the pipeline looks at."""
    lag = " · ".join(
        f"{words('stage.' + name)} {stage['now_s']:.2f} / {stage['p99_s']:.2f} s"
        for name, stage in status["lag"].items()
    )
    per_s = words("status.per_s", amount=f"{status['readings_per_s']:g}", total=f"{status['readings']:,}")
    dropped = words(
        "status.dropped_of", recent=words.amounts(status["dropped_per_min"]), total=words.amounts(status["dropped"])
    )
    return [
        ("lag", lag),
        ("readings", per_s),
        ("dropped", dropped),
        ("gateways", _gateways(status["gateways"], words)),
        ("quarantine", _quarantine(status["quarantine"], words)),
        ("disk", _disk(status["disk"], words)),
    ]


def _gateways(gateways: Mapping[str, Any], words: Words) -> str:
    found = words("status.of_online", online=gateways["online"], total=gateways["total"])
    found += " · " + words("status.spooled", amount=gateways["spooled"])
    late = [
        words("status.late", gateway=each["id"], late=_span(each["late_s"], words), spooled=each["spooled"] or 0)
        for each in gateways["late"][:5]
    ]
    return " · ".join([found, *late])


def _span(seconds: float | None, words: Words) -> str:
    from api.health import span  # noqa: PLC0415  as above

    return words("status.never") if seconds is None else span(seconds, words.language)


def _quarantine(quarantine: Mapping[str, Any], words: Words) -> str:
    who = ", ".join(f"{device} {amount}" for device, amount in list(quarantine["devices"].items())[:5])
    return f"{quarantine['messages']} ({who})" if who else str(quarantine["messages"])


def _disk(disk: Mapping[str, Any] | None, words: Words) -> str:
    if disk is None:
        return "?"
    facts = {"percent": f"{disk['used_share'] * 100:.0f}", "free": size(disk["free_bytes"])}
    grows = disk["grows_bytes_per_day"]
    found = words("status.disk_used", **facts, data=size(disk["data_bytes"]))
    return found if grows is None else found + " · " + words("status.grows", amount=size(grows))


def size(amount: float) -> str:
    """Return bytes as a person says them.

    >>> size(3_400_000_000)
    '3.4 GB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if abs(amount) < 1000:
            return f"{amount:.{1 if unit != 'B' else 0}f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"


def work(status: Mapping[str, Any], words: Words) -> list[tuple[str, str]]:
    """Return what the pipeline has made."""
    outbox = status["outbox"]
    waits = _span(outbox["oldest_s"], words) if outbox["waiting"] else "0"
    delivered = words("status.delivered_of", total=status["delivered"], waiting=outbox["waiting"], oldest=waits)
    return [
        ("alarms_open", str(status["alarms_open"])),
        ("incidents_open", str(status["incidents_open"])),
        ("cases", words("status.of_which_open", total=status["cases"], open=status["cases_open"])),
        ("rescues", words("status.of_which_open", total=status["rescues"], open=status["rescues_open"])),
        ("maintenance", str(status["maintenance"])),
        ("closed", str(status["closed"])),
        ("delivered", delivered + (" · " + words("status.dead", count=outbox["dead"]) if outbox["dead"] else "")),
    ]


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Say how a live run does. Exit code 4, and why, where it is not live."


def _run(args: argparse.Namespace) -> int:
    layout = Layout(args.data)
    status = ask(layout)
    if not args.json:  # who looks at a run that is not live wants to see what still works
        sys.stdout.write("\n".join(lines(status, language(os.environ))) + "\n")
    if not status["live"]:
        raise Unavailable(f"{layout.root}: not live: {'; '.join(status['missing'])}; logs are in {layout.run}")
    if args.json:
        emit(status, as_json=True)
    return 0


command = Subcommand("say how a live run does (exit code 4 where it is not live)", _arguments, _run)
