"""Where things stand in a data folder, and what all processes of a run agree on (`run/run.json`)."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

import msgspec

from citybrain.clock import RunClock, system_clock
from citybrain.errors import Damaged, NotFound
from citybrain.storage import OS_FILES
from citybrain.wire import crc32c


class Run(msgspec.Struct, frozen=True):
    """One run: its clock, shards, and the loopback addresses of its services.

    `workers`: how many engines share the shards. `size`: how large the simulated district is. `api_host` is where the
    API listens: another address than loopback only inside a container's own network. `logs`: the options that tell a
    process where the logs are, none where they are in the data folder.
    """

    clock: RunClock
    shards: int = 2
    host: str = "127.0.0.1"
    mqtt_port: int = 1883
    api_port: int = 8080
    platform_port: int = 8090
    cloud_port: int = 8070  # where operators' clouds push
    operator_port: int = 8091  # where the simulated operator is asked
    seed: int = 7
    api_host: str = "127.0.0.1"
    workers: int = 1
    size: Literal["zone", "reference"] = "zone"
    logs: tuple[str, ...] = ()


class Active(msgspec.Struct, frozen=True):
    """What the run works with now, by content hash (`run/active.json`)."""

    registry: str
    ruleset: str


class Layout(msgspec.Struct, frozen=True):
    """The folders under `--data DIR`, and the URL of the desk's database where that is not a file among them."""

    root: Path
    store: str = ""

    @property
    def run(self) -> Path:
        return self.root / "run"

    @property
    def broker(self) -> Path:
        return self.root / "broker"

    @property
    def quarantine(self) -> Path:
        return self.root / "quarantine"

    @property
    def blobs(self) -> Path:
        return self.root / "blobs"

    @property
    def evidence(self) -> Path:
        return self.root / "evidence"

    @property
    def clouds(self) -> Path:
        return self.root / "clouds"

    @property
    def database(self) -> Path:
        return self.root / "city.db"

    @property
    def place(self) -> Path | str:
        """Where the desk's database is: a file, or a URL (`citybrain.db.place`)."""
        return self.store or self.database

    @property
    def secrets(self) -> Path:
        return self.root / "secrets"

    @property
    def ca(self) -> Path:
        return self.root / "ca"

    @property
    def templates(self) -> Path:
        return self.root / "templates"

    @property
    def truth(self) -> Path:
        return self.root / "truth.jsonl"

    def log(self, shard: int) -> Path:
        return self.root / "log" / str(shard)

    def transitions(self, shard: int) -> Path:
        return self.root / "transitions" / str(shard)

    def engine(self, shard: int) -> Path:
        return self.root / "engine" / str(shard)

    def gateway(self, gateway: str) -> Path:
        return self.root / "gateways" / gateway

    def mailbox(self, process: str) -> Path:
        return self.root / "mailbox" / process

    def make(self) -> None:
        """Create the folders that every process expects."""
        for folder in (self.root, self.run, self.blobs, self.secrets):
            OS_FILES.make(folder)

    def write_run(self, run: Run) -> None:
        OS_FILES.make(self.run)
        OS_FILES.replace(self.run / "run.json", msgspec.json.encode(run))

    def read_run(self) -> Run:
        """Return what the processes of this run agreed on; where there is none, the defaults at real time.

        Raises Damaged where the file is not what `write_run` wrote.
        """
        path = self.run / "run.json"
        if not path.exists():
            return Run(clock=system_clock())
        try:
            return msgspec.json.decode(OS_FILES.read(path), type=Run)
        except msgspec.DecodeError as error:
            raise Damaged(str(path), 0, f"{error}; remove it, and `citybrain run` makes a new one") from None

    def write_active(self, active: Active) -> None:
        """Publish the registry and rule set in force; durable."""
        OS_FILES.make(self.run)
        OS_FILES.replace(self.run / "active.json", msgspec.json.encode(active))

    def read_active(self) -> Active | None:
        """Return the registry and rule set in force, or None where nothing has been activated yet."""
        path = self.run / "active.json"
        return msgspec.json.decode(OS_FILES.read(path), type=Active) if path.exists() else None

    def put_blob(self, content: bytes) -> str:
        """Store content under its hash, durably; return the hash."""
        name = blob_name(content)
        OS_FILES.make(self.blobs)
        if not (self.blobs / name).exists():
            OS_FILES.replace(self.blobs / name, content)
        return name

    def get_blob(self, name: str) -> bytes:
        """Return content by its hash; raises NotFound, or Damaged where it is not what the hash says."""
        path = self.blobs / name
        if not path.exists():
            raise NotFound(f"{path}: no such content; the log names it, so the data folder is incomplete")
        content = OS_FILES.read(path)
        if blob_name(content) != name:
            raise Damaged(str(path), 0, f"content has hash {blob_name(content)} (crc32c {crc32c(content):08x})")
        return content


def blob_name(content: bytes) -> str:
    """Return the content's SHA-256 in hex."""
    return hashlib.sha256(content).hexdigest()
