"""The compiled loops of `streams.decode`. Imported only when the first body is decoded: numba takes its time.

Both write the values that pass every check, in order, to `observed_at`, `value` and `series`, and count in `stats`.
They return FAST, or PLAIN where the body is not of the plain shape and the general path must say what it is, or HARD
where a JSON number needs more than one rounding: then they are told where to note such numbers, and what they are.
No fast-math anywhere: the results equal the general path's bit for bit.
"""

# Compiled code takes arrays, not objects, and calls cost it more than lines: long parameter lists, one long function.
# ruff: noqa: SIM110  `all()` of a generator does not compile to a loop

from __future__ import annotations

from typing import Any

import numba
import numpy as np

FAST, PLAIN, HARD = 0, 1, 2
USED, READINGS, UNKNOWN_DEVICE, UNKNOWN_METRIC, WRONG_LANE, NOT_A_NUMBER, OUT_OF_RANGE, BAD_TIME, FUTURE = range(9)
HARD_NUMBERS = 9
STATS = 10
AHEAD_MS = 2_000  # a clock may be this far ahead before it is set back
FAR_MS = 10 * 366 * 86_400_000  # a time this far off was never measured

# 10^22 is the last power of ten that a double holds exactly; with a mantissa of at most 2^53 there is one rounding
# (W. Clinger, How to read floating point numbers accurately, 1990).
TENS = np.array([10.0**n for n in range(23)])
EXACT = 2**53
FNV_START, FNV_PRIME = np.uint64(14695981039346656037), np.uint64(1099511628211)
LETTER_D, LETTER_T, LETTER_M = ord("d"), ord("t"), ord("m")
SMALL_E, LARGE_E = ord("e"), ord("E")
QUOTE, COLON, COMMA, MINUS, PLUS, POINT, ZERO, NINE = 34, 58, 44, 45, 43, 46, 48, 57
OPEN, CLOSE, OPEN_LIST, CLOSE_LIST, ESCAPE = 123, 125, 91, 93, 92


@numba.njit(cache=True, inline="always")
def _checked(s: int, number: float, at: int, received: int, low: float, high: float) -> int:
    """Return USED, or why the value of series `s` (or minus a reason) is not used."""
    if s < 0:
        return -s
    if not np.isfinite(number):
        return NOT_A_NUMBER
    if number < low or number > high:
        return OUT_OF_RANGE
    if at < 0 or at - received > FAR_MS or received - at > FAR_MS:
        return BAD_TIME
    return USED


@numba.njit(cache=True)
def columns(
    body: Any,
    start: int,
    shape: Any,  # values, devices, metrics, base time, received_at
    table: Any,  # [device, metric] of the frame -> series, or minus a reason
    limits: Any,  # [low | high, metric of the frame]
    series_device: Any,
    observed_at: Any,
    value: Any,
    series: Any,
    stats: Any,
) -> int:
    n, n_devices, n_metrics, base, received = shape
    numbers = body[start : start + 8 * n].view(np.float64)
    after = body[start + 8 * n : start + 12 * n].view(np.uint32)
    device = body[start + 12 * n : start + 14 * n].view(np.uint16)
    metric = body[start + 14 * n : start + 16 * n].view(np.uint16)
    k, last_device, last_at = 0, -1, 0
    for i in range(n):
        d, m = device[i], metric[i]
        if d >= n_devices or m >= n_metrics:
            return PLAIN
        s = table[d, m]
        at = base + np.int64(after[i])
        why = _checked(s, numbers[i], at, received, limits[0, m], limits[1, m])
        if why != USED:
            stats[why] += 1
            continue
        if series_device[s] != last_device or at != last_at:
            stats[READINGS] += 1
            last_device, last_at = series_device[s], at
        if at > received + AHEAD_MS:
            stats[FUTURE] += 1
            at = received + AHEAD_MS
        observed_at[k] = at
        value[k] = numbers[i]
        series[k] = s
        k += 1
    stats[USED] = k
    return FAST


@numba.njit(cache=True, inline="always")
def _skip(body: Any, i: int, n: int) -> int:
    while i < n and (body[i] == 32 or body[i] == 10 or body[i] == 13 or body[i] == 9):
        i += 1
    return i


@numba.njit(cache=True)
def _equal(body: Any, start: int, length: int, names: Any, first: int, after: int) -> bool:
    if after - first != length:
        return False
    for i in range(length):
        if body[start + i] != names[first + i]:
            return False
    return True


@numba.njit(cache=True)
def _name(body: Any, i: int, n: int) -> tuple[int, Any]:
    """Return (where the string that begins at `i` ends, its hash); -1 where it has escapes or does not end."""
    code = FNV_START
    while i < n:
        c = body[i]
        if c == QUOTE:
            return i, code
        if c == ESCAPE or c < 32:
            break
        code = (code ^ np.uint64(c)) * FNV_PRIME
        i += 1
    return -1, code


