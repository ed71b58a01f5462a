"""Keeps the processes of one machine alive: starts them, restarts what dies, stops them in order, outlived by none.

Every process has its own process group, so that Ctrl-C reaches the supervisor alone and it decides the order; and the
kernel kills every one of them when the supervisor dies in any other way (PR_SET_PDEATHSIG), so that none is orphaned.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import msgspec

from citybrain.clock import monotonic_s, real_unix_ms, wait_s
from citybrain.counters import Counters, Heartbeat
from citybrain.errors import CityBrainError, Unavailable

PR_SET_PDEATHSIG = 1
BACKOFF_S = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
STEADY_S = 30.0  # up for so long, a process is forgiven its former deaths
GRACE_S = 6.0  # from the first SIGTERM to SIGKILL
LOG_BYTES = 4 * 1024 * 1024  # a process's log is cut when it grows beyond; the last half is kept beside it


class Part(msgspec.Struct, frozen=True):
    """One process. `once`: it prepares something and ends; `after`: what must have ended well before it starts.

    It is ready when its port (if it has one) accepts, its heartbeat (if it has one) is its own and fresh, and
    the gauge `proof` (if it has one) is at least `least` there. `wave`: when it is told to stop; lower first.
    """

    name: str
    argv: tuple[str, ...]
    once: bool = False
    after: tuple[str, ...] = ()
    port: int = 0
    heartbeat: bool = True
    proof: str = ""
    least: float = 0.0
    wave: int = 0


class Child:
    """A part and the process that runs it now, if one does."""

    def __init__(self, part: Part, log: Path) -> None:
        self.part = part
        self.log = log
        self.process: subprocess.Popen[bytes] | None = None
        self.done = False
        self.deaths = 0
        self.started_s = 0.0
        self.started_ms = 0
        self.due_s = 0.0

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def last_words(self) -> str:
        """Return the last line of its log that says something."""
        try:
            lines = self.log.read_bytes()[-4096:].decode(errors="replace").splitlines()
        except OSError:
            return ""
        return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")


class Failed(CityBrainError):
    """A process that prepares the others ended with an error; `exit_code` is its own."""

    def __init__(self, what: str, exit_code: int) -> None:
        super().__init__(what)
        self.exit_code = exit_code


Say = Callable[[str, str], None]  # (zh, en)


class Supervisor:
    """Runs `parts`; `say` is told the few things a person wants to know, in Chinese and English."""

    def __init__(
        self, parts: Sequence[Part], folder: Path, say: Say, counters: Counters, grace_s: float = GRACE_S
    ) -> None:
        self.children = {part.name: Child(part, folder / f"{part.name}.log") for part in parts}
        self._folder = folder
        self._say = say
        self._counters = counters
        self._grace_s = grace_s

    def step(self) -> None:
        """Start what is due, notice what died; raises Failed where a preparing process did not succeed."""
        now_s = monotonic_s()
        for child in self.children.values():
            if child.process is not None and child.process.poll() is not None:
                self._ended(child, child.process.returncode, now_s)
            if child.process is None and not child.done and now_s >= child.due_s and self._may_start(child):
                self._start(child, now_s)
            elif child.alive and now_s - child.started_s > STEADY_S:
                child.deaths = 0
            cut_log(child.log)
        self._counters.gauges["processes"] = float(sum(child.alive for child in self.children.values()))
        self._counters.details["children"] = {
            name: child.process.pid for name, child in self.children.items() if child.process is not None
        }
        self._counters.details["parts"] = [name for name, child in self.children.items() if not child.part.once]
        self._counters.publish()

    def _may_start(self, child: Child) -> bool:
        return all(self.children[name].done for name in child.part.after)

    def _start(self, child: Child, now_s: float) -> None:
        with child.log.open("ab") as log:
            child.process = _spawn(child.part.argv, log)
        child.started_s, child.started_ms = now_s, real_unix_ms()

    def _ended(self, child: Child, code: int, now_s: float) -> None:
        child.process = None
        if child.part.once:
            if code:
                raise Failed(f"{child.part.name}: {child.last_words()} (exit code {code}; see {child.log})", abs(code))
            child.done = True
            return
        delay_s = BACKOFF_S[min(child.deaths, len(BACKOFF_S) - 1)]
        child.deaths += 1
        child.due_s = now_s + delay_s
        self._counters.add("restarts_total", process=child.part.name)
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        words = f"; {child.last_words()}" if code > 0 else ""
        self._say(
            f"{child.part.name} 退出({how}),{delay_s:g} 秒后重启",
            f"{child.part.name} ended ({how}), restarting in {delay_s:g} s{words}; log: {child.log}",
        )

    def waiting_for(self, host: str) -> list[str]:
        """Return the names of the processes that are not ready yet."""
        return [name for name, child in self.children.items() if not self._ready(child, host)]

    def _ready(self, child: Child, host: str) -> bool:
        if child.part.once:
            return child.done
        if not child.alive or (child.part.port and not accepts(host, child.part.port)):
            return False
        return not child.part.heartbeat or self._beats(child)

    def _beats(self, child: Child) -> bool:
        """Return whether the heartbeat on disk is this very process's: process ids come again in containers."""
        try:
            content = (self._folder / f"{child.part.name}.heartbeat.json").read_bytes()
            beat = msgspec.json.decode(content, type=Heartbeat)
        except (OSError, msgspec.DecodeError):
            return False
        mine = child.process is not None and beat.pid == child.process.pid and beat.at >= child.started_ms
        proven = not child.part.proof or beat.gauges.get(child.part.proof, -math.inf) >= child.part.least
        return mine and proven and beat.live(real_unix_ms())

    def stop(self) -> None:
        """Stop every process, wave after wave: SIGTERM, and SIGKILL `grace_s` after the first one."""
        deadline_s = monotonic_s() + self._grace_s
        waves = sorted({child.part.wave for child in self.children.values()})
        for position, wave in enumerate(waves):
            members = [c for c in self.children.values() if c.part.wave == wave and c.alive]
            for child in members:
                _signal(child, signal.SIGTERM)
            left_s = deadline_s - monotonic_s()
            _await_end(members, left_s / (len(waves) - position))
        for child in self.children.values():
            if child.alive:
                self._say(f"{child.part.name} 未按时停止,强制结束", f"{child.part.name} did not stop in time: killed")
                _signal(child, signal.SIGKILL)
        _await_end(list(self.children.values()), 2.0)
        self._counters.gauges["processes"] = 0.0
        self._counters.publish(force=True)


