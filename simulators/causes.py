"""What can go wrong in the district and what only looks like it: kinds of causes, how often, how long, how strong.

docs/faults.md is the contract. Parameter ranges overlap those of the look-alikes wherever that table says what tells
them apart; all magnitudes are engineering choices [U] around docs/domain.md.
"""

from __future__ import annotations

import math
import random
from typing import Literal

import msgspec

from citybrain.clock import DAY_MS, HOUR_MS, MINUTE_MS, SECOND_MS
from citybrain.model import Device
from simulators.district import District

ANNOUNCED_MS = 60 * SECOND_MS  # a permitted use is entered this long before it starts
PERMIT_AFTER_MS = 2 * MINUTE_MS
REPORT_TAGS = {f"report_{hours}h": hours * HOUR_MS for hours in (1, 4, 12, 24)}
MAINS_REPORT_MS = MINUTE_MS
LOCAL_MS = 8 * HOUR_MS  # the district keeps UTC+8

Due = Literal["case", "rescue", "maintenance", "nothing"]
Wide = Literal["device", "zone", "building"]


class Kind(msgspec.Struct, frozen=True):
    """A kind of cause.

    at: the kind of device it happens to; needs: metrics the device must have; tag, without: tags it must have, or not.
    wide: whom it touches. zone_day, city_day: how many a day in the district of each size. minutes: how long it lasts.
    hours: local hours in which it begins. warm_reports: how many reports the device must have made before. after: for
    how many minutes it is felt when it is over.
    """

    name: str
    at: str
    zone_day: float
    city_day: float
    minutes: tuple[float, float]
    due: Due
    category: str | None = None
    department: str = ""
    wide: Wide = "device"
    needs: tuple[str, ...] = ()
    tag: str = ""
    without: str = ""
    hours: tuple[float, float] = (0, 24)
    warm_reports: int = 0
    after: float = 0.0


def _case(name: str, at: str, days: tuple[float, float], minutes: tuple[float, float], category: str, department: str,
          **more: object) -> Kind:  # fmt: skip
    return msgspec.convert({**more, "name": name, "at": at, "zone_day": days[0], "city_day": days[1],
                            "minutes": minutes, "due": more.get("due", "case"), "category": category,
                            "department": department}, Kind)  # fmt: skip


def _alike(name: str, at: str, days: tuple[float, float], minutes: tuple[float, float], **more: object) -> Kind:
    return msgspec.convert({**more, "name": name, "at": at, "zone_day": days[0], "city_day": days[1],
                            "minutes": minutes, "due": "nothing"}, Kind)  # fmt: skip


def _care(name: str, at: str, days: tuple[float, float], minutes: tuple[float, float], category: str, department: str,
          **more: object) -> Kind:  # fmt: skip
    return _case(name, at, days, minutes, category, department, due="maintenance", **more)


