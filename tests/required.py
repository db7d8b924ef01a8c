"""What a test needs that pip does not install with gatelet.

Where it is missing the test is skipped with the reason, and fails where CI promises everything.
"""

from __future__ import annotations

import os
import shutil
from typing import NoReturn

import pytest

SEARCHED = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
"""Debian's servers are not in the PATH of every user."""


def in_ci() -> bool:
    return os.environ.get("CI") == "true"


def unavailable(reason: str) -> NoReturn:
    """Skip the running test; in CI fail it."""
    if in_ci():
        pytest.fail(reason)
    pytest.skip(reason)


def program(name: str, package: str = "") -> str:
    """Where `name` of Debian's `package` (of the same name without) is installed."""
    found = shutil.which(name, path=SEARCHED)
    if found is None:
        unavailable(f"needs {name} (apt-get install {package or name})")
    return found


def needs(*programs: str, package: str = "") -> pytest.MarkDecorator:
    """Mark a test that calls `programs`; where one is missing in CI the test fails by itself."""
    missing = [name for name in programs if shutil.which(name, path=SEARCHED) is None]
    return pytest.mark.skipif(
        bool(missing) and not in_ci(),
        reason=f"needs {', '.join(missing)} (apt-get install {package or ' '.join(missing)})",
    )
