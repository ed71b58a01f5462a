"""What a gateway says of itself: above all how long its certificate is still valid."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from citybrain.clock import DAY_MS, real_unix_ms
from citybrain.counters import Counters
from citybrain.storage import OS_FILES
from citybrain.units import METRICS
from gateway.spool import Spool
from gateway.times import BoxClock
from gateway.vitals import HOUR_S, Expiry, Vitals
from tests.certificates import Authority

NOW = real_unix_ms()


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ca")


def test_the_days_that_are_left_stand_in_its_own_readings(tmp_path: Path, authority: Authority) -> None:
    counters, mine = Counters("gateway"), authority.sign("gw-1", end_d=20)
    spool = Spool(tmp_path / "spool", "board", OS_FILES, counters=counters)
    spool.start()
    vitals = Vitals("gw-1", spool, BoxClock(tmp_path / "clock", counters), counters, mine)
    ((_, reading),) = vitals.poll(NOW)
    assert reading.values["certificate_days"] == pytest.approx(20, abs=0.2)
    assert METRICS["certificate_days"].unit == "d"
    without = Vitals("gw-1", spool, BoxClock(tmp_path / "clock", counters), counters)
    assert "certificate_days" not in without.poll(NOW)[0][1].values, "a broker on loopback asks for none"
    unset = BoxClock(tmp_path / "clock", counters, system=lambda: 0)
    assert "certificate_days" not in Vitals("gw-1", spool, unset, counters, mine).poll(NOW)[0][1].values
    spool.close()


def test_a_renewal_is_seen_at_once_and_an_end_is_below_zero(tmp_path: Path, authority: Authority) -> None:
    old, new = authority.sign("old", end_d=3), authority.sign("new", end_d=365)
    link = tmp_path / "gateway.pem"
    link.symlink_to(old)
    expiry = Expiry(link, Counters("gateway"))
    assert expiry.days(NOW) == pytest.approx(3, abs=0.2)
    assert expiry.days(NOW + 5 * DAY_MS) == pytest.approx(-2, abs=0.2)
    (tmp_path / "next").symlink_to(new)
    (tmp_path / "next").rename(link)  # as the folder `pki` changes
    assert expiry.days(NOW) == pytest.approx(365, abs=0.2)


def test_the_file_is_read_when_it_is_another_one_and_else_once_an_hour(
    tmp_path: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = authority.sign("gw-1", end_d=20)
    before, text = mine.stat(), mine.read_bytes()
    passed_s = [1000.0]
    monkeypatch.setattr("gateway.vitals.monotonic_s", lambda: passed_s[0])
    expiry = Expiry(mine, Counters("gateway"))
    assert expiry.days(NOW) is not None
    mine.write_bytes(b"x" * len(text))  # the same file by all that is looked at
    os.utime(mine, ns=(before.st_atime_ns, before.st_mtime_ns))
    passed_s[0] += HOUR_S - 1
    assert expiry.days(NOW) is not None, "not read again"
    passed_s[0] += 1
    assert expiry.days(NOW) is None, "an hour has passed"


def test_a_certificate_that_is_gone_or_none_is_said_once_and_the_rest_is_told(tmp_path: Path) -> None:
    counters, path = Counters("gateway"), tmp_path / "gateway.pem"
    expiry = Expiry(path, counters)
    for _ in range(3):
        assert expiry.days(NOW) is None
    path.write_text("-----BEGIN CERTIFICATE-----\nhello\n-----END CERTIFICATE-----\n")
    assert expiry.days(NOW) is None
    assert counters.values["errors_total{stage=certificate}"] == 2
    assert "gateway.pem: cannot be read" in counters.warnings[0]
    assert "expected a certificate in PEM" in counters.warnings[1]
