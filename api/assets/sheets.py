"""Excel and CSV as a clerk keeps them, read into lines that know where each of their values stands.

Headers are Chinese or English and may name a unit in brackets; a sheet may have a title above them. What cannot be read
is a finding with file, sheet and cell, and the rest is read all the same.
"""

from __future__ import annotations

import csv
import io
import re
import unicodedata
import zipfile
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from api.assets.findings import Finding, finding, warning
from citybrain.config import load_yaml
from citybrain.units import METRICS, Metric

FILE = Path(__file__).with_name("columns.yaml")
MOST_UNPACKED = 256 * 1024 * 1024  # [U] our choice: a district's list takes 5 MiB
TITLE_ROWS = 5  # how far down the headers may stand
_BRACKETS = re.compile(r"[(（\[【](.*?)[)）\]】]")
_SPACES = re.compile(r"[\s_\-]+")
Grid = Sequence[Sequence[Any]]  # rows of a sheet, from its first


class Column(msgspec.Struct, frozen=True):
    """A column: its letter, its header as written, and the field or metric that it holds."""

    letter: str
    header: str
    field: str


class Line(msgspec.Struct, frozen=True):
    """One row of a sheet: values by field, `nominal` numbers by metric; `where` is file and sheet."""

    where: str
    row: int
    columns: dict[str, Column]
    values: dict[str, str]

    def at(self, field: str = "") -> str:
        """Return where a field stands: `assets.xlsx 消火栓!F12`; the row where the sheet has no such column."""
        column = self.columns.get(field)
        return f"{self.where}!{column.letter if column else ''}{self.row}"

    def __contains__(self, field: str) -> bool:
        return field in self.values

    def get(self, field: str) -> str:
        """Return a value without the space around it, "" where there is none."""
        return self.values.get(field, "")


class Sheet(msgspec.Struct, frozen=True):
    """A sheet's lines, and the fields it has."""

    file: str
    where: str
    name: str
    fields: frozenset[str]
    lines: tuple[Line, ...]


@cache
def names() -> dict[str, str]:
    """Return the field of every name a column may have."""
    known = load_yaml(FILE, dict[str, tuple[str, ...]])
    return {plain(name): field for field, all_names in known.items() for name in all_names}


def plain(header: str) -> str:
    """Return a header as it is compared: half width, lower case, without spaces and brackets.

    >>> plain("经 度（°）")
    '经度'
    """
    text = unicodedata.normalize("NFKC", _BRACKETS.sub("", header)).lower()
    return _SPACES.sub("", text)


def unit_of(header: str) -> str:
    """Return what stands in brackets in a header, "" where nothing does."""
    match = _BRACKETS.search(header)
    return match[1].strip() if match else ""


# --- files ------------------------------------------------------------------------------------------------------


def read_sheets(name: str, content: bytes) -> tuple[list[Sheet], list[Finding]]:
    """Return the sheets of an .xlsx or .csv file, and what is wrong with them."""
    if name.lower().endswith(".csv"):
        return _read_csv(name, content)
    return _read_xlsx(name, content)


def _read_csv(name: str, content: bytes) -> tuple[list[Sheet], list[Finding]]:
    text = decoded(content)
    if text is None:
        return [], [finding(name, "encoding")]
    first = text.partition("\n")[0]
    delimiter = max(",;\t", key=first.count)
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    except csv.Error as error:
        return [], [finding(name, "unreadable", what=error)]
    stem = Path(name).stem
    return _sheet(name, name, stem, rows)


def decoded(content: bytes) -> str | None:
    """Return a text file's text: UTF-8 or GBK (GB 18030); None where it is neither."""
    if b"\0" in content:
        return None
    for encoding in ("utf-8-sig", "gb18030"):
        try:
            return content.decode(encoding)
        except UnicodeDecodeError:
            continue
    return None


def _read_xlsx(name: str, content: bytes) -> tuple[list[Sheet], list[Finding]]:
    import openpyxl  # noqa: PLC0415  a desk that imports nothing does without
    from openpyxl.utils.exceptions import InvalidFileException  # noqa: PLC0415

    try:
        with zipfile.ZipFile(io.BytesIO(content)) as packed:
            unpacked = sum(one.file_size for one in packed.infolist())
        if unpacked > MOST_UNPACKED:
            return [], [finding(name, "unreadable", what=f"it unpacks to {unpacked} bytes, at most {MOST_UNPACKED}")]
        book = openpyxl.load_workbook(io.BytesIO(content), data_only=True)
    except (zipfile.BadZipFile, InvalidFileException, SyntaxError, KeyError, ValueError, TypeError, OSError) as error:
        return [], [finding(name, "unreadable", what=error)]
    sheets: list[Sheet] = []
    found: list[Finding] = []
    for page in book.worksheets:
        rows = [list(row) for row in page.iter_rows(values_only=True)]
        merged = [(area.coord, area.min_row, area.max_row) for area in page.merged_cells.ranges]
        read, wrong = _sheet(name, f"{name} {page.title}", page.title, rows, merged)
        sheets += read
        found += wrong
    if not sheets and not found:
        found.append(finding(name, "empty"))
    if sheets:  # a book comes with blank sheets; only one without any line is wrong
        found = [_milder(one) if one.code == "empty" else one for one in found]
    return sheets, found


