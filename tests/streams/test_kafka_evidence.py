"""Pictures of a gateway with `ingest --log kafka`: whole and once at the centre, wherever ingest is killed."""

from __future__ import annotations

import random
from collections import Counter

from citybrain.clock import real_unix_ms
from citybrain.model import Lane, Reading
from citybrain.wire import CHUNK_BYTES, blob_sha256
from streams.evidence import EvidenceStore
from streams.log import Kind, decode_control, frame_head
from tests.conftest import eventually
from tests.streams.test_kafka_ingest import Site, site

__all__ = ["site"]  # the fixture
PICTURE_BYTES = 300_000
CHUNKS = -(-PICTURE_BYTES // CHUNK_BYTES)


def picture(seed: int) -> bytes:
    return b"\xff\xd8\xff" + random.Random(seed).randbytes(PICTURE_BYTES - 3)


def chunks_acked(site: Site) -> int:
    return site.gateway.spool.floor(Lane.BLOB) - 1


def acked(site: Site, chunks: int) -> None:
    eventually(lambda: site.polled() and chunks_acked(site) >= chunks, 60, f"{chunks} chunks acknowledged")


def evidenced(site: Site) -> Counter[str]:
    """Return how often the log says of which picture that it is there."""
    controls = [decode_control(record.payload) for record in site.records() if record.kind == Kind.CONTROL]
    return Counter(control.content for control in controls if control.what == "evidence")


def test_a_picture_ends_whole_and_once_wherever_ingest_is_killed(site: Site) -> None:
    """Ingest is killed after 0, 2, 4 of 5 chunks; once another machine goes on, which has the shared evidence and Kafka
    and nothing else.
    """
    pictures = {killed_at: picture(killed_at) for killed_at in range(0, CHUNKS, 2)}
    kept = EvidenceStore(site.layout.evidence)
    site.spool(1)
    site.drive()  # the registry is in Kafka
    for killed_at, content in pictures.items():
        before = chunks_acked(site)
        site.gateway.spool.put_blob(content, real_unix_ms())
        site.spool(3)
        acked(site, before + killed_at)
        site.kill()
        for path in site.layout.blobs.iterdir() if killed_at == 2 else ():
            path.unlink()
        site.start()
        acked(site, before + CHUNKS)
    event = Reading("hyd-1", real_unix_ms(), {"tilt_deg": 40.0})
    site.gateway.spool.append(Lane.EVENT, [event], event.observed_at)
    site.drive()
    names = [blob_sha256(content) for content in pictures.values()]
    for name, content in zip(names, pictures.values(), strict=True):
        about = kept.find(name)
        assert (about.complete, about.gateway, about.size) == (True, "gw-a", PICTURE_BYTES)
        assert kept.content(about) == content
    left = [path for path in site.layout.evidence.rglob("*") if path.is_file()]
    files = Counter(path.suffix for path in left if not path.name.startswith("."))  # what a kill left half written
    assert files == {".json": len(pictures), ".blob": len(pictures)}, "no part is left, and nothing was set aside"
    assert evidenced(site) == Counter(names)
    heads = [frame_head(record.payload) for record in site.records() if record.kind == Kind.FRAME]
    taken = Counter((head.lane, head.seq) for head in heads)
    assert set(taken.values()) == {1}
    assert sum(lane is Lane.BLOB for lane, _ in taken) == CHUNKS * len(pictures)
