"""Pictures from a gateway's spool to whoever may look at them: whole, once, for as long as configured."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from citybrain import wire
from citybrain.clock import DAY_MS, RunClock
from citybrain.counters import Counters
from citybrain.db.schema import alarms, incidents
from citybrain.errors import DiskFull, NotFound, StorageError, WireError
from citybrain.layout import Layout
from citybrain.model import Device, Evidence, Gateway, Lane, Place, Reading, Registry
from citybrain.segments import Reader
from citybrain.storage import OS_FILES, Files
from citybrain.wire import CHUNK_BYTES, MAX_BLOB, Chunk, Header, Message, blob_chunks, blob_sha256, open_chunk
from gateway.spool import Spool
from gateway.uplink import BLOB_MESSAGES, Uplink
from streams.batch import lay
from streams.evidence import TOMBSTONE_DAYS, EvidenceStore, Expired, View
from streams.history import frames
from streams.history.retention import Retention
from streams.ingest import Ingest
from streams.log import Control, Kind, decode_control, frame_head
from streams.registry import Index, encode_registry
from streams.runtimes.history import HistoryProcess
from tests.faulty_files import LossyFiles
from tests.seeded_site import Seeded, process, seeded

NOW = 1_767_225_600_000
PLACE = Place(120.16, 31.19, "990101001001001")
GATEWAYS = ("gw-a", "gw-b")
REGISTRY = Registry(
    tuple(Gateway(name, 0, PLACE) for name in GATEWAYS),
    tuple(Device(f"cam-{name}", "camera", name, PLACE, ("signal",), ("evidence",)) for name in GATEWAYS),
)


def picture(size: int, seed: int = 1) -> bytes:
    return b"\xff\xd8\xff" + random.Random(seed).randbytes(size - 3)


def opened(body: bytes) -> Chunk:
    return open_chunk(Message(Header(1, 1, 1, 0), True, body, 0))


# --- chunks ---


@given(content=st.binary(min_size=1, max_size=3 * CHUNK_BYTES), unmasked=st.booleans())
@example(content=b"x" * CHUNK_BYTES, unmasked=False)
@example(content=b"x" * MAX_BLOB, unmasked=True)
@settings(deadline=None, max_examples=30)
def test_chunks_make_the_blob_again(content: bytes, unmasked: bool) -> None:
    bodies = blob_chunks(content, unmasked=unmasked)
    chunks = [opened(body) for body in bodies]
    assert b"".join(chunk.content for chunk in chunks) == content
    assert [chunk.offset for chunk in chunks] == list(range(0, len(content), CHUNK_BYTES))
    assert {(chunk.sha256, chunk.size, chunk.unmasked) for chunk in chunks} == {
        (blob_sha256(content), len(content), unmasked)
    }
    header = Header(wire.MAX_SEQ, wire.MAX_SEQ, 1, NOW)
    assert all(len(wire.columns_message(header, body)) <= 64 * 1024 for body in bodies)


@pytest.mark.parametrize("size", [0, MAX_BLOB + 1])
def test_a_blob_that_is_empty_or_too_large_is_refused(tmp_path: Path, size: int) -> None:
    spool = Spool(tmp_path, "A")
    spool.start()
    with pytest.raises(ValueError, match=f"a blob of {size} bytes"):
        spool.put_blob(bytes(size), NOW)
    assert spool.spooled() == 0


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"x" * 48,
        blob_chunks(b"abc")[0][:-1],
        blob_chunks(b"abc")[0] + b"d",
        wire.CHUNK.pack(bytes(32), MAX_BLOB + 1, 0, 0) + b"x" * CHUNK_BYTES,
        wire.CHUNK.pack(bytes(32), 0, 0, 0) + b"x",
        wire.CHUNK.pack(bytes(32), 100, 7, 0) + b"x" * 93,
        wire.CHUNK.pack(bytes(32), 100, CHUNK_BYTES, 0) + b"x",
    ],
)
def test_what_is_no_chunk_is_refused(body: bytes) -> None:
    with pytest.raises(WireError, match="malformed"):
        opened(body)


def test_the_number_of_a_picture_is_exact() -> None:
    sha256 = "f" * 64
    assert int(wire.evidence_number(sha256)) == int(sha256[:13], 16) == 2**52 - 1


# --- from the spool to the store ---


class Line:
    """Gateways' real spools and uplinks, and a real ingest; what one says the other hears at once."""

    def __init__(self, root: Path, files: Files = OS_FILES) -> None:
        self.layout, self.root = Layout(root / "data"), root
        self.layout.make()
        self.files = files
        self.counters = Counters("ingest")
        self.open_ingest()
        name = self.layout.put_blob(encode_registry(REGISTRY))
        self.ingest.control(Control("registry", NOW, "test", name), NOW)
        self.ingest.commit()
        self.uplinks: dict[str, Uplink] = {}
        for gateway in GATEWAYS:
            self.open_gateway(gateway)
        self.mono_s = 0.0

    @property
    def store(self) -> EvidenceStore:
        return EvidenceStore(self.layout.evidence, self.files)

    def close(self) -> None:
        self.ingest.close()
        for uplink in self.uplinks.values():
            uplink.spool.close()

    def open_ingest(self) -> None:
        self.ingest = Ingest(self.layout, (0,), self.counters, self.files)
        self.ingest.start()

    def open_gateway(self, name: str) -> None:
        spool = Spool(self.root / name, name)
        spool.start()
        self.uplinks[name] = Uplink(spool, name, 0)
        self.uplinks[name].connected(0.0)

    def put(self, content: bytes, gateway: str = "gw-a", *, unmasked: bool = False) -> str:
        spool = self.uplinks[gateway].spool
        sha256 = spool.put_blob(content, NOW, unmasked=unmasked)
        spool.commit()
        return sha256

    def turn(self, *, acknowledge: bool = True, most: int = 1 << 30) -> int:
        """Let each gateway send what it may, at most so many messages; return how many went."""
        self.mono_s += 10.0
        sent = 0
        for uplink in self.uplinks.values():
            for topic, payload in uplink.outgoing(NOW, self.mono_s):
                if sent < most:
                    self.ingest.message(topic, payload, NOW)
                    sent += 1
        for topic, payload in self.ingest.commit():
            for uplink in self.uplinks.values() if acknowledge else ():
                if topic == uplink.ack_topic:
                    uplink.incoming(topic, payload, self.mono_s)
        return sent

    def drain(self) -> None:
        while any(uplink.spool.spooled() for uplink in self.uplinks.values()):
            assert self.turn()

    def complete(self) -> list[str]:
        """Return the blobs that the log says are complete."""
        records = Reader(self.layout.log(0), 0, self.files)
        controls = [decode_control(record.payload) for record in records if record.kind == Kind.CONTROL]
        return [control.content for control in controls if control.what == "evidence"]

    def seqs(self) -> list[int]:
        """Return the numbers of the blob lane's messages in the log."""
        heads = [
            frame_head(record.payload)
            for record in Reader(self.layout.log(0), 0, self.files)
            if record.kind == Kind.FRAME
        ]
        return [head.seq for head in heads if head.lane is Lane.BLOB]


