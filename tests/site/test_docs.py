"""The documents say what there is: commands, options, exit codes, configuration, and no link leads nowhere."""

from __future__ import annotations

import re
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import msgspec
import pytest

from citybrain import cli, errors
from citybrain.layout import Layout, Run
from citybrain.units import CONVERSIONS
from simulators.mapping import Mapping
from streams.runtimes.embedded import DEFAULTS, PORTS

ROOT = Path(__file__).parents[2]
OPERATIONS = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
REPLAY = (ROOT / "docs" / "replay.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "README.zh.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
EVERYWHERE = {"--help", "--data", "--json"}


def row_of(name: str) -> str:
    rows = [line for line in OPERATIONS.splitlines() if line.startswith(f"| `citybrain {name}` |")]
    assert len(rows) == 1, f"docs/operations.md has {len(rows)} rows for `citybrain {name}`"
    return rows[0]


def options_of(parser: ArgumentParser) -> set[str]:
    found: set[str] = set()
    for action in parser._actions:
        found |= {option for option in action.option_strings if option.startswith("--")}
        inner = action.choices.values() if isinstance(action.choices, dict) else ()  # of a subcommand's subcommands
        for parser_inside in inner:
            found |= options_of(parser_inside) if isinstance(parser_inside, ArgumentParser) else set()
    return found - EVERYWHERE


@pytest.mark.parametrize("name", sorted(cli.commands()))
def test_every_command_and_option_is_documented(name: str) -> None:
    row = row_of(name)
    options = options_of(cli.parser_for(name, cli.commands()[name].load()))
    assert {option for option in options if f"`{option}" not in row} == set()
    documented = set(re.findall(r"`(--[a-z-]+)", row))
    assert documented <= options, f"documented, but there is no {documented - options}"


def test_no_command_is_documented_that_is_not_there() -> None:
    documented = set(re.findall(r"^\| `citybrain ([a-z]+)` \|", OPERATIONS, re.MULTILINE))
    assert documented == set(cli.commands())


def test_every_exit_code_is_documented() -> None:
    table = OPERATIONS[OPERATIONS.index("## Exit codes") :]
    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)}
    codes = {value for name, value in vars(errors).items() if name.startswith("EXIT_")}
    assert documented == codes | {0, 130}
    assert all(str(code) in (cli.__doc__ or "") for code in documented)


def test_the_usual_ports_are_documented() -> None:
    for port in (getattr(DEFAULTS, field) for field in PORTS):
        assert f"127.0.0.1:{port}" in OPERATIONS


def test_every_place_in_the_data_folder_is_documented() -> None:
    names = [name for name, value in vars(Layout).items() if isinstance(value, property)]
    paths = [getattr(Layout(Path()), name) for name in names]
    paths += [method(Layout(Path()), 0) for method in (Layout.log, Layout.transitions, Layout.engine)]
    paths += [Layout(Path()).gateway("g"), Layout(Path()).mailbox("desk")]
    for path in paths:
        assert f"`{path.parts[0]}" in OPERATIONS, f"docs/operations.md does not say what {path} is"


def test_what_a_run_agrees_on_is_documented() -> None:
    line = next(line for line in OPERATIONS.splitlines() if "`run/run.json` |" in line)
    words = {"clock": "clock", "shards": "shards", "seed": "seed", "mqtt_port": "ports"}
    assert all(word in line for word in words.values())
    assert set(words) <= {field.name for field in msgspec.structs.fields(Run)}


def test_every_field_of_a_mapping_is_documented() -> None:
    todo: list[Any] = [Mapping]
    while todo:
        kind = todo.pop()
        for field in msgspec.structs.fields(kind):
            assert f"`{field.name}`" in REPLAY, f"docs/replay.md: {kind.__name__}.{field.name}"
            inner = getattr(field.type, "__args__", (field.type,))
            todo += [each for each in inner if isinstance(each, type) and issubclass(each, msgspec.Struct)]
    assert all(f"`{unit}`" in REPLAY for unit in CONVERSIONS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not re.match(r"^[a-z]+:", target):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_pages_that_code_refers_to_exist() -> None:
    missing = set()
    for package in ("citybrain", "edge", "gateway", "streams", "rules", "api", "simulators", "benchmarks"):
        for source in (ROOT / package).rglob("*.py"):
            for name in re.findall(r"docs/([a-z_]+\.md)", source.read_text(encoding="utf-8")):
                if not (ROOT / "docs" / name).exists():
                    missing.add(f"{source.relative_to(ROOT)}: docs/{name}")
    assert missing == set()


def test_both_readmes_name_the_same_commands_and_pages() -> None:
    def named(page: str) -> list[str]:
        text = (ROOT / page).read_text(encoding="utf-8")
        commands = re.findall(r"(?:citybrain|make|docker compose) [a-z]+(?: --[a-z-]+(?: [0-9A-Z]+)?)*", text)
        return [*commands, *(link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("README"))]

    assert named("README.md") == named("README.zh.md")
    assert "make run" in named("README.md")


def test_readmes_name_only_commands_that_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for page in ("README.md", "README.zh.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        assert set(re.findall(r"`?citybrain ([a-z]+)", text)) <= set(cli.commands())
        for target in re.findall(r"\bmake ([a-z]+)\b", text):
            assert f"\n{target}:" in makefile, target


def test_ci_runs_what_the_readme_says() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert script.rstrip().endswith("exec make test")
    assert "hadolint docker/Dockerfile" in script
    assert "dclint@" in script
    assert re.search(r"DCLINT=\d+\.\d+\.\d+", script)


def test_every_test_that_proves_an_invariant_exists() -> None:
    page = (ROOT / "docs" / "invariants.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-z_/]+\.py)::(\w+)`", page))
    assert len(named) > 50
    for file, name in sorted(named):
        (path,) = (ROOT / "tests").rglob(file)
        text = path.read_text(encoding="utf-8")
        assert re.search(rf"^(?:def {name}\(|{name} = )", text, re.MULTILINE), f"there is no {file}::{name}"


@pytest.mark.parametrize("number", range(1, 9))
def test_every_invariant_has_its_tests_or_says_why_not(number: int) -> None:
    page = (ROOT / "docs" / "invariants.md").read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if line.startswith(f"| {number} |"))
    missing = page[page.index("### Not covered yet") : page.index("## Bad input")]
    assert "::test_" in row or "::Test" in row or "the table below" in row or f"\n- {number}: " in missing
