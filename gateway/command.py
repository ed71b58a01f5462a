"""`citybrain gateway run|doctor|status|points`: the box in the cabinet, and what a technician asks it.

Exit codes of `doctor`: 0 all is well, 1 something is wrong, 3 gateway.yaml is. Of `status`: 0 online, 1 not online,
4 the process does not run.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pwd
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from citybrain.cli import Subcommand
from citybrain.errors import StorageError, UsageError
from citybrain.layout import Layout

WRITING = ("run", "enrol", "renew", "commission")  # what leaves files in the data folder

# An action is a module with `arguments(parser)` and `run(args) -> int`; it is imported when it is called.
ACTIONS = {
    "run": ("serve: drivers, spool, uplink, orders", "gateway.command"),
    "doctor": ("check everything that could keep this box from working", "gateway.doctor"),
    "status": ("say how the box is", "gateway.status"),
    "points": ("say what each point told last, and when", "gateway.points"),
    "enrol": ("get certificate and configuration for a one-time code", "gateway.enrolment.enrol"),
    "commission": ("has the platform seen every point? say so, signed", "gateway.enrolment.commission"),
    "renew": ("get the next certificate where that is due", "gateway.enrolment.renew"),
}


def _arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, (help_, module) in ACTIONS.items():
        one = actions.add_parser(name, help=help_)
        one.add_argument("--data", type=Path, default=argparse.SUPPRESS, metavar="DIR", help="data folder")
        one.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print one JSON object")
        importlib.import_module(module).arguments(one)


def arguments(_parser: argparse.ArgumentParser) -> None:
    """`run` has no options of its own."""


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT."""
    from gateway.run import GatewayProcess  # noqa: PLC0415  no other action needs it

    process = GatewayProcess(Layout(args.data))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, process.stop)
    process.run()
    return 0


def _mine(folder: Path, action: str) -> None:
    """Refuse to work in a folder that is another user's: what root leaves there the gateway could not read again."""
    if not folder.is_dir():
        return
    owner = folder.stat().st_uid
    here = f"sudo -u {user_name(owner)} {sys.argv[0]} gateway {action} --data {folder}"
    if not os.access(folder, os.R_OK | os.X_OK):
        raise StorageError(f"{folder}: it may not be read by {user_name(os.geteuid())}; use: {here}")
    if action in WRITING and os.geteuid() == 0 and owner != 0:
        raise UsageError(f"{folder} is {user_name(owner)}'s, who could not read what root writes there; use: {here}")


def user_name(uid: int) -> str:
    """Return a user's name, or the number where it has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"#{uid}"


def _run(args: argparse.Namespace) -> int:
    _mine(args.data, args.action)
    action: Callable[[argparse.Namespace], int] = importlib.import_module(ACTIONS[args.action][1]).run
    return action(args)


command = Subcommand("the box in the cabinet: run it, check it, ask it", _arguments, _run)
