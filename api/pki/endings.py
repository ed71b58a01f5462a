"""What ends, and when: the authority, its revocation lists, the server's and the services' certificates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from api.health import Ending
from api.pki import certificates
from api.pki.ca import SERVER, Authority
from citybrain.errors import ConfigError, StorageError
from citybrain.storage import OS_FILES


def endings(authority: Authority, now_ms: int) -> list[Ending]:
    """Return when what the centre itself shows ends, the authority first; for boxes see `api.fleet`. now_ms: real time.

    A broker's folder counts like ours: what could not be written there is what its broker still reads.
    """
    book = authority.book()
    if not book.current:
        return []
    folders = [authority.folder, *(Path(one.path) for one in authority.setting.brokers)]
    ends: list[tuple[str, str, int | None]] = [("authority", f"{book.current}", book.authorities[book.current])]
    ends += [("list", "crl.pem", list_ends(authority, folders)), ("server", SERVER, _server_ends(folders))]
    services = book.latest("service").values()
    ends += [("service", one.name, one.until_ms) for one in services if one.revoked_ms is None]
    return [Ending(kind, name, (until_ms - now_ms) / 1000) for kind, name, until_ms in ends if until_ms is not None]


def list_ends(authority: Authority, folders: Iterable[Path]) -> int | None:
    """Return until when the revocation lists in these folders hold (Unix ms), None where none can be read.

    A list that ends with its authority is left out: nothing of that authority is valid any longer then.
    """
    with_it = {until_ms // 1000 for until_ms in authority.book().authorities.values()}
    found = [end_s for folder in folders for end_s in _lists(folder / "crl.pem") if end_s not in with_it]
    return min(found) * 1000 if found else None


def _lists(path: Path) -> Iterator[int]:
    try:
        lists = certificates.read_lists(OS_FILES.read(path))
    except (StorageError, ValueError):
        return  # gone, or another user's: the authority's notes say so
    yield from (int(one.next_update_utc.timestamp()) for one in lists if one.next_update_utc is not None)


def _server_ends(folders: Iterable[Path]) -> int | None:
    found = []
    for path in (folder / "server.pem" for folder in folders):
        try:
            found.append(certificates.until_ms_of(certificates.read_certificate(OS_FILES.read(path), str(path))))
        except (StorageError, ConfigError):
            continue  # as above
    return min(found, default=None)
