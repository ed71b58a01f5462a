"""Every text a person reads stands in the catalogue, in both languages; the page itself holds none."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from string import Formatter
from typing import get_args

import pytest

import api
from api.cases.cases import CASE, VERDICTS
from api.routes.console import FOLDER, rendered
from citybrain.i18n import LANGUAGES, catalogue
from streams.alarms import ALARM
from streams.incidents import INCIDENT
from streams.ruleset import Scope, Urgency

CJK = re.compile(r"[\u3000-\u303f\u3400-\u9fff\uff00-\uffef]")
HTML = (FOLDER / "index.html").read_text(encoding="utf-8")
SCRIPT = (FOLDER / "app.js").read_text(encoding="utf-8")
STYLE = (FOLDER / "style.css").read_text(encoding="utf-8")
FILLED_BY_US = {"page.language", "page.other", "page.texts"}
# What `code(family, value)` of the script may be asked for.
FAMILIES = {
    "alarm.state": set(ALARM.states) - {"new"} | {"shelved"},
    "incident.state": set(INCIDENT.states) - {"new"},
    "case.stage": set(CASE.states) - {"new"},
    "verdict": set(VERDICTS),
    "scope": set(get_args(Scope)),
    "drop": {"malformed", "late", "unknown_device", "unknown_gateway"},
}


def used_in_html() -> set[str]:
    return set(re.findall(r"\[\[([^\]]+)\]\]", HTML)) - FILLED_BY_US


def used_in_script() -> set[str]:
    """Every literal that looks like a key, but for the families of codes; and `none.${name}` of the lists."""
    families = set(re.findall(r'code\("([a-z_.]+)"', SCRIPT))
    keys = set(re.findall(r'"([a-z_]+\.[a-z_.]+)"', SCRIPT)) - families
    lists = re.findall(r'^  \["(\w+)", "v1/', SCRIPT, re.MULTILINE)
    assert len(lists) == 6
    return keys | {f"none.{name}" for name in lists}


def used_in_python() -> set[str]:
    """Literal keys of `text("…")`, `both("…")` and `catalogue()["…"]` in the api package."""
    found: set[str] = set()
    for path in Path(str(api.__file__)).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            value = None
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("text", "both"):
                value = node.args[0] if node.args else None
            elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == "catalogue()":
                value = node.slice
            if isinstance(value, ast.Constant) and isinstance(value.value, str) and "." in value.value:
                found.add(value.value)
    return found


def test_every_key_in_use_is_there() -> None:
    used = used_in_html() | used_in_script() | used_in_python()
    assert len(used) > 50
    assert used <= set(catalogue())


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_code_has_its_text(family: str) -> None:
    missing = {value for value in FAMILIES[family] if f"{family}.{value}" not in catalogue()}
    assert not missing
    if family != "drop":
        assert f'code("{family}"' in SCRIPT


def test_reasons_of_membership_have_texts() -> None:
    for code in ("first", "same_device", *(f"same_{scope}" for scope in get_args(Scope))):
        assert f"why.{code}" in catalogue()


def test_both_languages_are_there_and_fill_in_the_same() -> None:
    def names(text: str) -> set[str]:
        return {name for _, name, _, _ in Formatter().parse(text) if name}

    for key, text in catalogue().items():
        assert text.zh.strip(), key
        assert text.en.strip(), key
        assert names(text.zh) == names(text.en), key
        if key != "page.switch":  # it names the other language
            assert not CJK.search(text.en), key


def test_the_page_holds_no_text_of_its_own() -> None:
    for name, source in (("index.html", HTML), ("app.js", SCRIPT), ("style.css", STYLE)):
        assert not CJK.search(source), name
    bare = re.sub(r"\[\[[^\]]+\]\]", "", re.sub(r"<[^>]*>", " ", HTML)).strip()
    assert bare == "", "words outside of tags"


def test_states_are_called_as_the_operators_call_them() -> None:
    words = [catalogue()[f"alarm.state.{state}"].zh for state in ("unack", "acked", "rtn_unack", "shelved")]
    assert words == ["未确认", "处理中", "已恢复", "搁置"]


def test_urgencies_are_marked() -> None:
    for urgency in get_args(Urgency):
        assert f".{urgency} {{ border-left-color" in STYLE


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_page_asks_nobody_but_us(language: str) -> None:
    page = rendered(language)
    assert "[[" not in page
    assert f'<html lang="{language}">' in page
    for source in (page, SCRIPT, STYLE):
        assert not re.search(r"https?:|//[a-z0-9.-]+\.[a-z]{2,}|@import|url\(", source)
    assert "innerHTML" not in SCRIPT
    assert "eval(" not in SCRIPT


def test_texts_cannot_leave_their_script_element() -> None:
    from api.routes.console import script_json

    assert "<" not in script_json({"key": "</script><b>&amp;"})
