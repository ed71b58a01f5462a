"""Strict YAML: every error names the file, the line and the field, and says what was expected.

A document is decoded into a msgspec struct with `forbid_unknown_fields=True`. Durations are written `15s`, `5min`,
`2h`, `1d` and become milliseconds.
"""

from __future__ import annotations

import difflib
import re
import typing
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import yaml

from citybrain.errors import ConfigError

T = TypeVar("T")

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|min|h|d)")
_FACTOR = {"ms": 1, "s": 1000, "min": 60_000, "h": 3_600_000, "d": 86_400_000}


class Duration(int):
    """Milliseconds, written `15s` in a file."""

    __slots__ = ()


def duration_ms(text: str) -> int:
    """Return `15s`, `5min`, `2h`, `1d`, `250ms` in milliseconds; raises ValueError.

    >>> duration_ms("1.5min")
    90000
    """
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ValueError(f'expected a duration such as "15s", "5min" or "2h", got {text!r}')
    return round(float(match[1]) * _FACTOR[match[2]])


def duration_text(ms: int) -> str:
    """Return milliseconds the way a file writes them.

    >>> duration_text(300000)
    '5min'
    """
    for unit in ("d", "h", "min", "s"):
        if ms and ms % _FACTOR[unit] == 0:
            return f"{ms // _FACTOR[unit]}{unit}"
    return f"{ms}ms"


def _hook(kind: type, value: Any) -> Any:
    if kind is Duration:
        if not isinstance(value, str):
            raise ValueError(f'expected a duration such as "15s", got {value!r}')
        return Duration(duration_ms(value))
    raise NotImplementedError(kind)


class Lines:
    """Where each field of a YAML document stands: path like `rules[2].on_delay` → line."""

    def __init__(self, file: str, node: yaml.Node | None) -> None:
        self.file = file
        self._lines: dict[str, int] = {}
        self._walked: set[int] = set()  # nodes: an alias (`*a`) is walked once, whatever it multiplies to
        if node is not None:
            self._walk(node, "")

    def _walk(self, node: yaml.Node, path: str) -> None:
        self._lines.setdefault(path, node.start_mark.line + 1)
        if id(node) in self._walked:
            return
        self._walked.add(id(node))
        if isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key, value in node.value:
                name = str(key.value)
                here = f"{path}.{name}" if path else name
                if name in seen:
                    raise ConfigError(f"{self.file}:{key.start_mark.line + 1} {here}", "written twice")
                seen.add(name)
                self._lines[here] = key.start_mark.line + 1
                self._walk(value, here)
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                self._walk(value, f"{path}[{index}]")

    def where(self, path: str) -> str:
        """Return `file:line path` of a field, or of the nearest one around it."""
        at = path
        while at and at not in self._lines:
            at = at[: max(at.rfind("."), at.rfind("["), 0)]
        return f"{self.file}:{self._lines.get(at, 1)} {path}".rstrip()


def parse_yaml(text: str, file: str) -> tuple[Any, Lines]:
    """Parse one YAML document; raises ConfigError with the line where it is no YAML or holds a key twice."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        value = yaml.safe_load(text)
        return value, Lines(file, node)
    except yaml.reader.ReaderError as error:
        line, code = text.count("\n", 0, error.position) + 1, int(error.character)
        raise ConfigError(f"{file}:{line}", f"not YAML: the character U+{code:04X} may not stand in it") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark is not None else 1
        problem = str(getattr(error, "problem", error))
        hint = "; indent with spaces, not with tabs" if r"'\t'" in problem else ""
        raise ConfigError(f"{file}:{line}", f"not YAML: {problem}{hint}") from None
    except RecursionError:
        raise ConfigError(f"{file}:1", "nested too deeply") from None


def convert(value: Any, kind: type[T], lines: Lines, path: str = "") -> T:
    """Turn a parsed value into `kind`; raises ConfigError naming file, line and field, and the nearest known name."""
    try:
        return msgspec.convert(value, kind, dec_hook=_hook)
    except msgspec.ValidationError as error:
        what, _, inside = str(error).partition(" - at `")
        if key := re.match(r"key` in `(.*)", inside):
            inside, what = key[1], f"{what} as a key: put it in quotes"
        what += ": nothing is written there" if what.endswith("got `null`") else ""
        inner = _named(inside.rstrip("`").removeprefix("$"), value, kind, str(error)).removeprefix(".")
        unknown = re.search(r"unknown field `(.+)`", what)
        if unknown:
            inner = f"{inner}.{unknown[1]}" if inner else unknown[1]
            what = f"unknown field {unknown[1]!r}{_nearest(unknown[1], kind)}"
        full = f"{path}{'' if not path or not inner or inner[0] == '[' else '.'}{inner}"
        raise ConfigError(lines.where(full), what) from None
    except RecursionError:
        raise ConfigError(lines.where(path), "nested too deeply, or an anchor (&) that holds itself") from None


def _named(path: str, value: Any, kind: Any, message: str) -> str:
    """Return msgspec's path of an error with the keys that it leaves out (`[...]`): whose part alone fails so."""
    done, around = "", value
    while "[...]" in path:
        before, _, path = path.partition("[...]")
        for field, index in re.findall(r"\.([^.\[]+)|\[(\d+)\]", before):
            around = around[field or int(index)]
        key = next((key for key in list(around) if _message_of(around, key, value, kind) == message), None)
        if key is None:
            return f"{done}{before}[...]{path}"
        done, around = f"{done}{before}.{key}", around[key]
    return done + path


def _message_of(around: dict[str, Any], key: str, value: Any, kind: Any) -> str:
    """Return what is wrong with `value` while the mapping `around` in it has but one key."""
    whole = dict(around)
    around.clear()
    around[key] = whole[key]
    try:
        msgspec.convert(value, kind, dec_hook=_hook)
    except msgspec.ValidationError as error:
        return str(error)
    finally:
        around.clear()
        around.update(whole)
    return ""


def _nearest(name: str, kind: Any) -> str:
    names: set[str] = set()
    todo, seen = [kind], set()
    while todo:
        current = todo.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        fields = getattr(current, "__struct_encode_fields__", ())
        names.update(fields)
        hints = typing.get_type_hints(current) if fields else {}
        todo += [*hints.values(), *typing.get_args(current)]
    names.discard(name)  # known, but not there
    close = difflib.get_close_matches(name, sorted(names), 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def read_bytes(path: Path) -> bytes:
    """Return a file's content; raises ConfigError where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(str(path), f"cannot be read: {error.strerror or error}") from None


def text_of(content: bytes, file: str) -> str:
    """Return a file's text; raises ConfigError with the line where it is not UTF-8."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{file}:{line}", f"not UTF-8 (byte {content[error.start]:02X}): save it as UTF-8") from None


def load_yaml(path: Path, kind: type[T]) -> T:
    """Read a YAML file as `kind`; raises ConfigError."""
    value, lines = parse_yaml(text_of(read_bytes(path), str(path)), str(path))
    return convert(value, kind, lines)
