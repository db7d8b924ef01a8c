"""The Verilog in yosys, and the build scripts against the presets. Nothing here maps or places."""

from __future__ import annotations

import re
import subprocess

import pytest
from gatelet.accelerators.rtl import PRESETS
from gatelet.accelerators.rtl.config import TOP, VERILOG, verilog_sources
from required import program

SCRIPTS = VERILOG.parent / "tcl"


@pytest.mark.parametrize("board", sorted(PRESETS))
def test_yosys_elaborates_the_core_without_a_complaint(board: str) -> None:
    program("yosys")
    sizes = PRESETS[board].verilog_parameters
    commands = [
        *(f"read_verilog {source}" for source in verilog_sources()),
        "chparam " + " ".join(f"-set {name} {value}" for name, value in sizes.items()) + f" {TOP}",
        f"hierarchy -check -top {TOP}",
        "proc",
        "check -assert",
    ]
    done = subprocess.run(
        ["yosys", "-q", "-p", "; ".join(commands)],
        capture_output=True, text=True, timeout=110, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Warning" not in done.stderr, done.stderr[-2000:]


@pytest.mark.parametrize("script", ["build.tcl", "resources.tcl"])
@pytest.mark.parametrize("board", sorted(PRESETS))
def test_scripts_build_the_presets(script: str, board: str) -> None:
    text = (SCRIPTS / script).read_text("utf-8")
    block = text[
        text.index(f"{board} {{") if f"{board} {{" in text else text.index(f"{board}  {{") :
    ]
    found = re.search(r"sizes \{([^}]*)\}", block)
    assert found is not None
    words = found[1].split()
    sizes = {name: int(value) for name, value in zip(words[::2], words[1::2], strict=True)}
    expected = PRESETS[board].verilog_parameters
    assert sizes == {name: expected[name] for name in sizes}
    assert {"PE", "SIMD", "RQ", "ACT_DEPTH", "WEIGHT_DEPTH"} <= set(sizes)
