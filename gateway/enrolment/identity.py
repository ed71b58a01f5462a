"""The box's key and certificate: `DATA/pki`, a link to the folder in force, so that all of it changes at once.

The key is made here and leaves never. A new one waits in `pki-new` until its certificate is there; a process that dies
in between finds it again and asks with the same key, which the centre answers with the same certificate.
"""

from __future__ import annotations

import base64
import shutil
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.x509.oid import NameOID

from citybrain.errors import ConfigError, ProtocolError
from citybrain.storage import OS_FILES

KEY, CERTIFICATE, TRUST, CENTRE = "gateway.key", "gateway.pem", "ca.pem", "centre.json"


class Centre(msgspec.Struct, frozen=True):
    """Where the box was enrolled, and as what."""

    url: str
    gateway: str


class Identity:
    """The `pki` of a data folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / "pki"
        self._pending = root / "pki-new"

    @property
    def enrolled(self) -> bool:
        """Whether there is a certificate."""
        return (self.folder / CERTIFICATE).exists()

    @property
    def centre(self) -> Centre:
        """Where we were enrolled; raises ConfigError where we were not."""
        path = self.folder / CENTRE
        if not path.exists():
            raise ConfigError(str(path), "this box is not enrolled: `citybrain gateway enrol` does that")
        try:
            return msgspec.json.decode(OS_FILES.read(path), type=Centre)
        except msgspec.DecodeError as error:
            raise ConfigError(str(path), str(error)) from None

    @property
    def certificate(self) -> x509.Certificate:
        """Our certificate; raises ConfigError."""
        path = self.folder / CERTIFICATE
        try:
            return x509.load_pem_x509_certificate(OS_FILES.read(path))
        except ValueError as error:
            raise ConfigError(str(path), f"expected a certificate in PEM: {error}") from None

    @property
    def trust(self) -> str:
        """The authorities we trust, PEM."""
        return OS_FILES.read(self.folder / TRUST).decode()

    @property
    def shown(self) -> tuple[Path, Path]:
        """The files of our certificate and its key."""
        return self.folder / CERTIFICATE, self.folder / KEY

    def request(self) -> str:
        """Return a certificate request in PEM for the key that waits, which is made where there is none."""
        key, name = self._waiting(), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "box")])
        made = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
        return made.public_bytes(serialization.Encoding.PEM).decode()

    def adopt(self, certificate: str, trust: str, centre: Centre) -> None:
        """Put the key that waits in force, with its certificate; raises ProtocolError where they do not fit."""
        key = self._waiting()
        try:
            given = x509.load_pem_x509_certificate(certificate.encode())
            x509.load_pem_x509_certificates(trust.encode())
        except ValueError as error:
            raise ProtocolError(f"{centre.url}: what it sent is no certificate: {error}") from None
        if given.public_key() != key.public_key():
            raise ProtocolError(f"{centre.url}: the certificate it sent is for another key")
        OS_FILES.replace(self._pending / CERTIFICATE, certificate.encode())
        OS_FILES.replace(self._pending / TRUST, trust.encode())
        OS_FILES.replace(self._pending / CENTRE, msgspec.json.encode(centre))
        self._switch(self.root / f"pki-{given.serial_number:x}"[: len("pki-") + 60])

    def seal(self, text: bytes) -> str:
        """Return a JWS of `text` (RFC 7515, ES256) with its content detached."""
        key = _read(self.folder / KEY)
        header = {"alg": "ES256", "kid": f"{self.certificate.serial_number:x}"}
        head = _encoded(msgspec.json.encode(header))
        r, s = decode_dss_signature(key.sign(f"{head}.{_encoded(text)}".encode(), ec.ECDSA(hashes.SHA256())))
        return f"{head}..{_encoded(r.to_bytes(32) + s.to_bytes(32))}"

    def _waiting(self) -> ec.EllipticCurvePrivateKey:
        path = self._pending / KEY
        if path.exists():
            return _read(path)
        OS_FILES.make(self._pending)
        self._pending.chmod(0o700)
        key = ec.generate_private_key(ec.SECP256R1())
        form = serialization.PrivateFormat.PKCS8
        pem = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
        OS_FILES.replace_private(path, pem)
        return key

    def _switch(self, folder: Path) -> None:
        """Let `pki` lead to the folder that was pending; what it led to is removed."""
        before = self.folder.resolve() if self.folder.is_symlink() else None
        if self.folder.is_dir() and before is None:  # made by hand
            OS_FILES.rename(self.folder, self.root / "pki-before")
        OS_FILES.make(folder)
        folder.chmod(0o700)
        for name in (KEY, CERTIFICATE, TRUST, CENTRE):  # copied: the key waits where it is until all else is done
            OS_FILES.replace_private(folder / name, OS_FILES.read(self._pending / name))
        link = self.root / ".pki.new"
        link.unlink(missing_ok=True)
        link.symlink_to(folder.name)
        OS_FILES.rename(link, self.folder)
        shutil.rmtree(self._pending)
        if before is not None and before != folder.resolve() and before.parent == self.root.resolve():
            shutil.rmtree(before, ignore_errors=True)


def _read(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(OS_FILES.read(path), None)
    except (ValueError, TypeError) as error:
        raise ConfigError(str(path), f"the key cannot be read ({error}); remove it and enrol again") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(str(path), "expected a key on P-256; remove it and enrol again")
    return key


def _encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
