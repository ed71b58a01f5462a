"""Rules and rule sets: the types, and what makes a rule valid.

`streams.plan` compiles them. Files and versions of rules are `rules/`'s; what a rule *means* is fixed here.
docs/rules.md shows them.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from typing import Any, Literal

import msgspec

from citybrain.clock import from_iso
from citybrain.config import Duration, Lines, convert
from citybrain.errors import ConfigError
from citybrain.units import METRICS
from streams.kinds import KINDS, Kind

Urgency = Literal["life", "urgent", "normal", "watch"]
Scope = Literal["device", "zone", "building", "gateway"]


class Title(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an operator reads."""

    zh: str
    en: str


class Selector(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which devices a rule watches; every field that is given must match."""

    kind: str = ""
    tag: str = ""
    zone: str = ""
    building: str = ""
    grid: str = ""
    street: str = ""
    device: str = ""


class Correlate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Alarms of one `cause` that share their `by` within `within` belong to one incident. The device always does."""

    by: Scope
    cause: str
    within: Duration


class Confirm(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """When an incident becomes a case.

    at_once: with its first alarm. after: when an alarm still holds `hold` after it was raised. members: when
    `members` subjects are in the incident, or `hold` after the first if it still holds. operator: when a person says
    so. never: it is evidence only.
    """

    policy: Literal["at_once", "after", "members", "operator", "never"]
    hold: Duration = msgspec.field(default_factory=Duration)
    members: int = 1


class Widened(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """From `members` subjects on the cause is another one, of another category."""

    members: int
    category: str


class CaseTemplate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the case will be: its kind and its category (rules/library/categories.yaml). The highest rank leads."""

    kind: Literal["case", "rescue", "maintenance"]
    category: str
    rank: int = 0
    widened: Widened | None = None


class Guard(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The last value of the same device's `metric` against `at_least`: it can keep a rule from beginning to hold.

    Under `unless` the rule does not begin while the value is >= `at_least`, and an unknown value stops nothing; under
    `only_while` it begins only while the value is >= `at_least`, and an unknown value is not enough.
    """

    metric: str
    at_least: float


class Override(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Other parameters for some of a rule's devices, until an ISO time: `when` holds those that differ.

    It ends with the first tick of the log at or after `until`. Of several that select a device the first counts.
    """

    select: Selector
    when: dict[str, Any]
    until: str
    reason: str
    source: str

    @property
    def until_ms(self) -> int:
        """When it ends (Unix ms); raises ValueError where `until` is no time."""
        return from_iso(self.until)


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One rule. `when` holds `kind` and its parameters; the guards `unless` and `only_while` keep it from beginning.

    `source` says where its numbers come from; `owner` who answers for it.
    """

    id: str
    title: Title
    select: Selector
    when: dict[str, Any]
    urgency: Urgency
    correlate: Correlate
    confirm: Confirm
    case: CaseTemplate
    source: str
    owner: str
    unless: Guard | None = None
    only_while: Guard | None = None
    overrides: tuple[Override, ...] = ()


class RuleSet(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A version of all rules; named by the hash of its canonical bytes."""

    rules: tuple[Rule, ...]


def encode_ruleset(ruleset: RuleSet) -> bytes:
    """Return the rule set's canonical bytes; their SHA-256 is its name."""
    return msgspec.json.encode(ruleset, enc_hook=int, order="deterministic")  # a Duration is its milliseconds


def decode_ruleset(content: bytes) -> RuleSet:
    """Return a rule set from its canonical bytes; raises ConfigError."""
    try:
        return msgspec.json.decode(content, type=RuleSet, dec_hook=_duration)
    except msgspec.DecodeError as error:
        raise ConfigError("rule set", str(error)) from None


def _duration(kind: type, value: Any) -> Any:
    if kind is Duration and isinstance(value, int):
        return Duration(value)
    raise NotImplementedError(kind)


def kind_of(rule: Rule, lines: Lines | None = None, path: str = "") -> tuple[Kind, Any]:
    """Return a rule's kind and its parameters; raises ConfigError naming the field."""
    lines = lines or Lines(f"rule {rule.id}", None)
    when = f"{path}.when" if path else "when"
    name = rule.when.get("kind")
    if not isinstance(name, str) or name not in KINDS:
        what = "missing" if name is None else f"{name!r}{nearest(str(name), KINDS)}"
        raise ConfigError(lines.where(f"{when}.kind"), f"expected one of {', '.join(sorted(KINDS))}, got {what}")
    return KINDS[name], convert(rule.when, KINDS[name].Parameters, lines, when)


def overridden(rule: Rule, override: Override) -> Rule:
    """Return the rule as it is for the devices of one of its overrides."""
    return msgspec.structs.replace(rule, when=rule.when | override.when)


def nearest(name: str, known: Any) -> str:
    """Return `; did you mean 'x'?` where a known name is close, else nothing."""
    close = difflib.get_close_matches(name, sorted(known), 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def problems(rule: Rule, lines: Lines | None = None, path: str = "") -> list[ConfigError]:
    """Return everything that is wrong with one rule, each with its place in the file where `lines` knows it."""
    lines = lines or Lines(f"rule {rule.id}", None)
    before = f"{path}." if path else ""
    try:
        kind, parameters = kind_of(rule, lines, path)
    except ConfigError as error:
        return [error, *_errors(_rule_problems(rule), lines, before)]
    found = [(f"when.{field}".rstrip("."), what) for field, what in kind.problems(parameters)]
    if kind.JUDGES:
        places = getattr(kind, "places", lambda _: ("metric",))(parameters)
        for name, place in zip(kind.metrics(parameters), places, strict=True):
            found += _metric_problems(f"when.{place}", name)
    elif rule.unless or rule.only_while:
        field = "unless" if rule.unless else "only_while"
        found.append((field, f"kind {rule.when['kind']} takes no guard: expected it only on rules that judge values"))
    if getattr(parameters, "clock", "") == "platform" and rule.select.kind != "gateway":
        found.append(("when.clock", 'expected "gateway": platform time is for rules that select kind gateway'))
    overrides = [
        error
        for n, override in enumerate(rule.overrides)
        for error in _override_problems(rule, n, override, lines, path)
    ]
    return [*_errors([*found, *_rule_problems(rule)], lines, before), *overrides]


def _override_problems(rule: Rule, n: int, override: Override, lines: Lines, path: str) -> Iterator[ConfigError]:
    """Yield what is wrong with the n-th override; what it leaves out is the rule's, which has been checked."""
    at = f"{path}.overrides[{n}]" if path else f"overrides[{n}]"
    if not any(msgspec.structs.astuple(override.select)):
        yield ConfigError(lines.where(f"{at}.select"), "expected at least one field: it is for some of the devices")
    try:
        _ = override.until_ms
    except ValueError:
        what = f"expected an ISO 8601 time such as 2026-03-01T00:00:00+08:00, got {override.until!r}"
        yield ConfigError(lines.where(f"{at}.until"), what)
    if not override.when:
        yield ConfigError(lines.where(f"{at}.when"), "expected at least one parameter that differs")
    try:
        kind, parameters = kind_of(overridden(rule, override), lines, at)
    except ConfigError as error:
        yield error
        return
    for field, what in kind.problems(parameters):
        yield ConfigError(lines.where(f"{at}.when.{field}".rstrip(".")), what)
    if _watches(rule) != _watches(overridden(rule, override)):
        yield ConfigError(lines.where(f"{at}.when"), "an override cannot change the kind, the metrics or the clock")


def _watches(rule: Rule) -> tuple[Any, ...]:
    """Return what decides where a rule's instances stand and what feeds them."""
    kind, parameters = kind_of(rule)
    return rule.when["kind"], kind.metrics(parameters), getattr(parameters, "clock", "")


def _errors(found: list[tuple[str, str]], lines: Lines, before: str) -> list[ConfigError]:
    return [ConfigError(lines.where(before + field), what) for field, what in found]


def _metric_problems(field: str, name: str) -> Iterator[tuple[str, str]]:
    if name not in METRICS:
        yield field, f"unknown metric {name!r}{nearest(name, METRICS)}"


def _rule_problems(rule: Rule) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    if not re.fullmatch(r"[a-z][a-z0-9_]*", rule.id):
        found.append(("id", f"expected lower-case letters, digits and _, got {rule.id!r}"))
    if not any(msgspec.structs.astuple(rule.select)):
        found.append(("select", f"expected at least one of {', '.join(Selector.__struct_fields__)}"))
    if rule.unless:
        found += _metric_problems("unless.metric", rule.unless.metric)
    if rule.only_while:
        found += _metric_problems("only_while.metric", rule.only_while.metric)
    if rule.confirm.policy == "after" and rule.confirm.hold <= 0:
        found.append(("confirm.hold", "expected a duration longer than 0 with policy after"))
    if rule.confirm.policy == "members" and rule.confirm.members < 2:
        found.append(("confirm.members", f"expected 2 or more with policy members, got {rule.confirm.members}"))
    if rule.case.widened and rule.case.widened.members < 2:
        found.append(("case.widened.members", f"expected 2 or more, got {rule.case.widened.members}"))
    return found
