"""The certificate authority in `DATA/ca`: it signs, revokes, rotates, and keeps what others need of it up to date.

Every step is a line of the journal, written before its effect is told to anybody. The other files (`trust.pem`,
`crl.pem`, `server.pem`, what brokers read) follow from the journal and are made anew by `tend`, which also does what
time asks for: a revocation list before it is old, the server's certificate before it ends.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from api.pki import broker, certificates
from api.pki.broker import BrokerFolder
from api.pki.certificates import Key, Revoked
from api.pki.journal import Book, Event, Issued, Journal, Kind, Step
from citybrain.clock import DAY_MS, Clock, iso, system_clock
from citybrain.errors import ConfigError, NotFound, TransitionError, UsageError
from citybrain.layout import Layout
from citybrain.storage import OS_FILES

AUTHORITY_MS = 10 * 365 * DAY_MS  # [U] ours: an authority outlives the boxes it signs for
CERTIFICATE_MS = 365 * DAY_MS
# A broker refuses everybody once its list is old, so a list lives long and is renewed early: the centre may stand
# still for 60 days. [U]
LIST_MS, LIST_LEFT_MS = 90 * DAY_MS, 60 * DAY_MS
SERVER = "citybrain"
SERVICE = "service-"  # what a gateway's id never begins with


class Setting(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`ca/ca.json`: by which names boxes reach the centre, and where the passphrase is.

    hosts: names or addresses in the server's certificate, the first one is told to boxes. listen: where `citybrain api`
    serves boxes, "" for nowhere. passphrase: `file:PATH` (relative to the data folder) or `env:NAME`. brokers: folders
    that `ca broker` has written, which are kept up to date.
    """

    hosts: tuple[str, ...]
    name: str = "City brain"
    listen: str = "0.0.0.0:8443"
    broker_port: int = 8883
    passphrase: str = "file:secrets/ca.passphrase"
    brokers: tuple[BrokerFolder, ...] = ()


