"""A second copy of what is sealed: parts of the history, engine snapshots, blobs; in a folder or S3-compatible storage.

Objects are named by their SHA-256 and never changed; `index.json`, written last, says which file each one is. So who
fetches has a copy that was whole at one moment, and can prove it; a push that is cut off leaves the last one as it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from urllib.parse import urlsplit

import msgspec
import pyarrow as pa
from pyarrow import fs

from citybrain.errors import Damaged, NotFound, Unavailable, UsageError
from citybrain.layout import Layout
from citybrain.storage import OS_FILES, Files
from streams.history.manifest import Part, history_folder, read_manifest

INDEX = "index.json"


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file: its object, its size, and for a file of a part the manifest's crc32c (it need not be read again)."""

    sha256: str
    size: int
    checksum: int | None = None


class Contents(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a copy consists of: files by their path in the data folder."""

    files: dict[str, Entry] = {}
    version: int = 1


class Pushed(msgspec.Struct, frozen=True):
    """What a push did: files of the copy, and what of it was written anew."""

    files: int
    bytes: int
    sent: int
    sent_bytes: int
    removed: int


class Fetched(msgspec.Struct, frozen=True):
    """What a fetch brought, and in words what it could not."""

    files: int
    bytes: int
    wrong: tuple[str, ...]


class Mirror:
    """One place for copies, by URL: `s3://BUCKET/PATH?endpoint_override=HOST:PORT&scheme=https` or `file:///PATH`.

    Credentials come from the environment or the profile as for every S3 client, never from the URL. Raises UsageError
    where the URL is none; every method raises Unavailable where the storage does not answer or refuses.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("s3", "file") or "@" in parts.netloc:
            what = "expected s3://BUCKET/PATH or file:///PATH, without credentials (they belong into the environment)"
            raise UsageError(f"{parts.scheme}://…: {what}")
        self.name = f"{parts.scheme}://{parts.netloc}{parts.path}"
        try:
            self._storage, self._root = fs.FileSystem.from_uri(url)
        except (pa.ArrowException, OSError) as error:
            raise UsageError(f"{self.name}: {error}") from None

    # --- objects

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def _object(self, sha256: str) -> str:
        return self._path(f"objects/{sha256[:2]}/{sha256}")

    def _read(self, path: str) -> bytes:
        """Return an object; raises FileNotFoundError."""
        try:
            with self._storage.open_input_stream(path) as stream:
                found: bytes = stream.read()
                return found
        except FileNotFoundError:
            raise
        except OSError as error:
            raise Unavailable(f"{self.name}: {error}") from None

    def _write(self, path: str, content: bytes) -> None:
        """Write an object, whole or not at all."""
        beside = f"{path}.part" if isinstance(self._storage, fs.LocalFileSystem) else path
        try:
            if beside != path:
                self._storage.create_dir(str(PurePosixPath(path).parent))
            with self._storage.open_output_stream(beside) as stream:
                stream.write(content)
            if beside != path:
                self._storage.move(beside, path)
        except OSError as error:
            raise Unavailable(f"{self.name}: {error}") from None

    def _sizes(self, paths: list[str]) -> dict[str, int]:
        try:
            found = self._storage.get_file_info(paths)
        except OSError as error:
            raise Unavailable(f"{self.name}: {error}") from None
        return {info.path: info.size for info in found if info.is_file}

    def contents(self) -> Contents | None:
        """Return what the copy consists of, None where there is none yet; raises Damaged."""
        try:
            return msgspec.json.decode(self._read(self._path(INDEX)), type=Contents)
        except FileNotFoundError:
            return None
        except msgspec.DecodeError as error:
            raise Damaged(f"{self.name}/{INDEX}", 0, f"{error}; push to another place, nothing is guessed") from None

    def object(self, path: str, entry: Entry) -> bytes:
        """Return a file's content; raises Damaged or NotFound where it is not what was pushed."""
        try:
            content = self._read(self._object(entry.sha256))
        except FileNotFoundError:
            raise NotFound(f"{path}: {self._object(entry.sha256)} is missing; push again") from None
        if hashlib.sha256(content).hexdigest() != entry.sha256:
            what = "not what was pushed; remove the object and push again"
            raise Damaged(f"{path}: {self._object(entry.sha256)}", 0, what)
        return content

    # --- copies

    def push(self, layout: Layout, shards: int, files: Files = OS_FILES) -> Pushed:
        """Bring the copy up to the data folder's state; raises Damaged where a manifest cannot be read."""
        before = (self.contents() or Contents()).files
        found: dict[str, Entry] = {}
        sent = sent_bytes = 0
        for path, checksum, read in sealed(layout, shards, files):
            known = before.get(path)
            if known is None or checksum is None or known.checksum != checksum:
                content = read()
                known = Entry(hashlib.sha256(content).hexdigest(), len(content), checksum)
            there = self._object(known.sha256)
            if self._sizes([there]).get(there) != known.size:
                self._write(there, read())
                sent, sent_bytes = sent + 1, sent_bytes + known.size
            found[path] = known
        if found != before:
            self._write(self._path(INDEX), msgspec.json.encode(Contents(found), order="deterministic"))
        removed = self._remove({entry.sha256 for entry in before.values()} - {e.sha256 for e in found.values()})
        return Pushed(len(found), sum(entry.size for entry in found.values()), sent, sent_bytes, removed)

    def _remove(self, objects: set[str]) -> int:
        """Remove objects that the index has just ceased to name."""
        try:
            for sha256 in objects:
                if self._sizes([self._object(sha256)]):
                    self._storage.delete_file(self._object(sha256))
        except OSError as error:
            raise Unavailable(f"{self.name}: {error}") from None
        return len(objects)

    def fetch(self, layout: Layout, files: Files = OS_FILES) -> Fetched:
        """Fill a data folder that has no history yet; manifests come last, and what is not as it was is left out.

        Raises UsageError where there is a history, NotFound where there is no copy.
        """
        contents = self.contents()
        if contents is None:
            raise NotFound(f"{self.name}: nothing was pushed there")
        if any(layout.root.glob("history/*/manifest.json")):
            raise UsageError(f"{layout.root}: has a history already; give an empty --data")
        wrong: list[str] = []
        count = size = 0
        for path, entry in sorted(
            contents.files.items(), key=lambda item: (item[0].endswith("manifest.json"), item[0])
        ):
            if not safe(path):
                raise Damaged(f"{self.name}/{INDEX}", 0, f"{path!r} leads out of the data folder")
            try:
                content = self.object(path, entry)
            except (Damaged, NotFound) as error:
                wrong.append(str(error))
                continue
            files.make((layout.root / path).parent)
            files.replace(layout.root / path, content)
            count, size = count + 1, size + len(content)
        return Fetched(count, size, tuple(wrong))

    def verify(self) -> Fetched:
        """Read every object of the copy and compare it with its hash; raises NotFound where there is no copy."""
        contents = self.contents()
        if contents is None:
            raise NotFound(f"{self.name}: nothing was pushed there")
        wrong: list[str] = []
        for path, entry in contents.files.items():
            try:
                self.object(path, entry)
            except (Damaged, NotFound) as error:
                wrong.append(str(error))
        good = len(contents.files) - len(wrong)
        return Fetched(good, sum(entry.size for entry in contents.files.values()), tuple(wrong))


def safe(path: str) -> bool:
    """Return whether a path of an index stays inside the data folder."""
    parts = PurePosixPath(path).parts
    return bool(parts) and parts[0] in ("history", "engine", "blobs") and ".." not in parts


Sealed = tuple[str, int | None, Callable[[], bytes]]


def sealed(layout: Layout, shards: int, files: Files = OS_FILES) -> Iterator[Sealed]:
    """Yield (path, checksum, read) of everything that belongs into a copy: what is never written to again."""

    def file(path: str, checksum: int | None = None) -> Sealed:
        return path, checksum, lambda: files.read(layout.root / path)

    for name in files.names(layout.blobs):
        if name[0] != ".":
            yield file(f"blobs/{name}")
    for shard in range(shards):
        for name in files.names(layout.engine(shard))[-2:]:
            if name.endswith(".snapshot"):
                yield file(f"engine/{shard}/{name}")
        manifest = read_manifest(history_folder(layout, shard), files)
        for part in manifest.parts:
            yield from (file(f"history/{shard}/{name}", checksum) for name, checksum in files_of(part))
        if manifest.parts:
            content = msgspec.json.encode(manifest)
            yield f"history/{shard}/manifest.json", None, lambda content=content: content  # type: ignore[misc]


def files_of(part: Part) -> Iterator[tuple[str, int]]:
    """Yield the files of a part with their crc32c."""
    yield from zip((part.values_file, part.records_file), part.checksums, strict=True)
