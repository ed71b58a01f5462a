"""What is installed is ours alone, complete, and small enough for a Pi."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import distribution, packages_distributions
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("citybrain", "edge", "gateway", "streams", "rules", "api", "simulators")
LOCKS = sorted((ROOT / "requirements").glob("*.lock"))
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# Imports every module of a package with the server's libraries hidden, and prints how many it was.
PI = """
import importlib, pkgutil, sys
# imported in the processes of drivers that say that they need numpy
ARRAYS = {"edge.signals.features", "edge.signals.raw"}
HIDDEN = set("numpy numba sqlalchemy alembic pydantic fastapi uvicorn httpx amqtt cv2".split())
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"{name} is not on a Pi")
sys.meta_path.insert(0, Hide())
count = 0
for top in sys.argv[1:]:
    package = importlib.import_module(top)
    for module in pkgutil.walk_packages(package.__path__, f"{top}."):
        if module.name in ARRAYS or module.name.startswith("edge.vision."):
            continue
        if not module.name.startswith("citybrain.db") and not module.name.endswith("__main__"):
            importlib.import_module(module.name)
            count += 1
print(count)
"""


@pytest.mark.parametrize("name", PACKAGES)
def test_each_import_name_has_one_owner(name: str) -> None:
    owners = set(packages_distributions().get(name, []))
    assert owners == {PROJECT["name"]}, f"import name {name} belongs to {owners}; run `make install`"


def test_the_distribution_does_not_take_a_name_of_others() -> None:
    assert PROJECT["name"] not in {"citybrain", "edge", "rules", "simulators", "gateway", "streams", "api"}
    assert distribution(PROJECT["name"]).version == PROJECT["version"]


def test_every_extra_is_there() -> None:
    assert set(PROJECT["optional-dependencies"]) >= {"pi", "camera", "server", "kafka", "dev"}
    assert {path.stem for path in LOCKS} >= {"pi", "camera", "server", "kafka", "dev"}


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
def test_requirements_are_pinned_and_hashed_and_name_no_index(lock: Path) -> None:
    text = lock.read_text()
    assert not re.search(r"https?://|--(extra-)?index-url|--find-links|--trusted-host", text)
    entries = re.split(r"\n(?=[a-zA-Z0-9])", text.replace("\\\n", " ").strip())
    assert len(entries) >= len(PROJECT["dependencies"])
    for entry in entries:
        assert re.match(r"^[A-Za-z0-9._-]+(\[[a-z,]+\])?==\S+", entry), entry[:80]
        assert "--hash=sha256:" in entry, entry[:80]


def test_a_pi_needs_neither_arrays_nor_a_database() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PI, "citybrain", "edge", "gateway"], capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    assert int(done.stdout) > 10


def test_the_hook_that_hides_libraries_does_hide_them() -> None:
    done = subprocess.run([sys.executable, "-c", PI, "streams"], capture_output=True, timeout=60, check=False)
    assert done.returncode != 0
    assert b"is not on a Pi" in done.stderr


def test_every_command_can_be_loaded() -> None:
    points = {p.name: p for p in distribution(PROJECT["name"]).entry_points if p.group == "citybrain.commands"}
    written = PROJECT["entry-points"]["citybrain.commands"]
    assert {name: point.value for name, point in points.items()} == written
    for point in points.values():
        assert point.load().help
