"""The folder that a mosquitto reads: listeners, who may use which topic, certificates, and who is shut out.

mosquitto 2.0.11 reads certificates, revocation list and access list again on SIGHUP (tests/api/test_broker_tls.py). An
access list applies to sessions that are open, a revocation list only to new ones, so a gateway whose certificate is
revoked is also denied every topic: it is out at once.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from citybrain.errors import ConfigError, StorageError
from citybrain.storage import OS_FILES
from streams.runtimes.broker import WHOLE_BROKER

if TYPE_CHECKING:
    from api.pki.journal import Book

INGEST = "service-ingest"
PID = "mosquitto.pid"
UP = ("telemetry", "event", "blob", "status", "reply")
DOWN = ("ack", "command")


class Source(msgspec.Struct, frozen=True):
    """What a broker's folder follows from: the authority's folder and, as text, who may use which topic.

    What only a person can do is added to `notes`.
    """

    folder: Path
    access: str
    notes: list[str]


class BrokerFolder(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A folder written for a broker: its listeners, and as which user it runs (who owns its key)."""

    path: str
    port: int = 8883
    bind: str = "0.0.0.0"
    loopback_port: int = 1883  # 0: no listener for this machine's own processes
    user: str = ""


def configuration(folder: BrokerFolder) -> str:
    """Return a whole mosquitto.conf, for a mosquitto that `citybrain run` does not start."""
    at = Path(folder.path)
    lines = [
        "# Written by `citybrain ca broker`; changes are lost with the next one.",
        "per_listener_settings true",
        f"pid_file {at / PID}",
        *WHOLE_BROKER,
        *([f"user {folder.user}"] if folder.user else []),
    ]
    if folder.loopback_port:
        lines += [
            "",
            "# Our own processes on this machine. Whoever may open a loopback connection here may publish.",
            f"listener {folder.loopback_port} 127.0.0.1",
            "allow_anonymous true",
            f"acl_file {at / 'loopback.acl'}",
        ]
    return "\n".join([*lines, "", listener(folder)])


def listener(folder: BrokerFolder) -> str:
    """Return the listener for boxes; `citybrain run` puts it behind its own (streams.runtimes.broker)."""
    at = Path(folder.path)
    lines = [
        "# Boxes and services: a certificate of ours, whose name is user name and client id.",
        f"listener {folder.port} {folder.bind}",
        "allow_anonymous false",
        "tls_version tlsv1.2",
        f"cafile {at / 'trust.pem'}",
        f"certfile {at / 'server.pem'}",
        f"keyfile {at / 'server.key'}",
        f"crlfile {at / 'crl.pem'}",
        "require_certificate true",
        "use_identity_as_username true",
        "use_username_as_clientid true",
        f"acl_file {at / 'access.acl'}",
    ]
    return "\n".join([*lines, ""])


def access(book: Book, now_ms: int) -> str:
    """Return the access list: a gateway its own topics, ingest all of them, one that is shut out none."""
    lines, services = ["# Written by `citybrain ca`."], book.latest("service")
    for name in sorted({INGEST, *(name for name in services if name.startswith(INGEST))}):
        lines += [f"user {name}", "topic read cb/v1/#", *(f"topic write cb/v1/+/+/{channel}" for channel in DOWN)]
    for name, one in sorted({**book.latest("gateway"), **services}.items()):
        if one.state(now_ms) == "revoked":
            lines += [f"user {name}", "topic deny cb/#"]
    lines += [f"pattern write cb/v1/+/%u/{channel}" for channel in UP]
    lines += [f"pattern read cb/v1/+/%u/{channel}" for channel in DOWN]
    return "\n".join([*lines, ""])


def write(source: Source, folder: BrokerFolder) -> None:
    """Make the folder, or make it anew; raises ConfigError where its user is not there."""
    path = Path(folder.path)
    if folder.user:
        try:
            pwd.getpwnam(folder.user)
        except KeyError:
            raise ConfigError(f"--user {folder.user}", "there is no such user on this machine") from None
    OS_FILES.make(path)
    path.chmod(0o700)
    _put(path / "mosquitto.conf", configuration(folder).encode(), folder.user)
    _put(path / "listener.conf", listener(folder).encode(), folder.user)
    _put(path / "loopback.acl", b"topic readwrite cb/v1/#\n", folder.user)
    if folder.user and os.geteuid() == 0:
        shutil.chown(path, folder.user)
    refresh(source, folder)


def refresh(source: Source, folder: BrokerFolder) -> bool:
    """Bring a folder up to date with its source, have the broker read it; return whether anything changed."""
    path = Path(folder.path)
    if not path.is_dir():
        source.notes.append(f"{path}: the broker's folder is gone; `citybrain ca broker --out {path}` makes it")
        return False
    files = {name: OS_FILES.read(source.folder / name) for name in ("trust.pem", "crl.pem", "server.key", "server.pem")}
    files["access.acl"] = source.access.encode()
    try:
        changed = [_put(path / name, data, folder.user) for name, data in files.items()]
    except StorageError as error:
        again = f"`citybrain ca broker --out {path}` as the user it belongs to brings it up to date"
        source.notes.append(f"the broker's folder cannot be written: {error}; {again}")
        return False
    if any(changed):
        _reload(path, source.notes)
    return any(changed)


def _reload(path: Path, notes: list[str]) -> None:
    """Send SIGHUP to the mosquitto that reads the folder; say what to do where that is not ours to do."""
    pid = path / PID
    try:
        number = int(pid.read_text())
        if Path(f"/proc/{number}/comm").read_text().strip() == "mosquitto":
            os.kill(number, signal.SIGHUP)
    except (FileNotFoundError, ValueError, ProcessLookupError):
        return  # it does not run: it reads everything when it starts
    except PermissionError:
        what = "has changed, and its broker is another user's: `systemctl reload mosquitto`"
        notes.append(f"{path}: {what}")


def _put(path: Path, data: bytes, user: str) -> bool:
    if path.exists() and OS_FILES.read(path) == data:
        return False
    OS_FILES.replace_private(path, data)
    if user and os.geteuid() == 0:
        shutil.chown(path, user)
    return True
