"""The drivers there are: one module and one line each.

A module has `Config` (a frozen msgspec struct that refuses unknown fields; `devices()` names its devices),
`make(name, config) -> edge.driver.Driver`, `PROCESS` (True: it runs in a process of its own), and
`DEADLINE_S` (after so many seconds without a call of its host it is taken to hang). It is imported only where it is
configured, so that a gateway without a camera needs no numpy. The gateway's own process imports it for its `Config`: a
module with `PROCESS` imports numpy and the like inside its functions, where only its child comes.
"""

from __future__ import annotations

from importlib.util import find_spec

DRIVERS: dict[str, str] = {
    "json_lines": "edge.drivers.json_lines",
    "modbus_rtu": "edge.drivers.modbus_rtu",
    "modbus_tcp": "edge.drivers.modbus_tcp",
    "elevator_serial": "edge.drivers.elevator_serial",
    "elevator_retrofit": "edge.drivers.elevator_retrofit",
    "vibration": "edge.drivers.vibration",
    "pressure_fast": "edge.drivers.pressure_fast",
    "camera": "edge.drivers.camera",
}


def need(library: str, package: str) -> None:
    """Raise ValueError where a driver's library is not installed here; it is not imported.

    >>> need("no_such_library", "no-such-package")
    Traceback (most recent call last):
    ValueError: this driver needs no_such_library, which is not installed here: pip install no-such-package
    """
    if find_spec(library) is None:
        raise ValueError(f"this driver needs {library}, which is not installed here: pip install {package}")
