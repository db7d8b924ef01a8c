"""The scoring bench runs as its documentation says, if only for a moment."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e

BENCH = Path(__file__).parents[1] / "bench" / "bench_scoring.py"


def test_the_bench_compares_servers_under_one_load() -> None:
    run = subprocess.run(
        [
            *(sys.executable, str(BENCH), "--seconds", "0.1", "--concurrency", "2"),
            *("--models", "mlp", "--servers", "gatelet", "grpcio"),
        ],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    for expected in (
        "mlp        onnxruntime loop ",
        "mlp        data plane together ",
        "mlp        gatelet gRPC together, tritonclient ",
        "mlp        grpcio gRPC, tritonclient ",
        "gatelet: answers with 1 models after ",
    ):
        assert expected in run.stdout, run.stdout
