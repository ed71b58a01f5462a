"""What the desk does with commands about the ledger: checks them whole, writes, and asks ingest for what follows.

A command says what somebody wants; it is decided here, against the ledger as it stands in the desk's transaction. Only
an import brings its own rows, made from a version it names: where the ledger has changed since, it is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import msgspec

from api.assets.book import REGISTER, Book, Register
from api.assets.changes import (
    Adopt,
    Changes,
    Move,
    Replace,
    Sheet,
    adopt,
    check,
    commission_gateway,
    decode_changes,
    move,
    replace,
    subject_known,
)
from api.clerk import Clerk
from api.ledger import text
from citybrain.clock import DAY_MS
from citybrain.db.schema import asked, assets
from citybrain.errors import NotFound, TransitionError, UsageError
from citybrain.machine import Moved
from citybrain.mailbox import Command
from streams.incidents import is_rescue
from streams.ruleset import Rule

T = TypeVar("T")
USE_RULE = "hydrant_illegal_use"  # what an authorised use silences
LONGEST_DAYS = 366  # [U] our choice: a window that nobody looks at for more than a year is a mistake


class Enter(msgspec.Struct, frozen=True):
    """An entry of a register.

    ruleset: hash of the rule set whose rules it silences; a maintenance window leaves the life-safety ones alone unless
    `also_life` says otherwise.
    """

    kind: Literal["use", "maintenance"]
    subject: str
    from_ms: int
    until_ms: int
    ruleset: str = ""
    also_life: bool = False


class Cancel(msgspec.Struct, frozen=True):
    """An entry is taken back; what it silenced so far stays silent."""

    register: int


class Import(msgspec.Struct, frozen=True):
    """A change set, by its content hash."""

    content: str


def _body(command: Command, kind: type[T]) -> T:
    try:
        return msgspec.convert(command.body, kind)
    except msgspec.ValidationError as error:
        raise UsageError(f"body of {command.kind!r}: {error}") from None


def _book(clerk: Clerk) -> Book:
    return clerk.setting.shelf.book(clerk.ledger.connection, clerk.setting.atlas.registry, clerk.now_ms)


def _write(clerk: Clerk, changes: Changes, command: Command) -> None:
    """Check and write a change set, note it, and have ingest asked for the registry it makes."""
    shelf, book = clerk.setting.shelf, _book(clerk)
    after = check(book, changes, shelf.shards)
    for asset in changes.assets:
        if asset.state == "retired" and clerk.ledger.life_alarm(asset.code) is not None:
            # its alarm would end with it, and read as if the passenger were out
            raise TransitionError(f"asset {asset.code}: a life-safety alarm holds there now; it cannot be retired")
    shelf.write(clerk.ledger, changes, after)
    for note in changes.notes:
        row = clerk.ledger.row(assets, "code", note.asset)
        assert row is not None, f"asset {note.asset}: it has just been written"
        clerk.ledger.note(
            clerk.now_ms, "asset", row["id"], note.moved, command.actor, why=command.reason, **note.details
        )
    clerk.ledger.counts["ledger_changes"] += 1
    _ask(clerk, "registry", {"version": after.version}, command)


def _ask(clerk: Clerk, kind: str, body: dict[str, Any], command: Command) -> None:
    clerk.ledger.add(
        asked, at=clerk.now_ms, kind=kind, body=text(body), actor=command.actor, reason=command.reason, done=0
    )


# --- assets -----------------------------------------------------------------------------------------------------


def _import(clerk: Clerk, command: Command) -> str:
    changes = decode_changes(clerk.setting.content(_body(command, Import).content))
    _write(clerk, changes, command)
    told = ", ".join(f"{count} {name}" for name, count in changes.counts.items())
    return f"ledger version {changes.base + 1}: {told or 'nothing'}"


def _adopt(clerk: Clerk, command: Command) -> str:
    wish = _body(command, Adopt)
    _write(clerk, adopt(_book(clerk), wish, clerk.now_ms, command.reason), command)
    return f"asset {wish.asset}: carries sensor {wish.sensor}"


def _replace(clerk: Clerk, command: Command) -> str:
    wish = _body(command, Replace)
    _write(clerk, replace(_book(clerk), wish, clerk.now_ms, command.reason), command)
    return f"asset {wish.asset}: carries sensor {wish.sensor} from now on"


def _mover(event: str, done: str) -> Callable[[Clerk, Command], str]:
    def handle(clerk: Clerk, command: Command) -> str:
        code = _body(command, Move).asset
        _write(clerk, move(_book(clerk), code, event, clerk.now_ms, command.reason), command)
        return f"asset {code}: {done}"

    return handle


def _commission_gateway(clerk: Clerk, command: Command) -> str:
    wish, book = _body(command, Sheet), _book(clerk)
    changes = commission_gateway(book, wish)
    _write(clerk, changes, command)
    passed = sum(note.moved.event == "activate" for note in changes.notes)
    return f"gateway {wish.gateway}: commissioned by {command.actor}, {passed} in service now"


# --- registers --------------------------------------------------------------------------------------------------


def _enter(clerk: Clerk, command: Command) -> str:
    wish, book = _body(command, Enter), _book(clerk)
    if not command.reason.strip():
        raise UsageError("a register needs a reason: who allowed it, or what is being done")
    if not clerk.now_ms - DAY_MS < wish.until_ms or not 0 < wish.until_ms - wish.from_ms <= LONGEST_DAYS * DAY_MS:
        raise UsageError(
            f"from {wish.from_ms} until {wish.until_ms}: expected an end after the beginning, not long past, "
            f"within {LONGEST_DAYS} days of it (Unix ms)"
        )
    subject_known(book, wish.subject)
    rules = _silenced(clerk, book, wish)
    _no_clash(book, wish, rules)
    n = max(book.registers, default=0) + 1
    entry = Register(
        n, wish.kind, wish.subject, rules, wish.from_ms, wish.until_ms, command.actor, command.reason, clerk.now_ms
    )
    _settle(clerk, book, entry, command, REGISTER.move("new", "enter"), entry.until_ms)
    return f"register {n}: {wish.kind} of {wish.subject}, {len(rules)} rule(s) silent"


def _cancel(clerk: Clerk, command: Command) -> str:
    wish, book = _body(command, Cancel), _book(clerk)
    entry = book.registers.get(wish.register)
    if entry is None:
        raise NotFound(f"register {wish.register}: no such entry")
    moved = REGISTER.move(entry.state, "cancel")
    until_ms = min(max(entry.from_ms, clerk.now_ms), entry.until_ms)
    over = msgspec.structs.replace(entry, state="cancelled", cancelled_by=command.actor)
    _settle(clerk, book, over, command, moved, until_ms)
    return f"register {entry.n}: cancelled"


def _settle(clerk: Clerk, book: Book, entry: Register, command: Command, moved: Moved, until_ms: int) -> None:
    """Write an entry and have ingest asked for an override a rule; one that ends where it begins takes it back."""
    clerk.setting.shelf.enter(clerk.ledger, book, entry)
    clerk.ledger.note(clerk.now_ms, "register", entry.n, moved, command.actor, why=command.reason)
    for rule in entry.rules:
        body = {"subject": entry.subject, "rule": rule, "from_ms": entry.from_ms, "until_ms": until_ms}
        _ask(clerk, "override", body, command)


def _no_clash(book: Book, wish: Enter, rules: Sequence[str]) -> None:
    """Overrides of equal subject, rule and beginning are one to the engine: the second would end with the first."""
    for entry in book.registers.values():
        same = entry.state == "entered" and (entry.subject, entry.from_ms) == (wish.subject, wish.from_ms)
        if same and set(entry.rules) & set(rules):
            raise UsageError(f"register {entry.n} begins at the same time for {wish.subject}: cancel it first")


def _silenced(clerk: Clerk, book: Book, wish: Enter) -> tuple[str, ...]:
    """Return the rules an entry silences: by name, so that a life-safety rule is never among them unless said so."""
    asset = book.assets.get(wish.subject)
    if wish.kind == "use":
        if asset is not None and asset.kind != "hydrant":
            raise UsageError(f"asset {asset.code}: it is of kind {asset.kind}; only the use of a hydrant is authorised")
        return (USE_RULE,)
    if wish.also_life:
        return ("*",)
    rules = _rules(clerk, wish.ruleset)
    return tuple(
        rule.id for rule in rules if not is_rescue(rule) and (asset is None or rule.select.kind in ("", asset.kind))
    )


def _rules(clerk: Clerk, ruleset: str) -> Sequence[Rule]:
    if not ruleset:
        raise UsageError("ruleset: say which rule set is in force (its hash); a maintenance window names its rules")
    return clerk.setting.rulebook.rules(ruleset)


Handler = Callable[[Clerk, Command], str]
HANDLERS: dict[str, Handler] = {
    "ledger_import": _import,
    "asset_adopt": _adopt,
    "asset_replace": _replace,
    "asset_commission": _mover("commission", "on trial: its alarms show, and open no case"),
    "asset_activate": _mover("activate", "in service"),
    "asset_retire": _mover("retire", "retired"),
    "gateway_commission": _commission_gateway,
    "register_enter": _enter,
    "register_cancel": _cancel,
}
