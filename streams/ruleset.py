"""Rules and rule sets: the types, and how a rule set is compiled to arrays.

Files and versions of rules are `rules/`'s; what a rule *means* is fixed here. docs/rules.md shows them.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from citybrain.config import Duration

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
    hold: Duration = Duration(0)
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


class Unless(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The rule does not begin to hold while the last value of the same device's `metric` is >= `at_least`."""

    metric: str
    at_least: float


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One rule. `when` holds `kind` and its parameters; `unless` silences it while another metric is in a range.

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
    unless: Unless | None = None


class RuleSet(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A version of all rules; named by the hash of its canonical bytes."""

    rules: tuple[Rule, ...]


def encode_ruleset(ruleset: RuleSet) -> bytes:
    """Return the rule set's canonical bytes; their SHA-256 is its name."""
    return msgspec.json.encode(ruleset, order="deterministic")
