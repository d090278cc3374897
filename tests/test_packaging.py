"""What is shipped: the wheel holds code, recipes and configs, and the tested stack fits what it asks for."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from finetune import __version__

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def constraints() -> list[str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("#")
    return [line for line in lines if not line.startswith("#")]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    words = ["-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    assert path.name == f"finetune_recipes-{__version__}-py3-none-any.whl"
    return zipfile.ZipFile(path)


def test_the_wheel_holds_all_code_recipes_and_configs(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    for folder, inside in (
        ("finetune", "finetune"),
        ("recipes", "finetune/_recipes"),
        ("configs", "finetune/_configs"),
    ):
        tracked = subprocess.run(["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True, check=True)
        files = [line for line in tracked.stdout.splitlines() if (ROOT / line).exists()]
        assert len(files) >= 2
        missing = [line for line in files if inside + line.removeprefix(folder) not in names]
        assert not missing
    tops = {name.split("/")[0] for name in names}
    assert tops == {"finetune", f"finetune_recipes-{__version__}.dist-info"}
    assert sum(entry.file_size for entry in wheel.infolist()) < 5e6


def test_the_wheel_carries_the_licence_and_the_command(wheel: zipfile.ZipFile) -> None:
    facts = f"finetune_recipes-{__version__}.dist-info"
    assert "Apache License" in wheel.read(f"{facts}/licenses/LICENSE").decode()
    assert "finetune = finetune.cli.main:main" in wheel.read(f"{facts}/entry_points.txt").decode()
    metadata = wheel.read(f"{facts}/METADATA").decode()
    assert "License-Expression: Apache-2.0\n" in metadata
    assert "Requires-Python: >=3.11\n" in metadata


def test_constraints_are_exact_and_sorted_and_name_no_build(constraints: list[str]) -> None:
    assert len(constraints) >= 80
    for line in constraints:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line), line
    assert constraints == sorted(set(constraints), key=str.upper)
    assert "torch==2.13.0" in constraints


def test_everything_asked_for_is_constrained_to_a_release_that_fits(project: dict, constraints: list[str]) -> None:
    pinned = {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in constraints}
    extras = project["optional-dependencies"]
    asked = [
        Requirement(line) for line in sum((extras[name] for name in extras if name != "all"), project["dependencies"])
    ]
    assert len(asked) >= 20
    for requirement in asked:
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement
        assert not [one for one in requirement.specifier if one.operator in ("==", "<", "<=")], requirement


def test_what_is_installed_here_is_the_tested_stack(project: dict, constraints: list[str]) -> None:
    pinned = {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in constraints}
    for line in project["dependencies"]:
        name = canonicalize_name(Requirement(line).name)
        assert importlib.metadata.version(name).split("+")[0] == pinned[name]


def test_all_means_every_extra(project: dict) -> None:
    extras = project["optional-dependencies"]
    (line,) = extras["all"]
    assert Requirement(line).name == project["name"]
    assert Requirement(line).extras == set(extras) - {"all"}
    assert all(extras.values())
