"""Enrolment at the centre: one-time codes, and what a box gets for one. The authority's journal holds all of it.

A code is 80 random bits, kept as its hash, for one gateway of the ledger, once, until it ends; a newer code of the same
gateway takes its place. Using it and signing are one step under the authority's lock, so two boxes cannot share a code.
"""

from __future__ import annotations

import hashlib
import io
import secrets
from collections import deque
from pathlib import Path
from urllib.parse import quote

import msgspec
import segno
import yaml
from cryptography import x509

from api.pki import certificates
from api.pki.ca import Authority, box_step
from api.pki.journal import Issued
from citybrain.clock import MINUTE_MS, iso
from citybrain.errors import ConfigError, NotFound, TransitionError, UsageError
from citybrain.layout import Layout
from citybrain.storage import OS_FILES

ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"  # Crockford's base 32: nothing that is read as something else
LETTERS = 16
AGAIN_MS = 15 * MINUTE_MS  # how long the same key may fetch its answer again: it was lost on the way, or not written
WRONG, WRONG_MS = 10, 10 * MINUTE_MS  # wrong codes from one address before it has to wait [U]
OURS = ("gateway", "shard", "broker")  # of gateway.yaml: what the centre says itself


class Invitation(msgspec.Struct, frozen=True):
    """What the technician gets: a code, whose it is, until when, and all of it as the text of a QR code."""

    gateway: str
    code: str
    until_ms: int
    url: str
    fingerprint: str

    @property
    def text(self) -> str:
        """The QR code's text: address, code, and the fingerprint of the authority that the box may trust."""
        return f"{self.url}#code={quote(self.code)}&ca={self.fingerprint}"


def invite(authority: Authority, gateway: str, ttl_ms: int, actor: str, reason: str) -> Invitation:
    """Make a code for a gateway; the caller has checked that the ledger has it. Raises UsageError."""
    setting = authority.setting
    certificates.check_name(gateway, "gateway")
    if not setting.listen:
        raise UsageError(
            f"{authority.folder / 'ca.json'} listen: boxes are served nowhere; give an address such as 0.0.0.0:8443"
        )
    if not 0 < ttl_ms <= 90 * 24 * 60 * MINUTE_MS:
        raise UsageError("--ttl: expected a time up to 90d")
    letters = "".join(secrets.choice(ALPHABET) for _ in range(LETTERS))
    code = "-".join(letters[n : n + 4] for n in range(0, LETTERS, 4))
    until_ms = authority.clock.now_ms() + ttl_ms
    authority.add_code(code_hash(code), gateway, until_ms, actor, reason)
    url = f"https://{setting.hosts[0]}:{setting.listen.rpartition(':')[2]}"
    server = certificates.read_certificate(OS_FILES.read(authority.folder / "server.pem"), "server.pem")
    roots = [authority.root(number) for number in authority.book().authorities]
    root = next(one for one in roots if one.subject == server.issuer)
    return Invitation(gateway, code, until_ms, url, certificates.fingerprint(root))


def code_hash(code: str) -> str:
    """Return the hash under which a code is kept, however it was typed.

    >>> code_hash("k7qf-0000 1111 zzzz") == code_hash("K7QFOOOOIlL1ZZZZ")
    True
    """
    letters = code.upper().replace("-", "").replace(" ", "").replace("O", "0").replace("I", "1").replace("L", "1")
    return hashlib.sha256(letters.encode()).hexdigest()


def enrol(authority: Authority, code: str, request: x509.CertificateSigningRequest, board: str) -> tuple[Issued, bool]:
    """Sign a box's certificate for its code; return it, and whether it was fetched again.

    Raises NotFound for a code that there is none of, TransitionError for one that is used, over, taken back or
    superseded, in words for the technician.
    """
    key = certificates.key(request)
    print_ = certificates.key_fingerprint(key)
    with authority.writing() as signing:
        now_ms, book = authority.clock.now_ms(), authority.book()
        found = book.codes.get(code_hash(code))
        if found is None:
            raise NotFound("there is no such code; compare it with the sheet, or ask the centre for another")
        if found.used_ms is not None:
            issued = book.issued[found.serial]
            fresh = found.key == print_ and now_ms < found.used_ms + AGAIN_MS and issued.revoked_ms is None
            if fresh:
                return issued, True
            raise TransitionError(f"the code was used on {iso(found.used_ms)}; ask the centre for another")
        if now_ms >= found.until_ms:
            raise TransitionError(f"the code was valid until {iso(found.until_ms)}; ask the centre for another")
        newer = [one for one in book.codes.values() if one.gateway == found.gateway and one.made_ms > found.made_ms]
        revoked = [one.revoked_ms for one in book.issued.values() if one.name == found.gateway and one.revoked_ms]
        if newer or any(at_ms >= found.made_ms for at_ms in revoked):
            why = "a newer code has been made for this gateway" if newer else "the gateway has been revoked since"
            raise TransitionError(f"the code holds no more: {why}; ask the centre for another")
        return signing(box_step("enrol", found.gateway, board, found.hash), key), False


