"""What `gatelet profile` measures: a folder or an image run here, or a served endpoint."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from .command import CommandError, configuration, wrong_use
from .scoring_client import scoring_client

if TYPE_CHECKING:
    from ...accelerators.backend import Backend
    from ...accelerators.tensors import Array, TensorSpec
    from ..profile.subjects import EndpointSubject, FolderSubject


def subject_of(
    arguments: argparse.Namespace, cleanup: ExitStack
) -> tuple[FolderSubject | EndpointSubject, str, str, str]:
    """What to measure, and how to call it: target, model and version."""
    from ...modules.model_json import load_model
    from ..profile.subjects import EndpointSubject, FolderSubject

    path = Path(arguments.model)
    subject: FolderSubject | EndpointSubject
    if path.exists():
        folder = _unpacked(path, cleanup)
        # Named in errors before anything is loaded.
        specs = load_model(folder).inputs if arguments.inputs else ()
        subject = FolderSubject(
            folder,
            _backends(arguments, cleanup),
            _given(arguments, specs),
            tuple(arguments.threads) if arguments.threads else None,
        )
        cleanup.callback(subject.close)
        return subject, str(path), subject.model.name, subject.model.version
    if "/" in arguments.model or arguments.model.startswith("."):
        raise CommandError(f"{arguments.model} does not exist; name a folder or an endpoint")
    client = cleanup.enter_context(scoring_client(arguments))
    if arguments.threads:
        wrong_use("--threads is for a folder; a served model has its own: set SCORING_THREADS")
    pid = _scoring_pid(arguments)
    subject = EndpointSubject(client, arguments.model, arguments.model_version, pid=pid)
    if arguments.inputs:
        given = _given(arguments, subject.metadata.inputs)
        subject = EndpointSubject(client, arguments.model, arguments.model_version, given, pid)
    version = arguments.model_version or ", ".join(subject.metadata.versions)
    return subject, arguments.url, arguments.model, version


def _given(arguments: argparse.Namespace, specs: Sequence[TensorSpec]) -> dict[str, Array]:
    from .score import named, read_value

    texts = dict(named(text) for text in arguments.inputs)
    by_name = {spec.name: spec for spec in specs}
    for name in texts:
        if name not in by_name:
            wrong_use(f"{arguments.model} takes {', '.join(map(str, specs))}, not {name}")
    return {name: read_value(by_name[name], value) for name, value in texts.items()}


def _unpacked(path: Path, cleanup: ExitStack) -> Path:
    """The model folder of a folder or of an image as OCI layout."""
    from ...modules.errors import ImageError
    from ...modules.oci.layout import open_layout
    from ...modules.oci.unpack import MODEL_FOLDER, UnpackLimits, unpack_layer

    if (path / "model.json").exists():
        return path
    folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="gatelet-profile-")))
    limits = UnpackLimits()
    left = limits.bytes
    try:
        image = open_layout(path)
        diff_ids = image.config.rootfs.diff_ids
        for layer, diff_id in zip(image.manifest.layers, diff_ids, strict=True):
            with image.open_blob(layer.digest) as blob:
                _, size = unpack_layer(blob, layer, diff_id, folder, limits, left, lambda _: None)
            left -= size
    except (ImageError, OSError) as error:
        raise CommandError(f"{path} is no model folder and no image: {error}") from error
    return folder / MODEL_FOLDER


def _backends(arguments: argparse.Namespace, cleanup: ExitStack) -> dict[str, Backend]:
    """The CPU, and the FPGA where the configuration names a board whose process runs."""
    from ...accelerators.cpu import cpu_backend

    backends: dict[str, Backend] = {}
    if arguments.config.exists():
        from ..roles import board_of

        config = configuration(arguments)
        board = board_of(config)
        if board is not None and config.fabric_socket.exists():
            from ...accelerators.fpga.backend import FpgaBackend

            fpga = FpgaBackend(config.fabric_socket, board.name, board.part)
            cleanup.callback(fpga.close)
            backends[fpga.name] = fpga
    cpu = cpu_backend(0)
    backends[cpu.name] = cpu
    return backends


def _scoring_pid(arguments: argparse.Namespace) -> int | None:
    """Of the scoring process, if the agent of this machine says so."""
    if not arguments.config.exists():
        return None
    from .agent_client import AgentClient

    try:
        with AgentClient(configuration(arguments).agent_socket) as agent:
            found = agent.status()["processes"].get("scoring", {}).get("pid")
    except CommandError:
        return None
    return int(found) if found else None
