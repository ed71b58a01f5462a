"""What the desk left behind: its rows as they are, and as its journal makes them again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, Table, select

from api.desk import Desk, replay
from benchmarks.faults.judge import Books
from citybrain.db.schema import alarms, cases, incidents, outbox
from citybrain.db.store import open_store
from citybrain.layout import Layout
from rules.categories import load_categories
from streams.logs import LogStore


def read_books(store: Engine, platform: Sequence[dict[str, Any]]) -> Books:
    """Return what the desk's database holds, beside the platform's list."""
    with store.connect() as db:
        undelivered = select(outbox.c.id).where(outbox.c.state != "delivered")
        return Books(rows(store, alarms), rows(store, cases), list(db.execute(undelivered).scalars()), platform)


def rows(store: Engine, table: Table) -> list[dict[str, Any]]:
    """Return a table's rows in the order of their ids."""
    with store.connect() as db:
        return [dict(row) for row in db.execute(select(table).order_by(table.c.id)).mappings()]


def replay_differs(store: Engine, layout: Layout, logs: LogStore, shards: int, folder: Path) -> list[str]:
    """Do the journal's inputs again with a desk that nothing happens to; return which rows are other then."""
    again = open_store(folder / "again.db")
    try:
        desk = Desk(again, layout, range(shards), load_categories(), logs=logs)
        desk.start()
        replay(store, desk)
        return [text for table in (alarms, incidents, cases) for text in differences(store, again, table)]
    finally:
        again.dispose()


def differences(store: Engine, again: Engine, table: Table) -> list[str]:
    """Return a sentence for every row of a table that is in one database only, or other in the other."""
    have, made = ({row["id"]: row for row in rows(one, table)} for one in (store, again))
    return [
        f"{table.name} {id}: {have.get(id)}, its journal makes {made.get(id)}"
        for id in sorted(have.keys() | made.keys())
        if have.get(id) != made.get(id)
    ]
