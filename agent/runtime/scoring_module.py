"""Scoring modules: where the Unix socket of a container that serves a model lies."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from .container import SCORING_LABEL

MOUNT = "/run/gatelet"
"""Where a scoring module finds its folder inside the container."""

SOCKET_NAME = "scoring.sock"

SOCKET_VARIABLE = "GATELET_SCORING_SOCKET"
"""Tells a scoring module where to listen: `/run/gatelet/scoring.sock`."""

SOCKET_LIMIT = 107
"""Bytes of a socket's path (unix(7))."""

_NO = ("false", "0", "no")


def module_folder(run_dir: PurePosixPath, module: str) -> PurePosixPath:
    """The folder on the host that `module` shares with the scoring process."""
    return run_dir / "modules" / module


def scoring_socket(run_dir: PurePosixPath, module: str) -> PurePosixPath:
    """The module's socket as the scoring process reaches it."""
    return module_folder(run_dir, module) / SOCKET_NAME


def is_scoring(labels: Mapping[str, str]) -> bool:
    """Whether an image or container with `labels` serves a model."""
    return SCORING_LABEL in labels and labels[SCORING_LABEL].strip().lower() not in _NO


def named_model(labels: Mapping[str, str]) -> str:
    """The model that the label's value names, "" where it only says that there is one."""
    value = labels.get(SCORING_LABEL, "").strip()
    return "" if value.lower() in (*_NO, "true", "1", "yes") else value


def shared_folder(body: Mapping[str, Any]) -> str | None:
    """The host folder that gatelet itself mounts into a container, None without.

    `body` is a create body made by `create_body`, or what the engine keeps of it.
    """
    if not is_scoring(body.get("Labels") or {}):
        return None
    for mount in (body.get("HostConfig") or {}).get("Mounts") or ():
        if mount.get("Target") == MOUNT:
            return str(mount["Source"])
    return None
