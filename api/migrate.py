"""`citybrain migrate`: bring a database to this version's schema; with `--from`, move an embedded one to PostgreSQL.

Tables are copied in the order of their foreign keys, rows in the order of their keys, in batches. The mark, how far the
copy is, is written in the same transaction as each batch, so it may be killed anywhere and goes on from there. While
there is a mark no desk works on the target (`api.desk`). In the end both sides are counted and summed; only then the
mark goes, and the source says where it has moved to, so that no desk goes on there by mistake.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from sqlalchemy import Column, Connection, Engine, Table, func, insert, select

from api.lease import Lease, lock_of
from citybrain.cli import Subcommand, emit
from citybrain.db.migrations import HEAD, revision, upgrade
from citybrain.db.place import add_database, layout_of
from citybrain.db.schema import MOVED, MOVING, lease, meta, metadata
from citybrain.db.store import named, open_store, reading, refusals, upsert, writing
from citybrain.errors import NotFound, StorageError, Unavailable, UsageError

BATCH = 2000
Report = dict[str, dict[str, Any]]  # table → rows and sum


class Mark(msgspec.Struct, frozen=True):
    """How far a copy is: the source, the table being copied, and the key of the last row that is there."""

    source: str
    table: str = ""
    after: Any = None


def tables() -> list[Table]:
    """Return what is copied, those first that others refer to. The lease belongs to its database; `meta` comes last."""
    return [table for table in metadata.sorted_tables if table not in (lease, meta)] + [meta]


def key_of(table: Table) -> Column[Any]:
    """Return the one column that a table's rows are ordered by."""
    (key,) = table.primary_key.columns
    return key


def copy(source: Engine, target: Engine) -> Report:
    """Copy everything, from where an earlier copy stopped; return what there is in the end, by table.

    Raises StorageError where the target has rows of something else, or where both sides differ in the end.
    """
    ours = Lease(target, "migrate")
    with refusals(source), refusals(target):
        if not ours.take(again=True):  # of this source there is one copy: we have its lock
            raise Unavailable(f"{named(target)}: a desk, or another copy, works on it; stop it first")
        mark = _begin(source, target)
        names = [table.name for table in tables()]
        for table in tables()[names.index(mark.table) if mark.table else 0 :]:
            after = mark.after if table.name == mark.table else None
            for rows in batches(source, table, after):
                after = rows[-1][key_of(table).name]
                with writing(target) as connection:
                    ours.hold(connection)
                    connection.execute(insert(table), rows)
                    _put_mark(connection, Mark(mark.source, str(table.name), after))
        report = _compared(source, target)
        with writing(target) as connection:
            connection.execute(meta.delete().where(meta.c.key == MOVING))
    ours.release()
    return report


def _begin(source: Engine, target: Engine) -> Mark:
    """Return where to go on; raises StorageError where the target is not ours to fill."""
    with writing(target) as connection:
        found = connection.execute(select(meta.c.value).where(meta.c.key == MOVING)).scalar()
        if found is not None:
            mark = msgspec.json.decode(found, type=Mark)
            if mark.source != named(source):
                raise StorageError(
                    f"{named(target)}: a copy of {mark.source} is under way there, not of {named(source)}; "
                    "finish that one, or make a new database"
                )
            return mark
        for table in tables():
            if connection.execute(select(func.count()).select_from(table)).scalar_one():
                raise StorageError(f"{named(target)}: there are rows in {table.name}; copy into an empty database")
        mark = Mark(named(source))
        _put_mark(connection, mark)
        return mark


def _put_mark(connection: Connection, mark: Mark) -> None:
    row = {"key": MOVING, "value": msgspec.json.encode(mark).decode()}
    connection.execute(upsert(connection.dialect.name, meta, tuple(row), ("key",)), row)


def batches(store: Engine, table: Table, after: Any = None) -> Iterator[list[dict[str, Any]]]:
    """Yield rows in the order of their keys, those behind `after`."""
    key = key_of(table)
    while True:
        query = select(table).order_by(key).limit(BATCH)
        if after is not None:
            query = query.where(key > after)
        if table is meta:
            query = query.where(key.not_in((MOVING, MOVED)))
        with reading(store) as connection:
            rows = [dict(row) for row in connection.execute(query).mappings()]
        if not rows:
            return
        yield rows
        after = rows[-1][key.name]


def summed(store: Engine, table: Table) -> dict[str, Any]:
    """Return how many rows there are, and a sum over them that does not depend on their order."""
    rows, total = 0, 0
    for batch in batches(store, table):
        rows += len(batch)
        for row in batch:
            # PostgreSQL's text has no U+0000 (`citybrain.db.postgres`)
            told = msgspec.json.encode(list(row.values())).replace(b"\\u0000", "\ufffd".encode())
            digest = hashlib.blake2b(told, digest_size=8).digest()
            total = (total + int.from_bytes(digest)) % 2**64
    return {"rows": rows, "sum": f"{total:016x}"}


def _compared(source: Engine, target: Engine) -> Report:
    report: Report = {}
    for table in tables():
        here, there = summed(source, table), summed(target, table)
        if here != there:
            raise StorageError(
                f"{table.name}: {here['rows']} rows (sum {here['sum']}) in {named(source)}, {there['rows']} (sum "
                f"{there['sum']}) in {named(target)}: the source has changed since the copy began; make a new database"
            )
        report[str(table.name)] = here
    return report


def move(path: Path, target: Engine) -> Report:
    """Move the embedded database at `path` to `target`, and say so in it.

    Raises NotFound, Unavailable while a desk works on it, StorageError.
    """
    lock = lock_of(path)
    if not path.exists():
        raise NotFound(f"{path}: no such database")
    if not lock.take():
        raise Unavailable(f"{path}: a desk works on it; stop it first (`citybrain run`, or its desk)")
    source = open_store(path)
    try:
        with refusals(source):
            there = revision(source)
        if there != HEAD:
            raise StorageError(f"{path}: schema {there}, this program's is {HEAD}; run `citybrain migrate` on it first")
        upgrade(target)
        report = copy(source, target)
        with writing(source) as connection:
            row = {"key": MOVED, "value": named(target)}
            connection.execute(upsert("sqlite", meta, tuple(row), ("key",)), row)
    finally:
        source.dispose()
        lock.release()
    return report


def _table(report: Report) -> str:
    lines = [f"{'table':<14}{'rows':>10}  sum"]
    lines += [f"{name:<14}{found['rows']:>10}  {found['sum']}" for name, found in report.items()]
    return "\n".join([*lines, ""])


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Bring the desk's database to this version's schema; nothing is lost, and it may be repeated. With --from, "
        "copy an embedded database into an empty one of PostgreSQL; run it again where it was interrupted."
    )
    parser.add_argument("--from", dest="source", type=Path, metavar="FILE", help="an embedded database, DATA/city.db")
    add_database(parser)


def _run(args: argparse.Namespace) -> int:
    layout = layout_of(args)
    if args.source is not None and not layout.store:
        raise UsageError("--from: say where to, with --database postgresql://USER@HOST:PORT/NAME")
    layout.make()
    store = open_store(layout.place)
    try:
        report = _brought(args.source, store)
    finally:
        store.dispose()
    if report and not args.json:
        sys.stdout.write(_table(report))
    emit({"database": named(store)} | ({"tables": report} if report and args.json else {}), as_json=args.json)
    return 0


def _brought(source: Path | None, store: Engine) -> Report:
    if source is not None:
        return move(source, store)
    upgrade(store)
    return {}


command = Subcommand("bring the database to this version's schema, or move it to PostgreSQL", _arguments, _run)
