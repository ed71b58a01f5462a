"""The uplink: windows, order, time-outs and what an acknowledgement may free. No network: the test is the network."""

from __future__ import annotations

from pathlib import Path

import pytest

from citybrain.model import Lane, Reading
from citybrain.wire import (
    MAX_MESSAGE,
    WINDOW_BYTES,
    WINDOW_MESSAGES,
    Ack,
    Message,
    encode_json,
    open_message,
    readings_of,
    topic,
)
from gateway.spool import Spool
from gateway.uplink import HANDED_OVER, MOST_TIMEOUT_S, TIMEOUT_S, Uplink
from tests.faulty_files import LossyFiles

T, E = Lane.TELEMETRY, Lane.EVENT
FOLDER = Path("/disk/spool")
ACK = topic(3, "gw-1", "ack")


def opened(disk: LossyFiles | None = None, serial: str = "A") -> Spool:
    spool = Spool(FOLDER, serial, disk or LossyFiles())
    spool.start()
    return spool


def fill(spool: Spool, count: int, lane: Lane = T) -> None:
    for number in range(count):
        spool.append(lane, [Reading("d", number, {"value": float(number)})], number)
    spool.commit()


def linked(spool: Spool, *, compress: bool = False) -> Uplink:
    uplink = Uplink(spool, "gw-1", 3, compress)
    uplink.connected(0.0)
    return uplink


def out(uplink: Uplink, mono_s: float, unsent: int = 0) -> list[tuple[str, Message]]:
    return [(where.split("/")[-1], open_message(payload)) for where, payload in uplink.outgoing(5, mono_s, unsent)]


def seqs(uplink: Uplink, mono_s: float, unsent: int = 0) -> list[int]:
    """Return the numbers of the messages; questions without one are left out."""
    return [message.header.seq for _, message in out(uplink, mono_s, unsent) if not message.header.asks]


def questions(uplink: Uplink, mono_s: float) -> dict[str, int]:
    """Return which lanes ask without a message, and with which seq."""
    return {where: message.header.seq for where, message in out(uplink, mono_s) if message.header.asks}


def ack(uplink: Uplink, lane: Lane, seq: int, epoch: int | None = None, mono_s: float = 0.0) -> None:
    epoch = uplink.spool.epoch if epoch is None else epoch
    uplink.incoming(ACK, encode_json(Ack(lane.topic, epoch, seq)), mono_s)


def test_a_message_carries_its_numbers_and_its_readings() -> None:
    spool = opened()
    fill(spool, 2)
    ((where, first), (_, second)) = out(linked(spool), 0.0)
    assert where == "telemetry"
    assert (first.header.epoch, first.header.seq, first.header.floor, first.header.sent_at) == (spool.epoch, 1, 1, 5)
    assert readings_of(second) == [Reading("d", 1, {"value": 1.0})]


def test_nothing_goes_out_without_a_connection() -> None:
    spool = opened()
    fill(spool, 2)
    uplink = Uplink(spool, "gw-1", 3)
    assert uplink.outgoing(5, 0.0) == []
    uplink.connected(0.0)
    assert seqs(uplink, 0.0) == [1, 2]
    uplink.disconnected()
    assert uplink.outgoing(5, 99.0) == []


def test_events_go_first() -> None:
    spool = opened()
    fill(spool, 3)
    fill(spool, 2, E)
    assert [where for where, _ in out(linked(spool), 0.0)] == ["event"] * 2 + ["telemetry"] * 3


def test_at_most_a_window_of_messages_is_under_way() -> None:
    spool = opened()
    fill(spool, 3 * WINDOW_MESSAGES)
    uplink = linked(spool)
    assert seqs(uplink, 0.0) == list(range(1, WINDOW_MESSAGES + 1))
    assert seqs(uplink, 0.1) == []
    ack(uplink, T, 5)
    assert seqs(uplink, 0.2) == list(range(WINDOW_MESSAGES + 1, WINDOW_MESSAGES + 6))
    assert spool.floor(T) == 6


@pytest.mark.parametrize("compress", [False, True])
def test_at_most_512_kib_are_under_way_and_the_largest_message_fits(compress: bool) -> None:
    spool = opened()
    many = [Reading(f"dev-{n:05d}", n, {"value": n * 0.1}) for n in range(9000)]
    for _ in range(6):
        spool.append(T, many, 5)
    spool.commit()
    uplink = linked(spool, compress=compress)
    payloads = [payload for _, payload in uplink.outgoing(5, 0.0)]
    assert 2 <= len(payloads) < spool.next_seq(T) - 1 or compress
    assert sum(map(len, payloads)) <= WINDOW_BYTES
    assert max(map(len, payloads)) <= MAX_MESSAGE
    assert readings_of(open_message(payloads[0]))[0] == many[0]


