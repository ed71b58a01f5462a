"""Whether somebody is in a car, and trapped there, from a door magnet, a presence sensor and a button; pure.

Nobody enters or leaves a closed car: who was seen in it is in it until the doors open. A passive infrared sensor sees
motion only, so that a person is seen again and again, while a broken one says one thing for ever.
"""

from __future__ import annotations

import msgspec

SETTLED_S = 30.0  # after the doors have closed, who is inside has been seen
LONG_S = 60.0  # nobody moves for so long without a pause
HOLD_S = 10.0  # a sensor that fell silent beside an open door
STUCK_S = 600.0
BLIND_RIDES = 20  # with openings, and nobody seen
DEAD_DOOR_RIDES, OPEN_DOOR_RIDES = 6, 2  # without an opening; with the doors "open"
BOUNCE_S = 0.2
APART_S = 2.0  # two motions, and no flicker
BUTTON_S = 600.0  # a press says for so long that somebody is inside
ALARM_HOLD_S, ALARM_AGAIN_S = 60.0, 5.0
BUTTON, TRAPPED = 90, 93  # as the platform's rules number them (rules/library/elevators.yaml)


class Delays(msgspec.Struct, frozen=True):
    """How long a car stands before its passenger counts as trapped, in s: outside a door zone, there with the button
    pressed, and levelled or unknown. 15 and 90 s are from one source, the field wanted 45 s (docs/domain.md)."""

    outside_s: float = 45.0
    pressed_s: float = 15.0
    levelled_s: float = 90.0


class Bounced:
    """A contact: a change counts once it has lasted `BOUNCE_S`."""

    def __init__(self) -> None:
        self.value: bool | None = None
        self._other_s: float | None = None

    def take(self, t_s: float, value: bool | None) -> bool:
        """Take what it says now; return whether its value changed."""
        if value is None or value == self.value:
            self._other_s = None
            return False
        if self._other_s is None and self.value is not None:
            self._other_s = t_s
            return False
        if self._other_s is not None and t_s - self._other_s < BOUNCE_S:
            return False
        self.value, self._other_s = value, None
        return True


class Cabin:
    """What is known of one car's doors and passengers. Times in s that never step back."""

    def __init__(self) -> None:
        self.door = Bounced()
        self._closed_s: float | None = None
        self._seen_s = float("-inf")  # motion, last
        self._seen_open_s = float("-inf")
        self._edge_s = float("-inf")
        self._rising_s: float | None = None  # since when the sensor says motion without a pause
        self._edges = 0  # motions that began since the doors closed
        self._early = False  # one of them before the car was settled
        self._rides_unseen = self._rides_closed = self._rides_open = 0

    @property
    def closed(self) -> bool | None:
        """Whether the doors are closed; None where the magnet cannot be right."""
        broken = self._rides_closed >= DEAD_DOOR_RIDES or self._rides_open >= OPEN_DOOR_RIDES
        return None if broken else self.door.value

    def step(self, t_s: float, *, door_closed: bool | None, motion: bool | None) -> bool:
        """Take one sample; return whether the doors opened or closed."""
        changed = self.door.take(t_s, door_closed)
        if changed:
            self._rides_open = self._rides_closed = 0
            self._closed_s = t_s if self.door.value else None
            self._edges, self._early = 0, False
        if motion:
            self._see(t_s)
        elif motion is not None:
            self._rising_s = None
        return changed

    def _see(self, t_s: float) -> None:
        self._seen_s, self._rides_unseen = t_s, 0
        if self._closed_s is None:
            self._seen_open_s = t_s
        if self._rising_s is not None:
            return
        self._rising_s = t_s
        if t_s - self._edge_s >= APART_S or not self._edges:
            self._edges, self._edge_s = self._edges + 1, t_s
        if self._closed_s is not None and t_s - self._closed_s <= SETTLED_S:
            self._early = True

    def rode(self) -> None:
        """Take a ride that is over, for what only rides show: a sensor that never changes."""
        self._rides_unseen += 1
        self._rides_closed += self.door.value is True
        self._rides_open += self.door.value is False

    def blind(self, t_s: float) -> str:
        """Return why the presence sensor cannot be right; empty where it can."""
        if self._rising_s is not None and t_s - self._rising_s > STUCK_S:
            return f"the presence sensor says motion for {STUCK_S / 60:.0f} min without a pause"
        if self._rides_unseen >= BLIND_RIDES:
            return f"the presence sensor saw nobody in {BLIND_RIDES} rides"
        return ""

    def dead_door(self) -> str:
        """Return why the door magnet cannot be right; empty where it can."""
        if self._rides_closed >= DEAD_DOOR_RIDES:
            return f"the door magnet saw no opening in {DEAD_DOOR_RIDES} rides"
        return f"the car rides while the door magnet says open ({OPEN_DOOR_RIDES} times)" if self.closed is None else ""

    def occupied(self, t_s: float) -> bool | None:
        """Return whether somebody is inside; None where the sensor cannot be right."""
        return None if self.blind(t_s) else self.evidence(t_s) > 0

    def evidence(self, t_s: float) -> int:
        """Return how sure that is: 0 nobody was seen, 1 once, 2 repeatedly in the closed car."""
        if self._closed_s is None or self.closed is None:
            return int(t_s - self._seen_s <= (HOLD_S if self.closed is False else LONG_S))
        if self._edges >= 2:
            return 2
        inside_s = t_s - self._closed_s
        carried_over = self._rising_s is not None and self._rising_s <= self._closed_s and inside_s <= LONG_S
        came_in = self._closed_s - self._seen_open_s <= HOLD_S and inside_s <= HOLD_S
        return int(self._early or carried_over or came_in)