# Wide and long causes are placed first. Rates are far above a real district's: days must mean something in statistics.
# (a day in the zone, a day in the reference district), (shortest, longest in minutes)
KINDS = (
    _care("gateway_offline", "gateway", (2, 1.5), (4, 60), "gateway_offline", "sensor-ops"),
    _care("stuck_sensor", "hydrant", (0, 0.8), (480, 720), "sensor_stuck", "sensor-ops",
          needs=("pressure_mpa",), without="dry_barrel", warm_reports=4),
    _alike("drift", "hydrant", (0, 1), (1440, 4320), needs=("pressure_mpa",), without="dry_barrel"),
    _care("sensor_jump", "hydrant", (0, 1), (120, 360), "sensor_faulty", "sensor-ops",
          needs=("pressure_mpa",), without="dry_barrel", warm_reports=14),
    _care("device_dead", "hydrant", (0, 0.7), (12, 90), "device_offline", "sensor-ops"),
    _care("device_dead", "elevator", (1, 0.6), (12, 90), "device_offline", "sensor-ops"),
    _care("device_dead", "camera", (0, 0.6), (12, 90), "camera_offline", "camera-ops"),
    _care("device_dead", "pump_room", (0, 0.3), (12, 90), "device_offline", "sensor-ops"),
    _case("mains_burst", "hydrant", (3, 3), (40, 120), "water_main_burst", "water", wide="zone",
          needs=("pressure_mpa",), without="dry_barrel"),
    _case("pump_failure", "pump_room", (0, 1.2), (30, 90), "pump_failure", "pump-ops", wide="zone"),
    _alike("pump_switch", "hydrant", (1, 3), (20, 90), wide="zone", needs=("pressure_mpa",), without="dry_barrel"),
    _case("power_cut_occupied", "elevator", (3, 2), (10, 30), "elevator_trapped", "lift-rescue", due="rescue",
          wide="building"),
    _alike("power_cut_empty", "elevator", (3, 2), (10, 30), wide="building"),
    _care("battery_low", "hydrant", (3, 1.5), (150, 480), "battery", "sensor-ops", needs=("battery_v",)),
    _case("freezing", "hydrant", (0, 1.5), (150, 400), "hydrant_frozen", "water",
          needs=("temperature_c", "pressure_mpa"), without="dry_barrel"),
    _alike("frost", "hydrant", (0, 2), (150, 400), needs=("temperature_c",)),
    _case("slow_leak", "hydrant", (0, 2), (80, 400), "hydrant_leak", "water", needs=("water_present",)),
    _case("rough_ride", "elevator", (0, 2), (180, 300), "elevator_vibration", "lift-maintenance",
          needs=("vibration_rms_g",), hours=(7, 17), after=120),
    _case("machine_room_hot", "elevator", (0, 2), (75, 240), "elevator_hot", "lift-maintenance",
          needs=("temperature_c",)),
    _care("camera_lost", "camera", (0, 1.2), (8, 180), "camera_care", "camera-ops", needs=("signal",)),
    _care("camera_frozen", "camera", (0, 1.2), (40, 240), "camera_care", "camera-ops", needs=("motion",)),
    _care("camera_dirty", "camera", (0, 1.2), (50, 300), "camera_care", "camera-ops", needs=("sharpness",)),
    _care("camera_dark", "camera", (0, 1.2), (50, 240), "camera_care", "camera-ops", needs=("brightness",)),
    _care("camera_moved", "camera", (0, 1.2), (50, 300), "camera_care", "camera-ops", needs=("view_shift",)),
    _alike("night", "camera", (0, 2), (120, 300), needs=("brightness",), hours=(20, 24)),
    _case("knocked_over", "hydrant", (4, 3), (60, 180), "hydrant_damaged", "water", needs=("tilt_deg",)),
    _case("low_pressure", "hydrant", (5, 3), (20, 120), "hydrant_no_pressure", "water", needs=("pressure_mpa",),
          without="dry_barrel"),
    _case("illegal_use", "hydrant", (6, 4), (0.6, 20), "hydrant_illegal_use", "water", needs=("cap_open",)),
    _alike("authorised_use", "hydrant", (5, 5), (5, 20), needs=("cap_open",)),
    _alike("sprinkler_lorry", "hydrant", (1, 3), (5, 15), needs=("cap_open",)),
    _alike("draining", "hydrant", (0, 3), (8, 23), needs=("water_present",)),
    _alike("brief_opening", "hydrant", (1, 4), (0.05, 0.2), needs=("cap_open",)),
    _alike("bump", "hydrant", (1, 4), (0.05, 30), needs=("tilt_deg",)),
    _case("water_hammer", "hydrant", (0, 2), (12, 40), "water_hammer", "water", needs=("hammer_mpa",)),
    _alike("single_hammer", "hydrant", (0, 3), (1, 5), needs=("hammer_mpa",)),
    _alike("cold_battery", "hydrant", (1, 3), (3, 180), needs=("battery_v",)),
    _alike("missed_reports", "hydrant", (1, 2), (1.5, 3), needs=("pressure_mpa",)),
    _alike("missed_reports", "camera", (0, 1), (1.5, 3)),
    _alike("missed_reports", "elevator", (0, 1), (1.5, 3)),
    _case("pump_room_flood", "pump_room", (0, 1.5), (40, 150), "pump_room_flooded", "pump-ops", needs=("level_m",)),
    _case("trapped", "elevator", (5, 4), (15, 40), "elevator_trapped", "lift-rescue", due="rescue"),
    _case("door_failure", "elevator", (5, 3), (12, 25), "elevator_door_failure", "lift-maintenance",
          needs=("fault_code",)),
    _case("unintended_movement", "elevator", (1, 1.5), (15, 60), "elevator_dangerous", "lift-maintenance",
          needs=("fault_code",)),
    _case("lift_fault", "elevator", (1, 2), (6, 120), "elevator_fault", "lift-maintenance", needs=("fault_code",)),
    _alike("inspection", "elevator", (4, 4), (20, 45), needs=("service_mode",)),
    _alike("lift_maintenance", "elevator", (1, 3), (30, 90)),
    _alike("button_play", "elevator", (1, 4), (1, 2), needs=("fault_code",)),
    _alike("loading", "elevator", (1, 4), (3, 15)),
    _alike("rough_once", "elevator", (1, 3), (1.2, 1.6), needs=("vibration_rms_g",)),
    _case("exposed_garbage", "camera", (0, 3), (12, 180), "exposed_garbage", "sanitation", needs=("garbage_s",),
          hours=(6, 21)),
    _alike("sweeping", "camera", (0, 4), (0.5, 9), needs=("garbage_s",), hours=(5, 21)),
    _case("illegal_stall", "camera", (0, 3), (12, 150), "illegal_stall", "urban-order", needs=("stall_s",),
          hours=(6, 22)),
    _alike("short_stop", "camera", (0, 4), (0.5, 9), needs=("stall_s",), hours=(6, 22)),
    _case("fire_lane_blocked", "camera", (0, 3), (7, 120), "fire_lane_blocked", "urban-order",
          needs=("lane_blocked_s",)),
    _alike("lorry", "camera", (0, 5), (0.5, 4.5), needs=("lane_blocked_s",), hours=(5, 22)),
    _case("crowd", "camera", (0, 2), (8, 60), "crowd", "urban-order", needs=("crowd",), hours=(9, 22)),
)  # fmt: skip
KIND = {kind.name: kind for kind in reversed(KINDS)}  # by name; of those with several the first
BY_PERMIT = {  # what is entered in a register before, for which rule
    "authorised_use": "hydrant_illegal_use",
    "draining": "hydrant_illegal_use",
    "sprinkler_lorry": "hydrant_illegal_use",
    "lift_maintenance": "*",
}


