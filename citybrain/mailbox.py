"""A durable queue of commands into one process: a folder of files, each put there by an atomic, synced rename.

Operator commands and verdicts go to the desk this way, rule-set activations, registry changes and overrides to ingest.
A command is there once `put` returns; its consumer takes it, makes its effect durable, and only then removes it, so it
may see one again after a crash and must know its `id`.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection
from pathlib import Path
from typing import Any

import msgspec

from citybrain.errors import StorageError
from citybrain.storage import OS_FILES, Files


class Command(msgspec.Struct, frozen=True):
    """Something somebody wants: `kind` names it, `actor` says who, `at` when (platform time, Unix ms), `body` what."""

    id: str
    kind: str
    actor: str
    at: int
    body: dict[str, Any] = {}
    reason: str = ""


class Broken(msgspec.Struct, frozen=True):
    """A file in the mailbox that is no command; it has been moved aside to `path`."""

    path: str
    what: str


def command(kind: str, actor: str, at: int, body: dict[str, Any], reason: str = "") -> Command:
    """Make a command with a fresh id."""
    return Command(secrets.token_hex(12), kind, actor, at, body, reason)


class Mailbox:
    """The folder. Commands come out in the order of their `at`, then id."""

    def __init__(self, folder: Path, files: Files = OS_FILES) -> None:
        self.folder = folder
        self._files = files

    def put(self, item: Command) -> None:
        """Store a command durably; raises StorageError."""
        self._files.make(self.folder)
        self._files.replace(self.folder / f"{item.at:015d}-{item.id}.json", msgspec.json.encode(item))

    def take(self, most: int = 200, besides: Collection[str] = ()) -> tuple[list[tuple[str, Command]], list[Broken]]:
        """Return up to `most` (name, command) pairs, and what could not be read (moved aside, never deleted).

        besides: names that the caller has read already and leaves there.
        """
        items: list[tuple[str, Command]] = []
        broken: list[Broken] = []
        names = [name for name in self._files.names(self.folder) if name.endswith(".json") and name[0] != "."]
        names = [name for name in names if name not in besides] if besides else names
        for name in names[:most]:
            path = self.folder / name
            try:
                content = self._files.read(path)
            except StorageError:
                if self._files.size(path):
                    raise
                continue  # it is gone: another desk took it, and this one was stopped meanwhile (docs/database.md)
            try:
                items.append((name, msgspec.json.decode(content, type=Command)))
            except msgspec.DecodeError as error:
                aside = path.with_suffix(".broken")
                self._files.rename(path, aside)
                broken.append(Broken(str(aside), f"{path}: not a command: {error}"))
        return items, broken

    def done(self, name: str) -> None:
        """Remove a command whose effect is durable."""
        self._files.remove(self.folder / name)
