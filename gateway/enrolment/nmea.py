"""Where a GPS receiver says we are: NMEA 0183, sentences GGA and RMC, checksum verified."""

from __future__ import annotations

from typing import NamedTuple

from citybrain.clock import monotonic_s
from citybrain.errors import Unavailable

BAUD = 9600
OFF_M = 10.0  # [U] of 95 % of positions under an open sky; times HDOP, where a sentence says it
FIX_S = 60.0  # a receiver that was on finds itself in less


class Fix(NamedTuple):
    """A position: degrees (WGS-84), and how far it may be off; 0 where nobody knows."""

    lon: float
    lat: float
    accuracy_m: float = 0.0


def parse(line: str) -> Fix | None:
    """Return a position, None where the sentence says none (no fix, damaged, another one).

    >>> parse("$GPGGA,092750.000,3112.3400,N,12128.4220,E,1,8,1.03,61.7,M,55.2,M,,*67")
    Fix(lon=121.4737, lat=31.205667, accuracy_m=10.3)
    """
    body, star, given = line.strip().partition("*")
    if not body.startswith("$") or not star or not _sum_fits(body[1:], given):
        return None
    field = body[1:].split(",")
    if field[0].endswith("GGA") and len(field) > 8 and field[6] not in ("", "0"):
        hdop = float(field[8]) if field[8] else 1.0
        return Fix(_degrees(field[4], field[5]), _degrees(field[2], field[3]), round(OFF_M * hdop, 1))
    if field[0].endswith("RMC") and len(field) > 6 and field[2] == "A":
        return Fix(_degrees(field[5], field[6]), _degrees(field[3], field[4]), OFF_M)
    return None


def _sum_fits(body: str, given: str) -> bool:
    found = 0
    for character in body.encode():
        found ^= character
    return given[:2].upper() == f"{found:02X}"


def _degrees(text: str, side: str) -> float:
    """Return `ddmm.mmmm` or `dddmm.mmmm` as degrees."""
    whole = text.find(".") - 2
    degrees = int(text[:whole]) + float(text[whole:]) / 60
    return round(-degrees if side in "SW" else degrees, 6)


def position_of(port: str, within_s: float = FIX_S) -> Fix:
    """Return where the receiver on a serial port says it is; raises Unavailable where it does not."""
    import serial  # noqa: PLC0415  only where there is a receiver

    until_s = monotonic_s() + within_s
    try:
        with serial.Serial(port, BAUD, timeout=1.0) as line:
            while monotonic_s() < until_s:
                found = parse(line.readline().decode("ascii", errors="replace"))
                if found is not None:
                    return found
    except (serial.SerialException, OSError) as error:
        raise Unavailable(f"{port}: {error}") from None
    raise Unavailable(
        f"{port}: no position within {within_s:.0f} s; is the antenna under the sky? or give --gps LON,LAT"
    )