def renew(authority: Authority, serial: str, request: x509.CertificateSigningRequest) -> tuple[Issued, bool]:
    """Sign the next certificate of a box that has shown the one with `serial`; return it, and whether it was there.

    A repeat with the same key gets the same certificate. Raises NotFound, TransitionError where it is not valid.
    """
    key = certificates.key(request)
    print_ = certificates.key_fingerprint(key)
    with authority.writing() as signing:
        now_ms, shown = authority.clock.now_ms(), authority.issued(serial)
        if shown.kind != "gateway" or shown.state(now_ms) != "valid":
            raise TransitionError(f"the certificate is {shown.state(now_ms)}; ask the centre for a new code")
        latest = authority.book().latest("gateway")[shown.name]
        if latest.key == print_ and latest.state(now_ms) == "valid" and latest.serial != shown.serial:
            return latest, True
        return signing(box_step("renew", shown.name, shown.board), key), False


class Throttle:
    """Whose wrong codes are not looked at any more. In memory: 80 bits need no more than to be noticed.

    A code that is there is taken all the same: one address may be a whole fleet's.
    """

    def __init__(self) -> None:
        self._wrong: dict[str, deque[int]] = {}

    def waits(self, source: str, now_ms: int) -> bool:
        """Return whether an address has to wait."""
        tries = self._wrong.get(source)
        while tries and tries[0] <= now_ms - WRONG_MS:
            tries.popleft()
        return bool(tries) and len(tries or ()) >= WRONG

    def wrong(self, source: str, now_ms: int) -> None:
        """Note a wrong code."""
        if len(self._wrong) > 10_000:
            self._wrong.clear()
        self._wrong.setdefault(source, deque(maxlen=WRONG)).append(now_ms)


def configuration(layout: Layout, authority: Authority, gateway: str, shard: int) -> str:
    """Return a box's gateway.yaml: what the centre knows, then `templates/<gateway>.yaml`, else `default.yaml`.

    Raises ConfigError where the template is no YAML or says what the centre says itself.
    """
    setting = authority.setting
    tls = "{ca: pki/ca.pem, certificate: pki/gateway.pem, key: pki/gateway.key}"
    head = f"gateway: {gateway}\nshard: {shard}\nbroker:\n  host: {setting.hosts[0]}\n"
    head += f"  port: {setting.broker_port}\n  tls: {tls}\n"
    path = next((path for path in _templates(layout, gateway) if path.exists()), None)
    if path is None:
        return f"{head}drivers: {{}}\n"
    text = path.read_text(encoding="utf-8")
    try:
        given = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(str(path), f"not YAML: {error}") from None
    twice = sorted(set(given) & set(OURS)) if isinstance(given, dict) else ["(no mapping)"]
    if twice:
        raise ConfigError(str(path), f"leave out {', '.join(twice)}: the centre fills them in")
    return f"{head}{text}"


def _templates(layout: Layout, gateway: str) -> tuple[Path, ...]:
    return layout.templates / f"{gateway}.yaml", layout.templates / "default.yaml"


def draw(text: str, target: str) -> str:
    """Draw a QR code: to a .svg or .png file, or for `terminal` as the text that is returned. Raises UsageError."""
    made = segno.make(text, error="m", micro=False)
    if target == "terminal":
        out = io.StringIO()
        made.terminal(out, compact=True)
        return out.getvalue()
    path = Path(target)
    if path.suffix not in (".svg", ".png"):
        raise UsageError(f"--qr {target}: expected a file that ends in .svg or .png, or `terminal`")
    drawn = io.BytesIO()
    made.save(drawn, kind=path.suffix[1:], scale=6, border=4)
    OS_FILES.replace_private(path, drawn.getvalue())
    return ""