def test_a_picture_arrives_whole_and_stands_in_the_log(tmp_path: Path) -> None:
    line = Line(tmp_path)
    content = picture(300_000)
    sha256 = line.put(content)
    line.drain()
    about = line.store.find(sha256[:13])
    assert (about.sha256, about.gateway, about.size, about.complete, about.unmasked) == (
        sha256,
        "gw-a",
        300_000,
        True,
        False,
    )
    assert line.store.content(about) == content
    assert line.complete() == [sha256]
    assert line.seqs() == [1, 2, 3, 4, 5]
    assert line.counters.values["evidence_total"] == 1
    assert [path.suffix for path in sorted(line.layout.evidence.glob("*/*"))] == [".blob", ".json"]


def test_events_and_telemetry_go_before_pictures(tmp_path: Path) -> None:
    line = Line(tmp_path)
    uplink = line.uplinks["gw-a"]
    line.put(picture(MAX_BLOB))
    uplink.spool.append(Lane.TELEMETRY, [Reading("cam-gw-a", NOW, {"signal": 1.0})], NOW)
    uplink.spool.append(Lane.EVENT, [Reading("cam-gw-a", NOW, {"evidence": 7.0})], NOW)
    uplink.spool.commit()
    lanes = [wire.parse_topic(topic)[2] for topic, _ in uplink.outgoing(NOW, 0.0)]
    assert lanes == ["event", "telemetry", *["blob"] * BLOB_MESSAGES]


