"""A real water network under simulated demand: what its pressure sensors would say, with bursts and open hydrants.

EPANET solves it (through WNTR), every 5 minutes, with pressure-dependent demand. It is a steady-state solver: there is
no water hammer, and what happens within a step is there at its end. Flows in L/s, pressures in MPa, times in seconds
since the beginning. Everything is drawn from the seed.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import networkx
import numpy as np
import wntr

from citybrain.errors import ConfigError

STEP_S = 300
DAY_S = 86_400
HOUR_S = 3600
MPA_PER_M = 0.00980665
SENSORS = 55
NOISE_MPA = 0.005
HISTORY_DAYS = 5
EVENT_DAYS = 9  # at least
APART_S = 2 * HOUR_S
DURATION_S = (HOUR_S // 2, 3 * HOUR_S)
FLOWS_LPS = {"burst": (10.0, 60.0), "hydrant": (5.0, 30.0)}
FELT_MPA, FELT_BY, FELT_WITHIN_S = 0.025, 3, 30 * 60
REQUIRED_M = 14.0  # full demand from here on: the static pressure a hydrant must have (GB 50974-2014 7.2.8) [U]
LEAST_MPA = 0.20  # a sensor stands where the least pressure of an ordinary day is well above 0.14 MPa: hydrants do
GROUPS = 8  # districts whose demand varies together
# Of an ordinary residential day, hour by hour, mean 1: our choice [U], after the usual two peaks.
DAILY = (0.45, 0.38, 0.35, 0.35, 0.42, 0.70, 1.15, 1.50, 1.45, 1.25, 1.12, 1.10,
         1.15, 1.08, 1.00, 0.98, 1.02, 1.18, 1.40, 1.52, 1.38, 1.12, 0.85, 0.60)  # fmt: skip
GROUP_SIGMA, GROUP_HOURS = 0.08, 2.0  # of a group's demand around its day, and how long a deviation lasts [U]
DAY_SIGMA = 0.05  # of a whole day's demand [U]


class Event(msgspec.Struct, frozen=True):
    """A burst or an open hydrant: `flow_lps` at `node` in [start_s, end_s), multiples of a step."""

    kind: str
    node: str
    start_s: int
    end_s: int
    flow_lps: float


class Sensor(msgspec.Struct, frozen=True):
    """A pressure sensor at a node; `phase_s` is when, in each step, it reports. x, y: the network's own coordinates."""

    node: str
    zone: str
    phase_s: int
    x: float
    y: float


