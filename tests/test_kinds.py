"""Every rule kind passes the same checks; the docs know every kind, field and rule."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import yaml

from citybrain.config import Lines, convert
from citybrain.model import Evidence
from rules.files import library
from streams.kinds import KINDS, Kind
from streams.kinds.absence import METRIC
from streams.ruleset import Rule, problems
from streams.warm import sample_rule, sample_ruleset

DOCS = (Path(__file__).parent.parent / "docs" / "rules.md").read_text(encoding="utf-8")

kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))


def parameters_of(kind: Kind) -> object:
    return convert(yaml.safe_load(kind.SAMPLE)["when"], kind.Parameters, Lines("sample", None))


@kinds
def test_the_sample_is_valid(kind: Kind) -> None:
    assert kind.problems(parameters_of(kind)) == []
    assert [rule for rule in sample_ruleset().rules if problems(rule)] == []


@kinds
def test_the_explanation_comes_in_two_languages_and_names_the_number(kind: Kind) -> None:
    parameters = parameters_of(kind)
    metric = next(iter(kind.metrics(parameters)), "")
    evidence = Evidence(metric, 41.5, 0.14, 0, 7)
    texts = {language: kind.explain(parameters, evidence, language) for language in ("zh", "en")}
    assert texts["zh"] != texts["en"]
    assert all("41.5" in text or "7" in text for text in texts.values())
    unknown = kind.explain(parameters, Evidence(metric, None, None, 0), "zh")
    assert unknown


@kinds
def test_the_docs_describe_the_kind_and_its_fields(kind: Kind) -> None:
    name = next(name for name, module in KINDS.items() if module is kind)
    assert f"\n### {name}\n" in DOCS
    for field in kind.Parameters.__struct_fields__:
        assert field == "kind" or f"`{field}`" in DOCS, field


def test_the_docs_describe_every_field_of_a_rule_and_every_rule_we_ship() -> None:
    assert [name for name in Rule.__struct_fields__ if f"`{name}`" not in DOCS] == []
    assert [rule.id for rule in library().rules if f"`{rule.id}`" not in DOCS] == []
    assert METRIC in DOCS


@pytest.mark.parametrize(
    ("when", "field", "what"),
    [
        ({"kind": "threshold", "metric": "flow_lps"}, "when", "exactly one of above, below"),
        ({"kind": "threshold", "metric": "flow_lps", "above": 1, "below": 2}, "when.above", "exactly one"),
        ({"kind": "threshold", "metric": "flow_lps", "above": 1, "deadband": -1}, "when.deadband", "0 or more"),
        (
            {"kind": "threshold", "metric": "flow_lps", "above": 1, "deadband": float("nan")},
            "when.deadband",
            "0 or more",
        ),
        ({"kind": "threshold", "metric": "flow_lp", "above": 1}, "when.metric", "did you mean 'flow_lps'"),
        (
            {"kind": "threshold", "metric": "flow_lps", "above": 1, "count": {"n": 17, "within": "1min"}},
            "when.count.n",
            "2..16",
        ),
        ({"kind": "threshold", "metric": "flow_lps", "above": 1, "on_dealy": "1s"}, "when.on_dealy", "'on_delay'"),
        ({"kind": "threshold", "metric": "flow_lps", "above": 1, "on_delay": "15 sec"}, "when.on_delay", "15 sec"),
        ({"kind": "device_code", "metric": "fault_code", "codes": [], "clear": [0]}, "when.codes", "at least one"),
        (
            {"kind": "device_code", "metric": "fault_code", "codes": [1], "clear": [1]},
            "when.clear",
            "stands in codes",
        ),
        ({"kind": "absence", "timeout": "0s"}, "when.timeout", "longer than 0"),
        ({"kind": "absense", "timeout": "1s"}, "when.kind", "did you mean 'absence'"),
        ({"metric": "flow_lps"}, "when.kind", "got missing"),
        ({"kind": "reported", "metric": "x"}, "when.metric", "unknown field"),
    ],
)
def test_wrong_parameters_are_named(when: dict[str, object], field: str, what: str) -> None:
    rule = msgspec.structs.replace(sample_rule("sample", {"kind": "reported"}), when=when)
    found = problems(rule)
    assert len(found) == 1
    assert found[0].where.endswith(f" {field}")
    assert what in found[0].what


def test_explaining_loads_no_compiler() -> None:
    code = "import sys, streams.kinds, streams.ruleset, streams.engine; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_kernels_can_be_compiled_ahead() -> None:
    done = subprocess.run([sys.executable, "-m", "streams.kinds"], check=True, capture_output=True, text=True)
    assert done.stdout.startswith("kernels compiled: engine")
