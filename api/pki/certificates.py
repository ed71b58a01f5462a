"""Keys, certificates and revocation lists: EC P-256 and SHA-256 throughout. Pure: bytes and times in, bytes out.

Serials are random (RFC 5280, 20 octets at most); every certificate begins an hour ago, so that a box whose clock is
slow takes it too.
"""

from __future__ import annotations

import datetime
import ipaddress
import re
from collections.abc import Iterable, Sequence

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from citybrain.clock import HOUR_MS
from citybrain.errors import ConfigError, UsageError

Key = ec.EllipticCurvePrivateKey
SLOW_MS = HOUR_MS
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # it becomes a topic level, a client id and a common name


class Revoked(msgspec.Struct, frozen=True):
    """A line of a revocation list."""

    serial: int
    at_ms: int


def new_key() -> Key:
    """Return a new private key on P-256."""
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: Key, passphrase: bytes | None = None) -> bytes:
    """Return a private key as PKCS#8, encrypted where there is a passphrase."""
    how = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, how)


def read_key(pem: bytes, where: str, passphrase: bytes | None = None) -> Key:
    """Return a private key; raises ConfigError where the passphrase is wrong or it is no P-256 key."""
    try:
        key = serialization.load_pem_private_key(pem, passphrase)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(where, f"cannot be opened: is the passphrase right? ({error})") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ConfigError(where, "expected a key on P-256")
    return key


def read_certificate(pem: bytes, where: str) -> x509.Certificate:
    """Return the first certificate of a PEM file; raises ConfigError."""
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError as error:
        raise ConfigError(where, f"expected a certificate in PEM: {error}") from None


def read_request(pem: bytes) -> x509.CertificateSigningRequest:
    """Return a request that proves it has its key, which is on P-256; raises UsageError."""
    try:
        request = x509.load_pem_x509_csr(pem)
        key, proven = request.public_key(), request.is_signature_valid
    except (ValueError, UnsupportedAlgorithm, InvalidSignature) as error:
        raise UsageError(f"request: expected a certificate request in PEM: {error}") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise UsageError("request: expected a key on P-256")
    if not proven:
        raise UsageError("request: it is not signed by its own key")
    return request


def key(request: x509.CertificateSigningRequest) -> ec.EllipticCurvePublicKey:
    """Return the key of a request that `read_request` has taken."""
    found = request.public_key()
    assert isinstance(found, ec.EllipticCurvePublicKey)
    return found


def request_for(key: Key, name: str) -> bytes:
    """Return a certificate request for `name` in PEM."""
    made = x509.CertificateSigningRequestBuilder().subject_name(_name(name)).sign(key, hashes.SHA256())
    return made.public_bytes(serialization.Encoding.PEM)


def common_name(subject: x509.Name) -> str:
    """Return the common name, "" where there is none."""
    found = subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(found[0].value) if found else ""


def authority(key: Key, name: str, serial: int, now_ms: int, until_ms: int) -> x509.Certificate:
    """Return a self-signed authority that may sign no further authority."""
    builder = _builder(_name(name), _name(name), key.public_key(), serial, now_ms, until_ms)
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)  # signs certificates and CRLs
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(usage, critical=True)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    return builder.sign(key, hashes.SHA256())


def certificate(
    issuer: x509.Certificate,
    issuer_key: Key,
    key: ec.EllipticCurvePublicKey,
    name: str,
    serial: int,
    now_ms: int,
    until_ms: int,
    hosts: Sequence[str] = (),
) -> x509.Certificate:
    """Return a certificate: a server's where there are `hosts` (names or addresses), else a client's."""
    builder = _builder(_name(name), issuer.subject, key, serial, now_ms, until_ms)
    usage = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
    purpose = ExtendedKeyUsageOID.SERVER_AUTH if hosts else ExtendedKeyUsageOID.CLIENT_AUTH
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(usage, critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key())
    builder = builder.add_extension(identifier, critical=False)
    if hosts:
        builder = builder.add_extension(x509.SubjectAlternativeName([_host(host) for host in hosts]), critical=False)
    return builder.sign(issuer_key, hashes.SHA256())


def revocations(
    issuer: x509.Certificate, issuer_key: Key, revoked: Iterable[Revoked], number: int, now_ms: int, until_ms: int
) -> x509.CertificateRevocationList:
    """Return an authority's revocation list, which says when the next one comes at the latest."""
    builder = x509.CertificateRevocationListBuilder().issuer_name(issuer.subject)
    builder = builder.last_update(_moment(now_ms - SLOW_MS)).next_update(_moment(until_ms))
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key())
    builder = builder.add_extension(identifier, critical=False).add_extension(x509.CRLNumber(number), critical=False)
    for one in revoked:
        line = x509.RevokedCertificateBuilder().serial_number(one.serial).revocation_date(_moment(one.at_ms))
        builder = builder.add_revoked_certificate(line.build())
    return builder.sign(issuer_key, hashes.SHA256())


def read_lists(pem: bytes) -> list[x509.CertificateRevocationList]:
    """Return the revocation lists of a PEM file; raises ValueError."""
    end = b"-----END X509 CRL-----\n"
    return [x509.load_pem_x509_crl(part + end) for part in pem.split(end)[:-1]]


def pem(made: x509.Certificate | x509.CertificateRevocationList) -> bytes:
    """Return a certificate or a revocation list in PEM."""
    return made.public_bytes(serialization.Encoding.PEM)


def fingerprint(made: x509.Certificate) -> str:
    """Return the SHA-256 of a certificate, in hex."""
    return made.fingerprint(hashes.SHA256()).hex()


def key_fingerprint(key: ec.EllipticCurvePublicKey) -> str:
    """Return the SHA-256 of a public key (SubjectPublicKeyInfo), in hex."""
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    digest = hashes.Hash(hashes.SHA256())
    digest.update(key.public_bytes(serialization.Encoding.DER, form))
    return digest.finalize().hex()


def until_ms_of(made: x509.Certificate) -> int:
    """Return until when a certificate is valid, in Unix ms."""
    return int(made.not_valid_after_utc.timestamp() * 1000)


def check_name(name: str, what: str) -> str:
    """Return a name that may stand in a certificate; raises UsageError."""
    if not NAME.fullmatch(name):
        raise UsageError(f"{what} {name[:80]!r}: expected up to 64 letters, digits, '.', '_' or '-'")
    return name


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, serial: int, now_ms: int, until_ms: int
) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key).serial_number(serial)
    return builder.not_valid_before(_moment(now_ms - SLOW_MS)).not_valid_after(_moment(until_ms))


def _name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _moment(at_ms: int) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(at_ms // 1000, datetime.UTC)