class Cause(msgspec.Struct, frozen=True):
    """One thing that happens. `subjects` are the devices it touches, `centre` the one it is at.

    `occupied` are the cars with passengers in them. `strength` holds the kind's own numbers, units in their names.
    """

    id: str
    kind: str
    start_ms: int
    end_ms: int
    centre: str
    subjects: tuple[str, ...]
    strength: dict[str, float] = {}
    occupied: tuple[str, ...] = ()

    @property
    def permit(self) -> tuple[int, int]:
        """From when until when (Unix ms) it is permitted; for the kinds in BY_PERMIT."""
        return self.start_ms - ANNOUNCED_MS // 2, self.end_ms + PERMIT_AFTER_MS


class Permit(msgspec.Struct, frozen=True):
    """An entry in the register of authorised uses or of maintenance: nobody is alarmed by `rule` from..until."""

    subject: str
    rule: str
    from_ms: int
    until_ms: int
    reason: str


def permits(cause: Cause, district: District) -> list[Permit]:
    """Return what is entered before a cause, if anything; a lorry may fill up anywhere in the grid it sprinkles."""
    rule = BY_PERMIT.get(cause.kind)
    if rule is None:
        return []
    subject = f"grid:{grid(district, cause.centre)}" if cause.kind == "sprinkler_lorry" else cause.centre
    return [Permit(subject, rule, *cause.permit, cause.kind.replace("_", " "))]


def grid(district: District, device: str) -> str:
    """Return the code of the responsibility grid a device stands in."""
    return district.cells[district.devices[device].place.cell].grid


def report_ms(device: Device) -> int:
    """Return how far apart a device's ordinary reports are."""
    return next((REPORT_TAGS[tag] for tag in device.tags if tag in REPORT_TAGS), MAINS_REPORT_MS)


def is_battery(device: Device) -> bool:
    """Return whether a hydrant reports through its operator's cloud, now and then."""
    return "battery" in device.tags


