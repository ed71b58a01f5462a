"""`clouds.yaml`: who pushes readings to us, how to know him, and where in his messages things stand (docs/cloud.md).

Secrets are named, never written down: `token` and `key` are files in the data folder's `secrets/`.
"""

from __future__ import annotations

import math
import re
import secrets as random_secrets
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import msgspec

from citybrain.config import Duration, Lines, convert, parse_yaml
from citybrain.errors import ConfigError, NotFound
from citybrain.model import CLOUD_PREFIX
from citybrain.storage import OS_FILES
from citybrain.units import metric
from citybrain.webhook import new_secret, read_secret

LEAST_PULL_MS = 10_000
LEAST_TOKEN = 16
Refuse = Callable[[str, str], ConfigError]
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")


class Field(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one of the operator's values is: `metric` = value × `factor` + `offset`, on its lane."""

    metric: str
    factor: float = 1.0
    offset: float = 0.0
    lane: Literal["telemetry", "event"] = "telemetry"


class Pull(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where an operator offers what he has said, by cursor: `GET {url}/readings?after=CURSOR`."""

    url: str
    every: Duration = Duration(60_000)


class Operator(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One operator's platform. `messages`, `device`, `time`, `values` and `stream` are paths such as `payload.data`.

    messages: where in a body the list of messages stands; "" where the body is the list, or one message.
    values: an object of values by name; with `stream`, the one value that is named there. only: messages that say
    anything else at these paths are none of ours. gateways: what the ids of his virtual gateways begin with.
    alive: how long after his last sign of life his gateways' time goes on.
    """

    token: str
    key: str
    device: str
    time: str
    values: str
    fields: dict[str, Field]
    messages: str = ""
    stream: str = ""
    time_unit: Literal["ms", "s", "iso"] = "ms"
    only: dict[str, str | int] = {}
    ignore: tuple[str, ...] = ()
    gateways: str = CLOUD_PREFIX
    alive: Duration = Duration(90_000)  # of missing heartbeats gateway_offline is made, 90 s later [U]
    pull: Pull | None = None


class Clouds(msgspec.Struct, frozen=True):
    """The whole file: operators by the name that stands in their URL, `/push/NAME`."""

    operators: dict[str, Operator]


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    operators: dict[str | int, Any]


class Keys(msgspec.Struct, frozen=True):
    """What an operator proves himself with: a bearer token and a `whsec_` signing secret."""

    token: str
    secret: str


def read_clouds(path: Path) -> Clouds:
    """Read and check a file; raises ConfigError with file, line and field."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), f"cannot be read: {error}") from None
    value, lines = parse_yaml(text, str(path))
    clouds = Clouds({name: _operator(name, raw, lines) for name, raw in _named(value, lines).items()})
    for name, operator in clouds.operators.items():
        _check(name, operator, lines)
    for (one, a), (other, b) in combinations(clouds.operators.items(), 2):
        if a.gateways.startswith(b.gateways) or b.gateways.startswith(a.gateways):
            what = f"{a.gateways!r} and {b.gateways!r} of {one!r} can mean the same gateway: a gateway has one operator"
            raise ConfigError(lines.where(f"operators.{other}.gateways"), what)
    return clouds


def _named(value: Any, lines: Lines) -> dict[str, Any]:
    operators = convert(value, _File, lines).operators
    if not operators:
        raise ConfigError(lines.where("operators"), "expected at least one operator")
    return _strings(operators, "operators", lines)


def _strings(named: dict[Any, Any], path: str, lines: Lines) -> dict[str, Any]:
    """Return what is named by strings; YAML takes 3323_0_5700 for a number."""
    for name in named:
        if not isinstance(name, str):
            raise ConfigError(lines.where(path), f"YAML reads a name here as the number {name!r}: put it in quotes")
    return named


def _operator(name: str, raw: Any, lines: Lines) -> Operator:
    """Convert one operator, field by field, so that an error is told by its own line."""
    path = f"operators.{name}"
    fields = raw.get("fields") if isinstance(raw, dict) else None
    if isinstance(fields, dict):
        for key, field in _strings(fields, f"{path}.fields", lines).items():
            convert(field, Field, lines, f"{path}.fields.{key}")
    return convert(raw, Operator, lines, path)


def _check(name: str, operator: Operator, lines: Lines) -> None:
    def refuse(field: str, what: str) -> ConfigError:
        return ConfigError(lines.where(f"operators.{name}{field}"), what)

    if not _NAME.fullmatch(name):
        raise refuse("", f"{name!r}: expected small letters, digits and hyphens; it stands in the URL")
    for field in ("token", "key"):
        if not _FILE_NAME.fullmatch(getattr(operator, field)):
            raise refuse(f".{field}", "expected the name of a file in secrets/, without a folder")
    for field in ("device", "time", "values"):
        if not getattr(operator, field):
            raise refuse(f".{field}", "expected a path such as payload.data")
    if not operator.gateways.startswith(CLOUD_PREFIX):
        raise refuse(".gateways", f"{operator.gateways!r}: the ids of virtual gateways begin with {CLOUD_PREFIX!r}")
    if operator.alive <= 0:
        raise refuse(".alive", "expected more than 0s")
    if not operator.fields:
        raise refuse(".fields", "expected at least one: without it nothing is used")
    for key, field_ in operator.fields.items():
        _check_field(field_, f".fields.{key}", refuse)
    if operator.pull is not None:
        _check_pull(operator.pull, refuse)


def _check_field(field: Field, where: str, refuse: Refuse) -> None:
    try:
        metric(field.metric)
    except NotFound as error:
        raise refuse(f"{where}.metric", str(error)) from None
    if not (math.isfinite(field.factor) and field.factor and math.isfinite(field.offset)):
        raise refuse(f"{where}.factor", "expected a number that is not 0, and a finite offset")


def _check_pull(pull: Pull, refuse: Refuse) -> None:
    parts = urlsplit(pull.url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise refuse(
            ".pull.url", f"{pull.url!r}: expected http(s)://host/path without query; /readings is put behind it"
        )
    if pull.every < LEAST_PULL_MS:
        raise refuse(".pull.every", "expected at least 10s: the operator counts our requests")


# --- keys -------------------------------------------------------------------------------------------------------


def read_keys(folder: Path, operator: Operator) -> Keys:
    """Return an operator's token and secret; raises ConfigError naming the file, never what it holds."""
    secret = read_secret(folder / operator.key)
    if secret is None:
        raise ConfigError(
            str(folder / operator.key), "no such file; `citybrain cloud --new-keys` makes what is missing"
        )
    path = folder / operator.token
    token = path.read_text(encoding="ascii", errors="replace").strip() if path.exists() else ""
    if len(token) < LEAST_TOKEN or not token.isprintable() or " " in token:
        raise ConfigError(str(path), f"expected a token of at least {LEAST_TOKEN} characters without a space")
    return Keys(token, secret)


def make_keys(folder: Path, clouds: Clouds) -> list[str]:
    """Make the tokens and secrets that are missing, readable by their owner only; return the files' names."""
    OS_FILES.make(folder)
    made = []
    for operator in clouds.operators.values():
        for name, text in ((operator.token, random_secrets.token_urlsafe(32)), (operator.key, new_secret())):
            path = folder / name
            if not path.exists():
                OS_FILES.replace(path, text.encode())
                path.chmod(0o600)
                made.append(name)
    return made
