"""`citybrain maintenance`: the contractors' list, and what they say of it, through the API of a live run."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import quote, urlencode

from api.calls import Api
from api.status import Words
from citybrain.cli import Subcommand, emit, language
from citybrain.errors import UsageError
from citybrain.layout import Layout

STATES = ("open", "closed", "all", "dispatched", "taken", "handled", "feedback", "void")
DUE = ("overdue", "day", "week")


def lines(found: Mapping[str, Any], words: Words, now_ms: int) -> Iterable[str]:
    """Yield the list for a terminal: a contractor, its rounds, their orders; what is overdue is marked."""
    for contractor in found["contractors"]:
        unit = contractor["unit"]
        counts = words("maintenance.counts", orders=contractor["orders"], overdue=contractor["overdue"])
        yield f"{unit[words.language]} ({unit['code']}): {counts}"
        for round_ in contractor["rounds"]:
            yield "  " + words("maintenance.round", street=round_["street"] or "?", gateway=round_["gateway"] or "?")
            for order in round_["orders"]:
                yield "    " + _order(order, words, now_ms)
    if found["left_off"]:
        yield words("maintenance.left_off", count=found["left_off"])
    if not found["contractors"]:
        yield words("none.maintenance")


def _order(order: Mapping[str, Any], words: Words, now_ms: int) -> str:
    from api.health import span  # noqa: PLC0415  only where a person reads

    left_s = (order["deadline"] - now_ms) / 1000
    mark = "!" if order["overdue"] else " "
    when = ""
    if order["open"]:
        key = "field.overdue" if left_s < 0 else "field.left"
        when = words(key, time=span(abs(left_s), words.language))
    facts = [
        order["number"],
        words(f"case.stage.{order['stage']}"),
        order["title"][words.language],
        order["subject"],
        order["place"]["address"],
        when,
    ]
    return f"{mark} " + " · ".join(fact for fact in facts if fact)


def _list(api: Api, args: argparse.Namespace) -> int:
    asked = {name: getattr(args, name) for name in ("contractor", "state", "due") if getattr(args, name)}
    found = api.get(f"/v1/maintenance?{urlencode(asked)}")
    if args.json:
        emit(found, as_json=True)
    else:
        words = Words(language(os.environ))
        sys.stdout.write("".join(f"{line}\n" for line in lines(found, words, api.get("/v1/status")["at"])))
    return 0


NEEDED = {"take": (), "done": ("work",), "not-needed": ("reason",), "reassign": ("unit", "reason")}


def _tell(api: Api, args: argparse.Namespace) -> int:
    for name in ("number", "actor", *NEEDED[args.action]):
        if not getattr(args, name):
            option = "NUMBER" if name == "number" else f"--{name}"
            raise UsageError(f"maintenance {args.action}: {option} is missing")
    body = {name: getattr(args, name) for name in ("reason", "work", "unit") if getattr(args, name)}
    asked = api.post(f"/v1/maintenance/{quote(args.number, safe='')}/{args.action}", body, args.actor)
    state = api.decided(asked["command"])
    emit(state if args.json else {state["state"]: state["message"] or state["command"]}, as_json=args.json)
    return 0


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "The contractors' maintenance orders: list them, take them, say what was done."
    parser.add_argument("action", choices=("list", *NEEDED), help="what to do (docs/cases.md)")
    parser.add_argument("number", nargs="?", metavar="NUMBER", help="the order, for all but `list`")
    parser.add_argument("--contractor", metavar="UNIT", help="list only those of this unit")
    parser.add_argument("--state", choices=STATES, default="open", help="list those (default: open)")
    parser.add_argument("--due", choices=DUE, help="list what is overdue, or due within a day or a week")
    parser.add_argument("--actor", metavar="NAME", help="who says so")
    parser.add_argument("--reason", metavar="TEXT", help="why; not-needed and reassign must say so")
    parser.add_argument("--work", metavar="TEXT", help="what was done")
    parser.add_argument("--unit", metavar="UNIT", help="code of the unit that has it from now on")


def _run(args: argparse.Namespace) -> int:
    api = Api(Layout(args.data))
    return _list(api, args) if args.action == "list" else _tell(api, args)


command = Subcommand("the contractors' maintenance orders: list, take, done", _arguments, _run)