# How certain it is that somebody is trapped: (button pressed, seen) → outside a door zone, levelled or unknown. Our
# choice [U]: a bare button may be play, one motion a draught, and a car that stands between floors is no ordinary stop.
CERTAINTIES = {
    (True, 2): (1.0, 0.95),
    (True, 1): (0.95, 0.9),
    (True, 0): (0.6, 0.5),
    (False, 2): (0.9, 0.8),
    (False, 1): (0.6, 0.4),
    (False, 0): (0.0, 0.0),
}
DOORS_UNKNOWN = 0.8


class Trap:
    """Whether somebody is trapped: somebody inside, standing, doors not open, for long enough; nobody at service.

    Once told it is over only where the doors open, the car rides, or somebody serves it: a sensor that falls silent
    frees nobody.
    """

    def __init__(self, delays: Delays, tell_at: float) -> None:
        self.certainty = 0.0
        self.code = 0
        self.known = False  # after a start nobody knows who is inside, until the car was free once or somebody is seen
        self._delays = delays
        self._tell_at = tell_at
        self._since_s: float | None = None
        self._pressed = False
        self._pressed_s = self._button_s = float("-inf")

    def press(self, t_s: float, pressed: bool | None) -> bool:
        """Take the button; return whether this is a press that is to be told at once."""
        began = bool(pressed) and not self._pressed
        self._pressed = bool(pressed)
        if pressed:
            self._pressed_s = t_s
        if not began or t_s - self._button_s < ALARM_AGAIN_S:
            return False
        self._button_s = t_s
        return True

    def step(
        self, t_s: float, *, seen: int, standing: bool, closed: bool | None, outside: bool | None, service: bool
    ) -> None:
        """Judge the car as it is now. seen: 0–2 (`Cabin.evidence`); `code` and `certainty` are what comes of it."""
        free = not standing or closed is False or service
        if free:
            self._since_s, self.certainty = None, 0.0
        else:
            self._since_s = t_s if self._since_s is None else self._since_s
            self._weigh(t_s, seen, closed, outside is True)
        self.known = self.known or free or self.certainty > 0
        if self.certainty >= self._tell_at:
            self.code = TRAPPED
        elif free or self.code != TRAPPED:
            self.code = BUTTON if t_s - self._pressed_s < ALARM_HOLD_S else 0

    def _weigh(self, t_s: float, seen: int, closed: bool | None, outside: bool) -> None:
        assert self._since_s is not None
        pressed = t_s - self._pressed_s < BUTTON_S
        delays = self._delays
        wait_s = (delays.pressed_s if pressed else delays.outside_s) if outside else delays.levelled_s
        if t_s - self._since_s < wait_s:
            return
        certainty = CERTAINTIES[pressed, seen][0 if outside else 1] * (DOORS_UNKNOWN if closed is None else 1.0)
        self.certainty = max(self.certainty, certainty)