def test_a_time_out_sends_everything_again_later_each_time() -> None:
    spool = opened()
    fill(spool, 3)
    uplink = linked(spool)
    assert seqs(uplink, 0.0) == [1, 2, 3]
    ack(uplink, T, 1)
    assert seqs(uplink, TIMEOUT_S - 0.1) == []
    assert seqs(uplink, TIMEOUT_S) == [2, 3]
    assert seqs(uplink, 2 * TIMEOUT_S) == []
    assert seqs(uplink, 3 * TIMEOUT_S) == [2, 3]
    assert seqs(uplink, 3 * TIMEOUT_S + MOST_TIMEOUT_S) == [2, 3]
    assert seqs(uplink, 3 * TIMEOUT_S + 2 * MOST_TIMEOUT_S) == [2, 3]
    assert uplink.counters.values["sent_total"] == 3
    assert uplink.counters.values["resent_total"] == 8


def test_ingest_coming_back_ends_the_waiting() -> None:
    spool = opened()
    fill(spool, 3)
    uplink = linked(spool)
    seqs(uplink, 0.0)
    assert seqs(uplink, TIMEOUT_S) == [1, 2, 3]
    ack(uplink, T, 0, mono_s=TIMEOUT_S + 0.1)
    assert seqs(uplink, TIMEOUT_S + 0.1) == [1, 2, 3]
    ack(uplink, T, 0, mono_s=TIMEOUT_S + 0.2)
    assert seqs(uplink, TIMEOUT_S + 0.2) == []  # once, or every repeat's answer would ask for more repeats
    assert uplink.counters.values["dropped_total{reason=ack_repeated}"] == 1


def test_a_slow_line_neither_times_out_nor_piles_up() -> None:
    spool = opened()
    fill(spool, 99)
    uplink = linked(spool)
    assert len(seqs(uplink, 0.0)) == WINDOW_MESSAGES
    assert seqs(uplink, 50.0, unsent=20) == []
    assert seqs(uplink, 50.0 + TIMEOUT_S - 0.1) == []
    assert seqs(uplink, 50.0 + TIMEOUT_S)[0] == 1
    ack(uplink, T, 32)
    assert len(seqs(uplink, 51.0, unsent=HANDED_OVER - 3)) == 3


def test_a_reconnect_sends_everything_unacknowledged_at_once() -> None:
    spool = opened()
    fill(spool, 4)
    uplink = linked(spool)
    seqs(uplink, 0.0)
    ack(uplink, T, 2)
    uplink.disconnected()
    uplink.connected(0.5)
    assert seqs(uplink, 0.5) == [3, 4]


@pytest.mark.parametrize(
    ("where", "payload", "reason"),
    [
        (ACK, b"{", "ack_malformed"),
        (ACK, b'{"lane":"video","epoch":1,"seq":1}', "ack_malformed"),
        (ACK, b'{"lane":"telemetry","epoch":1,"seq":-1}', "ack_malformed"),
        (ACK, b'{"lane":"telemetry","epoch":1,"seq":1}', "ack_epoch"),
        ("cb/v1/3/gw-2/ack", b"", "ack_topic"),
    ],
)
def test_what_is_no_acknowledgement_of_ours_is_counted(where: str, payload: bytes, reason: str) -> None:
    spool = opened()
    fill(spool, 2)
    uplink = linked(spool)
    seqs(uplink, 0.0)
    uplink.incoming(where, payload, 0.0)
    assert uplink.counters.values[f"dropped_total{{reason={reason}}}"] == 1
    assert spool.floor(T) == 1


def test_old_and_repeated_acknowledgements_change_nothing() -> None:
    spool = opened()
    fill(spool, 4)
    uplink = linked(spool)
    seqs(uplink, 0.0)
    for seq in (3, 2, 3, 0):
        ack(uplink, T, seq)
    assert spool.floor(T) == 4
    assert uplink.counters.values["acked_total"] == 3
    assert not uplink.idle()
    ack(uplink, T, 4)
    assert uplink.idle()


