"""`influx.yaml`: where the values go, and as whom (docs/influx.md).

The token is named, never written down: a file (in the data folder's `secrets/` unless its path is absolute) or a
variable of the environment. It is read before every attempt after a refusal, so that a new one needs no restart.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from citybrain.config import Duration, Lines, convert, parse_yaml
from citybrain.errors import ConfigError

MOST_POINTS = 50_000
LEAST_TIMEOUT_MS, MOST_TIMEOUT_MS = 100, 300_000


class Reference(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a secret stands: in `file`, or in the environment variable `env`."""

    file: str = ""
    env: str = ""


class Target(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A server's write API.

    batch: points in a request. ca: a file of certificates to trust instead of the system's. again: of how long before
    a crash of the server everything is written once more (VictoriaMetrics answers before its disk has it).
    """

    url: str
    org: str
    bucket: str
    token: Reference | None = None
    batch: int = 5000
    timeout: Duration = Duration(10_000)
    ca: str = ""
    again: Duration = Duration(10_000)

    @property
    def name(self) -> str:
        """What a mark belongs to: another server, organisation or bucket has none of our values."""
        return f"{self.url} {self.org}/{self.bucket}"


def read_target(path: Path) -> Target:
    """Read and check a file; raises ConfigError with file, line and field."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), f"cannot be read: {error}; docs/influx.md has one to begin with") from None
    value, lines = parse_yaml(text, str(path))
    target = convert(value, Target, lines)
    _check(target, lines)
    return target


def _check(target: Target, lines: Lines) -> None:
    for field, what in _wrong(target).items():
        raise ConfigError(lines.where(field), what)


def _wrong(target: Target) -> dict[str, str]:
    found: dict[str, str] = {}
    if not _is_server(target.url):
        found["url"] = f'expected such as "https://influx.example:8086", without user or query, got {target.url!r}'
    for field in ("org", "bucket"):
        if not getattr(target, field):
            found[field] = "expected a name, got nothing"
    if target.token is not None and bool(target.token.file) == bool(target.token.env):
        found["token"] = "expected either file or env"
    if not 1 <= target.batch <= MOST_POINTS:
        found["batch"] = f"expected 1 to {MOST_POINTS} points, got {target.batch}"
    if not LEAST_TIMEOUT_MS <= target.timeout <= MOST_TIMEOUT_MS:
        found["timeout"] = 'expected "100ms" to "5min"'
    if target.ca and not Path(target.ca).is_file():
        found["ca"] = f"{target.ca}: no such file"
    return found


def _is_server(url: str) -> bool:
    try:
        parts: Any = urlsplit(url)
        known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        return False
    return bool(known) and not (parts.query or parts.fragment or "@" in parts.netloc)


def read_token(target: Target, secrets: Path) -> str:
    """Return the token, "" where none is named; raises ConfigError where it is not there."""
    if target.token is None:
        return ""
    if target.token.env:
        found, where = os.environ.get(target.token.env, ""), f"environment variable {target.token.env}"
    else:
        path = secrets / target.token.file  # an absolute one stays as it is
        where = str(path)
        try:
            found = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(where, f"the token cannot be read: {error}") from None
    token = found.strip()
    if not token or not token.isascii() or not token.isprintable():
        raise ConfigError(where, "expected a token: one line of ASCII")
    return token