@numba.njit(cache=True)
def _find(body: Any, start: int, end: int, code: Any, names: Any, ends: Any, slots: Any) -> int:
    """Return the number of the name `body[start:end]`, or -1."""
    mask = len(slots) - 1
    at = np.int64(code & np.uint64(mask))
    while slots[at] >= 0:
        number = slots[at]
        if _equal(body, start, end - start, names, ends[number], ends[number + 1]):
            return int(number)
        at = (at + 1) & mask
    return -1


@numba.njit(cache=True)
def hash_names(names: Any, ends: Any, slots: Any) -> None:
    """Fill an open-addressing table (a power of two, at most half full) with the numbers of the names."""
    mask = len(slots) - 1
    for number in range(len(ends) - 1):
        code = FNV_START
        for i in range(ends[number], ends[number + 1]):
            code = (code ^ np.uint64(names[i])) * FNV_PRIME
        at = np.int64(code & np.uint64(mask))
        while slots[at] >= 0:
            at = (at + 1) & mask
        slots[at] = number


@numba.njit(cache=True)
def _digits(body: Any, i: int, n: int, mantissa: int, taken: int) -> tuple[int, int, int]:
    """Take digits at `i`; return (behind them, the mantissa with the first 18 of the number, digits so far)."""
    while i < n and ZERO <= body[i] <= NINE:
        if taken < 18:
            mantissa = mantissa * 10 + (int(body[i]) - ZERO)
        taken += 1
        i += 1
    return i, mantissa, taken


@numba.njit(cache=True)
def _number(body: Any, i: int, n: int) -> tuple[int, float, bool]:
    """Return (behind the number at `i`, its value, whether that is exact); -1 where it is no JSON number."""
    negative = i < n and body[i] == MINUS
    if negative:
        i += 1
    first, scale = i, 0
    i, mantissa, taken = _digits(body, i, n, 0, 0)
    if taken == 0 or (taken > 1 and body[first] == ZERO):
        return -1, 0.0, False
    if i < n and body[i] == POINT:
        point = i + 1
        i, mantissa, taken = _digits(body, point, n, mantissa, taken)
        scale = point - i
        if scale == 0:
            return -1, 0.0, False
    if i < n and (body[i] == SMALL_E or body[i] == LARGE_E):
        i += 1
        down = i < n and body[i] == MINUS
        if i < n and (body[i] == MINUS or body[i] == PLUS):
            i += 1
        first = i
        i, power, _ = _digits(body, i, n, 0, 0)
        if i == first:
            return -1, 0.0, False
        scale += -power if down else power
    # Minus zero, and what needs more than one rounding, is read by somebody who can.
    if taken > 18 or mantissa > EXACT or not -22 <= scale <= 22 or (negative and mantissa == 0):
        return i, 0.0, False
    number = np.float64(mantissa)
    number = number / TENS[-scale] if scale < 0 else number * TENS[scale]
    return i, -number if negative else number, True


@numba.njit(cache=True)
def _values(
    body: Any,
    i: int,
    k: int,
    metric_names: Any,
    metric_ends: Any,
    metric_slots: Any,
    guess: Any,
    spans: Any,
    hard: Any,
    value: Any,
    series: Any,
    stats: Any,
) -> tuple[int, int]:
    """Read `{"name":number,...}` at `i`, metrics to `series[k:]`; return (behind it, next k) or minus why not."""
    n = len(body)
    i = _skip(body, i, n)
    if i >= n or body[i] != OPEN:
        return -PLAIN, k
    i = _skip(body, i + 1, n)
    if i < n and body[i] == CLOSE:
        return i + 1, k
    seen, place = np.uint64(0), 0
    while i < n and body[i] == QUOTE:
        i += 1
        m = guess[place]  # metrics come in the same order in most readings
        length = metric_ends[m + 1] - metric_ends[m]
        if (
            i + length < n
            and body[i + length] == QUOTE
            and _equal(body, i, length, metric_names, metric_ends[m], metric_ends[m + 1])
        ):
            i += length
        else:
            end, code = _name(body, i, n)
            if end < 0:
                return -PLAIN, k
            m = _find(body, i, end, code, metric_names, metric_ends, metric_slots)
            if m < 0:
                return -PLAIN, k
            guess[place] = m
            i = end
        bit = np.uint64(1) << np.uint64(m)
        if seen & bit:
            return -PLAIN, k
        seen |= bit
        place += 1
        i = _skip(body, i + 1, n)
        if i >= n or body[i] != COLON:
            return -PLAIN, k
        begin = _skip(body, i + 1, n)
        i, number, exact = _number(body, begin, n)
        if i < 0:
            return -PLAIN, k
        if not exact:
            known = stats[HARD_NUMBERS]
            if known < len(hard):
                number = hard[known]
            elif known < len(spans):
                spans[known, 0], spans[known, 1] = begin, i
            else:
                return -HARD, k
            stats[HARD_NUMBERS] += 1
        value[k], series[k] = number, m
        k += 1
        i = _skip(body, i, n)
        if i < n and body[i] == CLOSE:
            return i + 1, k
        if i >= n or body[i] != COMMA:
            return -PLAIN, k
        i = _skip(body, i + 1, n)
    return -PLAIN, k


