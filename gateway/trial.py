"""A new configuration on trial: put in force at once, kept only if the gateway is well with it.

Three files tell how far it is, so that a power cut at any moment ends in one of two states: `gateway.yaml`, the one in
force; `gateway.yaml.previous`, the one before; `trial.json`, while it is undecided whether the new one stays.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable
from pathlib import Path

import msgspec

from citybrain.clock import MINUTE_MS
from citybrain.errors import ConfigError, StorageError, UsageError
from citybrain.storage import OS_FILES, Files
from gateway.config import FILE, GatewayConfig, parse_config

TRIAL_MS = MINUTE_MS
MOST_STARTS = 3
MOST_TRIAL_MS = 30 * MINUTE_MS


class Configure(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of `configure`: the text, its SHA-256, and how long the gateway must have been well with it."""

    config: str
    sha256: str
    trial_s: float = TRIAL_MS / 1000


class Trial(msgspec.Struct, frozen=True):
    """`trial.json`: which order, which text (SHA-256), for how long.

    wrong_before: what was wrong with the configuration before; it is not held against the new one. starts: how often a
    process began with the new one; one that ends again and again must not keep it for ever.
    """

    id: str
    sha256: str
    trial_s: float
    wrong_before: tuple[str, ...] = ()
    starts: int = 0


def sha256(text: bytes) -> str:
    """Return the SHA-256 in hex."""
    return hashlib.sha256(text).hexdigest()


def checked(body: object, now: GatewayConfig) -> Configure:
    """Return a valid `configure`; raises UsageError or ConfigError, which say what is wrong with it."""
    try:
        wanted = msgspec.convert(body, Configure)
    except msgspec.ValidationError as error:
        raise UsageError(f"body of configure: {error}") from None
    found = sha256(wanted.config.encode())
    if found != wanted.sha256:
        raise UsageError(f"body of configure: the text has SHA-256 {found}, the order says {wanted.sha256[:64]}")
    if not 0 < wanted.trial_s <= MOST_TRIAL_MS / 1000:
        raise UsageError(f"body of configure: trial_s {wanted.trial_s}: expected up to {MOST_TRIAL_MS // 1000}")
    new = parse_config(wanted.config)
    if (new.gateway, new.shard) != (now.gateway, now.shard):
        raise ConfigError(FILE, f"this is {now.gateway} of shard {now.shard}; who it is only enrolment changes")
    return wanted


class Store:
    """The three files in the data folder; every method raises StorageError."""

    def __init__(self, folder: Path, files: Files = OS_FILES) -> None:
        self.current = folder / FILE
        self.previous = folder / f"{FILE}.previous"
        self._trial = folder / "trial.json"
        self._files = files

    def begin(self, order: str, wanted: Configure, wrong_before: Iterable[str]) -> Trial:
        """Put a new configuration in force, on trial."""
        trial = Trial(order, wanted.sha256, wanted.trial_s, tuple(wrong_before))
        self._files.replace(self.previous, self._files.read(self.current))
        self._files.replace(self._trial, msgspec.json.encode(trial))
        self._files.replace(self.current, wanted.config.encode())
        return trial

    def trial(self) -> Trial | None:
        """Return the trial that is undecided, None where there is none."""
        if self._trial.name not in self._files.names(self._trial.parent):
            return None
        try:
            return msgspec.json.decode(self._files.read(self._trial), type=Trial)
        except (msgspec.DecodeError, UnicodeDecodeError):  # never whole: the new configuration was not in force yet
            self._files.remove(self._trial)
            return None

    def started(self, trial: Trial) -> Trial:
        """Note that one more process begins with the new configuration."""
        trial = msgspec.structs.replace(trial, starts=trial.starts + 1)
        self._files.replace(self._trial, msgspec.json.encode(trial))
        return trial

    def sha256(self) -> str:
        """Return the hash of the configuration in force."""
        return sha256(self._files.read(self.current))

    def in_force(self, trial: Trial) -> bool:
        """Return whether the new configuration was put in force before the power went."""
        return self.sha256() == trial.sha256

    def keep(self) -> None:
        """The new configuration stays."""
        self._files.remove(self._trial)

    def abandon(self) -> None:
        """It could not be put in force: forget the trial, as far as the disk lets us; the next start does it else."""
        with contextlib.suppress(StorageError):
            self._files.remove(self._trial)

    def roll_back(self) -> None:
        """The one before is in force again."""
        self._files.replace(self.current, self._files.read(self.previous))
        self._files.remove(self._trial)
