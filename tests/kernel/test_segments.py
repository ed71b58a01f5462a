"""Segments: what was committed survives power loss, rubbish and full disks; nothing else is made up."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from citybrain.errors import Damaged, DiskFull, StorageError
from citybrain.segments import OVERHEAD, Reader, Record, Writer, pack, scan, segment_name, segments
from citybrain.storage import OS_FILES, OsFiles, storage_error
from tests.faulty_files import LossyFiles

FOLDER = Path("/disk/log")


def fill(writer: Writer, payloads: list[bytes], at: int = 1000) -> list[int]:
    offsets = [writer.append(1, at + index, payload) for index, payload in enumerate(payloads)]
    writer.commit()
    return offsets


def everything(folder: Path) -> list[Record]:
    return list(Reader(folder))


@given(
    batches=st.lists(st.lists(st.binary(max_size=1500), max_size=6), max_size=12),
    crashes=st.sets(st.integers(0, 11)),
    seed=st.integers(0, 2**16),
    segment_bytes=st.sampled_from([400, 3000, 100_000]),
)
@settings(max_examples=300, deadline=None)
def test_committed_records_survive_power_loss(
    batches: list[list[bytes]], crashes: set[int], seed: int, segment_bytes: int
) -> None:
    disk = LossyFiles(seed)
    writer = Writer(FOLDER, disk, segment_bytes)
    writer.start()
    committed: dict[int, bytes] = {}
    tried: dict[int, set[bytes]] = {}
    for index, batch in enumerate(batches):
        offsets = [writer.append(1, 7, payload) for payload in batch]
        for offset, payload in zip(offsets, batch, strict=True):
            tried.setdefault(offset, set()).add(payload)
        if index in crashes:
            disk.files[FOLDER / segment_name(segments(disk, FOLDER)[-1])].now += b"".join(
                pack(Record(offset, 7, 1, payload)) for offset, payload in zip(offsets, batch, strict=True)
            )  # written, never synced
            disk.crash()
            writer = Writer(FOLDER, disk, segment_bytes)
            writer.start()
            assert writer.next_offset > max(committed, default=-1)
            # what nobody was told of may have survived; from here on it counts like any other record
            committed |= {r.offset: r.payload for r in Reader(FOLDER, 0, disk) if r.offset not in committed}
        else:
            writer.commit()
            committed |= dict(zip(offsets, batch, strict=True))
    read = [(r.offset, r.payload) for r in Reader(FOLDER, 0, disk)]
    assert read == sorted(committed.items())
    assert all(payload in tried[offset] for offset, payload in read)


def test_a_reader_sees_only_what_is_synced() -> None:
    disk = LossyFiles()
    writer = Writer(FOLDER, disk)
    writer.start()
    reader = Reader(FOLDER, 0, disk)
    writer.append(1, 5, b"first")
    assert reader.read() == []
    writer.commit()
    assert [record.payload for record in reader.read()] == [b"first"]
    assert reader.read() == []


def test_a_reader_follows_over_segments_and_from_any_offset(tmp_path: Path) -> None:
    writer = Writer(tmp_path, segment_bytes=300)
    writer.start()
    for number in range(50):
        fill(writer, [b"%d" % number])
    assert len(segments(OS_FILES, tmp_path)) > 5
    assert [int(record.payload) for record in Reader(tmp_path)] == list(range(50))
    assert [int(record.payload) for record in Reader(tmp_path, 33)] == list(range(33, 50))
    assert writer.drop_before(33) > 3
    assert next(iter(Reader(tmp_path))).offset <= 33
    assert [int(record.payload) for record in Reader(tmp_path, 33)] == list(range(33, 50))


@pytest.mark.parametrize("cut", [1, OVERHEAD - 1, OVERHEAD, OVERHEAD + 2])
def test_a_torn_end_is_cut_and_kept_aside(tmp_path: Path, cut: int) -> None:
    writer = Writer(tmp_path)
    writer.start()
    fill(writer, [b"good", b"torn!"])
    writer.close()
    path = tmp_path / segment_name(0)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    again = Writer(tmp_path)
    again.start()
    assert again.next_offset == 1
    assert [record.payload for record in everything(tmp_path)] == [b"good"]
    (aside,) = tmp_path.glob("*.torn")
    assert aside.read_bytes() == whole[OVERHEAD + 4 : -cut]
    assert "torn end cut" in again.warnings[0]
    assert str(path) in again.warnings[0]
    fill(again, [b"next"])
    assert [record.payload for record in everything(tmp_path)] == [b"good", b"next"]


def test_damage_before_valid_records_sets_the_segment_aside_and_goes_on(tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    writer.start()
    fill(writer, [b"one", b"two", b"three"])
    writer.close()
    path = tmp_path / segment_name(0)
    data = bytearray(path.read_bytes())
    data[OVERHEAD + 3 + OVERHEAD] ^= 0xFF  # in the payload of "two"
    path.write_bytes(data)
    again = Writer(tmp_path)
    again.start()
    assert again.next_offset == 3
    assert (tmp_path / f"{segment_name(0)[:-4]}.damaged").read_bytes() == bytes(data)
    assert "offsets 1..2 are missing" in again.warnings[0]
    fill(again, [b"four"])
    assert [(record.offset, record.payload) for record in everything(tmp_path)] == [(0, b"one"), (3, b"four")]


def test_damage_in_a_sealed_segment_is_said_with_file_and_byte(tmp_path: Path) -> None:
    writer = Writer(tmp_path, segment_bytes=100)
    writer.start()
    for _ in range(4):
        fill(writer, [b"x" * 80])
    path = tmp_path / segment_name(1)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    reader = Reader(tmp_path)
    assert reader.read()[0].offset == 0
    with pytest.raises(Damaged, match=r"00000000000000000001\.seg at byte 0: checksum differs"):
        reader.read()


def test_a_full_disk_takes_nothing_and_loses_nothing() -> None:
    disk = LossyFiles()
    writer = Writer(FOLDER, disk)
    writer.start()
    fill(writer, [b"a" * 100])
    disk.capacity = disk.used() + 50
    writer.append(1, 1, b"b" * 100)
    with pytest.raises(DiskFull, match="no space left"):
        writer.commit()
    assert writer.next_offset == writer.committed == 1
    disk.capacity = None
    assert fill(writer, [b"c"]) == [1]
    assert [record.payload for record in Reader(FOLDER, 0, disk)] == [b"a" * 100, b"c"]


def test_a_full_disk_at_a_new_segment_leaves_the_old_one_open() -> None:
    disk = LossyFiles()
    writer = Writer(FOLDER, disk, segment_bytes=200)
    writer.start()
    fill(writer, [b"a" * 150])
    disk.capacity = disk.used() + 10
    writer.append(1, 1, b"b" * 150)
    with pytest.raises(DiskFull):
        writer.commit()
    disk.capacity = None
    fill(writer, [b"b" * 150])
    assert len(list(Reader(FOLDER, 0, disk))) == 2


def test_after_a_failed_sync_nothing_is_written_any_more() -> None:
    disk = LossyFiles()
    writer = Writer(FOLDER, disk)
    writer.start()
    disk.failing_syncs = 1
    writer.append(1, 1, b"x")
    with pytest.raises(StorageError, match="Input/output error"):
        writer.commit()
    writer.append(1, 1, b"y")
    with pytest.raises(StorageError, match="the process must end"):
        writer.commit()


def test_a_record_too_large_is_refused(tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    writer.start()
    with pytest.raises(StorageError, match="at most"):
        writer.append(1, 1, bytes(5 * 1024 * 1024))


@given(st.binary(max_size=400))
@settings(max_examples=300)
def test_rubbish_is_never_a_record(data: bytes) -> None:
    assert scan(data).records == []


def test_replace_syncs_the_file_before_the_rename_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    real_sync, real_replace = os.fsync, os.replace

    def sync(descriptor: int) -> None:
        calls.append("folder" if Path(f"/proc/self/fd/{descriptor}").is_dir() else "file")
        real_sync(descriptor)

    def replace(old: Path, new: Path) -> None:
        calls.append("rename")
        real_replace(old, new)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    OsFiles().replace(tmp_path / "a", b"content")
    assert calls == ["file", "rename", "folder"]
    calls.clear()
    OsFiles().append(tmp_path / "new.seg").close()
    assert calls == ["folder"]


def test_a_really_full_disk_leaves_no_half_record(tmp_path: Path) -> None:
    """`/dev/full` cannot seek or truncate, so a file-size limit stands in for the real device."""
    resource = pytest.importorskip("resource")
    import signal

    writer = Writer(tmp_path)
    writer.start()
    fill(writer, [b"x" * 1000])
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, limits[1]))
        writer.append(1, 1, b"y" * 1000)
        with pytest.raises(StorageError):
            writer.commit()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert (tmp_path / segment_name(0)).stat().st_size == OVERHEAD + 1000


def test_operating_system_errors_become_ours() -> None:
    assert isinstance(storage_error(Path("a"), OSError(errno.ENOSPC, "x")), DiskFull)
    assert "a: denied" in str(storage_error(Path("a"), OSError(errno.EACCES, "denied")))
