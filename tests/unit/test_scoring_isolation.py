"""A model's own process that does not come up, or dies of the model."""

from __future__ import annotations

from pathlib import Path

import pytest
from gatelet.accelerators.backend import LoadOptions, Variant
from gatelet.accelerators.cpu import CpuBackend
from gatelet.accelerators.errors import BackendUnavailable, LoadError
from gatelet.agent.scoring.isolated import IsolatedBackend

from ..bench import onnx_models

VARIANT = Variant("onnx", "onnx/model.onnx")

# Whoever opens a model with it dies.
_DEADLY = """
import signal

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    signal.raise_signal(signal.SIGSEGV)
"""


def test_sockets_that_cannot_be_made_are_said(tmp_path: Path) -> None:
    model = onnx_models.scale_folder(tmp_path / "m", 2.0)
    # Where the first process's control socket is to be.
    (tmp_path / "i" / "cpu1" / "c").mkdir(parents=True)
    with pytest.raises(BackendUnavailable, match="no process of its own can be started"):
        IsolatedBackend(CpuBackend(), tmp_path / "i").load(model, VARIANT, LoadOptions())
    assert not (tmp_path / "i" / "cpu1").exists()


def test_a_model_that_kills_its_process_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = onnx_models.scale_folder(tmp_path / "m", 2.0)
    library = tmp_path / "library" / "onnxruntime"
    library.mkdir(parents=True)
    (library / "__init__.py").write_text(_DEADLY)
    monkeypatch.setenv("PYTHONPATH", str(library.parent))
    backend = IsolatedBackend(CpuBackend(), tmp_path / "i")
    with pytest.raises(LoadError, match="process that loaded the model ended by SIGSEGV"):
        backend.load(model, VARIANT, LoadOptions())
    assert not (tmp_path / "i" / "cpu1").exists()
