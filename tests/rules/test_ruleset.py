"""Rule files: what is good is read, what is wrong is named by file, line and field."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

from citybrain.errors import EXIT_CONFIG, ConfigError
from citybrain.layout import Active, Layout
from citybrain.mailbox import Mailbox
from rules.categories import load_categories
from rules.command import schema
from rules.files import LIBRARY, check_rules, library, load_rules
from streams.kinds import KINDS
from streams.registry import encode_registry
from streams.ruleset import Rule, decode_ruleset, encode_ruleset
from tests.engine_logs import REGISTRIES

GOOD = """\
rules:
  - id: low
    title: {zh: 低, en: low}
    select: {kind: hydrant}
    when: {kind: threshold, metric: pressure_mpa, below: 0.14}
    urgency: urgent
    correlate: {by: zone, cause: water, within: 30min}
    confirm: {policy: at_once}
    case: {kind: case, category: hydrant_no_pressure}
    source: test
    owner: water
"""
OVERRIDE = "{select: {zone: z1}, when: {below: 0.1}, until: '2026-03-01', reason: test, source: test}"


def test_the_library_is_what_was_agreed() -> None:
    rules = {rule.id: rule for rule in library().rules}
    assert len(rules) == 40
    assert {rule.when["kind"] for rule in rules.values()} == set(KINDS)
    assert rules["hydrant_pressure_low"].when["below"] == 0.14
    rescues = {rule.id for rule in rules.values() if rule.case.kind == "rescue"}
    assert rescues == {"elevator_trapped", "elevator_trapped_inferred"}
    assert {rule.id for rule in rules.values() if rule.urgency == "life"} == rescues
    assert all(rules[name].confirm.policy == "at_once" for name in rescues)
    assert {rule.case.category for rule in rules.values()} | widened(rules.values()) == set(load_categories())
    assert all(re.search(r"\[[HMU]\]|docs/", rule.source) for rule in rules.values())


def widened(rules: Iterable[Rule]) -> set[str]:
    return {rule.case.widened.category for rule in rules if rule.case.widened}


def test_every_category_has_a_unit_a_clock_and_a_source() -> None:
    categories = load_categories()
    assert len(categories) == 28
    assert categories["water_main_burst"].codes["GB/T 30428.2"] == "05-01"
    assert categories["elevator_trapped"].unit == "lift-rescue"
    assert all(it.clock.amount > 0 and it.source and it.zh and it.en for it in categories.values())


def test_a_rule_set_survives_its_bytes() -> None:
    content = encode_ruleset(library())
    assert decode_ruleset(content) == library()
    assert encode_ruleset(decode_ruleset(content)) == content
    with pytest.raises(ConfigError, match="rule set"):
        decode_ruleset(content[:-5])


@pytest.mark.parametrize(
    ("old", "new", "where", "what"),
    [
        ("urgency: urgent", "urgency: soon", "6 rules[0].urgency", "soon"),
        ("by: zone", "by: street", "7 rules[0].correlate.by", "street"),
        ("    owner: water\n", "", "2 rules[0]", "owner"),
        ("select: {kind", "select: {kin", "4 rules[0].select.kin", "did you mean 'kind'"),
        ("metric: pressure_mpa", "metric: pressure", "5 rules[0].when.metric", "did you mean 'pressure_mpa'"),
        ("kind: threshold", "kind: treshold", "5 rules[0].when.kind", "did you mean 'threshold'"),
        ("below: 0.14", "belwo: 0.14", "5 rules[0].when.belwo", "did you mean 'below'"),
        ("hydrant_no_pressure", "hydrant_pressure", "9 rules[0].case.category", "did you mean 'hydrant_no_pressure'"),
        ("within: 30min", "within: 30 minutes", "7 rules[0].correlate.within", '"15s"'),
        ("id: low", "id: Low!", "2 rules[0].id", "lower-case"),
        ("{kind: hydrant}", "{}", "4 rules[0].select", "at least one of"),
        ("policy: at_once", "policy: after", "8 rules[0].confirm.hold", "longer than 0"),
        ("policy: at_once", "policy: members", "8 rules[0].confirm.members", "2 or more"),
        ("below: 0.14}", "below: 0.14}\n    unless: {metric: cap, at_least: 1}", "6 rules[0].unless.metric", "cap"),
        ("rules:", "rule:", "1 rules", "expected `rules:`"),
        ("    owner: water", "    owner: water\n    owner: fire", "12 rules[0].owner", "written twice"),
        ("title: {zh: 低", "title: {zh: [", "3", "not YAML"),
        (
            "{kind: threshold, metric: pressure_mpa, below: 0.14}",
            "{kind: absence, timeout: 90s, clock: platform}",
            "5 rules[0].when.clock",
            "gateway",
        ),
        (
            "when: {kind: threshold, metric: pressure_mpa, below: 0.14}",
            "when: {kind: reported}\n    only_while: {metric: cap_open, at_least: 1}",
            "6 rules[0].only_while",
            "takes no guard",
        ),
        *(
            ("    owner: water", "    owner: water\n    overrides:\n      - " + OVERRIDE.replace(old, new), where, what)
            for old, new, where, what in (
                ("below: 0.1", "belwo: 0.1", "13 rules[0].overrides[0].when.belwo", "did you mean 'below'"),
                ("below: 0.1", "below: low", "13 rules[0].overrides[0].when.below", "str"),
                ("below: 0.1", "above: 0.1", "13 rules[0].overrides[0].when.above", "exactly one"),
                ("below: 0.1", "", "13 rules[0].overrides[0].when", "at least one parameter"),
                ("below: 0.1", "metric: flow_lps", "13 rules[0].overrides[0].when", "cannot change the kind"),
                ("below: 0.1", "kind: absence", "13 rules[0].overrides[0].when.metric", "unknown field"),
                ("{zone: z1}", "{}", "13 rules[0].overrides[0].select", "some of the devices"),
                ("zone: z1", "zon: z1", "13 rules[0].overrides[0].select.zon", "did you mean 'zone'"),
                ("2026-03-01", "soon", "13 rules[0].overrides[0].until", "ISO 8601"),
                (", reason: test", "", "13 rules[0].overrides[0]", "reason"),
            )
        ),
    ],
)
def test_an_error_names_file_line_and_field(tmp_path: Path, old: str, new: str, where: str, what: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(GOOD.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_rules(file)
    assert caught.value.where == f"{file}:{where}"
    assert what in caught.value.what


def test_what_is_probably_not_meant_is_told_with_its_place(tmp_path: Path) -> None:
    file, data = tmp_path / "mine.yaml", Layout(tmp_path / "data")
    data.make()
    text = GOOD.replace("kind: hydrant}", "kind: elevator}") + "    overrides:\n      - " + OVERRIDE
    file.write_text(text.replace("2026-03-01", "2020-03-01"), encoding="utf-8")
    argv = [sys.executable, "-m", "citybrain", "rules", "validate", str(file), "--data", str(data.root), "--json"]
    done = subprocess.run([*argv, "--registry"], check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert "no registry is in force" in done.stderr
    data.write_active(Active(data.put_blob(encode_registry(REGISTRIES[0])), ""))
    done = subprocess.run([*argv, "--registry"], check=True, capture_output=True, text=True)
    assert json.loads(done.stdout)["warnings"] == [
        f"{file}:4 rules[0].select: selects none of 7 devices",
        f"{file}:13 rules[0].overrides[0].until: is over since 2020-03-01T00:00:00.000Z; it does nothing",
        f"{file}:13 rules[0].overrides[0].select: selects none of the rule's devices",
    ]
    assert "warning: " in done.stderr
    argv[4] = "activate"
    done = subprocess.run(argv, check=True, capture_output=True, text=True)
    assert len(json.loads(done.stdout)["warnings"]) == 3


def test_all_errors_of_a_folder_are_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(GOOD, encoding="utf-8")
    (tmp_path / "b.yaml").write_text(GOOD.replace("urgent", "soon"), encoding="utf-8")
    (tmp_path / "c.yaml").write_text(GOOD.replace("mpa", "bar"), encoding="utf-8")
    (tmp_path / "d.yaml").write_bytes(b"\xff\xfe")
    found = check_rules(tmp_path)
    assert (len(found.rules), found.files) == (1, 4)
    listed = "\n".join(map(str, found.errors))
    assert "b.yaml:6 rules[0].urgency" in listed
    assert "c.yaml:5 rules[0].when.metric" in listed
    assert f"c.yaml:2 rules[0].id: 'low' is given twice, first {tmp_path}/a.yaml:2" in listed
    assert "d.yaml: cannot be read" in listed
    with pytest.raises(ConfigError, match="4 errors"):
        load_rules(tmp_path)


def test_an_empty_folder_has_no_rules(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no rule files"):
        load_rules(tmp_path)


def test_a_folder_may_bring_its_own_categories(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(GOOD.replace("hydrant_no_pressure", "dry"), encoding="utf-8")
    assert "unknown category 'dry'" in str(check_rules(tmp_path).errors)
    (tmp_path / "categories.yaml").write_text(
        "dry: {zh: 无水, en: dry, unit: water, clock: {type: work_day, amount: 1}, source: test}", encoding="utf-8"
    )
    assert check_rules(tmp_path).errors == []


def references(node: Any) -> set[str]:
    if isinstance(node, dict):
        own = {node["$ref"]} if "$ref" in node else set()
        return own.union(*(references(value) for value in node.values()))
    return set().union(*(references(item) for item in node)) if isinstance(node, list) else set()


def test_the_schema_names_every_kind_and_holds_together() -> None:
    found = schema()
    assert set(KINDS) <= set(found["$defs"])
    assert {one.removeprefix("#/$defs/") for one in references(found)} <= set(found["$defs"])
    fields = found["$defs"]["Rule"]["properties"]
    written = yaml.safe_load((LIBRARY / "hydrants.yaml").read_text(encoding="utf-8"))["rules"]
    assert all(set(rule) <= set(fields) for rule in written)
    for rule in written:
        assert set(rule["when"]) <= set(found["$defs"][rule["when"]["kind"]]["properties"])


def citybrain(*args: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "citybrain", "rules", *args]
    return subprocess.run(argv, capture_output=True, text=True, check=False)


def test_the_command_validates_and_activates(tmp_path: Path) -> None:
    done = citybrain("validate", "--json")
    assert (done.returncode, json.loads(done.stdout)) == (0, {"files": 5, "rules": 40, "errors": [], "warnings": []})
    file = tmp_path / "mine.yaml"
    file.write_text(GOOD.replace("below", "belwo"), encoding="utf-8")
    done = citybrain("validate", str(file))
    assert done.returncode == EXIT_CONFIG
    assert f"{file}:5 rules[0].when.belwo: unknown field 'belwo'; did you mean 'below'?" in done.stderr
    data = tmp_path / "data"
    done = citybrain("activate", "--data", str(data), "--actor", "wang", "--reason", "night shift", "--json")
    name = json.loads(done.stdout)["ruleset"]
    assert decode_ruleset(Layout(data).get_blob(name)) == library()
    (_, item), *rest = Mailbox(Layout(data).mailbox("ingest")).take()[0]
    assert (item.kind, item.actor, item.body, item.reason) == ("ruleset", "wang", {"content": name}, "night shift")
    assert rest == []
