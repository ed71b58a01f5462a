"""Lift controllers on a pseudo-terminal: run states each second, codes at once, in a region's payloads.

    python -m simulators.lines.elevator --cars 2 --region regional_11

prints the port as JSON and rides until its input ends; every third ride of a car traps its passenger for two minutes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import msgspec

from edge.codes import codes_of
from edge.lifts.controllers import ADAPTERS, Occurrence, RunState
from simulators.lines.talker import Talker, Told, serve

EVERY_S = 1.0
IDLE = RunState(1, 0, door_zone=True, door_closed=True, occupied=False, floor=1)
RIDE_S, TRAPPED_S = 40.0, 120.0
FLOORS = 12


class Controllers:
    """The cars of one line, by station: how each stands, and what it says of a change."""

    def __init__(self, region: str, stations: range) -> None:
        self.adapter = ADAPTERS[region]()
        self.states = dict.fromkeys(stations, IDLE)

    def told(self, station: int, what: RunState | Occurrence) -> Told:
        """Return a frame's content."""
        kind, payload = self.adapter.write(what)
        return station, kind, payload

    def states_told(self, _: float = 0.0) -> list[Told]:
        """Return the run states of all cars."""
        return [self.told(station, state) for station, state in self.states.items()]


class Line:
    """Controllers on a wire. `start` and `stop`; `set` changes how a car stands, `say` tells a code."""

    def __init__(self, port: Path, region: str = "regional_93", cars: int = 1, baud: int = 9600) -> None:
        self.controllers = Controllers(region, range(1, cars + 1))
        self.talker = Talker(port, baud, self.controllers.states_told, EVERY_S / 5)

    def set(self, station: int, **changes: object) -> None:
        """Change how a car stands."""
        states = self.controllers.states
        states[station] = msgspec.structs.replace(states[station], **changes)

    def say(self, station: int, kind: str, code: int, *, begun: bool = True) -> None:
        """Tell a code now."""
        self.talker.say(self.controllers.told(station, Occurrence(kind, code, begun)))


def ride(at_s: float, station: int, trapped: int) -> tuple[RunState, Occurrence | None]:
    """Return how a car stands at a time of its endless rides, and the code that it tells once at that second."""
    number, inside_s = divmod(at_s + 7 * station, 3 * RIDE_S + TRAPPED_S)
    here, there = 1 + int(number) * 5 % FLOORS, 1 + (int(number) + 1) * 5 % FLOORS
    part_s = inside_s % RIDE_S if inside_s < 3 * RIDE_S else inside_s - 3 * RIDE_S
    if inside_s >= 3 * RIDE_S:
        state = RunState(1, 0, door_zone=False, door_closed=True, occupied=True, floor=here, active=trapped)
        return state, Occurrence("alarm", trapped) if part_s < EVERY_S else None
    boarding, riding = part_s < 5, 8 <= part_s < 25
    state = RunState(
        1,
        (1 if there > here else 2) if riding else 0,
        door_zone=not riding,
        door_closed=not boarding and part_s < 30,
        occupied=part_s < 34,
        floor=here + round((there - here) * min(1.0, max(0.0, (part_s - 8) / 17))),
    )
    return state, None


def main() -> int:
    """Ride until the input ends."""
    parser = argparse.ArgumentParser(prog="python -m simulators.lines.elevator", description=__doc__)
    parser.add_argument("--cars", type=int, default=1)
    parser.add_argument("--region", choices=sorted(ADAPTERS), default="regional_93")
    parser.add_argument("--baud", type=int, default=9600)
    args = parser.parse_args()
    controllers = Controllers(args.region, range(1, args.cars + 1))
    codes = codes_of(ADAPTERS[args.region]().table)
    trapped = next((code for code, one in codes.items() if one.number == 93), 4)

    def source(at_s: float) -> list[Told]:
        said: list[Told] = []
        for station in controllers.states:
            controllers.states[station], code = ride(at_s, station, trapped)
            said += [controllers.told(station, code)] if code is not None else []
        return said + controllers.states_told()

    return serve("lifts", args.baud, source, EVERY_S)


if __name__ == "__main__":
    raise SystemExit(main())
