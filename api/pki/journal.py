"""The authority's journal, `DATA/ca/journal.jsonl`: one line a step, never changed; what is true follows from it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import msgspec

from citybrain.errors import Damaged
from citybrain.storage import OS_FILES, OsFiles

Event = Literal["init", "rotate", "sign", "renew", "revoke", "code", "enrol"]
Kind = Literal["", "gateway", "service", "server"]


class Step(msgspec.Struct, frozen=True, omit_defaults=True):
    """Who did what when (Unix ms, real time), and why.

    authority: number of the one concerned. serial, name, kind, until, key (SHA-256 of the public key): of a
    certificate; `until` also of an authority or a code. code: SHA-256 of an enrolment code. board: the box's serial.
    """

    at: int
    event: Event
    actor: str
    reason: str = ""
    authority: int = 0
    serial: str = ""
    name: str = ""
    kind: Kind = ""
    until: int = 0
    key: str = ""
    code: str = ""
    board: str = ""


class Issued(msgspec.Struct, frozen=True):
    """A certificate; `serial` in hex, times in Unix ms."""

    serial: str
    name: str
    kind: Kind
    authority: int
    from_ms: int
    until_ms: int
    key: str
    board: str = ""
    revoked_ms: int | None = None
    why: str = ""

    def state(self, now_ms: int) -> str:
        """Return `valid`, `revoked` or `expired`."""
        if self.revoked_ms is not None:
            return "revoked"
        return "valid" if now_ms < self.until_ms else "expired"


class Code(msgspec.Struct, frozen=True):
    """An enrolment code: whose, from when until when, and by which key it was used."""

    hash: str
    gateway: str
    made_ms: int
    until_ms: int
    used_ms: int | None = None
    key: str = ""
    serial: str = ""


class Book(msgspec.Struct):
    """What the journal comes to. `authorities`: until when each is valid, by its number."""

    authorities: dict[int, int] = {}
    issued: dict[str, Issued] = {}
    codes: dict[str, Code] = {}
    steps: int = 0

    @property
    def current(self) -> int:
        """The authority that signs; 0 where there is none yet."""
        return max(self.authorities, default=0)

    def latest(self, kind: Kind) -> dict[str, Issued]:
        """Return the last certificate of each name of a kind."""
        return {one.name: one for one in self.issued.values() if one.kind == kind}

    def take(self, step: Step) -> None:
        """Add a step."""
        self.steps += 1
        if step.event in ("init", "rotate"):
            self.authorities[step.authority] = step.until
        elif step.event == "revoke":
            old = self.issued[step.serial]
            self.issued[step.serial] = msgspec.structs.replace(old, revoked_ms=step.at, why=step.reason)
        elif step.event == "code":
            self.codes[step.code] = Code(step.code, step.name, step.at, step.until)
        else:
            self.issued[step.serial] = Issued(
                step.serial, step.name, step.kind, step.authority, step.at, step.until, step.key, step.board
            )
        if step.event == "enrol":
            used = self.codes[step.code]
            self.codes[step.code] = msgspec.structs.replace(used, used_ms=step.at, key=step.key, serial=step.serial)


class Journal:
    """The file. Whoever adds holds the authority's lock."""

    def __init__(self, path: Path, files: OsFiles = OS_FILES) -> None:
        self.path = path
        self._files = files

    def read(self) -> list[Step]:
        """Return all steps; a line that was torn by a power loss was never confirmed to anybody and is left out.

        Raises Damaged where another line is not what was written.
        """
        return self._steps(0, 0)[0]

    def follow(self, book: Book, start: int) -> tuple[Book, int]:
        """Return a book with the steps behind byte `start` in it, and where to go on; raises Damaged.

        The old one stays as it is: others may be looking at it.
        """
        steps, end = self._steps(start, book.steps)
        after = Book(dict(book.authorities), dict(book.issued), dict(book.codes), book.steps)
        for step in steps:
            try:
                after.take(step)
            except KeyError as error:
                number = after.steps
                what = f"line {number} is about {error}, which no line before made"
                raise Damaged(str(self.path), number, what) from None
        return after, end

    def _steps(self, start: int, before: int) -> tuple[list[Step], int]:
        """Return the steps behind byte `start`, which follow on `before` lines, and where the last whole line ends."""
        if not self.path.exists():
            return [], 0
        text = self._files.read(self.path, start)
        lines = text.split(b"\n")[:-1]
        steps = [self._step(line, number) for number, line in enumerate(lines, before + 1)]
        return steps, start + text.rfind(b"\n") + 1

    def add(self, steps: Iterable[Step]) -> None:
        """Append steps, synced; cuts off a torn line first."""
        handle = self._files.append(self.path)
        try:
            whole = self._files.read(self.path).rfind(b"\n") + 1
            if whole < self._files.size(self.path):
                handle.truncate(whole)
            handle.write(b"".join(msgspec.json.encode(step) + b"\n" for step in steps))
            handle.sync()
        finally:
            handle.close()

    def _step(self, line: bytes, number: int) -> Step:
        try:
            return msgspec.json.decode(line, type=Step)
        except msgspec.DecodeError as error:
            raise Damaged(str(self.path), number, f"line {number}: {error}; restore the file from its backup") from None