# --- where, how long, how strong ------------------------------------------------------------------------------------


def suits(kind: Kind, device: Device) -> bool:
    """Return whether a kind of cause can happen to a device and be told from its readings in good time."""
    if device.kind != kind.at or not set(kind.needs) <= {*device.metrics, *device.event_metrics}:
        return False
    if (kind.tag and kind.tag not in device.tags) or (kind.without and kind.without in device.tags):
        return False
    if kind.name in ("stuck_sensor", "sensor_jump"):  # many reports are needed to see it
        return report_ms(device) <= HOUR_MS
    if kind.name in ("device_dead", "missed_reports"):
        return report_ms(device) <= 4 * HOUR_MS
    return True


def kind_of(cause: Cause, district: District) -> Kind:
    """Return the kind of a cause, for the kind of device it is at."""
    at = district.devices[cause.centre].kind
    return next(kind for kind in KINDS if kind.name == cause.kind and kind.at == at)


def length_ms(dice: random.Random, kind: Kind, device: Device) -> int:
    """Draw how long a cause lasts; what is seen by reports alone takes as many of them."""
    minutes = dice.uniform(*kind.minutes)
    if kind.name == "bump" and dice.random() < DEEP_SHARE:
        return round(dice.uniform(2, 8) * SECOND_MS)
    reports_ms = report_ms(device)
    if reports_ms > MAINS_REPORT_MS:
        match kind.name:
            case "device_dead":
                return round(reports_ms * dice.uniform(4.2, 6.0))
            case "missed_reports":
                return round(reports_ms * dice.uniform(1.05, 1.9))
            case "stuck_sensor":
                return round(reports_ms * dice.uniform(30, 48))
            case "sensor_jump":
                return round(reports_ms * dice.uniform(6, 12))
            case _:
                pass
    return round(minutes * MINUTE_MS)


def begins_well(kind: Kind, device: Device, start_ms: int, origin_ms: int) -> bool:
    """Return whether a kind may begin at this hour of the day, with the reports it wants to have gone before."""
    hour = (start_ms + LOCAL_MS) % DAY_MS / HOUR_MS
    return kind.hours[0] <= hour < kind.hours[1] and start_ms - origin_ms >= kind.warm_reports * report_ms(device)


def make(dice: random.Random, district: District, kind: str, span: tuple[int, int], centre: str) -> Cause:
    """Return a cause of a kind at a device from its start to its end (Unix ms), its strength drawn by `dice`."""
    start_ms, end_ms = span
    device = district.devices[centre]
    subjects: tuple[str, ...] = (centre,)
    match KIND[kind].wide:
        case "zone":
            subjects = tuple(dict.fromkeys((centre, *district.zones[device.zone])))
        case "building":
            subjects = district.buildings[device.building]
        case "device":
            pass
    occupied: tuple[str, ...] = ()
    if kind == "trapped":
        occupied = (centre,)
    elif kind == "power_cut_occupied":
        occupied = tuple(sorted(dice.sample(subjects, dice.randint(1, len(subjects)))))
    strength = _burst(dice, district, centre, subjects) if kind == "mains_burst" else _strength(dice, kind)
    if kind == "bump" and end_ms - start_ms > MINUTE_MS // 2:
        strength["tilt_deg"] = dice.uniform(2, 9)
    return Cause(f"{kind}-{centre}-{start_ms}", kind, start_ms, end_ms, centre, subjects, strength, occupied)


