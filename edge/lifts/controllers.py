"""What a lift controller's frames mean: one adapter a region, and what is known of each car; pure.

Frame types, the same in every region: 1 run state, 2 fault, 3 event, 4 alarm. An adapter knows how a region writes
their payloads, its code table what the numbers mean.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import ClassVar

import msgspec

from citybrain.config import Duration
from citybrain.model import Lane, Reading
from edge.codes import Code, codes_of
from edge.frames import Frame
from edge.report import Report, Reporter

RUN_STATE, FAULT, EVENT, ALARM = 1, 2, 3, 4
KINDS = {FAULT: "fault", EVENT: "event", ALARM: "alarm"}
MODES, DIRECTIONS = 8, 3
DOOR_ZONE, DOOR_CLOSED, OCCUPIED = 1, 2, 4
# A press of the button lasts a second, the rules look at it for two: its end is told this long after the last press.
ALARM_HOLD_MS = 60_000
BUTTON, TRAPPED = 90, 93  # as the platform's rules number them
UNSERVED = (0, 1, 5, 6, 7)  # modes in which nobody is at the car who knows (rules/library/elevators.yaml)
# How certain it is that somebody is trapped, with a passenger in a car that stands [U]: the controller itself says so;
# the button between floors; at a landing; at a landing with open doors, where he can walk out.
TOLD, PRESSED_OUTSIDE, PRESSED_LEVELLED, PRESSED_OPEN = 1.0, 0.95, 0.9, 0.5
ALARM_AGAIN_MS = 5_000  # an alarm that is told again and again is a press each time, but no more than that often


class RunState(msgspec.Struct, frozen=True):
    """How a car stands. direction: 0 none, 1 up, 2 down; mode: 0–7 (docs/domain.md); active: the gravest code that
    holds, 0 for none, so that a lost code frame is mended by the next run state."""

    mode: int
    direction: int
    door_zone: bool
    door_closed: bool
    occupied: bool
    floor: int
    active: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.mode < MODES or not 0 <= self.direction < DIRECTIONS:
            raise ValueError(f"mode {self.mode}, direction {self.direction}: there are 0–7 and 0–2")
        if not -20 <= self.floor <= 200:
            raise ValueError(f"floor {self.floor}: expected -20 to 200")


class Occurrence(msgspec.Struct, frozen=True):
    """A code that begins or is over. kind: that of the frame, `fault`, `event` or `alarm`."""

    kind: str
    code: int
    begun: bool = True


class Adapter:
    """Reads payloads as most controllers write them; `table` is the region's.

    Run state, 7 bytes: mode, direction, bits (1 door zone, 2 door closed, 4 passenger), floor (int16), active (uint16).
    Code, 3 bytes: 1 begun or 0 over, code (uint16).
    """

    table: ClassVar[str] = "gbt24476_2017"

    def read(self, frame: Frame) -> RunState | Occurrence:
        """Return what a frame says; raises ValueError where its payload is none of its type."""
        try:
            if frame.type == RUN_STATE:
                return self.run_state(frame.payload)
            if frame.type in KINDS:
                return self.occurrence(KINDS[frame.type], frame.payload)
        except struct.error:
            raise ValueError(f"type {frame.type} with {len(frame.payload)} bytes") from None
        raise ValueError(f"no frame type {frame.type}")

    def write(self, told: RunState | Occurrence) -> tuple[int, bytes]:
        """Return the type and payload that say this, as the controller does."""
        if isinstance(told, RunState):
            return RUN_STATE, self.run_state_bytes(told)
        kind = next(number for number, name in KINDS.items() if name == told.kind)
        return kind, self.occurrence_bytes(told)

    def run_state(self, payload: bytes) -> RunState:
        mode, direction, bits, floor, active = struct.unpack(">BBBhH", payload)
        flags = (bool(bits & DOOR_ZONE), bool(bits & DOOR_CLOSED), bool(bits & OCCUPIED))
        return RunState(mode, direction, *flags, floor, active)

    def run_state_bytes(self, state: RunState) -> bytes:
        bits = DOOR_ZONE * state.door_zone | DOOR_CLOSED * state.door_closed | OCCUPIED * state.occupied
        return struct.pack(">BBBhH", state.mode, state.direction, bits, state.floor, state.active)

    def occurrence(self, kind: str, payload: bytes) -> Occurrence:
        begun, code = struct.unpack(">BH", payload)
        return Occurrence(kind, code, bool(begun))

    def occurrence_bytes(self, told: Occurrence) -> bytes:
        return struct.pack(">BH", told.begun, told.code)


class Regional93(Adapter):
    """The usual payloads; a trapped passenger is 93."""

    table = "regional_93"


class Regional11(Adapter):
    """Codes are two BCD digits, the floor is what the display shows (`B2`, `-1`, `01`); a trapped passenger is 11.

    Run state, 8 bytes: mode, direction, door zone, door closed, passenger (a byte each), floor (2 characters), active.
    Code, 2 bytes: 0 over or 1 begun, code.
    """

    table = "regional_11"

    def run_state(self, payload: bytes) -> RunState:
        mode, direction, zone, closed, occupied, shown, active = struct.unpack(">BBBBB2sB", payload)
        return RunState(mode, direction, bool(zone), bool(closed), bool(occupied), _floor(shown), _from_bcd(active))

    def run_state_bytes(self, state: RunState) -> bytes:
        shown = f"B{-state.floor}" if state.floor < 0 else f"{state.floor:02}"
        flags = (state.door_zone, state.door_closed, state.occupied)
        return struct.pack(">BBBBB2sB", state.mode, state.direction, *flags, shown.encode(), _bcd(state.active))

    def occurrence(self, kind: str, payload: bytes) -> Occurrence:
        begun, code = struct.unpack(">BB", payload)
        return Occurrence(kind, _from_bcd(code), bool(begun))

    def occurrence_bytes(self, told: Occurrence) -> bytes:
        return bytes((told.begun, _bcd(told.code)))


def _floor(shown: bytes) -> int:
    text = shown.decode("ascii", "replace").replace("B", "-")
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"floor {shown!r}: expected such as 01, B2 or -1") from None


def _bcd(number: int) -> int:
    return number // 10 << 4 | number % 10


def _from_bcd(byte: int) -> int:
    if byte >> 4 > 9 or byte & 15 > 9:
        raise ValueError(f"code {byte:#04x}: no two decimal digits")
    return 10 * (byte >> 4) + (byte & 15)


ADAPTERS: dict[str, Callable[[], Adapter]] = {
    "gbt24476_2017": Adapter,
    "regional_93": Regional93,
    "regional_11": Regional11,
}

Said = list[tuple[Lane, Reading]]


class Car:
    """What one car's controller said, and what of it is to be told: repetitions are left out.

    telemetry_ms, events_ms: how often floor and motion, and how often the state in the event lane, are told unchanged.
    """

    def __init__(self, device: str, codes: dict[int, Code], telemetry_ms: int, events_ms: int) -> None:
        self._device = device
        self._codes = codes
        self._telemetry = Reporter(Report(Duration(telemetry_ms)))
        self._events = Reporter(Report(Duration(events_ms)))
        self._state: RunState | None = None
        self._active: dict[int, int] = {}  # numbers of what holds, with when it was told last
        self._released: set[int] = set()  # alarms that are over, and told as such later
        self._certainty = 0.0  # that somebody is trapped
        self._none_told = False  # was it said since the start whether anything holds

    def state(self, state: RunState, at_ms: int) -> Said:
        """Take a run state; return what is new in it. An active code that is in no table says nothing."""
        self._state = state
        moves = {"floor": float(state.floor), "moving": float(state.direction != 0)}
        said: Said = [(Lane.TELEMETRY, one)] if (one := self._telemetry.filter(self._reading(at_ms, moves))) else []
        event = self._events.filter(self._reading(at_ms, self._evidence()))
        codes = self._active_code(state.active, at_ms)
        if event is not None and not codes:  # a code has all of it with it
            said.append((Lane.EVENT, event))
        return said + codes

    def _active_code(self, code: int, at_ms: int) -> Said:
        known = self._codes.get(code)
        if not code:
            return self._over(set(self._active), at_ms)
        if known is None:
            return []
        if known.number not in self._active:
            return self._begin(known, at_ms)
        self._released.discard(known.number)
        return []

    def odd(self, told: RunState | Occurrence) -> str:
        """Return what is wrong with a code that was told; empty where nothing is."""
        code = told.active if isinstance(told, RunState) else told.code
        known = code in self._codes or (isinstance(told, RunState) and not code)
        return "" if known else f"code {code} is in no table of this region; is it the right one?"

    def occurrence(self, told: Occurrence, at_ms: int) -> Said:
        """Take a code; return what is to be told at once. One that is in no table says nothing."""
        known = self._codes.get(told.code)
        if known is None:
            return []
        if known.kind == "event":
            return self._tell(known.number, at_ms) if told.begun else []
        if not told.begun:
            return self._over({known.number} & set(self._active), at_ms)
        since_ms = self._active.get(known.number)
        if since_ms is not None and (known.kind == "fault" or 0 <= at_ms - since_ms < ALARM_AGAIN_MS):
            self._released.discard(known.number)
            return []
        return self._begin(known, at_ms)

    def tick(self, at_ms: int) -> Said:
        """Tell what waited: the end of an alarm."""
        return self._over(set(self._released), at_ms) if self._released else []

    def _begin(self, known: Code, at_ms: int) -> Said:
        self._active[known.number] = at_ms
        self._released.discard(known.number)
        return self._tell(known.number, at_ms)

    def _over(self, numbers: set[int], at_ms: int) -> Said:
        """End what holds; where nothing is left, or nothing was known yet, say that nothing holds."""
        alarms = {one.number for one in self._codes.values() if one.kind == "alarm"}
        held = {one for one in numbers & alarms if 0 <= at_ms - self._active[one] < ALARM_HOLD_MS}
        self._released |= held
        for number in numbers - held:
            del self._active[number]
            self._released.discard(number)
        if self._active or (self._none_told and not numbers):
            return []
        return self._tell(0, at_ms)

    def _tell(self, number: int, at_ms: int) -> Said:
        """A code goes behind its evidence: who judges it looks at what came before."""
        self._none_told = True
        return [(Lane.EVENT, self._reading(at_ms, self._evidence() | {"fault_code": float(number)}))]

    def _evidence(self) -> dict[str, float]:
        state = self._state
        if state is None:
            return {}
        return {
            "occupied": float(state.occupied),
            "door_closed": float(state.door_closed),
            "service_mode": float(state.mode),
            "trapped_certainty": self._judged(state),
        }

    def _judged(self, state: RunState) -> float:
        """Return how certain it is that somebody is trapped: all of it is known here, before any of it travels.

        A press lasts a second, being trapped does not: it ends where the car rides, stands open at a landing, is empty,
        or somebody serves it.
        """
        away = not state.occupied or state.direction != 0 or state.mode not in UNSERVED
        open_at_landing = state.door_zone and not state.door_closed
        if away or open_at_landing:
            self._certainty = 0.0
        now = PRESSED_LEVELLED if state.door_zone else PRESSED_OUTSIDE
        if TRAPPED in self._active:
            now = TOLD
        elif BUTTON not in self._active:
            now = 0.0
        elif open_at_landing:
            return PRESSED_OPEN
        if not away:
            self._certainty = max(self._certainty, now)
        return self._certainty

    def _reading(self, at_ms: int, values: dict[str, float]) -> Reading:
        return Reading(self._device, at_ms, values)


def car(device: str, adapter: Adapter, telemetry_ms: int, events_ms: int) -> Car:
    """Return a car of which nothing is known yet."""
    return Car(device, codes_of(adapter.table), telemetry_ms, events_ms)
