"""Who does what in the reference district: departments, offices stationed in the streets, contractors, streets."""

from __future__ import annotations

from collections.abc import Sequence

from citybrain.model import Area, Unit

# The codes are those that categories name (rules/library/categories.yaml); market supervises, and handles nothing yet.
DEPARTMENTS = (
    Unit("water", "供水公司", "Water company"),
    Unit("pump-ops", "泵站运维", "Pump room operations"),
    Unit("fire", "消防救援", "Fire and rescue"),
    Unit("lift-maintenance", "电梯维保管理", "Elevator maintenance"),
    Unit("lift-rescue", "96333电梯应急", "Elevator emergency line"),
    Unit("sensor-ops", "物联设备运维", "Sensor maintenance"),
    Unit("camera-ops", "视频设备运维", "Camera maintenance"),
    Unit("urban-order", "城管执法", "Urban order enforcement"),
    Unit("sanitation", "环境卫生", "Sanitation"),
    Unit("market", "市场监管", "Market supervision"),
)
_CONTRACTORS = {
    "lift-maintenance": ("安梯维保公司", "恒升电梯公司", "捷立维保公司", "同泰电梯公司"),
    "sensor-ops": ("远知物联公司", "听潮感知公司", "微澜科技公司"),
    "camera-ops": ("明眸视讯公司", "长视安防公司"),
}
_PREFIX = {"lift-maintenance": "lift-co", "sensor-ops": "sensor-co", "camera-ops": "camera-co"}
_STATIONED = (
    ("urban-order", "城管执法中队", "urban order squad"),
    ("water", "供水管理站", "water station"),
    ("market", "市场监管所", "market supervision office"),
)


def contractors(department: str) -> tuple[Unit, ...]:
    """Return the contractors that do a department's work at the assets that name them."""
    return tuple(
        Unit(f"{_PREFIX[department]}-{number}", zh, f"{department} contractor {number}", department=department)
        for number, zh in enumerate(_CONTRACTORS.get(department, ()), start=1)
    )


def stationed(street: Area) -> list[Unit]:
    """Return the offices that departments have in a street."""
    zh, en = street.zh.removesuffix("街道"), street.en.removesuffix(" Street")
    return [
        Unit(f"{department}-{street.code}", zh + office, f"{en} {english}", street.code, department)
        for department, office, english in _STATIONED
    ]


def organisation(areas: Sequence[Area]) -> tuple[Unit, ...]:
    """Return every unit of a district with these areas."""
    streets = [area for area in areas if area.kind == "street"]
    return (
        *DEPARTMENTS,
        *(unit for department in _CONTRACTORS for unit in contractors(department)),
        *(unit for street in streets for unit in stationed(street)),
        *(Unit(f"street-{street.code}", street.zh, street.en, street.code) for street in streets),
    )