def accepts(host: str, port: int) -> bool:
    """Return whether something accepts TCP connections there."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.settimeout(0.5)
        return probe.connect_ex((host, port)) == 0


def cut_log(path: Path) -> None:
    """Keep a log file bounded: its writer appends, so it can be emptied under its hands; the end is kept in `.1`."""
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_size > LOG_BYTES:
            with path.open("rb") as file:
                file.seek(-LOG_BYTES // 2, os.SEEK_END)
                path.with_suffix(".log.1").write_bytes(file.read())
            os.truncate(path, 0)


def _spawn(argv: tuple[str, ...], log: BinaryIO) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            process_group=0,
            preexec_fn=_dies_with(os.getpid()),  # noqa: PLW1509  no threads here
        )
    except OSError as error:
        raise Unavailable(f"{argv[0]}: cannot be started: {error.strerror}") from None


def _dies_with(parent: int) -> Callable[[], None] | None:
    """Return what a new process does first: ask the kernel to be killed when its parent dies."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl

    def prepare() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before we asked
            os._exit(1)

    return prepare


def _signal(child: Child, number: signal.Signals) -> None:
    if child.process is not None:
        with contextlib.suppress(ProcessLookupError):
            child.process.send_signal(number)


def _await_end(children: list[Child], seconds: float) -> None:
    deadline_s = monotonic_s() + max(0.0, seconds)
    while any(child.alive for child in children) and monotonic_s() < deadline_s:
        wait_s(0.02)
