"""What is wrong with what a clerk brought: where, what, and what was expected, in Chinese and English."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from typing import Any, Literal

import msgspec

from citybrain.errors import CityBrainError
from citybrain.i18n import text

FIELDS = ("where", "level", "code", "zh", "en")


class Finding(msgspec.Struct, frozen=True):
    """One thing found. where: `file.xlsx 消火栓!F12`. `code` names the text `import.CODE`, `facts` fill it in.

    A finding of level `error` keeps everything out; a `warning` is worth a look and stops nothing.
    """

    where: str
    code: str
    facts: dict[str, str] = {}
    level: Literal["error", "warning"] = "error"

    def told(self, language: str) -> str:
        """Return it in a language."""
        return text(f"import.{self.code}", language, **self.facts)

    def line(self) -> dict[str, str]:
        """Return it as a row of the report."""
        return dict(zip(FIELDS, (self.where, self.level, self.code, self.told("zh"), self.told("en")), strict=True))


class Refused(CityBrainError):
    """A change of the ledger is not possible: `findings` say why; nothing of it was done."""

    def __init__(self, findings: Iterable[Finding]) -> None:
        self.findings = tuple(findings)
        first = self.findings[0]
        more = f" (and {len(self.findings) - 1} more)" if len(self.findings) > 1 else ""
        super().__init__(f"{first.where}: {first.told('zh')} / {first.told('en')}{more}")


def finding(where: str, code: str, /, **facts: Any) -> Finding:
    """Make an error."""
    return Finding(where, code, {name: str(value) for name, value in facts.items()})


def warning(where: str, code: str, /, **facts: Any) -> Finding:
    """Make a warning."""
    return Finding(where, code, {name: str(value) for name, value in facts.items()}, "warning")


def errors(findings: Iterable[Finding]) -> list[Finding]:
    """Return those that keep everything out."""
    return [one for one in findings if one.level == "error"]


def report(findings: Iterable[Finding]) -> str:
    """Return a CSV report; it begins with a byte order mark, so that a spreadsheet takes it for UTF-8."""
    out = io.StringIO()
    writer = csv.DictWriter(out, FIELDS)
    writer.writeheader()
    writer.writerows(one.line() for one in findings)
    return "\ufeff" + out.getvalue()
