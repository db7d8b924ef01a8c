"""Scoring options of a model module: the `SCORING_*` variables of its manifest entry."""

from __future__ import annotations

import re
from collections.abc import Iterable

import msgspec

from .document import UNPARSABLE, ManifestError, hint, shown
from .module_spec import ModuleSpec

PREFIX = "SCORING_"
BACKENDS = ("fpga", "cpu")
AUTH_MODES = ("none", "key", "token")
KEYS = (
    "SCORING_ENDPOINT",
    "SCORING_TRAFFIC",
    "SCORING_BACKENDS",
    "SCORING_MAX_BATCH",
    "SCORING_MAX_DELAY_US",
    "SCORING_TIMEOUT_MS",
    "SCORING_MIRROR",
    "SCORING_AUTH",
    "SCORING_COLLECT",
)

MAX_BATCH = 65_536
MAX_DELAY_US = 10_000_000
MAX_TIMEOUT_MS = 3_600_000

# An endpoint is part of URLs and of metric labels.
_ENDPOINT = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}", re.ASCII)
_NUMBER = re.compile(r"[0-9]{1,10}", re.ASCII)
_OFF = ("", "0", "false", "off", "no", "none")


class ScoringOptions(msgspec.Struct, frozen=True):
    """How a model is served. 0 and () leave the choice to the scoring process.

    `traffic` is this module's percentage of the endpoint's requests; None for the module that gets
    the remainder. `mirror`, `auth` and `collect` are kept as asked for; `unsupported` names the
    variables that ask for something this version does not do.
    """

    endpoint: str
    traffic: int | None = None
    backends: tuple[str, ...] = ()
    max_batch: int = 0
    max_delay_us: int = 0
    timeout_ms: int = 0
    mirror: int = 0
    auth: str = "none"
    collect: str = ""
    unsupported: tuple[str, ...] = ()


def scoring_options(spec: ModuleSpec) -> ScoringOptions:
    """The options in `spec.env`; a blank variable counts as not set.

    Raises ManifestError 400 with the path `modules.<m>.env.<VARIABLE>.value` for a value out of
    bounds, and `modules.<m>.env.<VARIABLE>` for a `SCORING_` variable nobody knows.
    """
    variables = _Variables(spec)
    endpoint = variables.text("SCORING_ENDPOINT") or spec.name
    if not _ENDPOINT.fullmatch(endpoint):
        raise variables.error(
            "SCORING_ENDPOINT", "up to 128 letters, digits, '.', '_' and '-', not led by '.'"
        )
    auth = variables.text("SCORING_AUTH") or "none"
    if auth not in AUTH_MODES:
        raise variables.error("SCORING_AUTH", "none, key or token")
    mirror = variables.number("SCORING_MIRROR", 0, 100) or 0
    collect = variables.text("SCORING_COLLECT")
    asked = {
        "SCORING_MIRROR": mirror > 0,
        "SCORING_AUTH": auth != "none",
        "SCORING_COLLECT": collect.lower() not in _OFF,
    }
    return ScoringOptions(
        endpoint=endpoint,
        traffic=variables.number("SCORING_TRAFFIC", 0, 100),
        backends=variables.backends(),
        max_batch=variables.number("SCORING_MAX_BATCH", 1, MAX_BATCH) or 0,
        max_delay_us=variables.number("SCORING_MAX_DELAY_US", 0, MAX_DELAY_US) or 0,
        timeout_ms=variables.number("SCORING_TIMEOUT_MS", 1, MAX_TIMEOUT_MS) or 0,
        mirror=mirror,
        auth=auth,
        collect=collect,
        unsupported=tuple(name for name, wanted in asked.items() if wanted),
    )


def check_endpoints(modules: Iterable[ModuleSpec]) -> None:
    """Refuse modules that cannot share an endpoint: its requests must go somewhere, once.

    Raises ManifestError 400 when the percentages of an endpoint exceed 100 or when two modules
    claim the remainder. Modules that are to be stopped take no part.
    """
    shares: dict[str, int] = {}
    remainder: dict[str, str] = {}
    for spec in modules:
        options = scoring_options(spec)
        if spec.status != "running":
            continue
        path = f"modules.{spec.name}.env.SCORING_TRAFFIC.value"
        if options.traffic is None:
            first = remainder.setdefault(options.endpoint, spec.name)
            if first != spec.name:
                raise ManifestError(
                    UNPARSABLE,
                    path,
                    f"{first} and {spec.name} both serve endpoint {options.endpoint} without a "
                    "percentage; set SCORING_TRAFFIC (0 to 100) on one of them",
                )
        else:
            total = shares.get(options.endpoint, 0) + options.traffic
            shares[options.endpoint] = total
            if total > 100:
                raise ManifestError(
                    UNPARSABLE,
                    path,
                    f"the modules of endpoint {options.endpoint} claim {total} percent of its "
                    "requests; reduce one of them so that the sum is at most 100",
                )


class _Variables:
    """The SCORING_ variables of one module, with errors that name them."""

    def __init__(self, spec: ModuleSpec) -> None:
        self._module = spec.name
        self._values = {name: value for name, value in spec.env if name.startswith(PREFIX)}
        for name in self._values:
            if name not in KEYS:
                raise ManifestError(
                    UNPARSABLE,
                    f"modules.{spec.name}.env.{name}",
                    f"unknown scoring option{hint(name, KEYS)}; known: {', '.join(KEYS)}",
                )

    def error(self, name: str, expected: str) -> ManifestError:
        return ManifestError(
            UNPARSABLE,
            f"modules.{self._module}.env.{name}.value",
            f"expected {expected}, found {shown(self._values.get(name, self._module))}",
        )

    def text(self, name: str) -> str:
        return self._values.get(name, "").strip()

    def number(self, name: str, low: int, high: int) -> int | None:
        text = self.text(name)
        if not text:
            return None
        if not _NUMBER.fullmatch(text) or not low <= int(text) <= high:
            raise self.error(name, f"a whole number from {low} to {high}")
        return int(text)

    def backends(self) -> tuple[str, ...]:
        text = self.text("SCORING_BACKENDS")
        if not text:
            return ()
        names = tuple(word.strip().lower() for word in text.split(","))
        if len(set(names)) != len(names) or not set(names) <= set(BACKENDS):
            raise self.error(
                "SCORING_BACKENDS", "each of fpga and cpu at most once, such as 'fpga,cpu'"
            )
        return names
