"""What the desk asks of its database must not cost more the more there is."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import Select, text
from sqlalchemy.sql import ClauseElement

from api import ledger
from citybrain.db.migrations import upgrade
from citybrain.db.store import open_store

STATEMENTS = {name: each for name, each in vars(ledger).items() if isinstance(each, Select)}
GROWS = ("alarms", "incidents", "cases", "outbox", "journal", "timeline", "commands")
READ_WHOLE = {"_LAST_CASE": "the largest key is one step"}


def plan(tmp_path: Path, statement: ClauseElement) -> list[str]:
    """Return SQLite's plan of a statement, a line a step."""
    store = open_store(tmp_path / "city.db")
    upgrade(store)
    with store.connect() as connection:
        compiled = statement.compile(dialect=connection.dialect)
        driver = connection.connection.cursor()
        positions = compiled.positiontup or []  # type: ignore[attr-defined]
        driver.execute(f"EXPLAIN QUERY PLAN {compiled}", tuple(compiled.params.get(name) for name in positions))
        found = [str(row[3]) for row in driver.fetchall()]
    store.dispose()
    return found


@pytest.mark.parametrize("name", sorted(STATEMENTS))
def test_no_question_of_a_decision_reads_a_whole_table(name: str, tmp_path: Path) -> None:
    steps = plan(tmp_path, STATEMENTS[name])
    scans = [step for step in steps if step.startswith("SCAN") and step.split()[1] in GROWS]
    if name in READ_WHOLE:
        return
    assert scans == []


def test_a_whole_table_would_be_noticed(tmp_path: Path) -> None:
    assert plan(tmp_path, text("SELECT * FROM alarms WHERE count > 1").columns()) == ["SCAN alarms"]
