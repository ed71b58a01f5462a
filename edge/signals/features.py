"""What a window of raw samples says in a few numbers; pure numpy, no state.

A window is a float array [samples] of one axis with its mean still in it; none is empty.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]


def centred(window: F64) -> F64:
    """Return the window without its mean: gravity and the sensor's offset are no vibration.

    >>> centred(np.full(3, 0.1))  # and no rounding either
    array([0., 0., 0.])
    """
    return np.asarray(window - window.mean()) if np.ptp(window) > 0 else np.zeros(len(window))


def rms(window: F64) -> float:
    """Return the root mean square about the mean; of a sine its amplitude / √2.

    >>> round(rms(np.sin(np.linspace(0, 20 * np.pi, 1000, endpoint=False))), 4)
    0.7071
    """
    return float(np.sqrt(np.mean(centred(window) ** 2)))


def peak_to_peak(window: F64) -> float:
    """Return how far the extremes are apart.

    >>> peak_to_peak(np.array([1.0, -2.0, 0.5]))
    3.0
    """
    return float(np.ptp(window))


def half_waves(window: F64) -> F64:
    """Return the peak of each half wave between two crossings of the mean, in order, without sign.

    The half waves that the window cuts at its ends are not among them.
    """
    values = centred(window)
    above = values > 0
    turns = np.flatnonzero(above[1:] != above[:-1]) + 1
    if len(turns) < 2:
        return np.empty(0)
    return np.asarray(np.maximum.reduceat(np.abs(values), turns)[:-1])


def a95(window: F64) -> float | None:
    """Return A95: the value that 95 % of the peak-to-peak values do not pass; None with fewer than two half waves.

    A peak-to-peak value is the sum of two successive peaks of opposite sign with one zero crossing between them, A95
    their 95th percentile (terms of ISO 18738-1, ride quality of lifts). The standard weights the signal after ISO 8041
    first; we do not, so that ours counts frequencies that people feel less in full.

    >>> round(a95(np.sin(np.linspace(0, 40 * np.pi, 4000, endpoint=False))), 3)
    2.0
    """
    peaks = half_waves(window)
    if len(peaks) < 2:
        return None
    return float(np.percentile(peaks[1:] + peaks[:-1], 95, method="higher"))


def crest(window: F64) -> float | None:
    """Return the crest factor, peak / RMS about the mean; None where nothing vibrates. A sine has √2.

    >>> round(crest(np.sin(np.linspace(0, 20 * np.pi, 1000, endpoint=False))), 3)
    1.414
    """
    effective = rms(window)
    return float(np.abs(centred(window)).max() / effective) if effective > 0 else None


def kurtosis(window: F64) -> float | None:
    """Return the fourth standardised moment (Pearson: 3 for normal noise, 1.5 for a sine); None where nothing vibrates.

    Single shocks, as of a damaged bearing, raise it long before they raise the RMS (Dyer & Stewart, J. Mech. Des.
    100(2), 1978).

    >>> round(kurtosis(np.sin(np.linspace(0, 20 * np.pi, 1000, endpoint=False))), 3)
    1.5
    """
    values = centred(window)
    spread = float(np.mean(values**2))
    return float(np.mean(values**4) / spread**2) if spread > 0 else None


def band_rms(window: F64, rate_hz: float, bands_hz: Sequence[tuple[float, float]]) -> list[float]:
    """Return the RMS of what lies in each band [low, high) of frequencies.

    The squares over bands that part all frequencies up to rate_hz / 2 (that one included) sum up to the square of the
    window's RMS (Parseval); no taper is laid over it, which would break that.

    >>> x = np.sin(2 * np.pi * 50 * np.arange(1000) / 1000)
    >>> [round(value, 3) for value in band_rms(x, 1000, [(2, 40), (40, 100)])]
    [0.0, 0.707]
    """
    power = 2 * np.abs(np.fft.rfft(centred(window))) ** 2 / len(window) ** 2
    if len(window) % 2 == 0:
        power[-1] /= 2  # the highest frequency has no negative twin
    frequency = np.fft.rfftfreq(len(window), 1 / rate_hz)
    inside = ((frequency >= low) & (frequency < high) for low, high in bands_hz)
    return [float(np.sqrt(power[which].sum())) for which in inside]


def clipped_share(window: F64, full_scale: float) -> float:
    """Return the share of samples at or beyond the sensor's range: what went on there is not known.

    >>> clipped_share(np.array([0.0, 2.0, -2.0, 1.0]), 2.0)
    0.5
    """
    return float(np.mean(np.abs(window) >= full_scale))
