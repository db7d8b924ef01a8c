"""How a process ended, in words."""

from __future__ import annotations

import signal


def ending(code: int) -> str:
    """Of the return code that `subprocess` gives: "with exit code 1", "by SIGSEGV"."""
    if code >= 0:
        return f"with exit code {code}"
    try:
        return f"by {signal.Signals(-code).name}"
    except ValueError:
        return f"by signal {-code}"