def test_an_event_overtakes_the_pictures_that_wait(tmp_path: Path) -> None:
    line = Line(tmp_path)
    line.put(picture(MAX_BLOB))
    line.turn(acknowledge=False)
    spool = line.uplinks["gw-a"].spool
    spool.append(Lane.EVENT, [Reading("cam-gw-a", NOW, {"evidence": 7.0})], NOW)
    spool.commit()
    assert [topic.rsplit("/", 1)[1] for topic, _ in line.uplinks["gw-a"].outgoing(NOW, line.mono_s)] == ["event"]


@pytest.mark.parametrize("power", [False, True])
def test_a_kill_between_any_two_writes_loses_and_doubles_nothing(tmp_path: Path, power: bool) -> None:
    """Ingest dies at its n-th write to disk, for each n there is; it starts again and everything goes on."""
    content = picture(2 * CHUNK_BYTES + 5)
    for deadly in range(1, 200):
        disk = DyingFiles(deadly)
        line = Line(tmp_path / f"{power}-{deadly}", disk)
        disk.armed = True
        sha256 = line.put(content)
        try:
            line.drain()
        except StorageError:
            disk.armed = False
            if power:
                disk.crash()
            line.open_ingest()
            line.drain()
        assert line.store.content(line.store.find(sha256)) == content
        assert line.complete() == [sha256]
        assert line.seqs() == [1, 2, 3]
        line.close()
        if disk.armed:
            return
    pytest.fail("it never ran to its end")


class DyingFiles(LossyFiles):
    """A disk whose `deadly`-th write is the last thing that its process does, once it is armed."""

    def __init__(self, deadly: int) -> None:
        super().__init__()
        self.deadly = deadly
        self.armed = False

    def replace(self, path: Path, data: bytes) -> None:
        self._count(path)
        super().replace(path, data)

    def remove(self, path: Path) -> None:
        self._count(path)
        super().remove(path)

    def mark(self, path: Path, value: int) -> None:
        self._count(path)
        super().mark(path, value)

    def _count(self, path: Path) -> None:
        if self.armed:
            self.deadly -= 1
            if not self.deadly:
                raise StorageError(f"{path}: killed")


def test_the_same_picture_of_two_gateways_is_kept_once(tmp_path: Path) -> None:
    line = Line(tmp_path)
    sha256 = line.put(picture(100_000), "gw-a")
    assert line.put(picture(100_000), "gw-b", unmasked=True) == sha256
    line.drain()
    assert line.complete() == [sha256]
    about = line.store.find(sha256)
    assert about.gateway == "gw-a"
    assert about.unmasked, "one of them says that persons may be recognised"
    assert len(line.seqs()) == 4


def test_chunks_that_are_not_what_their_hash_says_are_set_aside(tmp_path: Path) -> None:
    line = Line(tmp_path)
    good = picture(100_000)
    spool = line.uplinks["gw-a"].spool
    for body in blob_chunks(good):
        spool.append_body(Lane.BLOB, body[:-1] + bytes([body[-1] ^ 1]), 1, NOW)
    spool.commit()
    line.drain()
    sha256 = blob_sha256(good)
    assert line.counters.values["dropped_total{reason=evidence_hash}"] == 1
    assert any(sha256 in text and ".wrong" in text for text in line.counters.warnings)
    assert line.complete() == []
    with pytest.raises(NotFound, match="not all of its 100000 bytes"):
        line.store.content(line.store.find(sha256))
    line.put(good)
    line.drain()
    assert line.complete() == [sha256], "sent well it is taken"


@pytest.mark.parametrize(
    "body", [b"rubbish", wire.columns_body([Reading("cam-gw-a", NOW, {"signal": 1.0})]), blob_chunks(b"abc")[0][:-1]]
)
def test_rubbish_in_the_blob_lane_is_counted_and_blocks_nothing(tmp_path: Path, body: bytes) -> None:
    line = Line(tmp_path)
    line.uplinks["gw-a"].spool.append_body(Lane.BLOB, body, 1, NOW)
    sha256 = line.put(b"good")
    line.drain()
    assert line.counters.values["dropped_total{reason=malformed}"] == 1
    assert line.complete() == [sha256]


