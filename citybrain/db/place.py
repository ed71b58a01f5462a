"""Where the desk's database is: the file `city.db` in the data folder, or PostgreSQL by its URL.

`--database postgresql://USER@HOST:PORT/NAME?password_file=PATH`, or the same in the environment variable
CITYBRAIN_DATABASE. On a command line a password would stand in `ps` for everybody, so it is refused there; libpq's
PGPASSWORD, PGPASSFILE and `~/.pgpass` work as well. Nothing here imports a database.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from citybrain.errors import ConfigError, UsageError
from citybrain.layout import Layout
from citybrain.storage import OS_FILES

VARIABLE = "CITYBRAIN_DATABASE"
EXPECTED = "expected postgresql://USER@HOST:PORT/NAME, optionally with ?password_file=PATH"
SCHEMES = ("postgresql", "postgres")
OPTIONS = frozenset({"password_file", "sslmode", "sslrootcert", "sslcert", "sslkey", "passfile"})


def add_database(parser: argparse.ArgumentParser) -> None:
    """Add `--database URL`."""
    parser.add_argument(
        "--database",
        metavar="URL",
        help=f"PostgreSQL, as postgresql://USER@HOST:PORT/NAME?password_file=PATH (default: ${VARIABLE}, "
        "else city.db in the data folder)",
    )


def layout_of(args: argparse.Namespace, environment: Mapping[str, str] | None = None) -> Layout:
    """Return the data folder with the database that command line or environment name; raises UsageError."""
    environment = os.environ if environment is None else environment
    given: str | None = getattr(args, "database", None)  # a command without the option takes the environment's
    url = given or environment.get(VARIABLE, "")
    if url:
        parts = split(url, "--database" if given else VARIABLE)
        if given and parts.password is not None:
            raise UsageError(
                f"--database {shown(given)}: a password on the command line is seen by everybody on this machine; "
                f"write ?password_file=PATH, or give the URL in {VARIABLE}"
            )
    return Layout(args.data, url)


def split(url: str, where: str = "database") -> SplitResult:
    """Return a URL's parts; raises UsageError where it is none of ours. The message never holds a password."""
    try:
        parts = urlsplit(url)
        known = parts.scheme in SCHEMES and parts.hostname and len(parts.path) > 1 and (parts.port or 5432)
        odd = {name for name, _ in parse_qsl(parts.query, strict_parsing=bool(parts.query))} - OPTIONS
    except ValueError as error:
        raise UsageError(f"{where}: {EXPECTED}; {_without_secret(str(error), url)}") from None
    if not known:
        raise UsageError(f"{where} {shown(url)}: {EXPECTED}")
    if odd:
        raise UsageError(f"{where} {shown(url)}: unknown option {min(odd)!r}; known: {', '.join(sorted(OPTIONS))}")
    return parts


def _without_secret(said: str, url: str) -> str:
    return "it cannot be read" if any(part and part in said for part in url.split("@")[:-1]) else said


def shown(url: str) -> str:
    """Return what may be printed of a URL: host, port and database.

    >>> shown("postgresql://desk:secret@db.example:5433/city?sslmode=require")
    'postgresql at db.example:5433/city'
    """
    rest = url.partition("://")[2].rpartition("@")[2].partition("?")[0]
    address, _, name = rest.partition("/")
    return f"postgresql at {address if ':' in address else f'{address}:5432'}/{name}"


def connection_parameters(url: str) -> dict[str, Any]:
    """Return what libpq is given for a URL; raises UsageError, or ConfigError where the password's file is missing."""
    parts = split(url)
    options = dict(parse_qsl(parts.query))
    found: dict[str, Any] = {
        "host": parts.hostname,
        "port": parts.port or 5432,
        "dbname": unquote(parts.path[1:]),
        "user": unquote(parts.username) if parts.username else None,
        "password": unquote(parts.password) if parts.password else None,
    }
    if file := options.pop("password_file", None):
        found["password"] = _password(Path(file))
    return {name: value for name, value in (found | options).items() if value is not None}


def _password(path: Path) -> str:
    if not path.is_file():
        raise ConfigError(str(path), "no such file; the database URL says that the password stands there")
    return OS_FILES.read(path).decode().rstrip("\r\n")
