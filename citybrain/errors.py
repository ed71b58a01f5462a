"""Every error this product raises on purpose.

CityBrainError
├── ConfigError          a file a person wrote is wrong: says file, line, field, what was expected
├── WireError            bytes from outside are not a frame; `reason` is the counter's label
├── StorageError         a disk said no
│   ├── DiskFull         no space left: the process stops taking, and says so
│   ├── Damaged          bytes on disk are not what was written: file, offset
│   ├── Overtaken        another process writes the same log: whoever learns it recovers from what is there
│   └── Fenced           another desk has the lease: nothing was written, and nothing may be
├── ProtocolError        a peer broke the contract of docs/wire.md
├── SignatureError       a webhook is unsigned, wrongly signed or too old; `reason` is the counter's label
├── TransitionError      a life cycle has no such step from here
├── NotFound             no such thing
├── Unavailable          a service we need does not answer, or its port is taken
└── UsageError           the command line was wrong
"""

from __future__ import annotations

EXIT_USAGE, EXIT_CONFIG, EXIT_UNAVAILABLE, EXIT_STORAGE, EXIT_FAILED = 2, 3, 4, 5, 1


class CityBrainError(Exception):
    """Root of the tree. `exit_code` is what the command line returns for it."""

    exit_code = EXIT_FAILED


class ConfigError(CityBrainError):
    """A file a person wrote is wrong: `where` is `path:line field`, `what` says what was expected."""

    exit_code = EXIT_CONFIG

    def __init__(self, where: str, what: str) -> None:
        super().__init__(f"{where}: {what}")
        self.where = where
        self.what = what


class WireError(CityBrainError):
    """Bytes from outside are not a frame. `reason` is a label of `dropped_total`."""

    def __init__(self, reason: str, what: str) -> None:
        super().__init__(f"{reason}: {what}")
        self.reason = reason


class StorageError(CityBrainError):
    """A disk said no."""

    exit_code = EXIT_STORAGE


class DiskFull(StorageError):
    """No space left on the device that holds `path`."""


class Damaged(StorageError):
    """Bytes on disk are not what was written."""

    def __init__(self, path: str, offset: int, what: str) -> None:
        super().__init__(f"{path} at byte {offset}: {what}")
        self.path = path
        self.offset = offset


class Overtaken(StorageError):
    """Another process writes the same log; what we wrote last counts nowhere."""


class Fenced(StorageError):
    """Another process has taken over the lease; the transaction wrote nothing."""


class ProtocolError(CityBrainError):
    """A peer broke the wire contract."""


class SignatureError(CityBrainError):
    """A webhook is unsigned, wrongly signed or too old."""

    def __init__(self, reason: str, what: str) -> None:
        super().__init__(f"{reason}: {what}")
        self.reason = reason


class TransitionError(CityBrainError):
    """A life cycle has no such step from its present state."""


class NotFound(CityBrainError):
    """No such thing."""


class Unavailable(CityBrainError):
    """A service we need does not answer, or its port is taken."""

    exit_code = EXIT_UNAVAILABLE


class UsageError(CityBrainError):
    """The command line was wrong."""

    exit_code = EXIT_USAGE
