"""Serial ports that cannot be opened: each says what to do."""

from __future__ import annotations

import grp
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge.serial_port import may_not, open_port
from simulators.lines.wire import Wire


def test_a_port_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"ttyUSB0 is not there: is the adapter plugged in\?$"):
        open_port(str(tmp_path / "ttyUSB0"), 9600)


def test_a_file_is_no_port(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file is no serial port$"):
        open_port(str(tmp_path / "file"), 9600)


@pytest.fixture
def nobody(tmp_path: Path) -> Iterator[None]:
    """Be no root meanwhile, who may open anything; leave a file that nobody may open."""
    (tmp_path / "tty").touch(0o000)
    uid = os.geteuid()
    if uid == 0:
        os.seteuid(65534)
    yield
    os.seteuid(uid)


def test_a_port_that_may_not_be_opened(tmp_path: Path, nobody: None) -> None:
    with pytest.raises(OSError, match=r"tty may not be opened: is the user in the group `dialout`\?$"):
        open_port(str(tmp_path / "tty"), 9600)


def test_whose_group_it_takes_is_said(tmp_path: Path) -> None:
    port = tmp_path / "tty"
    port.touch(0o660)
    port.chmod(0o660)  # whatever the umask is
    try:
        os.chown(port, -1, grp.getgrnam("dialout").gr_gid)
    except (KeyError, PermissionError):
        pytest.skip("only root gives a file away, and only where there is a group `dialout`")
    assert may_not(port) == "is the user in the group `dialout`?"
    port.chmod(0o600)
    assert may_not(port) == "its group `dialout` gives nobody a right to it (600): want a udev rule for `dialout`"


def test_a_folder_is_no_port(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"is no serial port$"):
        open_port(str(tmp_path), 9600)


def test_a_port_has_one_user(tmp_path: Path) -> None:
    wire = Wire(tmp_path / "ttyUSB0", 9600)
    wire.plug()
    try:
        with open_port(str(wire.port), 9600), pytest.raises(OSError, match="is used by another driver or program"):
            open_port(str(wire.port), 9600)
        open_port(str(wire.port), 19_200).close()
    finally:
        wire.unplug()
