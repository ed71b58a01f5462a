"""Evidence at the centre: pictures that gateways send in chunks, named by their hash, kept for a while, then gone.

    DATA/evidence/<aa>/<sha256>.json            what is known of it (`About`); outlives the content, as a tombstone
    DATA/evidence/<aa>/<sha256>.<offset>.part   its chunks, until it is complete
    DATA/evidence/<aa>/<sha256>.blob            the content, whole and verified
    DATA/evidence/<aa>/<sha256>.wrong           what did not have the hash it was sent under
    DATA/evidence/views.jsonl                   who was shown what, when and why

`<aa>`: the first two digits of the hash. A chunk is durable before ingest takes its number, so what a kill anywhere
costs is that it is written once more, as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

from citybrain.clock import DAY_MS, iso
from citybrain.errors import Damaged, NotFound, WireError
from citybrain.storage import OS_FILES, Files
from citybrain.wire import CHUNK_BYTES, Chunk, blob_sha256

KEPT_DAYS = 30  # at least: State Council Order 799
TOMBSTONE_DAYS = 400  # how long it is known that something was there
PREFIX = 13  # hex digits that the metric `evidence` holds
VIEWS = "views.jsonl"


class About(msgspec.Struct, frozen=True):
    """What is known of a blob: whose it is, when its first chunk came (Unix ms), whether it is whole, and since when
    it is removed.
    """

    sha256: str
    gateway: str
    size: int
    received_at: int
    unmasked: bool = False
    complete: bool = False
    expired_at: int | None = None


class View(msgspec.Struct, frozen=True):
    """One line of the view log: who looked at which blob, when (Unix ms), and why."""

    sha256: str
    actor: str
    at: int
    reason: str
    unmasked: bool


class Expired(NotFound):
    """The content was removed, as configured."""


class EvidenceStore:
    """The folder `DATA/evidence`. Its writers are ingest (`put`) and history (`expire`); everybody may read."""

    def __init__(self, folder: Path, files: Files = OS_FILES) -> None:
        self.folder = folder
        self._files = files

    # --- in ---

    def put(self, gateway: str, chunk: Chunk, now_ms: int) -> bool:
        """Make a chunk durable; return whether its blob is complete.

        Raises WireError: `malformed` where it contradicts an earlier chunk, `evidence_hash` where all are there and are
        not what the hash says, which sets them aside; StorageError.
        """
        about = self._begun(gateway, chunk, now_ms)
        if not about.complete:
            self._files.replace(self._path(about.sha256, f"{chunk.offset}.part"), chunk.content)
            content = self._assembled(about)
            if content is None:
                return False
            self._verify(about, content)
            self._files.replace(self._path(about.sha256, "blob"), content)
            self._write(msgspec.structs.replace(about, complete=True))
        self._drop_parts(about)
        return True

    def _begun(self, gateway: str, chunk: Chunk, now_ms: int) -> About:
        """Return what is known of the chunk's blob, noting it where it is new, or was removed and comes again."""
        about = self._about(chunk.sha256)
        if about is None or about.expired_at is not None:
            about = About(chunk.sha256, gateway, chunk.size, now_ms, chunk.unmasked)
            self._write(about)
        elif about.size != chunk.size:
            raise WireError("malformed", f"a chunk of {chunk.size} bytes of {chunk.sha256}, which has {about.size}")
        elif chunk.unmasked and not about.unmasked:  # who is in doubt about it has to give a reason
            about = msgspec.structs.replace(about, unmasked=True)
            self._write(about)
        return about

    def _assembled(self, about: About) -> bytes | None:
        parts = [self._path(about.sha256, f"{offset}.part") for offset in range(0, about.size, CHUNK_BYTES)]
        if not all(self._files.size(part) for part in parts):
            return None
        return b"".join(self._files.read(part) for part in parts)

    def _verify(self, about: About, content: bytes) -> None:
        if blob_sha256(content) != about.sha256:
            aside = self._path(about.sha256, "wrong")
            self._files.replace(aside, content)
            self._drop_parts(about)
            raise WireError("evidence_hash", f"{len(content)} bytes are not what {about.sha256} names; kept as {aside}")

    def _drop_parts(self, about: About) -> None:
        for offset in range(0, about.size, CHUNK_BYTES):
            self._files.remove(self._path(about.sha256, f"{offset}.part"))

    def _drop_unfinished(self, about: About) -> None:
        """Remove what a killed writer left half written; another one may be writing beside it until it is old."""
        folder = self.folder / about.sha256[:2]
        for name in self._files.names(folder):
            if name.startswith(f".{about.sha256}."):
                self._files.remove(folder / name)

    def _path(self, sha256: str, what: str) -> Path:
        return self.folder / sha256[:2] / f"{sha256}.{what}"

    def _write(self, about: About) -> None:
        path = self._path(about.sha256, "json")
        if not self._files.size(path):
            self._files.make(path.parent)
        self._files.replace(path, msgspec.json.encode(about))

    # --- out ---

    def _about(self, sha256: str) -> About | None:
        path = self._path(sha256, "json")
        if not self._files.size(path):
            return None
        try:
            return msgspec.json.decode(self._files.read(path), type=About)
        except msgspec.DecodeError as error:
            raise Damaged(str(path), 0, str(error)) from None

    def find(self, name: str) -> About:
        """Return what is known of a blob, by its hash or the first 13 digits of it; raises NotFound, Damaged."""
        if len(name) < PREFIX or not set(name) <= set("0123456789abcdef"):
            raise NotFound(f"evidence {name[:80]!r}: want a SHA-256 in hex, or at least its first {PREFIX} digits")
        there = self._files.names(self.folder / name[:2])
        found = [one.removesuffix(".json") for one in there if one.startswith(name) and one.endswith(".json")]
        about = self._about(found[0]) if len(found) == 1 else None
        if about is None:
            what = "more than one begins so; give the whole hash" if found else "never received, or long removed"
            raise NotFound(f"evidence {name}: {what}")
        return about

    def content(self, about: About) -> bytes:
        """Return a blob's content; raises Expired, NotFound where it never became whole, Damaged."""
        if about.expired_at is not None:
            raise Expired(f"evidence {about.sha256}: removed at {iso(about.expired_at)}, as configured")
        if not about.complete:
            raise NotFound(f"evidence {about.sha256}: not all of its {about.size} bytes have come")
        path = self._path(about.sha256, "blob")
        content = self._files.read(path)
        if blob_sha256(content) != about.sha256:
            raise Damaged(str(path), 0, "it is not what its name says any more")
        return content

    # --- who looked ---

    def viewed(self, view: View) -> None:
        """Note, durably, that somebody is shown something; raises StorageError, and then nothing is to be shown."""
        if not self._files.size(self.folder / VIEWS):
            self._files.make(self.folder)  # a commissioning photo may be the first that is ever shown
        handle = self._files.append(self.folder / VIEWS)
        try:
            handle.write(b"\n" + msgspec.json.encode(view))  # first the end of a line that a kill left half written
            handle.sync()
        finally:
            handle.close()

    def views(self, sha256: str) -> list[View]:
        """Return who was shown a blob, oldest first; half a line (a kill) is no view."""
        if not self._files.size(self.folder / VIEWS):
            return []
        found = []
        for line in self._files.read(self.folder / VIEWS).splitlines():
            try:
                view = msgspec.json.decode(line, type=View)
            except msgspec.DecodeError:
                continue
            if view.sha256 == sha256:
                found.append(view)
        return found

    # --- what is over ---

    def expire(self, now_ms: int, days: float = KEPT_DAYS) -> tuple[int, int]:
        """Remove the content of what came more than `days` ago; what was known of it stays for longer.

        Return how many blobs went, and how many that never became whole. Raises StorageError.
        """
        whole = incomplete = 0
        for about in self._all():
            if about.expired_at is None and about.received_at < now_ms - days * DAY_MS:
                self._files.remove(self._path(about.sha256, "blob"))
                self._files.remove(self._path(about.sha256, "wrong"))
                self._drop_parts(about)
                self._drop_unfinished(about)
                self._write(msgspec.structs.replace(about, expired_at=now_ms))
                whole, incomplete = whole + about.complete, incomplete + (not about.complete)
            elif about.expired_at is not None and about.expired_at < now_ms - TOMBSTONE_DAYS * DAY_MS:
                self._files.remove(self._path(about.sha256, "json"))
        return whole, incomplete

    def _all(self) -> Iterator[About]:
        for first in range(256):
            folder = self.folder / f"{first:02x}"
            for name in self._files.names(folder):
                if name.endswith(".json") and name[0] != ".":
                    about = self._about(name.removesuffix(".json"))
                    if about is not None:
                        yield about