class Authority:
    """The authority of a data folder; raises NotFound (see `setting`) where there is none yet."""

    def __init__(self, layout: Layout, clock: Clock | None = None) -> None:
        self.layout = layout
        self.folder = layout.ca
        self.clock = clock if clock is not None else system_clock()
        self.journal = Journal(self.folder / "journal.jsonl")
        self._book = Book()
        self._read = 0  # how far the journal was read, bytes
        self._reading = threading.Lock()
        self._keys: dict[int, Key] = {}
        self.notes: list[str] = []  # what somebody has to look at; whoever uses us says it and empties it

    # --- reading ---

    @property
    def exists(self) -> bool:
        """Whether it has been made."""
        return bool(self.book().authorities)

    @property
    def setting(self) -> Setting:
        """What it was made with; raises NotFound, ConfigError."""
        path = self.folder / "ca.json"
        if not path.exists():
            raise NotFound(f"{self.folder}: no certificate authority; `citybrain ca init --host NAME` makes one")
        try:
            return msgspec.json.decode(OS_FILES.read(path), type=Setting)
        except msgspec.DecodeError as error:
            raise ConfigError(str(path), str(error)) from None

    def book(self) -> Book:
        """Return what the journal comes to now; only what is new is read. Raises Damaged."""
        with self._reading:
            size = OS_FILES.size(self.journal.path)
            if size < self._read:  # another file: it was restored
                self._book, self._read = Book(), 0
            if size != self._read:
                self._book, self._read = self.journal.follow(self._book, self._read)
            return self._book

    def issued(self, serial: str) -> Issued:
        """Return a certificate's entry; raises NotFound."""
        found = self.book().issued.get(serial.lower().replace(":", "").lstrip("0"))
        if found is None:
            raise NotFound(f"certificate {serial[:60]!r}: no such serial; `citybrain ca list` names them all")
        return found

    def pem(self, serial: str) -> bytes:
        """Return a certificate in PEM."""
        return OS_FILES.read(self.folder / "issued" / f"{serial}.pem")

    def root(self, number: int) -> x509.Certificate:
        """Return an authority's certificate."""
        path = self.folder / f"authority-{number}.pem"
        return certificates.read_certificate(OS_FILES.read(path), str(path))

    def trust(self) -> bytes:
        """Return the certificates of all authorities that have not ended: what everybody is to trust."""
        now_ms = self.clock.now_ms()
        valid = [number for number, until_ms in self.book().authorities.items() if now_ms < until_ms]
        return b"".join(certificates.pem(self.root(number)) for number in valid)

    # --- steps ---

    def init(self, setting: Setting, actor: str, reason: str) -> None:
        """Make the authority, its server's certificate and ingest's; raises TransitionError where there is one."""
        if self.exists:
            raise TransitionError(
                f"{self.folder}: there is an authority already; `citybrain ca rotate` makes its successor"
            )
        for host in setting.hosts:
            if not host or any(character.isspace() or character in "/:@" for character in host.replace("::", "")):
                raise UsageError(f"--host {host!r}: expected a name or an address such as iot.example.city")
        OS_FILES.make(self.folder)
        self.folder.chmod(0o700)
        OS_FILES.make(self.folder / "issued")
        self._make_passphrase(setting.passphrase)
        self._keep(setting)
        with self._writing():
            self._found(1, setting, "init", actor, reason)
            self._tend()

    def rotate(self, actor: str, reason: str) -> int:
        """Make the next authority and return its number. Both are trusted; the new one signs from now on."""
        with self._writing():
            number = self.book().current + 1
            self._found(number, self.setting, "rotate", actor, reason)
            self._tend()
        return number

    def sign(self, kind: Kind, name: str, key: ec.EllipticCurvePublicKey, actor: str, reason: str) -> Issued:
        """Sign a certificate and return its entry; raises UsageError, TransitionError where the authority has ended."""
        certificates.check_name(name, kind)
        if kind == "gateway" and name.startswith(SERVICE):
            raise UsageError(f"gateway {name!r}: names that begin with {SERVICE!r} are our own services'")
        with self._writing():
            return self._sign_client(Step(0, "sign", actor, reason, name=name, kind=kind), key)

    @contextmanager
    def writing(self) -> Iterator[Callable[[Step, ec.EllipticCurvePublicKey], Issued]]:
        """Give a way to sign for a step (see `box_step`) after looking at the book, with nobody in between."""
        with self._writing():
            yield self._sign_client

    def make_service(self, name: str, actor: str, reason: str) -> tuple[Issued, bytes]:
        """Return a certificate for one of our own services, and its key in PEM, which is kept nowhere else."""
        key = certificates.new_key()
        return self.sign("service", name, key.public_key(), actor, reason), certificates.key_pem(key)

    def revoke(self, serials: Sequence[str], actor: str, reason: str) -> list[Issued]:
        """Revoke certificates; raises NotFound, TransitionError where one is revoked already, UsageError."""
        if not reason.strip():
            raise UsageError("--reason: say why a certificate is revoked; it stands in the journal for ever")
        with self._writing():
            found = [self.issued(serial) for serial in serials]
            for one in found:
                if one.revoked_ms is not None:
                    raise TransitionError(f"certificate {one.serial}: revoked on {iso(one.revoked_ms)}: {one.why}")
            now_ms = self.clock.now_ms()
            self._add(
                Step(now_ms, "revoke", actor, reason, one.authority, one.serial, one.name, one.kind) for one in found
            )
            self._tend()
        return found

    def add_code(self, code: str, gateway: str, until_ms: int, actor: str, reason: str) -> None:
        """Enter an enrolment code, by its hash; it takes the place of earlier ones of the gateway."""
        with self._writing():
            step = Step(self.clock.now_ms(), "code", actor, reason, name=gateway, until=until_ms, code=code)
            self._add([step])

    def tend(self) -> None:
        """Make anew what follows from the journal and the time; cheap where nothing is due."""
        with self._writing():
            self._tend()

    def serve_broker(self, folder: BrokerFolder) -> None:
        """Write a broker's folder and keep it up to date from now on; raises ConfigError."""
        with self._writing():
            self._tend()
            broker.write(self._source(), folder)
            setting = self.setting
            others = tuple(one for one in setting.brokers if one.path != folder.path)
            self._keep(msgspec.structs.replace(setting, brokers=(*others, folder)))

    # --- inside the lock ---

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Hold the lock: the command line and the API write the same journal."""
        descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _keep(self, setting: Setting) -> None:
        OS_FILES.replace(self.folder / "ca.json", msgspec.json.format(msgspec.json.encode(setting)))

    def _add(self, steps: Iterable[Step]) -> None:
        self.journal.add(steps)

    def _found(self, number: int, setting: Setting, event: Event, actor: str, reason: str) -> None:
        now_ms, key = self.clock.now_ms(), certificates.new_key()
        until_ms = now_ms + AUTHORITY_MS
        made = certificates.authority(key, f"{setting.name} CA {number}", x509.random_serial_number(), now_ms, until_ms)
        passphrase = read_passphrase(setting.passphrase, self.layout.root)
        for old in self.book().authorities:
            self._key(old)  # a wrong passphrase is found before two authorities have different ones
        OS_FILES.replace_private(self.folder / f"authority-{number}.key", certificates.key_pem(key, passphrase))
        OS_FILES.replace(self.folder / f"authority-{number}.pem", certificates.pem(made))
        self._add([Step(now_ms, event, actor, reason, number, name=setting.name, until=until_ms)])

    def _key(self, number: int) -> Key:
        if number not in self._keys:
            path = self.folder / f"authority-{number}.key"
            passphrase = read_passphrase(self.setting.passphrase, self.layout.root)
            self._keys[number] = certificates.read_key(OS_FILES.read(path), str(path), passphrase)
        return self._keys[number]

    def _sign(self, asked: Step, key: ec.EllipticCurvePublicKey, hosts: Sequence[str] = ()) -> Issued:
        """Sign for the name of a step (a server where there are hosts), write the step, and return what it comes to.

        The step says who asks, why and for whom; when, until when, serial and key it gets here, and the present
        authority where it names none. Raises TransitionError where the authority has ended.
        """
        now_ms, number = self.clock.now_ms(), asked.authority or self.book().current
        ends_ms = self.book().authorities[number]
        if now_ms >= ends_ms:
            raise TransitionError(
                f"authority {number} ended on {iso(ends_ms)}: `citybrain ca rotate` makes its successor"
            )
        until_ms, number_of_it = min(now_ms + CERTIFICATE_MS, ends_ms), x509.random_serial_number()
        made = certificates.certificate(
            self.root(number), self._key(number), key, asked.name, number_of_it, now_ms, until_ms, hosts
        )
        serial, print_ = f"{number_of_it:x}", certificates.key_fingerprint(key)
        OS_FILES.replace(self.folder / "issued" / f"{serial}.pem", certificates.pem(made))
        facts = {"at": now_ms, "authority": number, "serial": serial, "until": until_ms, "key": print_}
        self._add([msgspec.structs.replace(asked, **facts)])
        return self.issued(serial)

    def _sign_client(self, asked: Step, key: ec.EllipticCurvePublicKey) -> Issued:
        """Sign, and let in again at the brokers who was shut out."""
        made = self._sign(asked, key)
        for folder in self.setting.brokers:
            broker.refresh(self._source(), folder)
        return made

    def _source(self) -> broker.Source:
        """Return what brokers' folders follow from now."""
        return broker.Source(self.folder, broker.access(self.book(), self.clock.now_ms()), self.notes)

    def _tend(self) -> None:
        setting = self.setting
        _replace(self.folder / "trust.pem", self.trust())
        self._tend_server(setting)
        self._tend_list()
        for folder in setting.brokers:
            broker.refresh(self._source(), folder)

    def _tend_server(self, setting: Setting) -> None:
        """Renew the server's certificate at two thirds of its life, or where another authority is to sign it.

        A box learns of a new authority when it renews, so the server stays with the oldest one that a box or a service
        in use has its certificate from: that one everybody trusts.
        """
        now_ms, book = self.clock.now_ms(), self.book()
        shown = (*book.latest("gateway").values(), *book.latest("service").values())
        in_use = [one.authority for one in shown if one.state(now_ms) == "valid"]
        number = min(in_use, default=book.current)
        have = book.latest("server").get(SERVER)
        path = self.folder / "server.pem"
        fine = have is not None and have.authority == number and have.state(now_ms) == "valid" and path.exists()
        if fine and have is not None and self.pem(have.serial) == OS_FILES.read(path) and not due(have, now_ms):
            return
        key = certificates.new_key()
        asked = Step(0, "sign", "citybrain", "renewed before its end", number, name=SERVER, kind="server")
        made = self._sign(asked, key.public_key(), setting.hosts)
        OS_FILES.replace_private(self.folder / "server.key", certificates.key_pem(key))
        OS_FILES.replace(path, self.pem(made.serial))

    def _tend_list(self) -> None:
        now_ms, book, path = self.clock.now_ms(), self.book(), self.folder / "crl.pem"
        valid = [number for number, until_ms in book.authorities.items() if now_ms < until_ms]
        listed = {
            number: {
                Revoked(int(one.serial, 16), one.revoked_ms)
                for one in book.issued.values()
                if one.revoked_ms is not None and one.authority == number and now_ms < one.until_ms
            }
            for number in valid
        }
        if path.exists() and _lists_fit(OS_FILES.read(path), [set(one) for one in listed.values()], now_ms):
            return
        made = [
            certificates.revocations(
                self.root(number),
                self._key(number),
                sorted(listed[number], key=lambda one: one.serial),
                book.steps,
                now_ms,
                min(now_ms + LIST_MS, book.authorities[number]),
            )
            for number in valid
        ]
        OS_FILES.replace(path, b"".join(map(certificates.pem, made)))

    def _make_passphrase(self, reference: str) -> None:
        """Make the passphrase's file where it names one that is not there; nobody has to think one up."""
        scheme, _, name = reference.partition(":")
        path = self.layout.root / name
        if scheme == "file" and not path.exists():
            OS_FILES.make(path.parent)
            OS_FILES.replace_private(path, f"{secrets.token_urlsafe(32)}\n".encode())


