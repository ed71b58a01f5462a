"""The `citybrain` program: a shell around subcommands that other packages register as entry points.

An entry point in group `citybrain.commands` names a `Subcommand`; it is loaded only when it is called or helped on, so
`citybrain gateway` on a Pi never imports a database. Exit codes: 0 done, 1 failed, 2 usage, 3 configuration,
4 a service is unavailable, 5 storage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import msgspec

from citybrain.errors import EXIT_FAILED, CityBrainError

GROUP = "citybrain.commands"


class Subcommand(msgspec.Struct, frozen=True):
    """A subcommand: a line of help, a function that adds its arguments, one that runs it and returns the exit code."""

    help: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def commands() -> dict[str, EntryPoint]:
    """Return the registered subcommands, by name."""
    return {point.name: point for point in sorted(entry_points(group=GROUP), key=lambda point: point.name)}


def parser_for(name: str, command: Subcommand) -> argparse.ArgumentParser:
    """Return the argument parser of one subcommand, with `--data` and `--json` that all of them take."""
    parser = argparse.ArgumentParser(prog=f"citybrain {name}", description=command.help)
    parser.add_argument("--data", type=Path, default=Path("data"), metavar="DIR", help="data folder (default: data)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    command.arguments(parser)
    return parser


def language(environment: Mapping[str, str]) -> str:
    """Return "zh" where the terminal's language is Chinese, else "en"."""
    chosen = environment.get("LC_ALL") or environment.get("LC_MESSAGES") or environment.get("LANG") or ""
    return "zh" if chosen.lower().startswith("zh") else "en"


def emit(result: dict[str, Any], *, as_json: bool) -> None:
    """Print a command's result: one JSON object, or a line per key."""
    if as_json:
        sys.stdout.write(msgspec.json.encode(result).decode() + "\n")
    else:
        width = max((len(key) for key in result), default=0)
        for key, value in result.items():
            sys.stdout.write(f"{key:<{width}}  {value}\n")
    sys.stdout.flush()


def _usage(known: dict[str, EntryPoint]) -> str:
    lines = ["usage: citybrain COMMAND [--data DIR] [--json] ...", "", "commands:"]
    lines += [f"  {name}" for name in known]
    return "\n".join([*lines, "", "`citybrain COMMAND --help` explains one.", ""])


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    args = sys.argv[1:] if argv is None else argv
    known = commands()
    if not args or args[0] in ("-h", "--help"):
        sys.stdout.write(_usage(known))
        return 0 if args else 2
    if args[0] not in known:
        sys.stderr.write(f"citybrain: no command {args[0]!r}\n{_usage(known)}")
        return 2
    try:
        command: Subcommand = known[args[0]].load()
        return command.run(parser_for(args[0], command).parse_args(args[1:]))
    except CityBrainError as error:
        sys.stderr.write(f"citybrain {args[0]}: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `… | head`: whoever reads has seen enough; nothing may be flushed at the end either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
