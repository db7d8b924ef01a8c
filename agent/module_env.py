"""What the agent itself reads from the `env` of a manifest's entries."""

from __future__ import annotations

import re
from collections.abc import Iterable

from .document import UNPARSABLE, ManifestError, shown
from .module_spec import ModuleSpec
from .plan_types import UpdateMode

PROBATION = "GATELET_PROBATION_SECONDS"
UPDATE_MODE = "ModuleUpdateMode"
MAX_PROBATION_SECONDS = 86_400

_SECONDS = re.compile(r"[0-9]{1,6}(\.[0-9]{1,6})?", re.ASCII)
_MODES: dict[str, UpdateMode] = {
    "nonblocking": "NonBlocking",
    "waitforallpulls": "WaitForAllPulls",
}


def probation_seconds(spec: ModuleSpec) -> float | None:
    """How long this module must be healthy for its deployment to be good; None: the device's own.

    Raises ManifestError 400.
    """
    text = dict(spec.env).get(PROBATION, "").strip()
    if not text:
        return None
    if not _SECONDS.fullmatch(text) or float(text) > MAX_PROBATION_SECONDS:
        raise ManifestError(
            UNPARSABLE,
            f"modules.{spec.name}.env.{PROBATION}.value",
            f"expected seconds from 0 to {MAX_PROBATION_SECONDS}, found {shown(text)}",
        )
    return float(text)


def module_update_mode(system_modules: Iterable[ModuleSpec]) -> UpdateMode | None:
    """edgeAgent's ModuleUpdateMode in a manifest; None: the device's own.

    Raises ManifestError 400.
    """
    for spec in system_modules:
        text = dict(spec.env).get(UPDATE_MODE, "").strip()
        if spec.name == "edgeAgent" and text:
            if text.lower() not in _MODES:
                raise ManifestError(
                    UNPARSABLE,
                    f"systemModules.edgeAgent.env.{UPDATE_MODE}.value",
                    f"expected {' or '.join(_MODES.values())}, found {shown(text)}",
                )
            return _MODES[text.lower()]
    return None