def test_a_chunk_that_contradicts_another_of_its_blob_is_refused(tmp_path: Path) -> None:
    store = EvidenceStore(tmp_path)
    store.put("gw-a", opened(blob_chunks(picture(100_000))[0]), NOW)
    other = Chunk(blob_sha256(picture(100_000)), 100, 0, False, b"x" * 100)
    with pytest.raises(WireError, match=r"100 bytes of .* which has 100000"):
        store.put("gw-a", other, NOW)


def test_a_full_disk_takes_no_picture_and_every_reading(tmp_path: Path) -> None:
    disk = FullOfPictures()
    line = Line(tmp_path, disk)
    sha256 = line.put(picture(100_000))
    spool = line.uplinks["gw-a"].spool
    spool.append(Lane.EVENT, [Reading("cam-gw-a", NOW, {"evidence": 7.0})], NOW)
    spool.commit()
    line.turn()
    line.turn()
    assert spool.floor(Lane.EVENT) == 2
    assert spool.floor(Lane.BLOB) == 1
    assert line.counters.values["errors_total{stage=evidence}"] >= 1
    disk.full = False
    line.drain()
    assert line.complete() == [sha256]


class FullOfPictures(LossyFiles):
    full = True

    def replace(self, path: Path, data: bytes) -> None:
        if self.full and path.suffix == ".part":
            raise DiskFull(f"{path}: no space left on the device")
        super().replace(path, data)


def test_a_picture_of_which_a_part_was_evicted_is_counted_and_does_not_block(tmp_path: Path) -> None:
    line = Line(tmp_path)
    lost = line.put(picture(200_000, 1))
    spool = line.uplinks["gw-a"].spool
    line.turn(most=1)
    spool.limit_bytes = 0
    spool.commit()
    spool.limit_bytes = 1 << 30
    kept = line.put(picture(100_000, 2))
    line.drain()
    assert line.complete() == [kept]
    assert spool.counters.values["evicted_total{lane=blob}"] == 3
    assert line.counters.values["lost_total{reason=evicted}"] == 3
    assert line.store.expire(NOW + 31 * DAY_MS) == (1, 1)
    with pytest.raises(Expired):
        line.store.content(line.store.find(lost))


# --- the rest of the product, and a third lane ---


def test_history_keeps_the_records_and_the_engine_takes_them_for_a_sign_of_life(tmp_path: Path) -> None:
    line = Line(tmp_path)
    spool = line.uplinks["gw-a"].spool
    spool.append(Lane.TELEMETRY, [Reading("cam-gw-a", NOW, {"signal": 1.0})], NOW)
    line.put(picture(200_000))
    line.drain()
    records = list(Reader(line.layout.log(0)))
    laid = lay([record for record in records if record.kind == Kind.FRAME], len(GATEWAYS))
    assert laid.kept.tolist() == [1, 1, 1, 1, 1]
    assert laid.telemetry.tolist() == [1, 0, 0, 0, 0], "its stream time stands still"
    history = HistoryProcess(line.layout, [0], RunClock(NOW + 2 * DAY_MS, 0, 0.0), Retention())
    history.start()
    while history.step():
        pass
    assert list(frames(line.layout, 0, 0, len(records))) == records


def test_history_removes_what_is_old(tmp_path: Path) -> None:
    line = Line(tmp_path)
    sha256 = line.put(picture(100_000))
    line.drain()
    history = HistoryProcess(line.layout, [0], RunClock(NOW + 31 * DAY_MS, 0, 0.0), Retention())
    history.start()
    history.step()
    assert history.counters.values["removed_total{what=evidence}"] == 1
    with pytest.raises(Expired):
        line.store.content(line.store.find(sha256))


def test_what_a_spool_found_damaged_reaches_the_centre(tmp_path: Path) -> None:
    line = Line(tmp_path)
    (tmp_path / "gw-c").mkdir()
    (tmp_path / "gw-c" / "event").write_text("what is this?")
    spool = Spool(tmp_path / "gw-c", "c")
    spool.start()
    status = wire.encode_json(wire.Status(1, True, NOW, "c", spool.fault))
    line.ingest.message(wire.topic(0, "gw-a", "status"), status, NOW)
    assert "begins anew" in line.ingest.gateways["gw-a"].spool
    assert len(spool.fault) <= 300
    line.ingest.message(
        wire.topic(0, "gw-b", "status"), wire.encode_json(wire.Status(1, True, NOW, "c", "x" * 501)), NOW
    )
    assert line.counters.values["dropped_total{reason=malformed}"] == 1


