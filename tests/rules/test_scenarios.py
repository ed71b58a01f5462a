"""Golden examples beside rules: the library holds all of its own, and what is wrong with a file is named."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from citybrain.errors import EXIT_CONFIG, EXIT_FAILED, ConfigError
from rules.files import library
from rules.scenarios import SCENARIOS, Outcome, read_script, run_scenarios

ROOT = Path(__file__).parents[2]
FILE = """\
devices:
  mains: {kind: hydrant, tags: [mains, wet_barrel], metrics: [pressure_mpa, flow_lps], events: [cap_open]}
  dry: {kind: hydrant, tags: [mains, dry_barrel], metrics: [pressure_mpa]}
scenarios:
  - name: a burst
    rule: hydrant_pressure_low
    device: mains
    script:
      - at 0s pressure_mpa 0.30
      - every 60s from 1min to 10min pressure_mpa 0.10
      - want raise between 3min and 4min
"""


@pytest.fixture(scope="module")
def outcomes() -> list[Outcome]:
    return run_scenarios()


def test_every_scenario_of_the_library_goes_as_written(outcomes: list[Outcome]) -> None:
    assert [(it.name, it.wrong) for it in outcomes if it.wrong] == []


def test_every_rule_has_its_fault_and_its_look_alike() -> None:
    scripts: dict[str, str] = defaultdict(str)
    for file in SCENARIOS.glob("*.yaml"):
        name = ""
        for line in file.read_text(encoding="utf-8").splitlines():
            name = line.partition("rule: ")[2] or name
            scripts[name] += f"{line}\n"
    for rule in library().rules:
        assert "want raise" in scripts[rule.id], rule.id
        assert "want nothing" in scripts[rule.id], rule.id


def test_every_look_alike_of_the_docs_is_tried() -> None:
    page = (
        (ROOT / "docs" / "faults.md").read_text(encoding="utf-8").partition("## Look-alikes")[2].partition("\n## ")[0]
    )
    named = {name for row in re.findall(r"^\| (`.*?) \|", page, re.M) for name in re.findall(r"`(\w+)`", row)}
    written = "".join(file.read_text(encoding="utf-8") for file in SCENARIOS.glob("*.yaml"))
    assert len(named) > 15
    assert {name for name in named if name not in written} == set()


def test_what_goes_otherwise_is_told_with_its_place(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(FILE.replace("between 3min and 4min", "between 5min and 6min"), encoding="utf-8")
    (outcome,) = run_scenarios(file)
    assert outcome.where == f"{file}:5"
    assert outcome.wrong == ("want raise between 5min and 6min: got raise at 3min (pressure_mpa 0.1)",)
    file.write_text(FILE.replace("want raise between 3min and 4min", "want nothing"), encoding="utf-8")
    assert run_scenarios(file)[0].wrong == ("raise at 3min (pressure_mpa 0.1) was not wanted",)
    file.write_text(FILE.replace("pressure_mpa 0.10", "pressure_mpa 0.20"), encoding="utf-8")
    assert run_scenarios(file)[0].wrong == ("want raise between 3min and 4min: nothing came",)


@pytest.mark.parametrize(
    ("old", "new", "where", "what"),
    [
        ("rule: hydrant_pressure_low", "rule: hydrant_pressure_lo", "6 scenarios[0].rule", "did you mean 'hydrant_pre"),
        ("device: mains", "device: main", "7 scenarios[0].device", "did you mean 'mains'"),
        ("device: mains", "device: dry", "7 scenarios[0].device", "does not watch 'dry'"),
        ("at 0s pressure_mpa", "at 0s pressure", "9 scenarios[0].script[0]", "did you mean 'pressure_mpa'"),
        ("at 0s pressure_mpa 0.30", "at 0s pressure_mpa", "9 scenarios[0].script[0]", "expected METRIC VALUE"),
        ("at 0s pressure_mpa 0.30", "at 0 s pressure_mpa 0.30", "9 scenarios[0].script[0]", 'expected "at TIME'),
        ("at 0s pressure_mpa", "at 0s tilt_deg", "8 scenarios[0].script", "'mains' has no tilt_deg"),
        ("every 60s from 1min to 10min", "every 0s from 1min to 10min", "10 scenarios[0].script[1]", "above 0"),
        ("every 60s from 1min to 10min", "every 60s from 9min to 1min", "10 scenarios[0].script[1]", "after the start"),
        ("between 3min and 4min", "between 4min and 3min", "11 scenarios[0].script[2]", "second time after"),
        ("want raise", "want a raise", "11 scenarios[0].script[2]", 'or "want nothing"'),
        ("      - want raise between 3min and 4min\n", "", "10 scenarios[0].script[1]", "nothing of what is wanted"),
        ("want raise between", "want nothing\n      - want raise between", "12 scenarios[0].script[3]", "one of them"),
        ("    script:", "    scirpt:", "8 scenarios[0].scirpt", "did you mean 'script'"),
        ("devices:", "rules: nowhere.yaml\ndevices:", "", "cannot be read"),
    ],
)
def test_an_error_names_file_line_and_field(tmp_path: Path, old: str, new: str, where: str, what: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(FILE.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        run_scenarios(file)
    assert what in str(caught.value)
    if where:
        assert caught.value.where == f"{file}:{where}"


def test_a_folder_without_scenarios_and_a_missing_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no scenario files"):
        run_scenarios(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read"):
        run_scenarios(tmp_path / "none.yaml")


def test_a_file_may_be_about_rules_of_its_own(tmp_path: Path) -> None:
    rule = next(rule for rule in library().rules if rule.id == "hydrant_pressure_low")
    mine = f"""\
