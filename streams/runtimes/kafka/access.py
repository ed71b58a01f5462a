"""How to get into a Kafka that is not open to everybody: `--kafka-config FILE`, TLS and passwords.

    security.protocol: sasl_ssl
    ssl.ca.location: ca.pem
    sasl.mechanism: SCRAM-SHA-512
    sasl.username: citybrain
    sasl.password.file: kafka.password

The names are librdkafka's; a secret stands in a file of its own, named here. Paths are relative to the file's folder.
"""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any, Literal

import msgspec

from citybrain.config import load_yaml
from citybrain.errors import ConfigError

FILES = ("ssl.ca.location", "ssl.certificate.location", "ssl.key.location")
SECRETS = ("ssl.key.password.file", "sasl.password.file")


def _dotted(name: str) -> str:
    return name.replace("_", ".")


class Access(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename=_dotted):
    """What `--kafka-config` may say."""

    security_protocol: Literal["ssl", "sasl_ssl", "sasl_plaintext", "plaintext"]
    ssl_ca_location: str | None = None
    ssl_certificate_location: str | None = None
    ssl_key_location: str | None = None
    ssl_key_password_file: str | None = None
    ssl_endpoint_identification_algorithm: Literal["https", "none"] | None = None
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] | None = None
    sasl_username: str | None = None
    sasl_password_file: str | None = None


def read_access(path: Path) -> dict[str, Any]:
    """Return a file's settings for librdkafka, the secrets read from their files; raises ConfigError."""
    given = msgspec.to_builtins(load_yaml(path, Access))
    found = {name: value for name, value in given.items() if value is not None}
    for name in FILES:
        if name in found:
            found[name] = str(_readable(path, name, found[name]))
    for name in SECRETS:
        if name in found:
            secret = _readable(path, name, found.pop(name)).read_text(encoding="utf-8").rstrip("\r\n")
            found[name.removesuffix(".file")] = secret
    _check(path, found)
    return found


def _readable(path: Path, name: str, value: str) -> Path:
    file = path.parent / value
    try:
        with file.open("rb"):
            return file.resolve()
    except OSError as error:
        raise ConfigError(f"{path}: {name}", f"{file} cannot be read: {error.strerror}") from None


def _check(path: Path, found: dict[str, Any]) -> None:
    """Refuse what would leave half of it unused or unsaid."""
    protocol = found["security.protocol"]
    if "sasl" in protocol:
        for name in ("sasl.mechanism", "sasl.username", "sasl.password"):
            if name not in found:
                raise ConfigError(str(path), f"security.protocol {protocol} needs {name}{_of_file(name)}")
    for name in found:
        if name.split(".")[0] not in protocol and name != "security.protocol":
            raise ConfigError(str(path), f"{name}{_of_file(name)} has no meaning with security.protocol {protocol}")
    if ("ssl.certificate.location" in found) != ("ssl.key.location" in found):
        raise ConfigError(str(path), "ssl.certificate.location and ssl.key.location belong together")


def _of_file(name: str) -> str:
    return ".file" if f"{name}.file" in SECRETS else ""


def faust_credentials(settings: dict[str, Any]) -> Any:
    """Return the same for Faust, whose client is another one; None where Kafka is open. Raises ConfigError."""
    import faust  # noqa: PLC0415  only who asks for it needs Faust

    protocol = settings.get("security.protocol", "plaintext")
    context = ssl_context(settings) if protocol.endswith("ssl") else None
    if protocol.startswith("sasl"):
        return faust.SASLCredentials(
            username=settings["sasl.username"],
            password=settings["sasl.password"],
            mechanism=settings["sasl.mechanism"],
            ssl_context=context,
        )
    return faust.SSLCredentials(context) if context is not None else None


def ssl_context(settings: dict[str, Any]) -> ssl.SSLContext:
    """Return a TLS context that trusts and shows what the settings say; raises ConfigError."""
    try:
        context = ssl.create_default_context(cafile=settings.get("ssl.ca.location"))
        context.check_hostname = settings.get("ssl.endpoint.identification.algorithm") != "none"
        if "ssl.certificate.location" in settings:
            certificate, key = settings["ssl.certificate.location"], settings["ssl.key.location"]
            context.load_cert_chain(certificate, key, settings.get("ssl.key.password", ""))
    except ssl.SSLError as error:
        raise ConfigError("--kafka-config", f"a certificate or key cannot be used: {error}") from None
    return context
