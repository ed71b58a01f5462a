"""The gateway's time: it runs on the monotonic clock and follows the system's, so that no time comes twice.

A Pi has no clock of its own: it boots with the time of its last shutdown, or 1970, and is set by NTP later. So the
time begins at the latest of what the system says and what this box told last (`mark`), and is *unset* while

- the system says less than 2024 or than the mark; or
- this is the first time since the machine booted, its time began where the last one ended (within 2 min), and the
  kernel says that nothing keeps its clock: it looks right, and is late by as long as the power was away.

It is set when the system's clock has been moved to a time that can be, or the kernel says that it is kept. For the
first 2 min the clock is *holding*: whoever can wait asks `held_ms` for the true time later (`gateway/held.py`). After
them what the system says counts, if it can be.

Once it is set, a difference to the system's clock is

- forward: taken at once; readings have a gap between them, as time had for us;
- back by up to 10 min: made up by running at half speed, so the order of a device's readings holds;
- back by more: taken at once. What was stamped before lies in the future, and ingest holds it against the time at
  which it was received.

Each is one log line, and `offset_s`, in the gateway's own readings, says how far we are from the system's clock now.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from citybrain.clock import DAY_MS, MINUTE_MS, SECOND_MS, iso, monotonic_s, real_unix_ms, synchronised
from citybrain.counters import Counters
from citybrain.errors import StorageError
from citybrain.storage import OS_FILES, Files

SET_SINCE_MS = 1_704_067_200_000  # 2024-01-01: before this product was written; an unset clock says 1970 or a build's
STEP_MS = 250  # [U] what NTP slews by itself stays below
MOST_SLEW_MS = 10 * MINUTE_MS  # [U] at half speed made up in 20 minutes
SLEW_SPEED = 0.5
NEVER_MS = 4_102_444_800_000  # 2100: no mark of ours, the card is damaged there
MARK_EVERY_S = 60.0
HOLD_S = 120.0  # [U] NTP over a mobile network answers within; what a kill -9 may take meanwhile
DOUBT_MS = 2 * MINUTE_MS  # [U] a mark is up to 1 min old, and a shutdown takes its time
BACKDATED_MS = 5 * SECOND_MS  # what a driver stamps may lie so far back: it is of a window that was measured
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
LIE_MS = DAY_MS  # a mark further ahead than this was told by a clock that ran wrong, and counts nothing


def boot_number() -> int:
    """Return a number that each boot of the machine has for itself; 0 where it does not say."""
    try:
        return int(BOOT_ID.read_text(encoding="ascii").replace("-", "")[:15], 16)
    except (OSError, ValueError):
        return 0


class BoxClock:
    """A `Clock`. Call `follow` about once a second. `system`, `mono` (since the boot), `kept` and `boot` are where time
    comes from and what is known of it; tests give others.

    counters: `clock_steps_total{way=set|assumed|forward|slewed|back}`.
    """

    def __init__(
        self,
        mark: Path,
        counters: Counters,
        files: Files = OS_FILES,
        system: Callable[[], int] = real_unix_ms,
        mono: Callable[[], float] = monotonic_s,
        kept: Callable[[], bool] = synchronised,
        boot: int | None = None,
    ) -> None:
        self.offset_s = 0.0  # ours minus the system's
        self._counters = counters
        self._files = files
        self._path, self._boot_path = mark, mark.with_name(f"{mark.name}.boot")
        self._system, self._mono, self._kept = system, mono, kept
        self._boot = boot_number() if boot is None else boot
        wall_ms, marked_ms = system(), files.marked(mark)
        lies = marked_ms >= NEVER_MS or (wall_ms >= SET_SINCE_MS and marked_ms - wall_ms > LIE_MS)
        marked_ms = 0 if lies else marked_ms
        self._least_ms = max(SET_SINCE_MS, marked_ms)
        self._speed = 1.0
        self._marked_s = -MARK_EVERY_S
        self._anchor(max(wall_ms, self._least_ms))
        self._began_ms, self._began_s, self._wall_ms = self.now_ms(), self._base_s, wall_ms
        self.set_in_time = False  # while it held, so that what was read meanwhile has a true time
        self._moved_ms = self._held_until_ms = 0
        self.unset = wall_ms < self._least_ms or self._doubtful(marked_ms)
        if self.unset:
            since = iso(self.now_ms())
            counters.warn(f"the clock says {iso(wall_ms)}: it is not set; until it is, time goes on from {since}")

    def _doubtful(self, marked_ms: int) -> bool:
        """Return whether the system may have begun with the time at which it ended."""
        booted_ms = self._wall_ms - self._began_s * SECOND_MS
        again = marked_ms and booted_ms <= marked_ms + DOUBT_MS and self._files.marked(self._boot_path) != self._boot
        return bool(again) and not self._kept()

    def now_ms(self) -> int:
        """Return the gateway's time."""
        return int(self._base_ms + (self._mono() - self._base_s) * SECOND_MS * self._speed)

    @property
    def holding(self) -> bool:
        """Whether it is not set and still may be soon, so that the true time of what is read now will be known."""
        return self.unset and self._mono() - self._began_s < HOLD_S

    def held_ms(self, observed_at: int) -> int:
        """Return the true time of what was read while the clock held: what it told, moved as it was moved since.

        A time that this clock cannot have told is a device's own, and stays. Where the clock was not set, all do.
        """
        ours = self._began_ms - BACKDATED_MS <= observed_at <= self._held_until_ms
        return observed_at + self._moved_ms if ours else observed_at

    def follow(self) -> None:
        """Compare with the system's clock, and take what it says as described above; remember how far time has come."""
        wall_ms, now_ms = self._system(), self.now_ms()
        if self.unset and wall_ms >= self._least_ms:
            self._leave_unset(wall_ms, now_ms)
        elif not self.unset:
            self._compare(wall_ms, now_ms)
        self.offset_s = 0.0 if self.unset else (self.now_ms() - wall_ms) / SECOND_MS
        self._remember()

    def _leave_unset(self, wall_ms: int, now_ms: int) -> None:
        """Believe a time of the system's that can be, if somebody moved its clock or keeps it.

        One that merely runs past our mark is as wrong as it was before; if nobody has set it in time it must do.
        """
        passed_ms = (self._mono() - self._began_s) * SECOND_MS
        sure = abs(wall_ms - self._wall_ms - passed_ms) > STEP_MS or self._kept()
        if self.holding and not sure:
            return
        to_ms = wall_ms if wall_ms >= now_ms or now_ms - wall_ms > MOST_SLEW_MS else now_ms
        if self.holding:
            self.set_in_time, self._moved_ms, self._held_until_ms = True, to_ms - now_ms, now_ms
        self.unset = False
        self._step("set" if sure else "assumed", to_ms, now_ms)

    def _compare(self, wall_ms: int, now_ms: int) -> None:
        ahead_ms = now_ms - wall_ms
        if self._speed < 1.0 and ahead_ms <= 0:
            self._anchor(wall_ms)  # made up
        elif ahead_ms < -STEP_MS:
            self._step("forward", wall_ms, now_ms)
        elif ahead_ms > MOST_SLEW_MS:
            self._step("back", wall_ms, now_ms)
        elif ahead_ms > STEP_MS and self._speed == 1.0:
            self._step("slewed", now_ms, wall_ms)
            self._anchor(now_ms, SLEW_SPEED)

    def _step(self, way: str, to_ms: int, from_ms: int) -> None:
        self._anchor(to_ms)
        self._counters.add("clock_steps_total", way=way)
        self._counters.warn(f"clock {way}: {iso(from_ms)} → {iso(to_ms)} ({(to_ms - from_ms) / SECOND_MS:+.1f} s)")

    def _anchor(self, now_ms: int, speed: float = 1.0) -> None:
        self._base_ms, self._base_s, self._speed = float(now_ms), self._mono(), speed

    def _remember(self) -> None:
        """Mark how far time has come; not synced, because it only bounds what a later start may say."""
        now_s = self._mono()
        if now_s - self._marked_s >= MARK_EVERY_S:
            self._marked_s = now_s
            try:
                self._files.mark(self._path, self.now_ms())
                if not self.unset:  # else another process of this boot would take for set what is not
                    self._files.mark(self._boot_path, self._boot)
            except StorageError as error:
                self._counters.add("errors_total", stage="clock")
                self._counters.warn(str(error))
