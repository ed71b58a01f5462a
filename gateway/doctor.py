"""`citybrain gateway doctor`: everything that could keep this box from working, looked at one by one.

It changes nothing but a probe file that it removes again, and may run beside the gateway. A finding is `good`, `mind`
(works, but look at it) or `wrong`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

from citybrain.cli import emit, language
from citybrain.clock import iso, real_unix_ms
from citybrain.errors import EXIT_CONFIG, EXIT_FAILED, ConfigError
from citybrain.i18n import text
from edge.driver import Quality
from gateway.command import user_name
from gateway.journal import last_heartbeat
from gateway.ports import look_at
from gateway.status import worded

TIMESYNC = Path("/run/systemd/timesync/synchronized")
SECRET_MODE = 0o077  # what nobody else may do with the key
DAY_S = 86_400
SOON_DAYS = 30  # a certificate that ends within that is to be renewed by now (issue: at two thirds of a year)
CONNECT_S = 3.0
MARKS = {"good": "✓", "mind": "!", "wrong": "✗"}
NOT_WHOLE = (".damaged", ".torn", ".broken")


class Finding(msgspec.Struct, frozen=True):
    """What one look found; `code` is its text in the catalogue (`doctor.CODE`), `facts` what is filled in."""

    level: Literal["good", "mind", "wrong"]
    code: str
    facts: dict[str, str] = {}

    def told(self, language: str) -> str:
        """Return it in words."""
        if self.code in ("device", "driver"):
            what, why = self.facts["what"], self.facts["why"]
            look = text(f"look.{why.partition(':')[0].upper()}", language) if self.code == "device" else ""
            return text(f"doctor.{self.code}", language, what=worded(what, why, language), look=look)
        return text(f"doctor.{self.code}", language, **self.facts)


Look = Iterator[Finding]


def good(code: str, **facts: object) -> Finding:
    return Finding("good", code, {name: str(value) for name, value in facts.items()})


def mind(code: str, **facts: object) -> Finding:
    return Finding("mind", code, {name: str(value) for name, value in facts.items()})


def wrong(code: str, **facts: object) -> Finding:
    return Finding("wrong", code, {name: str(value) for name, value in facts.items()})


def examine(folder: Path, now_ms: int) -> Look:
    """Yield every finding about the gateway of a data folder."""
    yield from _user(folder)
    yield from _clock(now_ms)
    yield from _disk(folder)
    from gateway.config import FILE, read_config  # noqa: PLC0415  with the drivers' modules: not for `run`'s memory

    try:
        config = read_config(folder / FILE)
    except ConfigError as error:
        yield wrong("config", why=error)
        return
    yield good("config_well", gateway=config.gateway, drivers=len(config.drivers))
    yield from _spool(folder, config)
    beat = last_heartbeat(folder / "run")
    for driver in config.drivers:
        yield from _port(driver.name, driver.config, beat.pid if beat is not None else 0)
    yield from _certificate(folder, config, now_ms)
    yield from _broker(folder, config, now_ms)
    yield from _process(folder, now_ms)


def _user(folder: Path) -> Look:
    """Root may use any port: what the gateway's own user may not, only that user finds."""
    owner = folder.stat().st_uid if folder.is_dir() else 0
    if os.geteuid() == 0 and owner != 0:
        yield mind("as_root", user=user_name(owner))


def _clock(now_ms: int) -> Look:
    from gateway.times import SET_SINCE_MS  # noqa: PLC0415

    if now_ms < SET_SINCE_MS:
        yield wrong("clock_unset", at=iso(now_ms))
    elif TIMESYNC.parent.exists() and not TIMESYNC.exists():
        yield mind("clock_unsynced", at=iso(now_ms))
    else:
        yield good("clock", at=iso(now_ms))


def _disk(folder: Path) -> Look:
    probe = folder / ".doctor"
    try:
        probe.write_bytes(b"x" * 4096)
        probe.unlink()
        free_mb = shutil.disk_usage(folder).free // 1_000_000
    except OSError as error:
        yield wrong("disk", where=folder, why=error.strerror or error)
        return
    yield mind("disk_low", where=folder, free_mb=free_mb) if free_mb < 100 else good("disk_well", free_mb=free_mb)