def test_an_acknowledgement_beyond_what_was_sent_begins_a_new_epoch() -> None:
    spool = opened()
    fill(spool, 40)
    fill(spool, 1, E)
    uplink = linked(spool)
    seqs(uplink, 0.0)
    before = spool.epoch
    ack(uplink, T, 33)  # spooled, but not sent
    assert spool.epoch != before
    assert spool.counters.values["epochs_total{reason=restored}"] == 1
    assert "restored from a copy" in uplink.counters.warnings[-1]
    messages = out(uplink, 0.1)
    assert {message.header.epoch for _, message in messages} == {spool.epoch}
    assert [message.header.seq for _, message in messages] == [1, *range(1, 33)]
    ack(uplink, T, 32, epoch=before)
    assert spool.floor(T) == 1


def test_eviction_moves_the_floor_and_the_window_with_it() -> None:
    spool = opened()
    fill(spool, 10)
    uplink = linked(spool)
    seqs(uplink, 0.0)
    spool.limit_bytes = 1
    spool.commit()
    spool.limit_bytes = 1 << 20
    assert spool.floor(T) == spool.next_seq(T) == 11
    fill(spool, 2)
    assert [(m.header.seq, m.header.floor) for _, m in out(uplink, 0.1)] == [(11, 11), (12, 11)]
    ack(uplink, T, 10)
    ack(uplink, T, 12)
    assert uplink.idle()


# --- after a start on an epoch begun before ---


def restarted(disk: LossyFiles, spooled: int, acked: int, new: int = 0) -> Uplink:
    """Return the uplink of a second process: the first one left `spooled` messages, `acked` of them acknowledged."""
    spool = opened(disk)
    fill(spool, spooled)
    spool.acknowledged(T, acked)
    again = opened(disk)
    fill(again, new)
    return linked(again)


def test_after_a_start_ingest_is_asked_with_the_first_message_it_did_not_acknowledge() -> None:
    uplink = restarted(LossyFiles(), 10, 4, new=2)
    assert uplink.asking
    assert seqs(uplink, 0.0) == [5]
    assert seqs(uplink, 0.1) == []
    assert seqs(uplink, TIMEOUT_S) == [5]
    ack(uplink, T, 5)
    assert seqs(uplink, 3.0) == [6, 7, 8, 9, 10, 11, 12]


def test_what_ingest_says_to_have_is_compared_before_it_is_freed() -> None:
    uplink = restarted(LossyFiles(), 10, 4)
    assert seqs(uplink, 0.0) == [5]
    ack(uplink, T, 7)
    assert uplink.spool.floor(T) == 5
    assert seqs(uplink, 0.1) == [7]
    ack(uplink, T, 7)
    assert uplink.spool.floor(T) == 8
    assert seqs(uplink, 0.2) == [8, 9, 10]


def test_where_everything_is_acknowledged_it_asks_without_a_message() -> None:
    """With the last one ingest would be given it once more, where it does not know this epoch yet."""
    uplink = restarted(LossyFiles(), 10, 10)
    assert questions(uplink, 0.0) == {"event": 0, "telemetry": 10, "blob": 0}
    fill(uplink.spool, 2)
    assert out(uplink, 0.1) == []
    assert questions(uplink, TIMEOUT_S) == {"event": 0, "telemetry": 10}  # pictures wait for what is new
    ack(uplink, T, 10)
    assert uplink.spool.counters.values["epochs_total{reason=restored}"] == 0
    assert seqs(uplink, TIMEOUT_S + 0.1) == [11, 12]
    ack(uplink, E, 0)
    ack(uplink, Lane.BLOB, 0)
    assert not uplink.asking
    assert uplink.counters.values["asked_total"] == 6


def test_an_event_does_not_wait_for_the_backlog_because_its_lane_has_nothing_to_ask_with() -> None:
    """A full disk evicted the event lane's last message, which was acknowledged; telemetry has a long way to go."""
    disk = LossyFiles()
    spool = opened(disk)
    fill(spool, 3, E)
    spool.acknowledged(E, 3)
    fill(spool, 500)
    disk.capacity = disk.used()
    spool.append(T, [Reading("d", 501, {"value": 501.0})], 501)
    spool.commit()
    disk.capacity = None
    uplink = linked(opened(disk))
    assert uplink.spool.body(E, 3) is None
    fill(uplink.spool, 1, E)
    assert questions(uplink, 0.0)["event"] == 3
    ack(uplink, E, 3)
    assert out(uplink, 0.1)[0][0] == "event"
    assert uplink.spool.spooled() == 502


def test_a_restored_card_that_never_had_a_message_learns_it_too() -> None:
    uplink = restarted(LossyFiles(), 3, 3)
    fill(uplink.spool, 2, E)
    assert questions(uplink, 0.0)["event"] == 0
    ack(uplink, E, 7)
    assert uplink.spool.counters.values["epochs_total{reason=restored}"] == 1
    assert [(m.header.seq, m.header.floor) for where, m in out(uplink, 0.1) if where == "event"] == [(1, 1), (2, 1)]


