"""The wire protocol: first the model, in every state it can reach; then the real code, in step with the model.

The network loses, repeats and reorders; gateways and ingest are killed or lose power; spools are evicted; cards are
cloned onto other boards and restored from older copies. Whatever happens: what a spool committed is in the log exactly
once under its epoch and seq, in the lane's order, or counted as evicted; nothing is freed before; a repeat with other
content is noticed and never acknowledged; and in the end everything drains.
"""

from __future__ import annotations

import copy
import itertools
import shutil
import tempfile
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from citybrain.counters import Counters
from citybrain.errors import DiskFull
from citybrain.layout import Layout
from citybrain.model import Device, Gateway, Lane, Place, Reading, Registry
from citybrain.segments import Reader, Record, pack, segment_name, segments
from citybrain.wire import (
    LANES,
    WINDOW_MESSAGES,
    Header,
    columns_body,
    columns_message,
    crc32c,
    decode_ack,
    decode_status,
    open_message,
    parse_topic,
    readings_of,
)
from gateway.spool import Spool
from gateway.uplink import Uplink
from streams.ingest import Ingest
from streams.log import Control, Kind, decode_control, frame_head
from streams.registry import encode_registry
from tests.faulty_files import LossyFiles
from tests.protocol import model

GATEWAY = "gw-1"
FOLDER = Path("/disk/spool")
PLACE = Place(114.0, 22.5, "000000000000001")
METRIC = {Lane.TELEMETRY: "value", Lane.EVENT: "fault_code", Lane.BLOB: "value"}  # of a blob: rubbish, which counts too
REGISTRY = Registry(
    (Gateway(GATEWAY, 0, PLACE),), (Device("d", "hydrant", GATEWAY, PLACE, ("value",), ("fault_code",)),)
)
NOW_MS = 1_767_225_600_000


# --- the model, exhaustively ---


def check_world(world: model.World) -> None:
    keys = [(logged.epoch, logged.seq) for logged in world.ingest.log]
    assert len(set(keys)) == len(keys), world
    for epoch in {epoch for epoch, _ in keys}:  # an old epoch's message may still be under way when a new one begins
        own = [seq for of, seq in keys if of == epoch]
        assert own == sorted(own), world
    logged = {logged.body for logged in world.ingest.log}
    for one in world.ingest.log:  # what was acknowledged before its epoch began is not in the log once more
        assert one.epoch != world.gateway.epoch or one.seq >= world.gateway.begins, world
    freed = set(world.gateway.bodies[: world.gateway.floor - 1])
    assert freed <= logged | world.gone, world


def check_world_drains(world: model.World) -> None:
    check_world(world)
    after = model.drained(world)
    check_world(after)
    assert after.gateway.floor == len(after.gateway.bodies) + 1, world
    assert set(after.gateway.bodies) <= {logged.body for logged in after.ingest.log} | world.gone, world


@pytest.mark.parametrize(("messages", "accidents"), [(4, 1), (2, 3), pytest.param(3, 2, marks=pytest.mark.soak)])
def test_the_protocol_holds_in_every_reachable_state(messages: int, accidents: int) -> None:
    assert model.explore(messages, accidents, check_world_drains) > 10_000


def test_without_the_question_a_restored_card_would_lose_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the model can fail, and the question after a start is needed."""

    def trusting(gateway: model.Gateway) -> model.Gateway:
        return msgspec.structs.replace(gateway, sent=len(gateway.bodies), asking=False, high=0)

    monkeypatch.setattr(model, "restarted", trusting)
    with pytest.raises(AssertionError, match="restored=True"):
        model.explore(3, 2, check_world)


def test_asking_with_what_is_acknowledged_would_double_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ingest may not know it under the numbers of an epoch that began behind it."""

    def eager(gateway: model.Gateway) -> model.Sent:
        if gateway.bodies and gateway.floor > gateway.sent:
            last = len(gateway.bodies)
            return msgspec.structs.replace(model.message(gateway, last), floor=min(gateway.floor, last))
        return question(gateway)

    question = model.question
    monkeypatch.setattr(model, "question", eager)
    with pytest.raises(AssertionError, match="epoch=11"):
        model.explore(2, 2, check_world)


