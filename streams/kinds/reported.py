"""Kind `reported`: the platform itself noticed it (a gateway's conflicting numbers) and put it into the log as a fault.

Every report raises; nothing clears it but the operator, so the desk folds repeats into the open alarm.
"""

from __future__ import annotations

import msgspec

from citybrain.model import Evidence

JUDGES = False
SAMPLE = """\
when:
  kind: reported
"""


class Parameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """It has none: whoever reports names the rule and the subject."""

    kind: str


def problems(parameters: Parameters) -> list[tuple[str, str]]:
    """Return what is wrong with the parameters: nothing can be."""
    return []


def metrics(parameters: Parameters) -> tuple[str, ...]:
    """Return none: nothing was measured."""
    return ()


def limit(parameters: Parameters, *, raised: bool) -> float | None:
    """Return None: nothing was measured."""
    return None


def explain(parameters: Parameters, evidence: Evidence, language: str) -> str:
    """Say why in a sentence, in `zh` or `en`."""
    if language == "en":
        return f"noticed by the platform, {evidence.count} times so far"
    return f"平台自身发现，累计 {evidence.count} 次"