@numba.njit(cache=True)
def _time(body: Any, i: int) -> tuple[int, int]:
    """Return (behind the whole number at `i`, its value); -1 where it is anything but 1..15 digits."""
    n = len(body)
    first, at = i, 0
    while i < n and ZERO <= body[i] <= NINE and i - first < 16:
        at = at * 10 + (int(body[i]) - ZERO)
        i += 1
    digits = i - first
    if not 1 <= digits <= 15 or (digits > 1 and body[first] == ZERO):
        return -1, at
    if i < n and (body[i] == POINT or body[i] == SMALL_E or body[i] == LARGE_E):
        return -1, at
    return i, at


@numba.njit(cache=True)
def json(
    body: Any,
    front: Any,  # lane, gateway, received_at
    device_names: Any,
    device_ends: Any,
    device_slots: Any,
    device_gateway: Any,
    metric_names: Any,
    metric_ends: Any,
    metric_slots: Any,
    guess: Any,
    series_of: Any,
    series_lane: Any,
    limits: Any,
    spans: Any,  # [n, begin | end]: where to note hard numbers
    hard: Any,  # [n]: what they are
    observed_at: Any,
    value: Any,
    series: Any,
    stats: Any,
) -> int:
    lane, gateway, received = front
    n = len(body)
    i = _skip(body, 0, n)
    if i >= n or body[i] != OPEN_LIST:
        return PLAIN
    i = _skip(body, i + 1, n)
    k, last_device, last_at = 0, -1, 0
    if i < n and body[i] == CLOSE_LIST:
        stats[USED] = 0
        return FAST if _skip(body, i + 1, n) == n else PLAIN
    while True:
        if i >= n or body[i] != OPEN:
            return PLAIN
        i = _skip(body, i + 1, n)
        d, at, begin, end = -1, -1, k, -1
        while True:
            if i + 2 >= n or body[i] != QUOTE or body[i + 2] != QUOTE:
                return PLAIN
            key = body[i + 1]
            i = _skip(body, i + 3, n)
            if i >= n or body[i] != COLON:
                return PLAIN
            i = _skip(body, i + 1, n)
            if key == LETTER_D and d < 0:
                if i >= n or body[i] != QUOTE:
                    return PLAIN
                stop, code = _name(body, i + 1, n)
                if stop < 0:
                    return PLAIN
                d = _find(body, i + 1, stop, code, device_names, device_ends, device_slots)
                if d < 0 or device_gateway[d] != gateway:
                    return PLAIN
                i = stop + 1
            elif key == LETTER_T and at < 0:
                i, at = _time(body, i)
                if i < 0:
                    return PLAIN
            elif key == LETTER_M and end < 0:
                i, end = _values(
                    body, i, k, metric_names, metric_ends, metric_slots, guess, spans, hard, value, series, stats
                )
                if i < 0:
                    return -i
            else:
                return PLAIN
            i = _skip(body, i, n)
            if i < n and body[i] == COMMA:
                i = _skip(body, i + 1, n)
                continue
            if i < n and body[i] == CLOSE:
                i += 1
                break
            return PLAIN
        if d < 0 or at < 0 or end < 0:
            return PLAIN
        for j in range(begin, end):
            m = series[j]
            s = series_of[d, m]
            if s < 0:
                s = -UNKNOWN_METRIC
            elif series_lane[s] != lane:
                s = -WRONG_LANE
            why = _checked(s, value[j], at, received, limits[0, m], limits[1, m])
            if why != USED:
                stats[why] += 1
                continue
            if d != last_device or at != last_at:
                stats[READINGS] += 1
                last_device, last_at = d, at
            if at > received + AHEAD_MS:
                stats[FUTURE] += 1
                observed_at[k] = received + AHEAD_MS
            else:
                observed_at[k] = at
            value[k] = value[j]
            series[k] = s
            k += 1
        i = _skip(body, i, n)
        if i < n and body[i] == COMMA:
            i = _skip(body, i + 1, n)
            continue
        if i < n and body[i] == CLOSE_LIST and _skip(body, i + 1, n) == n:
            stats[USED] = k
            return FAST
        return PLAIN
