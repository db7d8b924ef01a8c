"""The wheel: what is in it, and that it works away from the tree."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("accelerators", "agent", "modules", "protos", "simulator")
DOCUMENTS = ("LICENSE", "NOTICE", "README.md", "pyproject.toml")


def run(*command: str | Path, cwd: Path, timeout: float = 100) -> str:
    # Neither the tree nor the user's own settings may help out.
    environment = {
        key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")
    }
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # A copy, since setuptools leaves build/lib behind and packs whatever it finds there.
    tree = tmp_path_factory.mktemp("tree")
    for folder in FOLDERS:
        shutil.copytree(
            ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__", "*.pyc")
        )
    for name in DOCUMENTS:
        shutil.copy(ROOT / name, tree)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "out", cwd=tree)
    (path,) = (tree / "out").iterdir()
    return path


@pytest.fixture(scope="module")
def venv(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel, and the dependencies of the one that runs the tests."""
    directory = tmp_path_factory.mktemp("venv")
    run(sys.executable, "-m", "venv", "--without-pip", directory, cwd=directory)
    python = directory / "bin" / "python"
    install = ("-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet")
    run(sys.executable, *install, wheel, cwd=directory)
    # A path in a .pth comes last and its own .pth files are not read: the editable gatelet of the
    # tests' environment stays out of sight.
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    own = Path(
        run(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=directory)[:-1]
    )
    (own / "dependencies.pth").write_text("".join(f"{path}\n" for path in sorted(paths)))
    return directory


def test_wheel_holds_the_five_folders_and_nothing_else(wheel: Path) -> None:
    expected = {
        f"gatelet/{path.relative_to(ROOT)}"
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    metadata = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    assert names - metadata == expected
    assert {name.split("/", 1)[1] for name in metadata} == {
        "METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt",
        "licenses/LICENSE", "licenses/NOTICE",
    }  # fmt: skip


def test_wheel_brings_the_files_that_are_not_modules(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {f"gatelet/{folder}/py.typed" for folder in FOLDERS} <= names
    assert {"gatelet/protos/control.proto", "gatelet/protos/open_inference.proto"} <= names
    assert "gatelet/simulator/demo/data/heldout.npz" in names
    assert "gatelet/simulator/demo/data/v2/overlays/pynq-z2/overlay.json" in names


def test_import_comes_from_the_wheel(venv: Path) -> None:
    code = "import gatelet.agent, gatelet; print(gatelet.agent.__file__, len(gatelet.__path__))"
    where, places = run(venv / "bin" / "python", "-c", code, cwd=venv).split()
    assert Path(where).is_relative_to(venv)
    assert places == "1"


def test_command_names_its_version(venv: Path) -> None:
    assert run(venv / "bin" / "gatelet", "--version", cwd=venv) == f"gatelet {version('gatelet')}\n"


def test_demo_runs_from_the_wheel(venv: Path) -> None:
    output = run(venv / "bin" / "gatelet", "demo", "--json", cwd=venv)
    result = json.loads(output)
    assert result["failures"] == 0
    scored = {row["step"]: row["requests"] for row in result["rows"] if row["requests"]}
    assert {"score v1": 450, "score v2": 450, "score v3": 450}.items() <= scored.items()
