"""Strict YAML: what is wrong, where it stands, and what was expected."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from citybrain.config import Duration, convert, duration_ms, duration_text, load_yaml, parse_yaml
from citybrain.errors import ConfigError


class Limit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    above: float
    on_delay: Duration = Duration(0)


class Sheet(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    limits: tuple[Limit, ...] = ()


GOOD = """\
name: hydrant
limits:
  - above: 1.5
    on_delay: 15s
  - {above: 2, on_delay: 2min}
"""


class Book(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    sheets: dict[str, dict[str, Sheet]]


def test_an_error_inside_mappings_names_their_keys() -> None:
    text = (
        "sheets:\n  a:\n    x.1: {name: one}\n    y: {name: two}\n"
        "  b:\n    z:\n      name: three\n      limits:\n        - {above: 1}\n        - {above: high}\n"
    )
    value, lines = parse_yaml(text, "book.yaml")
    with pytest.raises(
        ConfigError, match=r"book\.yaml:10 sheets\.b\.z\.limits\[1\]\.above: Expected `float`, got `str`"
    ):
        convert(value, Book, lines)
    assert list(value["sheets"]) == ["a", "b"]
    assert list(value["sheets"]["a"]) == ["x.1", "y"]


def read(text: str) -> Sheet:
    value, lines = parse_yaml(text, "sheet.yaml")
    return convert(value, Sheet, lines)


def test_a_good_file_is_read() -> None:
    assert read(GOOD) == Sheet("hydrant", (Limit(1.5, Duration(15_000)), Limit(2.0, Duration(120_000))))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD.replace("15s", "15 sec"), "sheet.yaml:4 limits[0].on_delay: expected a duration such as"),
        (GOOD.replace("15s", "15"), "sheet.yaml:4 limits[0].on_delay: expected a duration such as"),
        (GOOD.replace("above: 1.5", "above: high"), "sheet.yaml:3 limits[0].above: Expected `float`, got `str`"),
        (
            GOOD.replace("above: 2", "abvoe: 2"),
            "sheet.yaml:5 limits[1].abvoe: unknown field 'abvoe'; did you mean 'above'?",
        ),
        (GOOD.replace("name:", "nmae:"), "sheet.yaml:1 nmae: unknown field 'nmae'; did you mean 'name'?"),
        (GOOD + "name: again\n", "sheet.yaml:6 name: written twice"),
        (GOOD.replace("- above: 1.5", "- above: 1.5\n    above: 2"), "sheet.yaml:4 limits[0].above: written twice"),
        ("name: [", "sheet.yaml:1: not YAML:"),
        ("limits: []", "sheet.yaml:1: Object missing required field `name`"),
        ("", "sheet.yaml:1: Expected `object`, got `null`"),
        ("- 1", "sheet.yaml:1: Expected `object`, got `array`"),
    ],
)
def test_an_error_names_file_line_and_field(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(text)
    assert str(caught.value).startswith(message)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.yaml: cannot be read"):
        load_yaml(tmp_path / "missing.yaml", Sheet)
    (tmp_path / "latin.yaml").write_bytes("name: caf\xe9".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.yaml:1: not UTF-8 \(byte E9\)"):
        load_yaml(tmp_path / "latin.yaml", Sheet)


def test_yaml_cannot_make_objects() -> None:
    with pytest.raises(ConfigError, match="not YAML"):
        read("name: !!python/object/apply:os.getcwd []")


@pytest.mark.parametrize("text", ["", "15", "s", "15 s", "-1s", "1w", "1e3s", "15S", " 15s", "15s\n"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="expected a duration"):
        duration_ms(text)


@given(st.integers(0, 10**12))
def test_a_duration_reads_as_it_is_written(ms: int) -> None:
    assert duration_ms(duration_text(ms)) == ms
