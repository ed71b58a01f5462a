"""Rule files: YAML, strict; every error names the file, the line, the field and what was expected."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from citybrain.config import Lines, convert, parse_yaml
from citybrain.errors import ConfigError
from rules.categories import FILE as CATEGORIES_FILE
from rules.categories import load_categories
from streams.plan import unusual
from streams.registry import Index
from streams.ruleset import Rule, RuleSet, nearest, problems

LIBRARY = Path(__file__).with_name("library")


class Checked(msgspec.Struct):
    """What reading rule files found: rules that are right, where they stand, and everything that is wrong."""

    rules: list[Rule]
    errors: list[ConfigError]
    files: int = 0
    places: dict[str, tuple[Lines, str]] = {}

    def doubts(self, index: Index, now_ms: int) -> list[str]:
        """Return what is valid and probably not meant on this registry, each with file, line and field."""
        found = []
        for rule, field, what in unusual(RuleSet(tuple(self.rules)), index, now_ms):
            lines, at = self.places[rule]
            found.append(f"{lines.where(f'{at}.{field}')}: {what}")
        return found


@cache
def library() -> RuleSet:
    """Return the rules this product ships."""
    return load_rules(LIBRARY)


def load_rules(path: Path) -> RuleSet:
    """Read a rule file, or every one in a folder; raises ConfigError that lists all that is wrong."""
    checked = check_rules(path)
    if len(checked.errors) == 1:
        raise checked.errors[0]
    if checked.errors:
        listed = "\n  ".join(str(error) for error in checked.errors)
        raise ConfigError(str(path), f"{len(checked.errors)} errors\n  {listed}")
    return RuleSet(tuple(checked.rules))


def check_rules(path: Path) -> Checked:
    """Read a rule file, or every `*.yaml` but categories.yaml in a folder, without stopping at the first error."""
    found = Checked([], [])
    try:
        categories = load_categories(_categories_beside(path))
    except ConfigError as error:
        found.errors.append(error)
        categories = {}
    seen: dict[str, str] = {}
    for file in _files(path, found):
        found.files += 1
        for rule, lines, at in _read(file, found):
            wrong = [*problems(rule, lines, at), *_category_problems(rule, lines, at, categories)]
            if rule.id in seen:
                wrong.append(ConfigError(lines.where(f"{at}.id"), f"{rule.id!r} is given twice, first {seen[rule.id]}"))
            seen.setdefault(rule.id, lines.where(f"{at}.id"))
            found.errors += wrong
            if not wrong:
                found.rules.append(rule)
                found.places[rule.id] = lines, at
    return found


def _categories_beside(path: Path) -> Path:
    beside = (path if path.is_dir() else path.parent) / CATEGORIES_FILE.name
    return beside if beside.exists() else CATEGORIES_FILE


def _files(path: Path, found: Checked) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.glob("*.yaml") if file.name != CATEGORIES_FILE.name)
    if not files:
        found.errors.append(ConfigError(str(path), "no rule files: expected *.yaml"))
    return files


def _read(file: Path, found: Checked) -> list[tuple[Rule, Lines, str]]:
    try:
        value, lines = parse_yaml(file.read_text(encoding="utf-8"), str(file))
        items = _items(value, lines)
    except (OSError, UnicodeDecodeError) as error:
        found.errors.append(ConfigError(str(file), f"cannot be read: {error}"))
        return []
    except ConfigError as error:
        found.errors.append(error)
        return []
    rules = []
    for number, item in enumerate(items):
        at = f"rules[{number}]"
        try:
            rules.append((convert(item, Rule, lines, at), lines, at))
        except ConfigError as error:
            found.errors.append(error)
    return rules


def _items(value: Any, lines: Lines) -> list[Any]:
    if not isinstance(value, dict) or not isinstance(value.get("rules"), list):
        raise ConfigError(lines.where("rules"), "expected `rules:` with a list of rules")
    for name in value:
        if name != "rules":
            raise ConfigError(lines.where(str(name)), f"unknown field {str(name)!r}{nearest(str(name), ['rules'])}")
    return list(value["rules"])


def _category_problems(rule: Rule, lines: Lines, at: str, categories: dict[str, Any]) -> list[ConfigError]:
    named = [("case.category", rule.case.category)]
    if rule.case.widened:
        named.append(("case.widened.category", rule.case.widened.category))
    return [
        ConfigError(lines.where(f"{at}.{field}"), f"unknown category {name!r}{nearest(name, categories)}")
        for field, name in named
        if name not in categories
    ]