rules:
  - id: mine
    title: {{zh: 我的, en: mine}}
    select: {{kind: hydrant}}
    when: {{kind: threshold, metric: pressure_mpa, below: {rule.when["below"]}, on_delay: 2min}}
    urgency: normal
    correlate: {{by: device, cause: mine, within: 1h}}
    confirm: {{policy: at_once}}
    case: {{kind: case, category: hydrant_no_pressure}}
    source: test
    owner: test
"""
    (tmp_path / "mine.yaml").write_text(mine, encoding="utf-8")
    file = tmp_path / "mine.scenarios"
    file.write_text("rules: mine.yaml\n" + FILE.replace("hydrant_pressure_low", "mine"), encoding="utf-8")
    assert [it.wrong for it in run_scenarios(file)] == [()]


def test_values_run_in_a_line_with_the_same_noise_every_time() -> None:
    lines = ["every 10s from 0s to 30s pressure_mpa 0.3..0.1~0.01 flow_lps 2", "want nothing"]
    first, again = read_script(lines).said, read_script(lines).said
    assert first == again
    pressures = [said.value for said in first if said.metric == "pressure_mpa"]
    assert pressures == pytest.approx([0.3, 0.2, 0.1], abs=0.0101)
    assert [(said.at, said.value) for said in first if said.metric == "flow_lps"] == [
        (0, 2.0),
        (10000, 2.0),
        (20000, 2.0),
    ]


def citybrain(*args: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "citybrain", "rules", "test", *args]
    return subprocess.run(argv, capture_output=True, text=True, check=False)


def test_the_command_fails_where_a_scenario_does(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(FILE, encoding="utf-8")
    done = citybrain(str(file), "--json")
    assert (done.returncode, json.loads(done.stdout)) == (0, {"scenarios": 1, "rules": 1, "failed": 0, "wrong": []})
    file.write_text(FILE.replace("want raise between 3min and 4min", "want nothing"), encoding="utf-8")
    done = citybrain(str(file))
    assert done.returncode == EXIT_FAILED
    assert done.stderr == f"{file}:5 hydrant_pressure_low, a burst: raise at 3min (pressure_mpa 0.1) was not wanted\n"
    file.write_text(FILE.replace("mains\n", "main\n"), encoding="utf-8")
    assert citybrain(str(file)).returncode == EXIT_CONFIG
