"""A snapshot of an engine: a zip with `header.json` and one npy file an array; readable without pickle.

The arrays' rows are numbered by the registry and rule set that the header names, so they mean nothing without them.
"""

from __future__ import annotations

import io
import zipfile
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from citybrain.errors import StorageError
from streams.batch import Times
from streams.log import Control

FORMAT = 2


class Header(msgspec.Struct, frozen=True):
    """`offset`: the log record that comes next. `ticked_ms`: the latest tick's time.

    `faults`: how often (rule, subject) was reported.
    """

    shard: int
    offset: int
    registry: str
    ruleset: str
    overrides: tuple[Control, ...]
    ticked_ms: int
    faults: list[tuple[str, str, int]]
    counts: dict[str, int]
    format: int = FORMAT


class Frozen(NamedTuple):
    """An engine's memory as it was at one offset; nobody changes it any more, so any thread may write it."""

    header: Header
    arrays: dict[str, npt.NDArray[Any]]


class _Version(msgspec.Struct):
    format: int
    shard: int


def save_snapshot(header: Header, arrays: dict[str, npt.NDArray[Any]]) -> bytes:
    """Return the snapshot's bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(zipfile.ZipInfo("header.json"), msgspec.json.encode(header))
        for name, array in arrays.items():
            part = io.BytesIO()
            np.save(part, array, allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), part.getvalue())
    return buffer.getvalue()


def load_snapshot(content: bytes, shard: int | None = None) -> tuple[Header, dict[str, npt.NDArray[Any]]]:
    """Return header and arrays; raises StorageError where they are damaged, of another format or another shard."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            raw = archive.read("header.json")
            version = msgspec.json.decode(raw, type=_Version)
            if version.format != FORMAT:
                raise StorageError(f"snapshot has format {version.format}, this program reads {FORMAT}; replay the log")
            if shard is not None and version.shard != shard:
                raise StorageError(f"snapshot is of shard {version.shard}, not {shard}")
            header = msgspec.json.decode(raw, type=Header)
            names = [name for name in archive.namelist() if name.endswith(".npy")]
            arrays = {
                name.removesuffix(".npy"): np.load(io.BytesIO(archive.read(name)), allow_pickle=False) for name in names
            }
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError, msgspec.DecodeError) as error:
        raise StorageError(f"snapshot is damaged: {error}") from error
    missing = [name for name in Times._fields if name not in arrays]
    if missing:
        raise StorageError(f"snapshot is damaged: no array {missing[0]}")
    return header, arrays


class Stored(NamedTuple):
    """The arrays of a snapshot whose names begin with `prefix`."""

    arrays: dict[str, npt.NDArray[Any]]
    prefix: str = ""

    def has(self, name: str) -> bool:
        """Return whether there is such an array."""
        return self.prefix + name in self.arrays

    def array(self, name: str, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        """Return a stored array; raises StorageError where it is missing, of another shape or of other fields."""
        stored = self.arrays.get(self.prefix + name)
        if stored is None or stored.shape != shape or stored.dtype != dtype:
            found = "none" if stored is None else f"{stored.dtype} {stored.shape}"
            what = f"snapshot array {self.prefix}{name}"
            raise StorageError(f"{what}: expected {dtype} {shape}, found {found}; replay the log")
        return stored