class Network:
    """A network ready to be run; raises ConfigError where the file is none."""

    def __init__(
        self,
        path: Path,
        seed: int,
        events: int,
        history_days: int = HISTORY_DAYS,
        event_days: int = EVENT_DAYS,
    ) -> None:
        self.name = path.stem
        self.seed = seed
        self._demands: dict[Event, Any] = {}
        self.history_days = history_days
        self.days = history_days + max(event_days, math.ceil(events * 6 / 24))  # 6 h for each leave room to spread
        self.model = _load(path)
        _prepare(self.model, self.days * DAY_S)
        _vary(self.model, self.days, np.random.default_rng([seed, 1]))
        self.quiet = self.run([])
        self.sensors = _sensors(self.model, self.quiet, np.random.default_rng([seed, 2]))
        self.columns = [self.nodes.index(sensor.node) for sensor in self.sensors]

    @property
    def nodes(self) -> list[str]:
        names: list[str] = self.model.junction_name_list
        return names

    def run(self, events: Sequence[Event], until_s: int | None = None) -> Any:
        """Return the pressure of all junctions (steps × junctions, MPa) with these events."""
        for event in events:
            self._demand(event).base_value = event.flow_lps / 1000  # m³/s
        self.model.options.time.duration = self.days * DAY_S if until_s is None else until_s
        try:
            return _solve(self.model)
        finally:
            for event in events:
                self._demand(event).base_value = 0.0

    def _demand(self, event: Event) -> Any:
        """Return an event's own demand, put into the network the first time: nothing, until a run says otherwise."""
        if event not in self._demands:
            name, multipliers = f"event-{len(self._demands)}", np.zeros(self.days * DAY_S // STEP_S + 1)
            multipliers[event.start_s // STEP_S : event.end_s // STEP_S] = 1.0
            self.model.add_pattern(name, multipliers.tolist())
            junction = self.model.get_node(event.node)
            junction.add_demand(0.0, name, category=name)
            self._demands[event] = junction.demand_timeseries_list[-1]
        return self._demands[event]

    def plan(self, count: int) -> list[Event]:
        """Draw `count` events over the days after the history, at least 2 h apart, half of them bursts."""
        rng = np.random.default_rng([self.seed, 3])
        kinds = ["burst", "hydrant"] * (count // 2 + 1)
        length = [int(rng.integers(DURATION_S[0] // STEP_S, DURATION_S[1] // STEP_S + 1)) for _ in range(count)]
        room = (self.days - self.history_days) * DAY_S // STEP_S - sum(length) - (count + 1) * (APART_S // STEP_S)
        gaps = np.sort(rng.integers(0, room + 1, count))
        anywhere = self._burstable()
        events, at = [], self.history_days * DAY_S // STEP_S
        for number in range(count):
            kind = kinds[number]
            start = at + int(gaps[number]) + (number + 1) * (APART_S // STEP_S) + sum(length[:number])
            low, high = FLOWS_LPS[kind]
            node = (
                str(rng.choice(anywhere))
                if kind == "burst"
                else self.sensors[int(rng.integers(len(self.sensors)))].node
            )
            flow_lps = round(float(rng.uniform(low, high)), 1)
            events.append(Event(kind, node, start * STEP_S, (start + length[number]) * STEP_S, flow_lps))
        return events

    def _burstable(self) -> list[str]:
        """Return the junctions that carry pressure all day: the others are suction sides and dry ends."""
        least = self.quiet.min(axis=0)
        return [node for node, lowest in zip(self.nodes, least, strict=True) if lowest >= 0.1]

    def felt_mpa(self, event: Event, before: Sequence[Event], with_it: Any) -> float:
        """Return how much lower the third-most affected sensor is within 30 min than in a twin run without the event.

        before: the events that began earlier; what comes later changes nothing. with_it: the run with all events.
        """
        until_s = event.start_s + FELT_WITHIN_S
        window = slice(event.start_s // STEP_S, until_s // STEP_S + 1)
        without = self.run(before, until_s)
        lower = without[window][:, self.columns] - with_it[window][:, self.columns]
        return float(np.sort(lower, axis=1)[:, -FELT_BY].max())

    def reports(self, pressure: Any) -> list[tuple[int, Sensor, float]]:
        """Return (time in s, sensor, MPa) of all reports in the order of their times, with the sensors' noise."""
        noise = np.random.default_rng([self.seed, 4]).normal(0.0, NOISE_MPA, (len(pressure), len(self.sensors)))
        said = np.round(np.maximum(pressure[:, self.columns] + noise, 0.0), 4)
        order = sorted(range(len(self.sensors)), key=lambda number: self.sensors[number].phase_s)
        return [
            (step * STEP_S + self.sensors[number].phase_s, self.sensors[number], float(said[step, number]))
            for step in range(len(said))
            for number in order
        ]


def _load(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return wntr.network.WaterNetworkModel(str(path))
    except FileNotFoundError:
        raise ConfigError(str(path), "no such network file (EPANET .inp)") from None
    except Exception as error:  # noqa: BLE001  WNTR raises whatever its parser stumbles over
        raise ConfigError(str(path), f"WNTR cannot read it: {error}") from None


def _prepare(model: Any, duration_s: int) -> None:
    """Set steps, pressure-dependent demand and patterns of one step; repeat what a shorter file controls by time."""
    time = model.options.time
    repeat = int(time.pattern_timestep) // STEP_S
    if time.pattern_timestep % STEP_S or not repeat:
        raise ConfigError(
            f"{model.name} [TIMES] Pattern Timestep", f"expected a multiple of 5 min, got {time.pattern_timestep} s"
        )
    for _, pattern in model.patterns():
        pattern.multipliers = np.repeat(pattern.multipliers, repeat)
    _repeat_controls(model, duration_s)
    time.duration, time.report_start, time.pattern_timestep = duration_s, 0, STEP_S
    time.hydraulic_timestep = time.report_timestep = time.quality_timestep = STEP_S
    model.options.quality.parameter = "NONE"
    hydraulic = model.options.hydraulic
    hydraulic.demand_model, hydraulic.required_pressure, hydraulic.minimum_pressure = "PDD", REQUIRED_M, 0.0


def _repeat_controls(model: Any, duration_s: int) -> None:
    """Let controls by simulation time go on: a file of a week says nothing of the week after."""
    timed = [c for _, c in model.controls() if isinstance(c.condition, wntr.network.controls.SimTimeCondition)]
    if not timed:
        return
    period_s = math.ceil(max(c.condition._threshold for c in timed) / DAY_S) * DAY_S
    for round_ in range(1, duration_s // period_s + 1):
        for number, control in enumerate(timed):
            at_s = control.condition._threshold + round_ * period_s
            condition = wntr.network.controls.SimTimeCondition(model, "=", at_s)
            model.add_control(
                f"again-{round_}-{number}", wntr.network.controls.Control(condition, control.actions()[0])
            )


def _vary(model: Any, days: int, rng: np.random.Generator) -> None:
    """Give each group of junctions a demand of its own: its pattern, times the day's level, times a slow deviation.

    Where the file's pattern is flat the ordinary day is put in its place.
    """
    steps = days * DAY_S // STEP_S + 1
    hours = np.arange(steps) * STEP_S / HOUR_S % 24
    daily = np.interp(hours, np.arange(25), (*DAILY, DAILY[0]))
    whole = np.repeat(rng.normal(1.0, DAY_SIGMA, days + 1), DAY_S // STEP_S)[:steps]
    factors = [whole * (1 + _deviation(steps, rng)) for _ in range(GROUPS)]
    groups = _groups(model, rng)
    made: dict[tuple[int, str], str] = {}
    for name, junction in model.junctions():
        for demand in junction.demand_timeseries_list:
            own = demand.pattern.multipliers if demand.pattern is not None else np.ones(1)
            key = (groups[name], demand.pattern.name if demand.pattern is not None else "")
            if key not in made:
                made[key] = f"group-{key[0]}-{len(made)}"
                base = np.resize(own, steps)
                if own.max() < own.min() * 1.1:
                    base = base * daily
                model.add_pattern(made[key], np.maximum(base * factors[key[0]], 0.0).tolist())
            demand.pattern_name = made[key]


def _deviation(steps: int, rng: np.random.Generator) -> Any:
    """Return a first-order autoregressive deviation."""
    keep = float(np.exp(-STEP_S / (GROUP_HOURS * HOUR_S)))
    drawn = rng.normal(0.0, GROUP_SIGMA * np.sqrt(1 - keep * keep), steps)
    found = np.empty(steps)
    level = 0.0
    for step in range(steps):
        level = keep * level + drawn[step]
        found[step] = level
    return found


def _groups(model: Any, rng: np.random.Generator) -> dict[str, int]:
    """Return each junction's group: the nearest of a few centres."""
    names = model.junction_name_list
    points = np.array([model.get_node(name).coordinates for name in names])
    centres = points[_spread(points, min(GROUPS, len(points)), int(rng.integers(len(points))))]
    nearest = ((points[:, None, :] - centres[None, :, :]) ** 2).sum(axis=2).argmin(axis=1)
    return dict(zip(names, map(int, nearest), strict=True))


def _spread(points: Any, count: int, first: int) -> list[int]:
    """Return `count` points far from each other, greedily: always the one farthest from all taken so far."""
    chosen = [first]
    distance = ((points - points[first]) ** 2).sum(axis=1)
    while len(chosen) < count:
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, ((points - points[chosen[-1]]) ** 2).sum(axis=1))
    return chosen


def _sensors(model: Any, quiet: Any, rng: np.random.Generator) -> list[Sensor]:
    """Return where the sensors stand: named hydrants first, then spread over what carries pressure all day."""
    names = model.junction_name_list
    least = quiet.min(axis=0)
    named = [name for name in names if name.upper().startswith("HY")][:SENSORS]
    rest = [name for name, low in zip(names, least, strict=True) if low >= LEAST_MPA and name not in set(named)]
    count = min(SENSORS - len(named), len(rest))
    points = np.array([model.get_node(name).coordinates for name in rest])
    chosen = [rest[number] for number in _spread(points, count, int(rng.integers(len(rest))))] if count else []
    if not named and not chosen:
        raise ConfigError(f"{model.name}", f"no junction has {LEAST_MPA} MPa all day: nowhere to put a sensor")
    zones = _zones(model)
    found = []
    for name in (*named, *chosen):
        x, y = model.get_node(name).coordinates
        found.append(Sensor(name, zones[name], int(rng.integers(STEP_S)), float(x), float(y)))
    return found


def _zones(model: Any) -> dict[str, str]:
    """Return each node's pressure zone: what open pipes connect; pumps, valves and closed pipes are borders."""
    graph = networkx.Graph()
    graph.add_nodes_from(model.node_name_list)
    for _, pipe in model.pipes():
        if pipe.initial_status != wntr.network.LinkStatus.Closed:
            graph.add_edge(pipe.start_node_name, pipe.end_node_name)
    parts = sorted(networkx.connected_components(graph), key=lambda part: (-len(part), min(part)))
    return {node: f"zone-{number:02d}" for number, part in enumerate(parts, 1) for node in part}


def _solve(model: Any) -> Any:
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="epanet-"))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # negative pressures at suction sides are the network's own
        stack.enter_context(contextlib.chdir(folder))  # the solver leaves its scratch files where it is started
        results = wntr.sim.EpanetSimulator(model).run_sim(file_prefix=str(Path(folder) / "run"))
    return results.node["pressure"][model.junction_name_list].to_numpy() * MPA_PER_M
