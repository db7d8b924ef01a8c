"""The FPGA path with older releases of pynq than that of the tests' own environment, unmodified."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from required import unavailable

REPOSITORY = Path(__file__).parents[2]
FILES = (
    "test_fpga_board.py", "test_fpga_driver.py", "test_fpga_finn.py", "test_fpga_partial.py",
)  # fmt: skip

# What was imported and how each file fared, told by the process itself.
PLUGIN = """
import collections
import json
import os
import sys

outcomes = collections.defaultdict(collections.Counter)


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        outcomes[report.nodeid.split("::")[0].rpartition("/")[2]][report.outcome] += 1


def pytest_sessionfinish():
    loaded = {"version": sys.modules["pynq"].__version__, "file": sys.modules["pynq"].__file__}
    with open(os.environ["RELEASES_REPORT"], "w") as file:
        json.dump({"pynq": loaded, "outcomes": outcomes}, file)
"""


@pytest.mark.timeout(400)
@pytest.mark.parametrize("release", ["3.0.1", "3.1.2"])
def test_the_fpga_tests_pass_with_pynq(tmp_path: Path, release: str) -> None:
    folder = tmp_path / "pynq"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-compile"),
            *("--target", str(folder), f"pynq=={release}"),
        ],
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        unavailable(f"pynq {release} does not install: {done.stderr[-2000:]}")
    (tmp_path / "releases_report.py").write_text(PLUGIN)
    report = tmp_path / "report.json"
    ran = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "releases_report"),
            *("-p", "no:cacheprovider", "--basetemp", str(tmp_path / "inner")),
            *("-k", "not unmodified and not finn+"),
            *(str(REPOSITORY / "tests" / "contract" / name) for name in FILES),
        ],
        capture_output=True, text=True, timeout=300, check=False, cwd=REPOSITORY,
        env={
            **{k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")},
            "PYTHONPATH": os.pathsep.join((str(folder), str(tmp_path))),
            "RELEASES_REPORT": str(report),
        },
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
    told = json.loads(report.read_text())
    assert told["pynq"]["version"] == release
    assert told["pynq"]["file"].startswith(str(folder))
    for name in FILES:
        assert set(told["outcomes"][name]) == {"passed"}, told["outcomes"]
        assert told["outcomes"][name]["passed"] >= 10