RANGES: dict[str, dict[str, tuple[float, float]]] = {
    "low_pressure": {"level_mpa": (0.05, 0.133)},
    "knocked_over": {"tilt_deg": (13, 90), "flow_lps": (0, 20), "dip_mpa": (0.0, 0.04), "flow_s": (300, 1500),
                     "impact_g": (4, 40)},
    "bump": {"tilt_deg": (15, 60), "impact_g": (2, 20)},
    "illegal_use": {"flow_lps": (3, 12), "dip_mpa": (0.005, 0.03)},
    "authorised_use": {"flow_lps": (3, 12), "dip_mpa": (0.005, 0.03)},
    "sprinkler_lorry": {"flow_lps": (6, 14), "dip_mpa": (0.01, 0.03)},
    "brief_opening": {"flow_lps": (3, 12), "dip_mpa": (0.005, 0.03)},
    "draining": {"flow_lps": (3, 12), "dip_mpa": (0.005, 0.03), "open_s": (100, 180)},
    "pump_switch": {"step_mpa": (0.02, 0.05), "down": (0, 1)},
    "pump_failure": {"sag_mpa": (0.205, 0.25), "pump_mpa": (0.02, 0.12), "current_share": (0.0, 0.15)},
    "gateway_offline": {"power": (0, 1)},
    "pump_room_flood": {"level_m": (0.18, 0.8), "rise_s": (300, 1200)},
    "battery_low": {"low_v": (2.9, 3.14)},
    "cold_battery": {"low_v": (3.0, 3.12), "above_v": (3.23, 3.36), "dip_s": (120, 400), "dips": (0, 1)},
    "freezing": {"low_c": (-14, -3), "rise_mpa": (0.18, 0.5)},
    "frost": {"low_c": (-14, -1)},
    "water_hammer": {"strokes": (4, 10), "apart_s": (50, 110), "hammer_mpa": (0.35, 0.9)},
    "single_hammer": {"strokes": (1, 2.999), "apart_s": (20, 45), "hammer_mpa": (0.3, 0.9)},
    "drift": {"creep_mpa": (-0.05, 0.05)},
    "sensor_jump": {"jump_mpa": (0.4, 1.1)},
    "trapped": {"code_s": (2, 8), "button_s": (20, 40)},
    "power_cut_occupied": {"button_s": (20, 40)},
    "power_cut_empty": {"button_s": (20, 40)},
    "door_failure": {"codes": (4, 7.999), "over_s": (380, 480)},
    "loading": {"codes": (0, 2.999)},
    "unintended_movement": {"floors": (1, 1)},
    "lift_fault": {"code": (0, 3.999)},
    "button_play": {"rides": (0, 1), "press_s": (2, 6)},
    "rough_ride": {"vibration_g": (0.12, 0.4)},
    "rough_once": {"vibration_g": (0.13, 0.4)},
    "machine_room_hot": {"hot_c": (41.5, 55), "rise_s": (600, 1800)},
    "crowd": {"crowd": (0.78, 0.98)},
    "camera_dirty": {"sharpness": (0.1, 0.34)},
    "camera_dark": {"brightness": (0.0, 0.024)},
    "camera_moved": {"view_shift": (0.34, 0.95)},
    "night": {"brightness": (0.045, 0.09)},
    "lorry": {"hides": (0, 1)},
}  # fmt: skip


def _strength(dice: random.Random, kind: str) -> dict[str, float]:
    return {name: dice.uniform(*between) for name, between in RANGES.get(kind, {}).items()}


DEEP_SHARE = 0.5  # of bumps: hit hard, and upright again after seconds
WEAK_SHARE = 0.25  # of bursts: no hydrant need go dry, but several feel it
DRY_FALL_MPA = 0.22  # takes even the highest night pressure (0.34) below 0.14 with room for noise
FELT_FALL_MPA = 0.11  # far above what a pump's step and noise make


def _burst(dice: random.Random, district: District, centre: str, members: tuple[str, ...]) -> dict[str, float]:
    """Draw how deep pressure falls at a burst and how far that reaches; it decays with the pipe between.

    A strong one takes from 4 to two thirds of the zone below 0.14 MPa; a weak one is felt by from 6 to all.
    """
    found = [district.devices[member] for member in members]
    wet = [device.id for device in found if device.kind == "hydrant" and "dry_barrel" not in device.tags]
    weak = dice.random() < WEAK_SHARE
    depth = dice.uniform(0.13, 0.18) if weak else dice.uniform(0.24, 0.27)
    reached = dice.randint(min(6, len(wet)), len(wet)) if weak else dice.randint(4, max(2 * len(wet) // 3, 4))
    distances = sorted(district.pipe_m(centre, member) for member in wet)
    fall = FELT_FALL_MPA if weak else DRY_FALL_MPA
    return {
        "depth_mpa": depth,
        "reach_m": max(distances[min(reached, len(distances)) - 1], 1.0) / math.log(depth / fall),
    }