def _spool(folder: Path, config: Any) -> Look:
    files = [path for path in (folder / "spool").rglob("*") if path.is_file()] if (folder / "spool").exists() else []
    for path in files:
        if path.suffix in NOT_WHOLE:
            yield mind("spool_damaged", path=path)
    used_mb = sum(path.stat().st_size for path in files) / 1_000_000
    level = mind if used_mb > 0.9 * config.spool.limit_mb else good
    yield level("spool", used_mb=round(used_mb, 1), limit_mb=config.spool.limit_mb)


def _port(name: str, config: object, gateway: int) -> Look:
    for field in ("port", "device"):
        path = getattr(config, field, None)
        if isinstance(path, str) and path.startswith("/"):
            level, code, facts = look_at(Path(path), gateway)
            yield Finding(level, code, {"driver": name, "port": path, **facts})


def _certificate(folder: Path, config: Any, now_ms: int) -> Look:
    if config.broker.tls is None:
        return
    from gateway.broker.certificate import read_certificate  # noqa: PLC0415
    from gateway.broker.tls import client_context, day  # noqa: PLC0415

    tls = config.broker.tls.under(folder)
    try:
        client_context(tls)
        mine = read_certificate(Path(tls.certificate))
    except ConfigError as error:
        yield wrong("certificate", why=error)
        return
    left_days = (mine.not_after - now_ms // 1000) // DAY_S
    facts = {"begin": day(mine.not_before), "end": day(mine.not_after), "days": left_days}
    if not mine.not_before <= now_ms // 1000 < mine.not_after:
        yield wrong("certificate_dates", **facts)
    else:
        yield (mind if left_days < SOON_DAYS else good)("certificate_well", **facts)
    if mine.name != config.gateway:
        yield wrong("certificate_name", name=mine.name, gateway=config.gateway)
    if Path(tls.key).stat().st_mode & SECRET_MODE:
        yield mind("key_open", path=tls.key)


def _broker(folder: Path, config: Any, now_ms: int) -> Look:
    host, port = config.broker.host, config.broker.port
    try:
        address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4][0]
    except socket.gaierror as error:
        yield wrong("dns", host=host, why=error.strerror or error)
        return
    try:
        socket.create_connection((host, port), CONNECT_S).close()
    except OSError as error:
        yield wrong("broker", host=host, port=port, address=address, why=error.strerror or error)
        return
    refused = _refused(folder, config, now_ms)
    if refused is None:
        return
    if refused:
        yield wrong("broker", host=host, port=port, address=address, why=refused)
        return
    yield good("broker_well", host=host, port=port, address=address)


def _refused(folder: Path, config: Any, now_ms: int) -> str | None:
    """Return why the broker does not take us, "" where it does, None where our own files are at fault, said before."""
    from gateway.broker.greet import greet  # noqa: PLC0415
    from gateway.broker.tls import failure, own_dates  # noqa: PLC0415

    host, port, part = config.broker.host, config.broker.port, config.broker.tls
    tls = part.under(folder) if part is not None else None
    try:
        dates = own_dates(tls, now_ms) if tls is not None else ""
        found = greet(host, port, tls, f"{config.gateway}-doctor")
    except ConfigError:
        return None
    except OSError as error:
        found = failure(error, host, now_ms)
    return "; ".join(one for one in (found, dates) if one)


def _process(folder: Path, now_ms: int) -> Look:
    beat = last_heartbeat(folder / "run")
    if beat is None or not beat.live(now_ms):
        yield mind("process")
        return
    yield good("process_well", pid=beat.pid)
    for what, why in beat.details.get("gateway", {}).get("wrong", {}).items():
        quality = why.partition(":")[0].upper()
        yield Finding("wrong", "device" if quality in Quality.__members__ else "driver", {"what": what, "why": why})


def arguments(_parser: argparse.ArgumentParser) -> None:
    """There are none beside `--data` and `--json`."""


def run(args: argparse.Namespace) -> int:
    """Print what was found; return 0 where nothing is wrong, 3 where gateway.yaml is, else 1."""
    found, chosen = [], language(os.environ)
    for one in examine(args.data, real_unix_ms()):
        found.append(one)
        if not args.json:
            sys.stdout.write(f"{MARKS[one.level]} {one.told(chosen)}\n")
            sys.stdout.flush()
    if args.json:
        told = [{**msgspec.to_builtins(one), "zh": one.told("zh"), "en": one.told("en")} for one in found]
        emit({"well": all(one.level != "wrong" for one in found), "findings": told}, as_json=True)
    if any(one.code == "config" for one in found):
        return EXIT_CONFIG
    return EXIT_FAILED if any(one.level == "wrong" for one in found) else 0