def box_step(event: Event, name: str, board: str, code: str = "") -> Step:
    """Return the step of a box that asks for a certificate itself."""
    actor = f"box {board}" if board else "box"
    return Step(0, event, actor, name=name, kind="gateway", code=code, board=board)


def due(one: Issued, now_ms: int) -> bool:
    """Return whether two thirds of a certificate's life are over: time to renew it."""
    return now_ms >= one.from_ms + (one.until_ms - one.from_ms) * 2 // 3


def read_passphrase(reference: str, root: Path) -> bytes:
    """Return the passphrase that `file:PATH` or `env:NAME` refers to; raises ConfigError."""
    scheme, _, name = reference.partition(":")
    if scheme == "env":
        value = os.environ.get(name, "").strip().encode()
    elif scheme == "file":
        path = root / name
        value = OS_FILES.read(path).strip() if path.exists() else b""
    else:
        raise ConfigError(f"passphrase {reference!r}", "expected file:PATH or env:NAME")
    if not value:
        raise ConfigError(f"passphrase {reference}", "there is none: the authority's key cannot be opened without it")
    return value


def _lists_fit(text: bytes, wanted: Sequence[set[Revoked]], now_ms: int) -> bool:
    """Return whether the revocation lists on disk hold what they are to hold, and are not old."""
    try:
        lists = certificates.read_lists(text)
    except ValueError:
        return False
    if len(lists) != len(wanted):
        return False
    serials = [{one.serial_number for one in each} for each in lists]
    ends = [each.next_update_utc for each in lists]
    left = all(end_ is not None and end_.timestamp() * 1000 - now_ms >= LIST_LEFT_MS for end_ in ends)
    return left and serials == [{one.serial for one in each} for each in wanted]


def _replace(path: Path, data: bytes) -> None:
    """Write a file unless it holds that already: this happens every hour on a disk that may be a card."""
    if not path.exists() or OS_FILES.read(path) != data:
        OS_FILES.replace(path, data)
