"""pyproject.toml lists by hand what lies in the tree; these tests keep the two together."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
from gatelet.agent.version import VERSION

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("accelerators", "agent", "modules", "protos", "simulator")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def test_packages_are_the_folders_with_an_init_file() -> None:
    found = {
        ".".join(("gatelet", *path.parent.relative_to(ROOT).parts))
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("__init__.py")
    }
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found


def test_the_version_is_the_packages() -> None:
    assert PROJECT["project"]["version"] == VERSION


def test_every_folder_with_modules_has_an_init_file() -> None:
    folders = {path.parent for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    assert [str(path) for path in folders if not (path / "__init__.py").is_file()] == []


def test_package_directories_are_the_five_folders() -> None:
    assert PROJECT["tool"]["setuptools"]["package-dir"] == {
        f"gatelet.{folder}": folder for folder in FOLDERS
    }
    assert PROJECT["tool"]["importlinter"]["root_packages"] == [f"gatelet.{f}" for f in FOLDERS]


@pytest.mark.parametrize("extra", ["demo", "dev"])
def test_no_extra_leaves_out_the_fabric(extra: str) -> None:
    """`make demo` installs `demo` only, `make test` installs `dev` only."""
    extras = PROJECT["project"]["optional-dependencies"]
    seen: set[str] = set()
    wanted = [extra]
    while wanted:
        name = wanted.pop()
        seen.add(name)
        for requirement in extras[name]:
            if requirement.startswith("gatelet["):
                wanted += requirement[len("gatelet[") :].rstrip("]").split(",")
    assert {"demo", "fpga", "sim"} <= seen


def test_the_environment_script_can_be_read_by_older_interpreters() -> None:
    source = (ROOT / "tools" / "environment.py").read_text("utf-8")
    ast.parse(source, feature_version=(3, 8))
