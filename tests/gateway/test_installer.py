"""The installer of a box: what it refuses, that it may be repeated, and that a run that fails changes nothing."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import site
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "deploy" / "install-gateway.sh"
SERVER = {"numpy", "numba", "sqlalchemy", "alembic", "pydantic", "fastapi", "uvicorn", "httpx", "duckdb", "pyarrow"}


def install(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    given = {**os.environ, "DESTDIR": str(folder), "PYTHON": sys.executable, **environment}
    return subprocess.run(
        ["sh", str(SCRIPT), *words], env=given, capture_output=True, text=True, check=False, timeout=110
    )


def test_the_script_is_clean() -> None:
    program = shutil.which("shellcheck")
    if program is None:
        if os.environ.get("CI") == "true":
            pytest.fail("shellcheck is not installed: apt-get install shellcheck")
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([program, str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_a_pi_gets_no_server_package() -> None:
    locked = set(re.findall(r"^([a-z0-9._-]+)==", (ROOT / "requirements" / "pi.lock").read_text(), re.MULTILINE))
    assert {"msgspec", "paho-mqtt", "pymodbus", "pyserial", "cryptography"} <= locked
    assert locked & SERVER == set()


def test_script_and_units_speak_of_the_same_places() -> None:
    text = SCRIPT.read_text()
    for unit in sorted((ROOT / "deploy" / "systemd").glob("citybrain-gateway*")):
        assert unit.name in text
        if unit.suffix == ".service":
            said = unit.read_text()
            assert "ExecStart=/opt/citybrain/venv/bin/citybrain gateway" in said
            assert "--data /var/lib/citybrain" in said
            assert "User=citybrain" in said


@pytest.mark.parametrize(
    ("words", "what", "code"),
    [
        ((), "usage", 2),
        (("--wheels",), "usage", 2),
        (("--nonsense", "x"), "usage", 2),
        (("/no/such.whl",), "/no/such.whl: no such file", 1),
    ],
)
def test_what_is_missing_is_said(tmp_path: Path, words: tuple[str, ...], what: str, code: int) -> None:
    done = install(tmp_path, *words)
    assert (done.returncode, what in done.stderr) == (code, True), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_another_system_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "citybrain_senses-0.1.0-py3-none-any.whl"
    wheel.touch()
    tools = tmp_path / "tools"
    tools.mkdir()

    def tool(name: str, text: str) -> None:
        path = tools / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    path = f"{tools}:{os.environ['PATH']}"
    assert "python-none is missing" in install(tmp_path / "d", str(wheel), PYTHON="python-none").stderr
    tool("old", 'case "$*" in *version_info*) exit 1 ;; -V) echo Python 3.9.2 ;; esac')
    assert "Python 3.9.2; 3.11 or later" in install(tmp_path / "d", str(wheel), PYTHON="old", PATH=path).stderr
    tool("getconf", "echo 32")
    assert "32-bit" in install(tmp_path / "d", str(wheel), PATH=path).stderr
    assert not (tmp_path / "d").exists()


def test_two_runs_at_once_do_not_meet(tmp_path: Path) -> None:
    wheel = tmp_path / "citybrain_senses-0.1.0-py3-none-any.whl"
    wheel.touch()
    place = tmp_path / "target" / "opt" / "citybrain"
    place.mkdir(parents=True)
    with (place / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        done = install(tmp_path / "target", str(wheel))
    assert (done.returncode, "another run of it is at work here" in done.stderr) == (1, True)
    assert [one.name for one in place.iterdir()] == [".lock"]


@pytest.mark.parametrize("unit", ["citybrain-gateway.service", "citybrain-gateway-renew.service"])
def test_a_unit_exposes_little(tmp_path: Path, unit: str) -> None:
    """`systemd-analyze security`: 10 is everything; what is left is the network, the host's files and the ports."""
    program = shutil.which("systemd-analyze")
    if program is None:
        if os.environ.get("CI") == "true":
            pytest.fail("systemd-analyze is not installed: apt-get install systemd")
        pytest.skip("systemd-analyze is not installed")
    text = (ROOT / "deploy" / "systemd" / unit).read_text().replace("/opt/citybrain/venv/bin/citybrain", sys.executable)
    (tmp_path / unit).write_text(text)
    command = [program, "security", "--offline=true", "--threshold=16", "--no-pager", str(tmp_path / unit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr


@pytest.mark.soak
def test_it_installs_repeats_and_leaves_what_was_there_when_it_fails(tmp_path: Path) -> None:
    """The libraries come from this environment, not from an index: what pi.lock holds is not the script's doing."""
    left_out = shutil.ignore_patterns(
        ".venv", ".git", "__pycache__", "build", "data", "*.egg-info", ".*_cache", ".hypothesis"
    )
    source = shutil.copytree(ROOT, tmp_path / "source", ignore=left_out)  # building leaves its traces
    built = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            str(tmp_path),
            str(source),
        ],
        capture_output=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr.decode()
    (wheel,) = tmp_path.glob("*.whl")
    lock, target = tmp_path / "empty.lock", tmp_path / "target"
    lock.touch()
    ours = {"LOCK": str(lock), "PYTHONPATH": site.getsitepackages()[0]}
    remains = target / "opt/citybrain/venv-0.0.9-1"  # of a run that was cut off
    remains.mkdir(parents=True)
    before = os.umask(0o077)
    try:
        done = install(target, str(wheel), "--wheels", str(tmp_path), **ours)
    finally:
        os.umask(before)
    assert done.returncode == 0, done.stderr
    assert "enrol it now" in done.stdout
    assert not remains.exists()
    command = target / "usr/local/bin/citybrain-gateway"
    assert os.access(command, os.X_OK)
    assert 'gateway "$@" --data /var/lib/citybrain' in command.read_text()
    assert (target / "opt/citybrain/docs/gateway.md").exists(), "the unit's documentation"
    assert (target / "opt/citybrain/venv/bin/citybrain").stat().st_mode & 0o005 == 0o005, "whatever root's umask is"
    assert (target / "var/lib/citybrain").stat().st_mode & 0o077 == 0
    program = target / "opt/citybrain/venv/bin/citybrain"
    first = (target / "opt/citybrain/venv").readlink()
    (target / "var/lib/citybrain/gateway.yaml").touch()
    again = install(target, str(wheel), "--wheels", str(tmp_path), **ours)
    assert (again.returncode, "it is enrolled" in again.stdout) == (0, True), again.stderr
    second = (target / "opt/citybrain/venv").readlink()
    assert second != first
    assert not (target / "opt/citybrain" / first).exists()
    lock.write_text("no-such-package==1.0 --hash=sha256:" + "0" * 64 + "\n")
    failed = install(target, str(wheel), "--wheels", str(tmp_path), **ours)
    assert (failed.returncode, "what was there before is still there" in failed.stderr) == (1, True)
    assert (target / "opt/citybrain/venv").readlink() == second
    assert len([one for one in (target / "opt/citybrain").iterdir() if one.name.startswith("venv-")]) == 1
    shown = subprocess.run([program, "gateway", "--help"], env={**os.environ, **ours}, capture_output=True, check=False)
    assert shown.returncode == 0