def test_if_a_power_loss_took_what_an_epoch_began_with_messages_would_double(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(gateway: model.Gateway) -> model.Gateway:
        return model.restarted(msgspec.structs.replace(gateway, floor=gateway.readable))

    monkeypatch.setattr(model, "powerless", forgetful)
    with pytest.raises(AssertionError, match="epoch=11"):
        model.explore(2, 2, check_world)


def test_without_the_rule_of_floors_an_eviction_would_block_the_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    def deaf(ingest: model.Ingest, message: model.Sent) -> tuple[model.Ingest, model.Answer | None]:
        known = dict(ingest.expected).get(message.epoch, message.floor)
        return take(ingest, msgspec.structs.replace(message, floor=min(message.floor, known)))

    take = model.take
    monkeypatch.setattr(model, "take", deaf)
    with pytest.raises(AssertionError):
        model.explore(3, 2, check_world_drains)


# --- the real code ---


class Platform:
    """The real ingest on a disk that may lose power, and the model beside it."""

    def __init__(self, root: Path) -> None:
        self.layout = Layout(root)
        self.layout.make()
        self.disk = LossyFiles()
        self.counters = Counters("ingest")
        self.models = {lane: model.Ingest() for lane in Lane}
        self.durable = dict(self.models)
        self.answers: set[tuple[Lane, int]] = set()
        self.log: list[tuple[Lane, int, int, int]] = []  # lane, epoch, seq, checksum
        self.faults: list[Control] = []
        self._next = 0
        self.start()
        self.ingest.control(
            Control("registry", NOW_MS, "test", self.layout.put_blob(encode_registry(REGISTRY))), NOW_MS
        )
        self.ingest.commit()

    def start(self) -> None:
        self.ingest = Ingest(self.layout, (0,), self.counters, self.disk)
        self.ingest.start()

    def take(self, topic: str, payload: bytes) -> None:
        self.ingest.message(topic, payload, NOW_MS)
        lane, message = LANES[parse_topic(topic)[2]], open_message(payload)
        head = message.header
        sent = model.Sent(head.epoch, head.seq, head.floor, str(message.checksum))
        self.models[lane], answer = model.take(self.models[lane], sent)
        if answer is not None:
            self.answers.add((lane, head.epoch))

    def commit(self) -> list[tuple[str, bytes]]:
        acks = self.ingest.commit()
        said = {(LANES[ack.lane], ack.epoch): ack.seq for ack in (decode_ack(payload) for _, payload in acks)}
        assert said == {(lane, epoch): dict(self.models[lane].expected)[epoch] - 1 for lane, epoch in self.answers}
        self.answers.clear()
        self.durable = dict(self.models)
        self.read_log()
        for lane, ingest in self.models.items():
            logged = [(epoch, seq, str(checksum)) for at, epoch, seq, checksum in self.log if at is lane]
            assert logged == [(one.epoch, one.seq, one.body) for one in ingest.log]
        return acks

    def read_log(self) -> None:
        for record in Reader(self.layout.log(0), self._next, self.disk):
            self._next = record.offset + 1
            if record.kind == Kind.FRAME:
                head = frame_head(record.payload)
                self.log.append((head.lane, head.epoch, head.seq, head.checksum))
            elif record.kind == Kind.CONTROL and decode_control(record.payload).what == "fault":
                self.faults.append(decode_control(record.payload))

    def die(self, *, power: bool) -> None:
        if power:
            self.disk.crash()
        self.start()
        self.answers.clear()
        self.models = {lane: model.recovered(ingest) for lane, ingest in self.durable.items()}
        self.durable = dict(self.models)

    def logged(self) -> set[int]:
        return {checksum for _, _, _, checksum in self.log}


class Board:
    """A gateway: a real spool and uplink on a disk that may lose power, and what a test knows it committed."""

    def __init__(self, serial: str, disk: LossyFiles, epochs: itertools.count[int]) -> None:
        self.serial = serial
        self.disk = disk
        self.written: dict[Lane, dict[int, int]] = {lane: {} for lane in Lane}  # seq -> checksum of the body
        self.evicted: set[int] = set()  # checksums
        self.begins: dict[int, dict[Lane, int]] = {}  # by epoch: the floors it began with
        self._epochs = epochs
        self.start()

    def draw(self) -> int:
        epoch = next(self._epochs)
        self.begins[epoch] = {lane: self.spool.floor(lane) for lane in Lane}
        return epoch

    def start(self) -> None:
        self.spool = Spool(FOLDER, self.serial, self.disk, 1 << 20, 500, draw_epoch=self.draw)
        self.spool.start()
        self.uplink = Uplink(self.spool, GATEWAY, 0)
        for lane, written in self.written.items():
            last = self.spool.next_seq(lane) - 1
            if last == len(written) + 1:  # written, not synced, and it survived
                body = self.spool.body(lane, last)
                assert body is not None
                written[last] = crc32c(body)
            assert last == len(written)
            for seq in range(self.spool.floor(lane), last + 1):
                assert crc32c(self.spool.body(lane, seq) or b"") == written[seq]

    def write(self, lane: Lane, values: list[int]) -> None:
        for value in values:
            if lane is Lane.BLOB:
                self.spool.put_blob(b"picture %d" % value, NOW_MS)
            else:
                self.spool.append(lane, [Reading("d", NOW_MS, {METRIC[lane]: float(value)})], NOW_MS)
        self.commit()
        last = self.spool.next_seq(lane)
        for seq in range(last - len(values), last):
            self.written[lane][seq] = crc32c(self.spool.body(lane, seq) or b"")

    def refused(self, lane: Lane, values: list[int]) -> None:
        """Write on a full disk, which evicts what it can; what does not fit then is dropped and counted."""
        before = self.spool.counters.values["dropped_total{reason=disk_full}"]
        try:
            self.write(lane, values)
        except DiskFull:
            assert self.spool.counters.values["dropped_total{reason=disk_full}"] == before + len(values)

    def commit(self) -> None:
        """Commit, and note what that evicted."""
        before = {lane: self.spool.floor(lane) for lane in Lane}
        try:
            self.spool.commit()
        finally:
            for lane, floor in before.items():
                gone = range(floor, self.spool.floor(lane))
                self.evicted |= {self.written[lane][seq] for seq in gone if seq in self.written[lane]}

    def readable(self) -> bool:
        return all(self.spool.body(lane, self.spool.next_seq(lane) - 1) is not None for lane in Lane)

    def twin(self, serial: str) -> Board:
        """Return a board with a copy of this one's card in it."""
        other = Board.__new__(Board)
        other.serial, other.disk, other._epochs = serial, copy.deepcopy(self.disk), self._epochs
        other.written, other.evicted = copy.deepcopy(self.written), set(self.evicted)
        other.begins = self.begins  # epochs are nobody's twice
        return other


BOARDS = st.integers(0, 3)
WHICH = st.integers(0, 10_000)
LANE = st.sampled_from(list(Lane))


class Wire(RuleBasedStateMachine):
    """Boards of one gateway, a network, a platform. `up` and `down` hold what is under way, with its board."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="protocol-"))
        self.platform = Platform(self.root)
        self.values = itertools.count(1)
        self.epochs = itertools.count(1)
        self.boards = [Board("A", LossyFiles(), self.epochs)]
        self.copy: Board | None = None
        self.up: list[tuple[str, bytes]] = []
        self.down: list[tuple[str, bytes]] = []
        self.mono_s = 0.0
        self.forged = 0

    def board(self, index: int) -> Board:
        return self.boards[index % len(self.boards)]

    @initialize()
    def connect_first(self) -> None:
        self.boards[0].uplink.connected(self.mono_s)
        for lane in Lane:
            self.boards[0].write(lane, [next(self.values)])

    # gateways

    @rule(index=BOARDS, lane=LANE, count=st.integers(1, 6))
    def write(self, index: int, lane: Lane, count: int) -> None:
        self.board(index).write(lane, list(itertools.islice(self.values, count)))

    @rule(index=BOARDS)
    def write_a_backlog(self, index: int) -> None:
        self.board(index).write(Lane.TELEMETRY, list(itertools.islice(self.values, 40)))

    @rule(index=BOARDS)
    def send(self, index: int) -> None:
        before = len(self.up)
        self.up += self.board(index).uplink.outgoing(NOW_MS, self.mono_s)
        assert len(self.up) - before <= 2 * WINDOW_MESSAGES

    @rule(index=BOARDS, lane=LANE, count=st.integers(1, 6))
    def exchange(self, index: int, lane: Lane, count: int) -> None:
        """Write, and let everything go through for once."""
        board = self.board(index)
        board.write(lane, list(itertools.islice(self.values, count)))
        for message in board.uplink.outgoing(NOW_MS, self.mono_s):
            self.platform.take(*message)
        for ack in self.platform.commit():
            self.acknowledge(*ack)

    @rule(index=BOARDS)
    def connect(self, index: int) -> None:
        self.board(index).uplink.disconnected()
        self.board(index).uplink.connected(self.mono_s)

    @rule(seconds=st.sampled_from([0.5, 3.0, 20.0]))
    def pass_time(self, seconds: float) -> None:
        self.mono_s += seconds

    @precondition(lambda self: any(self.may_die(board) for board in self.boards))
    @rule(index=BOARDS, lane=LANE, how=st.sampled_from(["kill", "power", "half"]))
    def kill_gateway(self, index: int, lane: Lane, how: str) -> None:
        board = self.board(index)
        if not self.may_die(board):
            return
        board.spool.append(lane, [Reading("d", NOW_MS, {METRIC[lane]: 0.0})], NOW_MS)  # never committed
        if how == "half":
            folder = FOLDER / lane.topic
            body = columns_body([Reading("d", NOW_MS, {METRIC[lane]: float(next(self.values))})])
            last = folder / segment_name(segments(board.disk, folder)[-1])
            board.disk.files[last].now += pack(Record(board.spool.next_seq(lane), NOW_MS, 1, body))
        if how != "kill":
            board.disk.crash()
        board.start()

    def may_die(self, board: Board) -> bool:
        """A restored card that starts twice before it hears from ingest is beyond the contract (docs/wire.md)."""
        return self.copy is not board or not board.uplink.asking

    @rule(index=BOARDS)
    def run_out_of_space(self, index: int) -> None:
        board = self.board(index)
        used = sum(len(file.now) for path, file in board.disk.files.items() if path.suffix == ".seg")
        board.spool.limit_bytes = used // 4
        board.commit()
        board.spool.limit_bytes = 1 << 20

    @rule(index=BOARDS)
    def move_card(self, index: int) -> None:
        """The board died: its card goes on in another one."""
        board = self.board(index)
        board.serial += "'"
        board.start()
        board.uplink.connected(self.mono_s)

    @rule(index=BOARDS, lane=LANE, room=st.sampled_from([0, 100, 600]), uplink=st.booleans())
    def fill_the_disk(self, index: int, lane: Lane, room: int, uplink: bool) -> None:
        """Somebody else fills the card while something is written, and acknowledged; then there is room again."""
        board = self.board(index)
        board.disk.capacity = board.disk.used() + room
        board.refused(lane, [next(self.values) for _ in range(5)])
        if uplink:
            self.up += board.uplink.outgoing(NOW_MS, self.mono_s)
            for ack in self.down:
                self.acknowledge(*ack)
        board.disk.capacity = None

    @precondition(lambda self: len(self.boards) < 3)
    @rule(index=BOARDS)
    def clone_card(self, index: int) -> None:
        clone = self.board(index).twin(f"B{len(self.boards)}")
        clone.start()
        clone.uplink.connected(self.mono_s)
        assert clone.spool.epoch != self.board(index).spool.epoch
        self.boards.append(clone)

    @precondition(lambda self: self.copy is None and self.boards[0].readable())
    @rule()
    def keep_a_copy(self) -> None:
        self.copy = self.boards[0].twin(self.boards[0].serial)

    @precondition(lambda self: self.copy is not None and self.copy is not self.boards[0])
    @rule()
    def restore_the_copy(self) -> None:
        """The card comes back as it was; what it held later and the log has not is gone with it."""
        assert self.copy is not None
        self.boards[0] = self.copy
        self.up.clear()
        self.down.clear()
        self.copy.start()
        self.copy.uplink.connected(self.mono_s)

    # the network

    @precondition(lambda self: self.up)
    @rule(which=WHICH, fate=st.sampled_from(["take", "take", "take", "repeat", "lose"]))
    def up_one(self, which: int, fate: str) -> None:
        index = which % len(self.up)
        message = self.up[index] if fate == "repeat" else self.up.pop(index)
        if fate != "lose":
            self.platform.take(*message)

    @precondition(lambda self: self.up)
    @rule(most=st.integers(1, 80))
    def up_in_order(self, most: int) -> None:
        for message in self.up[:most]:
            self.platform.take(*message)
        del self.up[:most]

    @precondition(lambda self: self.down)
    @rule(which=WHICH, fate=st.sampled_from(["take", "take", "take", "repeat", "lose"]))
    def down_one(self, which: int, fate: str) -> None:
        index = which % len(self.down)
        ack = self.down[index] if fate == "repeat" else self.down.pop(index)
        if fate != "lose":
            self.acknowledge(*ack)

    def acknowledge(self, topic: str, payload: bytes) -> None:
        for board in self.boards:  # boards with one gateway's name hear the same topic
            board.uplink.incoming(topic, payload, self.mono_s)

    # the platform

    @rule()
    def commit(self) -> None:
        self.down += self.platform.commit()

    @rule(power=st.booleans())
    def kill_ingest(self, power: bool) -> None:
        self.platform.die(power=power)

    @precondition(lambda self: self.platform.log)
    @rule(which=WHICH)
    def forge(self, which: int) -> None:
        """Send a logged number with other content: no acknowledgement (`Platform.commit` compares), and one report."""
        recent = [one for one in self.platform.log if one[2] > self.platform_position(one[0], one[1]) - 20]
        lane, epoch, seq, _ = recent[which % len(recent)]
        body = columns_body([Reading("d", NOW_MS, {METRIC[lane]: 0.5})])
        self.platform.take(f"cb/v1/0/{GATEWAY}/{lane.topic}", columns_message(Header(epoch, seq, 1, NOW_MS), body))
        before = self.platform.models[lane].conflict
        assert before
        self.down += self.platform.commit()
        assert any(str(epoch) in fault.reason for fault in self.platform.faults)

    def platform_position(self, lane: Lane, epoch: int) -> int:
        return dict(self.platform.models[lane].expected)[epoch]

    # what must hold

    @invariant()
    def nothing_is_freed_before_it_is_in_the_log(self) -> None:
        logged = self.platform.logged()
        for board in self.boards:
            for lane, written in board.written.items():
                floor = board.spool.floor(lane)
                assert floor <= board.spool.next_seq(lane)
                for seq in range(1, floor):
                    assert written[seq] in logged or written[seq] in board.evicted

    @invariant()
    def the_log_has_each_message_once_and_in_order(self) -> None:
        last: dict[tuple[Lane, int], int] = {}
        for lane, epoch, seq, _ in self.platform.log:
            assert seq > last.get((lane, epoch), 0)
            last[lane, epoch] = seq
            assert seq >= self.boards[0].begins[epoch][lane], "acknowledged, and in the log once more"

    def teardown(self) -> None:
        try:
            self.drain()
        finally:
            shutil.rmtree(self.root)

    def drain(self) -> None:
        self.up.clear()
        self.down.clear()
        for board in self.boards:
            board.uplink.connected(self.mono_s)
        for _ in range(100):
            self.mono_s += 10.0
            for board in self.boards:
                for message in board.uplink.outgoing(NOW_MS, self.mono_s):
                    self.platform.take(*message)
            for ack in self.platform.commit():
                self.acknowledge(*ack)
        self.nothing_is_freed_before_it_is_in_the_log()
        self.the_log_has_each_message_once_and_in_order()
        logged = self.platform.logged()
        for board in self.boards:
            assert board.uplink.idle()
            for written in board.written.values():
                assert set(written.values()) <= logged | board.evicted
        self.check_what_is_lost()

    def check_what_is_lost(self) -> None:
        """What is missing between an epoch's first and last message was evicted, and ingest counted it."""
        evicted = {
            (lane, seq)
            for board in self.boards
            for lane, written in board.written.items()
            for seq, checksum in written.items()
            if checksum in board.evicted
        }
        missing = 0
        before: dict[tuple[Lane, int], int] = {}
        for lane, epoch, seq, _ in self.platform.log:
            gap = range(before.get((lane, epoch), seq - 1) + 1, seq)
            missing += len(gap)
            assert self.copy is not None or {(lane, number) for number in gap} <= evicted
            before[lane, epoch] = seq
        assert self.platform.counters.values["lost_total{reason=evicted}"] >= missing


TestWire = Wire.TestCase
TestWire.settings = settings(
    max_examples=100, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)


class Line:
    """One board, the platform, and a network that decides by `fates` which message or answer is lost."""

    def __init__(self, root: Path, fates: list[bool]) -> None:
        self.platform = Platform(root)
        self.epochs = itertools.count(1)
        self.values = itertools.count(1)
        self.board = Board("A", LossyFiles(), self.epochs)
        self.mono_s = 0.0
        self._fates = iter(fates)

    def write(self, lane: Lane, count: int) -> None:
        self.board.write(lane, list(itertools.islice(self.values, count)))

    def put_in(self, board: Board) -> None:
        self.board = board
        board.start()
        board.uplink.connected(self.mono_s)

    def rounds(self, count: int) -> None:
        for _ in range(count):
            self.mono_s += 10.0
            for message in self.board.uplink.outgoing(NOW_MS, self.mono_s):
                if next(self._fates, True):
                    self.platform.take(*message)
            for ack in self.platform.commit():
                if next(self._fates, True):
                    self.board.uplink.incoming(*ack, self.mono_s)
            self.check()

    def check(self) -> None:
        logged = self.platform.logged()
        for lane, written in self.board.written.items():
            assert {written[seq] for seq in range(1, self.board.spool.floor(lane))} <= logged

    def drain(self) -> None:
        self.rounds(60)
        assert self.board.uplink.idle()
        self.check()


@given(
    before=st.integers(1, 5),
    later=st.integers(0, 90),
    new=st.integers(0, 90),
    fates=st.lists(st.booleans(), max_size=60),
    settled=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_a_card_restored_from_an_older_copy_loses_nothing(
    before: int, later: int, new: int, fates: list[bool], settled: bool
) -> None:
    with tempfile.TemporaryDirectory(prefix="protocol-") as root:
        line = Line(Path(root), [True] * 400 if settled else fates)
        line.board.uplink.connected(0.0)
        for lane in Lane:
            line.write(lane, before)
        line.rounds(2)
        copy_ = line.board.twin("A")
        line.write(Lane.TELEMETRY, later)
        line.rounds(4)
        line._fates = iter(fates)
        line.put_in(copy_)
        for lane in Lane:
            line.write(lane, new)
        line.drain()
        assert not line.platform.faults


@pytest.mark.parametrize("lane", list(Lane))
@pytest.mark.parametrize("count", [1, 40])
def test_a_restored_card_whose_question_is_evicted_begins_a_new_epoch(lane: Lane, count: int) -> None:
    """It has nothing left to compare, and its new messages have numbers that ingest knows with other contents."""
    wire = Wire()
    wire.connect_first()
    wire.keep_a_copy()
    wire.exchange(0, lane, 6)
    wire.restore_the_copy()
    wire.run_out_of_space(0)
    wire.board(0).write(lane, list(itertools.islice(wire.values, count)))
    for _ in range(4):
        wire.exchange(0, lane, 1)
        wire.nothing_is_freed_before_it_is_in_the_log()
    assert wire.board(0).uplink.counters.values["epochs_total{reason=restored}"] == 1
    wire.teardown()


@pytest.mark.parametrize("full", list(Lane))
@pytest.mark.parametrize("power", [False, True])
def test_kills_after_a_full_disk_double_nothing(full: Lane, power: bool) -> None:
    """A full disk evicts what a lane had acknowledged, so that its process cannot tell its numbers by a message."""
    wire = Wire()
    wire.connect_first()
    board = wire.board(0)
    for lane in Lane:
        wire.exchange(0, lane, 6)
    wire.drain()
    assert board.spool.spooled() == 0
    board.disk.capacity = board.disk.used()
    while board.spool.body(full, board.spool.next_seq(full) - 1) is not None:
        other = Lane.TELEMETRY if full is not Lane.TELEMETRY else Lane.EVENT
        board.refused(other, [next(wire.values)])
    board.disk.capacity = None
    for _ in range(3):
        wire.drain()
        if power:
            board.disk.crash()
        board.start()
        wire.drain()
    assert len({checksum for *_, checksum in wire.platform.log}) == len(wire.platform.log)
    assert board.uplink.counters.values["epochs_total{reason=restored}"] == 0
    wire.teardown()


@given(st.integers(1, 5), st.integers(1, 90), st.integers(1, 90))
@settings(max_examples=25, deadline=None)
def test_a_restored_card_that_starts_twice_is_noticed_or_harmless(before: int, later: int, new: int) -> None:
    """It wrote other messages under numbers that ingest has: they are not lost silently."""
    with tempfile.TemporaryDirectory(prefix="protocol-") as root:
        line = Line(Path(root), [])
        line.board.uplink.connected(0.0)
        line.write(Lane.TELEMETRY, before)
        line.rounds(3)
        copy_ = line.board.twin("A")
        line.write(Lane.TELEMETRY, later)
        line.rounds(9)
        line.board = copy_
        copy_.start()
        line.write(Lane.TELEMETRY, new)  # offline, and then once more without power
        line.put_in(copy_)
        line.rounds(30)
        assert line.board.uplink.idle() or line.platform.faults
        assert line.board.uplink.idle() != bool(line.platform.faults)


def test_the_examples_of_the_contract_are_true() -> None:
    text = (Path(__file__).parents[2] / "docs" / "wire.md").read_text(encoding="utf-8")
    blocks = [block.split("```")[0] for block in text.split("```json\n")[1:]]
    message = open_message(blocks[0].strip().encode())
    dump = next(block for block in text.split("```\n") if block.startswith("cb 01"))
    columns = columns_message(message.header, columns_body(readings_of(message)))
    assert columns == bytes.fromhex(dump)
    assert readings_of(open_message(columns)) == readings_of(message)
    assert decode_ack(blocks[1].encode()).seq == 41
    assert decode_status(blocks[2].encode()).online
