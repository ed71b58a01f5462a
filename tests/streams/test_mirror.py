"""A second copy on S3-compatible storage (moto's server) and in a folder: complete, provable, honest about damage."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import boto3  # type: ignore[import-untyped]
import msgspec
import pytest
from moto.server import ThreadedMotoServer

from citybrain.cli import main
from citybrain.clock import system_clock
from citybrain.counters import read_heartbeats
from citybrain.errors import Unavailable, UsageError
from citybrain.layout import Layout, Run
from streams.history.manifest import history_folder
from streams.history.mirror import Contents, Entry, Fetched, Mirror
from tests.conftest import end, eventually, unused_port
from tests.history_logs import busy_log, compacted, merge_all, rows_of_history, write
from tests.streams.test_history import FEW

BUCKET = "city"


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """A data folder with a history of several parts, and something like a snapshot."""
    found = Layout(tmp_path / "data")
    found.make()
    found.write_run(Run(clock=system_clock(), shards=1))
    write(found, busy_log(found, 120, 1).records)
    assert len(compacted(found, FEW).manifest.parts) > 2
    found.engine(0).mkdir(parents=True)
    for offset in (100, 200, 300):
        (found.engine(0) / f"{offset:020d}.snapshot").write_bytes(b"state at %d" % offset)
    return found


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    made = ThreadedMotoServer(ip_address="127.0.0.1", port=unused_port(), verbose=False)
    made.start()
    host, port = made.get_host_and_port()
    try:
        yield f"{host}:{port}"
    finally:
        made.stop()


@pytest.fixture(params=["s3", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "file":
        return f"file://{tmp_path}/copy"
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    address = request.getfixturevalue("server")
    client = boto3.client("s3", endpoint_url=f"http://{address}", region_name="us-east-1")
    client.create_bucket(Bucket=BUCKET)
    return f"s3://{BUCKET}/{tmp_path.name}?endpoint_override={address}&scheme=http&region=us-east-1"


def mirror(*words: str) -> int:
    return main(["mirror", *words, "--json"])


def objects(url: str) -> Path:
    """Return where the objects are, of a copy in a folder."""
    return Path(url.removeprefix("file://")) / "objects"


def object_of(url: str, path: str) -> Path:
    contents = Mirror(url).contents()
    assert contents is not None
    name = contents.files[path].sha256
    return objects(url) / name[:2] / name


def test_what_is_pushed_can_be_fetched_and_read(layout: Layout, url: str, tmp_path: Path) -> None:
    pushed = Mirror(url).push(layout, 1)
    assert pushed.sent == pushed.files
    other = Layout(tmp_path / "other")
    fetched = Mirror(url).fetch(other)
    assert (fetched.files, fetched.bytes, fetched.wrong) == (pushed.files, pushed.bytes, ())
    assert rows_of_history(compacted(other)) == rows_of_history(compacted(layout))
    assert sorted(path.name for path in other.engine(0).iterdir()) == [
        f"{offset:020d}.snapshot" for offset in (200, 300)
    ]
    assert {path.name for path in other.blobs.iterdir()} == {path.name for path in layout.blobs.iterdir()}
    assert Mirror(url).verify() == fetched


def test_what_has_not_changed_is_not_sent_again(layout: Layout, url: str) -> None:
    first = Mirror(url).push(layout, 1)
    again = Mirror(url).push(layout, 1)
    assert (again.files, again.sent, again.removed) == (first.files, 0, 0)
    merge_all(compacted(layout))
    merged = Mirror(url).push(layout, 1)
    assert 0 < merged.sent < first.files
    assert merged.removed > 0
    assert Mirror(url).verify().wrong == ()


def test_a_push_that_was_cut_off_leaves_the_last_copy(layout: Layout, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/copy"
    before = Mirror(url).push(layout, 1)
    merge_all(compacted(layout))
    in_the_way = tmp_path / "copy" / "index.json.part"
    in_the_way.mkdir()
    with pytest.raises(Unavailable):
        Mirror(url).push(layout, 1)
    assert Mirror(url).verify() == Fetched(before.files, before.bytes, ())
    in_the_way.rmdir()
    after = Mirror(url).push(layout, 1)
    assert after.sent == 0  # its objects were there already
    assert after.files < before.files
    assert Mirror(url).verify().wrong == ()


def test_storage_that_does_not_answer_is_unavailable(
    layout: Layout, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    url = f"s3://{BUCKET}/x?endpoint_override=127.0.0.1:{unused_port()}&scheme=http&region=us-east-1"
    assert mirror("push", url, "--data", str(layout.root)) == 4
    assert f"s3://{BUCKET}/x: " in capsys.readouterr().err


def test_missing_and_damaged_objects_are_said_and_the_rest_is_fetched(
    layout: Layout, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"file://{tmp_path}/copy"
    pushed = Mirror(url).push(layout, 1)
    values = [path for path in history_folder(layout, 0).iterdir() if path.name.endswith(".values.parquet")]
    gone, bad = (f"history/0/{path.name}" for path in sorted(values)[:2])
    object_of(url, gone).unlink()
    damaged = object_of(url, bad)
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    assert mirror("verify", url) == 5
    found = json.loads(capsys.readouterr().out)
    assert found["files"] == pushed.files - 2
    assert any(text.startswith(f"{gone}: ") and "is missing" in text for text in found["wrong"])
    assert any(text.startswith(f"{bad}: ") and "not what was pushed" in text for text in found["wrong"])
    other = tmp_path / "other"
    assert mirror("fetch", url, "--data", str(other)) == 5
    assert json.loads(capsys.readouterr().out)["files"] == pushed.files - 2
    assert not (other / bad).exists()
    assert Mirror(url).push(layout, 1).sent == 1  # the missing one
    damaged.unlink()
    assert Mirror(url).push(layout, 1).sent == 1
    assert mirror("verify", url) == 0


def test_a_data_folder_with_a_history_is_left_alone(
    layout: Layout, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"file://{tmp_path}/copy"
    assert mirror("push", url, "--data", str(layout.root)) == 0
    assert mirror("fetch", url, "--data", str(layout.root)) == 2
    assert "has a history already" in capsys.readouterr().err


def test_an_index_that_leads_elsewhere_is_refused(layout: Layout, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/copy"
    Mirror(url).push(layout, 1)
    index = tmp_path / "copy" / "index.json"
    for path in ("history/../../evil", "/etc/evil", "run/run.json"):
        index.write_bytes(msgspec.json.encode(Contents({path: Entry("00", 0)})))
        assert mirror("fetch", url, "--data", str(tmp_path / "other")) == 5
    index.write_text("{")
    assert mirror("verify", url) == 5


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("/plain/path", 2),
        ("s3://KEY:SECRET@bucket/path", 2),
        ("https://bucket/path", 2),
        ("file:///nothing/was/pushed/here", 1),
    ],
)
def test_a_wrong_url_is_said_without_its_secret(url: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert mirror("verify", url) == code
    said = capsys.readouterr().err
    assert said.startswith("citybrain mirror: ")
    assert "SECRET" not in said


def test_every_is_a_time_and_only_for_push(layout: Layout, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/copy"
    assert mirror("push", url, "--data", str(layout.root), "--every", "often") == 2
    assert mirror("verify", url, "--every", "5min") == 2
    with pytest.raises(UsageError):
        Mirror("s3:/")


def test_it_goes_on_while_storage_is_away(layout: Layout, tmp_path: Path) -> None:
    """A file stands where the folder of the copy should be; then it does not."""
    (tmp_path / "copy").write_text("in the way")
    argv = [sys.executable, "-m", "citybrain", "mirror", "push", f"file://{tmp_path}/copy/of/it", "--every", "1s"]
    with subprocess.Popen([*argv, "--data", str(layout.root)]) as process:
        try:
            eventually(lambda: counted(layout).get("errors_total{stage=mirror}", 0) > 0, 20, "an error")
            (tmp_path / "copy").unlink()
            eventually(lambda: counted(layout).get("sent_total", 0) > 0, 20, "a copy")
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 0
        finally:
            end(process)
    assert Mirror(f"file://{tmp_path}/copy/of/it").verify().wrong == ()


def counted(layout: Layout) -> dict[str, int]:
    return next((beat.counters for beat in read_heartbeats(layout.run) if beat.process == "mirror"), {})
