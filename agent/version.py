"""Which gatelet this is.

pyproject.toml has it too, but to read the installed package's metadata costs every process 1 MB of
memory.
"""

from __future__ import annotations

VERSION = "0.1.0"