# --- expiry ---


def test_content_goes_when_it_is_old_and_what_was_known_of_it_later(tmp_path: Path) -> None:
    store = EvidenceStore(tmp_path)
    sha256 = blob_sha256(b"old")
    assert store.put("gw-a", opened(blob_chunks(b"old")[0]), NOW)
    assert store.expire(NOW + 30 * DAY_MS) == (0, 0)
    assert store.expire(NOW + 30 * DAY_MS + 1) == (1, 0)
    assert store.expire(NOW + 40 * DAY_MS) == (0, 0)
    with pytest.raises(Expired, match="removed at"):
        store.content(store.find(sha256))
    assert store.put("gw-a", opened(blob_chunks(b"old")[0]), NOW + 41 * DAY_MS), "it comes again"
    assert store.content(store.find(sha256)) == b"old"
    left = store._path(sha256, "0.part")
    left.with_name(f".{left.name}.4711.new").write_bytes(b"of a process that was killed while it wrote")
    store.expire(NOW + 80 * DAY_MS)
    store.expire(NOW + (81 + TOMBSTONE_DAYS) * DAY_MS)
    with pytest.raises(NotFound, match="never received, or long removed"):
        store.find(sha256)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


# --- who may look ---


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seeded]:
    made = seeded(tmp_path_factory.mktemp("site"))
    made.beat()
    with process(made.layout, "api", ready=made.url + "/healthz"):
        yield made


@pytest.fixture
def api(site: Seeded) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=site.url, trust_env=False, timeout=5) as client:
        yield client


def stored(site: Seeded, content: bytes, *, unmasked: bool = False, now_ms: int = NOW) -> str:
    store = EvidenceStore(site.layout.evidence)
    for body in blob_chunks(content, unmasked=unmasked):
        store.put("gw-01", opened(body), now_ms)
    return blob_sha256(content)


def test_a_picture_is_shown_to_a_named_person_and_that_is_noted(site: Seeded, api: httpx.Client) -> None:
    content = picture(70_000, 11)
    sha256 = stored(site, content)
    for named in ({"headers": {"X-Actor": "wang"}}, {"params": {"actor": "li", "reason": "night shift"}}):
        answer = api.get(f"/v1/evidence/{sha256}", **named)  # type: ignore[arg-type]
        assert (answer.status_code, answer.content) == (200, content)
        assert answer.headers["content-type"] == "image/jpeg"
        assert answer.headers["cache-control"] == "no-store"
    seen = api.get(f"/v1/evidence/{sha256}/views").json()["items"]
    assert [(view["actor"], view["reason"]) for view in seen] == [("wang", ""), ("li", "night shift")]
    assert all(abs(view["at"] - site.now_ms) < DAY_MS for view in seen)
    number = int(wire.evidence_number(sha256))
    about = api.get(f"/v1/evidence/number/{number}").json()
    assert about == api.get(f"/v1/evidence/{sha256}/about").json()
    assert (about["sha256"], about["gateway"], about["size"], about["complete"]) == (sha256, "gw-01", 70_000, True)
    assert len(api.get(f"/v1/evidence/{sha256}/views").json()["items"]) == 2, "that was no look at it"


def test_what_is_unmasked_is_shown_for_a_reason_only(site: Seeded, api: httpx.Client) -> None:
    sha256 = stored(site, picture(5_000, 12), unmasked=True)
    who = {"X-Actor": "wang"}
    answer = api.get(f"/v1/evidence/{sha256}", headers=who, params={"reason": "  "})
    assert (answer.status_code, answer.json()["error"]) == (400, "no_reason")
    assert api.get(f"/v1/evidence/{sha256}/views").json()["items"] == []
    assert api.get(f"/v1/evidence/{sha256}", headers=who, params={"reason": "case 12"}).status_code == 200
    assert api.get(f"/v1/evidence/{sha256}/views").json()["items"][0]["reason"] == "case 12"