def _milder(one: Finding) -> Finding:
    return msgspec.structs.replace(one, level="warning")


def _sheet(
    file: str, where: str, name: str, rows: Grid, merged: Iterable[tuple[str, int, int]] = ()
) -> tuple[list[Sheet], list[Finding]]:
    if not any(_text(value) for row in rows for value in row):
        return [], [finding(where, "empty")]
    top = _header_row(rows)
    if top is None:
        return [], [finding(where, "no_headers", names="编号, 类型, 经度, 纬度")]
    columns, found = _columns(where, top + 1, rows[top])
    found += [finding(f"{where}!{area}", "merged") for area, _, last in merged if last > top]
    lines = tuple(
        line for number, row in enumerate(rows[top + 1 :], top + 2) if (line := _line(where, number, columns, row))
    )
    if not lines:
        found.append(finding(where, "empty"))
    return [Sheet(file, where, name, frozenset(columns), lines)] if lines else [], found


def _header_row(rows: Grid) -> int | None:
    for number, row in enumerate(rows[:TITLE_ROWS]):
        if sum(plain(_text(value)) in names() for value in row) >= 2:
            return number
    return None


def _columns(where: str, row: int, headers: Sequence[Any]) -> tuple[dict[str, Column], list[Finding]]:
    columns: dict[str, Column] = {}
    found: list[Finding] = []
    for number, value in enumerate(headers):
        header, letter = _text(value), letters(number)
        if not header:
            continue
        at, field = f"{where}!{letter}{row}", names().get(plain(header), "")
        if not field:
            field, wrong = _metric_column(at, header)
            found += wrong
        if field in columns:
            found.append(finding(at, "column_twice", header=header, other=columns[field].letter))
        elif field:
            columns[field] = Column(letter, header, field)
    return columns, found


def _metric_column(at: str, header: str) -> tuple[str, list[Finding]]:
    """Return a metric as a field (`=pressure_mpa`) where the header names one, in its unit; else why it is not read."""
    name, unit = plain(header), unit_of(header)
    for metric in METRICS.values():
        base = plain(metric.name.rpartition("_")[0] or metric.name)
        if name == plain(metric.name) or name == plain(metric.zh):
            if unit and unit.lower() != metric.unit.lower():
                return "", [_wrong_unit(at, unit, metric)]
            return f"={metric.name}", []
        if name.startswith(base) and name.removeprefix(base) in _OTHER_UNITS and base in ("pressure", "flow", "level"):
            return "", [_wrong_unit(at, name.removeprefix(base), metric)]
    return "", [warning(at, "unknown_column", header=header)]


_OTHER_UNITS = frozenset({"kpa", "pa", "bar", "psi", "mh2o", "m3h", "lpm", "cm", "mm"})


def _wrong_unit(at: str, unit: str, metric: Metric) -> Finding:
    return finding(at, "wrong_unit", unit=unit, name=metric.name, expected=metric.unit)


def _line(where: str, row: int, columns: dict[str, Column], values: Sequence[Any]) -> Line | None:
    """Return a row, None where it is blank."""
    texts = {
        field: text
        for field, column in columns.items()
        if (number := column_number(column.letter)) < len(values) and (text := _text(values[number]))
    }
    return Line(where, row, columns, texts) if texts else None


def _text(value: Any) -> str:
    """Return a cell as text: a whole number without a fraction, because Excel keeps codes as numbers."""
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return str(value).strip()


def letters(number: int) -> str:
    """Return the letters of a column, from 0.

    >>> letters(0), letters(27)
    ('A', 'AB')
    """
    text = ""
    number += 1
    while number:
        number, rest = divmod(number - 1, 26)
        text = chr(65 + rest) + text
    return text


def column_number(text: str) -> int:
    """Return the number of a column by its letters, from 0."""
    number = 0
    for letter in text:
        number = number * 26 + ord(letter) - 64
    return number - 1
