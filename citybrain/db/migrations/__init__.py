"""Bringing a database up to the present schema, forward only."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import Engine, inspect, text

from citybrain.db.store import named, refusals, writing
from citybrain.errors import StorageError

HEAD = "0005"  # the newest revision in versions/; a test holds it there
FOLDER = Path(__file__).parent


def revision(engine: Engine) -> str | None:
    """Return the schema revision a database has, None where it has none yet."""
    with engine.connect() as connection:
        if not inspect(connection).has_table("alembic_version"):
            return None
        return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()


def upgrade(engine: Engine) -> str | None:
    """Bring the schema up to `HEAD`, in one transaction; return the revision it had.

    Raises StorageError where a newer version of the program wrote the database (going back would lose what it knows),
    and what the database refuses: DiskFull, StorageError.
    """
    with refusals(engine):
        before = revision(engine)
    if before == HEAD:
        return before
    known = {path.name.split("_")[0] for path in (FOLDER / "versions").glob("[0-9]*.py")}
    if before is not None and before not in known:
        raise StorageError(
            f"{named(engine)}: schema {before} is newer than this program's ({HEAD}); "
            "start the version that wrote it, or restore a backup"
        )
    # imported here: a desk whose schema is up to date needs neither the time nor the memory
    from alembic import command  # noqa: PLC0415
    from alembic.config import Config  # noqa: PLC0415

    config = Config()
    config.set_main_option("script_location", str(FOLDER).replace("%", "%%"))
    with writing(engine) as connection:
        if engine.dialect.name == "postgresql":  # of several that start at once, one does it
            connection.execute(text("SELECT pg_advisory_xact_lock(hashtext('citybrain schema'))"))
        config.attributes["connection"] = connection
        command.upgrade(config, HEAD)
    return before