def test_what_cannot_be_shown_is_refused_in_words(site: Seeded, api: httpx.Client) -> None:
    sha256, who = stored(site, picture(5_000, 13)), {"X-Actor": "wang"}
    nobody = api.get(f"/v1/evidence/{sha256}")
    assert (nobody.status_code, nobody.json()["error"]) == (400, "no_actor")
    for name in ("0" * 64, sha256[:12], "x" * 64, "..%2Fcity.db"):
        answer = api.get(f"/v1/evidence/{name}", headers=who)
        assert answer.status_code == 404, name
    EvidenceStore(site.layout.evidence).put("gw-01", opened(blob_chunks(picture(100_000, 14))[0]), NOW)
    half = api.get(f"/v1/evidence/{blob_sha256(picture(100_000, 14))}", headers=who)
    assert half.status_code == 404
    assert "not all of its 100000 bytes" in half.json()["what"]
    assert api.get("/v1/evidence/number/1.5").status_code == 404


def test_what_is_expired_is_gone_and_said_to_be(site: Seeded, api: httpx.Client) -> None:
    sha256 = stored(site, b"ancient", now_ms=NOW - 100 * DAY_MS)
    EvidenceStore(site.layout.evidence).expire(NOW, 90)
    gone = api.get(f"/v1/evidence/{sha256}", headers={"X-Actor": "wang"})
    assert (gone.status_code, gone.json()["error"]) == (410, "expired")
    assert api.get(f"/v1/evidence/{sha256}/about").json()["expired_at"] == NOW


def test_an_alarm_leads_to_the_pictures_that_were_told_with_its_metric(tmp_path: Path) -> None:
    made = Seeded(tmp_path)
    camera = Device("cam-1", "camera", "gw-01", made.index.device("gw-01").place, ("signal",), SCENE)
    registry = msgspec.structs.replace(made.district.registry, devices=(*made.district.registry.devices, camera))
    made.district = msgspec.structs.replace(made.district, registry=registry)
    made.index = Index(registry, "")
    made.prepare()
    here, coming = stored(made, picture(5_000, 21)), blob_sha256(b"still on its way")
    raised = made.now_ms - 60_000
    said = [("garbage_s", raised - 2_000, 61.0), ("stall_s", raised - 1_000, 61.0), ("garbage_s", raised, 601.0)]
    pictures = [(here, raised - 2_000), (blob_sha256(b"of the stall"), raised - 1_000), (coming, raised)]
    values = [("cam-1", "evidence", at, wire.evidence_number(sha256)) for sha256, at in pictures]
    made.frame(values + [("cam-1", metric, at, value) for metric, at, value in said])
    made.rows(incidents, made.incident(1, "garbage", "device", "cam-1"))
    evidence = msgspec.json.encode(Evidence("garbage_s", 601.0, 600.0, raised)).decode()
    made.rows(
        alarms,
        made.alarm(1, "camera_garbage", "cam-1", incident=1, why="first", raised_at=raised, evidence=evidence),
        made.alarm(2, "hydrant_pressure_low", "hyd-000001", incident=1, why="first"),
    )
    made.beat()
    with process(made.layout, "api", ready=made.url + "/healthz"):
        found = httpx.get(f"{made.url}/v1/alarms/1/pictures", trust_env=False, timeout=20).json()["items"]
        assert [(one["name"], one["complete"], one["at"]) for one in found] == [
            (coming[:13], False, raised), (here, True, raised - 2_000)]  # fmt: skip
        none = httpx.get(f"{made.url}/v1/alarms/2/pictures", trust_env=False, timeout=20)
        assert (none.status_code, none.json()) == (200, {"items": []})
        assert httpx.get(f"{made.url}/v1/alarms/3/pictures", trust_env=False, timeout=20).status_code == 404


SCENE = ("garbage_s", "stall_s", "evidence")


def test_half_a_line_in_the_view_log_hides_no_other(tmp_path: Path) -> None:
    store = EvidenceStore(tmp_path)
    store.viewed(View("a", "wang", NOW, "", False))
    with (tmp_path / "views.jsonl").open("a") as file:
        file.write('\n{"sha256":"a","actor"')
    store.viewed(View("a", "li", NOW, "", False))
    assert [view.actor for view in store.views("a")] == ["wang", "li"]