@pytest.mark.parametrize("power", [False, True])
def test_what_was_acknowledged_before_its_epoch_began_is_never_sent_in_it(power: bool) -> None:
    """A board is exchanged and stopped again before the lane said anything: in the log it was once more."""
    disk = LossyFiles(seed=1)
    spool = opened(disk)
    fill(spool, 10)
    spool.acknowledged(T, 7)
    opened(disk, serial="B")
    if power:
        disk.crash()  # and with it the mark of the floor
        disk.marks.clear()
    uplink = linked(opened(disk, serial="B"))
    assert uplink.asking
    assert [(m.header.seq, m.header.floor) for where, m in out(uplink, 0.0) if where == "telemetry"] == [(8, 8)]


def test_a_new_epoch_waits_where_the_disk_is_full_of_what_is_not_ours() -> None:
    disk = LossyFiles()
    uplink = restarted(disk, 10, 10)
    before = uplink.spool.epoch
    questions(uplink, 0.0)
    disk.capacity = 0
    ack(uplink, T, 15)
    assert (uplink.spool.epoch, uplink.asking) == (before, True)
    assert uplink.counters.values["errors_total{stage=disk_full}"] == 1
    assert "waits for room" in uplink.counters.warnings[-1]
    disk.capacity = None
    assert questions(uplink, TIMEOUT_S)["telemetry"] == 10
    ack(uplink, T, 15)
    assert uplink.spool.epoch != before
    assert opened(disk).epoch == uplink.spool.epoch


def test_what_ingest_has_and_this_card_cannot_read_any_more_is_believed() -> None:
    disk = LossyFiles()
    fill(opened(disk), 6)
    (path,) = [path for path in disk.files if path.suffix == ".seg" and path.parent.name == "telemetry"]
    disk.files[path].now[3 * (len(disk.files[path].now) // 6) - 1] ^= 0xFF  # in message 3
    uplink = linked(opened(disk))
    assert seqs(uplink, 0.0) == [1]
    ack(uplink, T, 3)
    assert seqs(uplink, 0.1) == [4, 5, 6]


def test_a_restored_card_learns_it_from_the_answer() -> None:
    uplink = restarted(LossyFiles(), 10, 10, new=20)
    before = uplink.spool.epoch
    assert questions(uplink, 0.0)["telemetry"] == 10
    ack(uplink, T, 15)
    assert uplink.spool.epoch != before
    assert not uplink.asking
    assert next((m.header.seq, m.header.floor) for _, m in out(uplink, 0.1)) == (11, 11)


def test_a_new_epoch_has_nothing_to_ask() -> None:
    disk = LossyFiles()
    fill(opened(disk), 5)
    uplink = linked(opened(disk, serial="B"))
    assert not uplink.asking
    assert seqs(uplink, 0.0) == [1, 2, 3, 4, 5]


def test_a_damaged_message_is_stepped_over_once_everything_before_it_is_logged() -> None:
    disk = LossyFiles()
    fill(opened(disk), 6)
    (path,) = [path for path in disk.files if path.suffix == ".seg" and path.parent.name == "telemetry"]
    file = disk.files[path]
    file.now[3 * (len(file.now) // 6) - 1] ^= 0xFF  # in message 3
    uplink = linked(opened(disk))
    assert seqs(uplink, 0.0) == [1]
    ack(uplink, T, 1)
    assert seqs(uplink, 0.1) == [2]
    ack(uplink, T, 2)
    sent = [(m.header.seq, m.header.floor) for where, m in out(uplink, 0.2) if where == "telemetry"]
    assert sent == [(4, 4), (5, 4), (6, 4)]
    assert uplink.counters.values["lost_total{reason=damaged}"] == 1


def test_telemetry_waits_until_every_event_is_on_its_way() -> None:
    spool = opened()
    fill(spool, 3, T)
    fill(spool, WINDOW_MESSAGES + 5, E)
    uplink = linked(spool)
    assert {where for where, _ in out(uplink, 0.0)} == {"event"}
    assert out(uplink, 0.1) == []
    ack(uplink, E, 4)
    assert {where for where, _ in out(uplink, 0.2)} == {"event"}  # one is left behind the window
    ack(uplink, E, 6)
    assert [where for where, _ in out(uplink, 0.3)] == ["event", "telemetry", "telemetry", "telemetry"]
