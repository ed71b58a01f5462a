"""The last value of each series, before anything is left out of the report; pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from citybrain.model import Reading


class Latest:
    """What each device said last, for whoever stands in front of the box.

    >>> latest = Latest(["hyd-1", "hyd-2"])
    >>> latest.note(Reading("hyd-1", 1000, {"pressure_mpa": 0.31}))
    >>> list(latest.points())
    [('hyd-1', 'pressure_mpa', 0.31, 1000)]
    """

    def __init__(self, devices: Iterable[str]) -> None:
        self.devices = tuple(devices)
        self._values: dict[str, dict[str, tuple[float, int]]] = {device: {} for device in self.devices}

    def note(self, reading: Reading) -> None:
        """Keep a reading's values: what was heard last counts, whatever its time says, since clocks are set back."""
        values = self._values.setdefault(reading.device, {})
        values.update({name: (value, reading.observed_at) for name, value in reading.values.items()})

    def points(self) -> Iterator[tuple[str, str, float, int]]:
        """Yield (device, metric, value, observed_at in Unix ms), by device as configured, then by metric."""
        for device, values in self._values.items():
            for name in sorted(values):
                yield device, name, *values[name]
