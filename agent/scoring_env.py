"""Scoring options of a model module: the `SCORING_*` variables of its manifest entry."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

import msgspec

from .canary import CanaryRules
from .document import UNPARSABLE, ManifestError, hint, shown
from .module_spec import ModuleSpec
from .runtime.scoring_module import named_model

PREFIX = "SCORING_"
BACKENDS = ("fpga", "cpu", "numpy")
AUTH_MODES = ("none", "key", "token")
KEYS = (
    "SCORING_ENDPOINT",
    "SCORING_TRAFFIC",
    "SCORING_BACKENDS",
    "SCORING_MAX_BATCH",
    "SCORING_MAX_DELAY_US",
    "SCORING_TIMEOUT_MS",
    "SCORING_PRIORITY",
    "SCORING_INSTANCES",
    "SCORING_THREADS",
    "SCORING_ISOLATE",
    "SCORING_STICKY",
    "SCORING_MIRROR",
    "SCORING_MIRROR_TOLERANCE",
    "SCORING_CANARY",
    "SCORING_CANARY_STEP_S",
    "SCORING_CANARY_MAX_ERROR_DELTA",
    "SCORING_CANARY_MAX_LATENCY_RATIO",
    "SCORING_CANARY_MIN_REQUESTS",
    "SCORING_AUTH",
    "SCORING_CLIENTS",
    "SCORING_COLLECT",
)

MAX_BATCH = 65_536
MAX_DELAY_US = 10_000_000
MAX_TIMEOUT_MS = 3_600_000
LAST_PRIORITY = 10
MAX_INSTANCES = 256
MAX_CLIENTS = 256
MAX_THREADS = 256
MIRROR_TOLERANCE = 0.01
SESSION_HEADER = "x-gatelet-session"

# An endpoint is part of URLs and of metric labels.
_ENDPOINT = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}", re.ASCII)
_NUMBER = re.compile(r"[0-9]{1,10}", re.ASCII)
_DECIMAL = re.compile(r"[0-9]{1,10}(\.[0-9]{1,10})?", re.ASCII)
_HEADER = re.compile(r"[a-z0-9_.-]{1,64}(?<!-bin)", re.ASCII)
_OFF = ("", "0", "false", "off", "no", "none")


class ScoringOptions(msgspec.Struct, frozen=True):
    """How a model is served. 0 and () leave the choice to the scoring process.

    `traffic` is this module's percentage of the endpoint's requests; None for the module that gets
    the remainder. `mirror`: percent of them that it gets a copy of. `sticky`: the header whose
    equal values go to one module. `model`: which one of a container's, where its label names it.
    `isolate`: in a process of its own. `clients`: common names of the certificates that may call,
    () for any.
    `collect` is kept as asked for; `unsupported` names the variables that ask for something this
    version does not do.
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
    mirror_tolerance: float = MIRROR_TOLERANCE
    priority: int = 0
    instances: int = 0
    threads: int = 0
    sticky: str = ""
    canary: CanaryRules | None = None
    model: str = ""
    isolate: bool = False
    clients: tuple[str, ...] = ()


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
    traffic = variables.number("SCORING_TRAFFIC", 0, 100)
    canary = variables.canary()
    if canary is not None:
        for name, given in (("SCORING_TRAFFIC", traffic is not None), ("SCORING_MIRROR", mirror)):
            if given:
                raise variables.error(name, "nothing beside SCORING_CANARY")
        traffic = canary.steps[0]
    if mirror:
        if traffic:
            raise variables.error("SCORING_TRAFFIC", "0 or nothing beside SCORING_MIRROR")
        traffic = 0
    asked = {
        "SCORING_COLLECT": collect.lower() not in _OFF,
    }
    return ScoringOptions(
        endpoint=endpoint,
        traffic=traffic,
        backends=variables.backends(),
        max_batch=variables.number("SCORING_MAX_BATCH", 1, MAX_BATCH) or 0,
        max_delay_us=variables.number("SCORING_MAX_DELAY_US", 0, MAX_DELAY_US) or 0,
        timeout_ms=variables.number("SCORING_TIMEOUT_MS", 1, MAX_TIMEOUT_MS) or 0,
        mirror=mirror,
        auth=auth,
        collect=collect,
        unsupported=tuple(name for name, wanted in asked.items() if wanted),
        mirror_tolerance=variables.decimal("SCORING_MIRROR_TOLERANCE", 0, 1e9, MIRROR_TOLERANCE),
        priority=variables.number("SCORING_PRIORITY", 1, LAST_PRIORITY) or 0,
        instances=variables.number("SCORING_INSTANCES", 1, MAX_INSTANCES) or 0,
        threads=variables.number("SCORING_THREADS", 1, MAX_THREADS) or 0,
        sticky=variables.header("SCORING_STICKY"),
        canary=canary,
        model=named_model(given_labels(spec)),
        isolate=variables.flag("SCORING_ISOLATE"),
        clients=variables.clients(),
    )


def given_labels(spec: ModuleSpec) -> dict[str, str]:
    """Those in createOptions, as far as they can be read: what is wrong there is told later."""
    options = json.loads(spec.create_options)
    given = next((value for key, value in options.items() if key.lower() == "labels"), None)
    if not isinstance(given, dict):
        return {}
    return {key: value for key, value in given.items() if isinstance(value, str)}


def check_endpoints(modules: Iterable[ModuleSpec]) -> None:
    """Refuse modules that cannot share an endpoint: its requests must go somewhere, once.

    Raises ManifestError 400 when the percentages of an endpoint (of a canary: its largest) exceed
    100, when two modules claim the remainder or are canaries, when none could take it, or when two
    name different sticky headers. Modules that are to be stopped take no part.
    """
    sharing: dict[str, list[tuple[str, ScoringOptions]]] = {}
    for spec in modules:
        options = scoring_options(spec)
        if spec.status == "running":
            sharing.setdefault(options.endpoint, []).append((spec.name, options))
    for endpoint, members in sharing.items():
        _check_shares(endpoint, members)
        _check_companions(endpoint, members)


def _check_shares(endpoint: str, members: list[tuple[str, ScoringOptions]]) -> None:
    total = 0
    first = ""
    for name, options in members:
        if options.traffic is None:
            if first:
                raise _refused(
                    name,
                    "SCORING_TRAFFIC",
                    f"{first} and {name} both serve endpoint {endpoint} without a "
                    "percentage; set SCORING_TRAFFIC (0 to 100) on one of them",
                )
            first = name
            continue
        total += options.canary.steps[-1] if options.canary is not None else options.traffic
        if total > 100:
            raise _refused(
                name,
                "SCORING_TRAFFIC" if options.canary is None else "SCORING_CANARY",
                f"the modules of endpoint {endpoint} claim {total} percent of its "
                "requests; reduce one of them so that the sum is at most 100",
            )


def _check_companions(endpoint: str, members: list[tuple[str, ScoringOptions]]) -> None:
    canary = sticky = ""
    for name, options in members:
        if options.canary is not None:
            if canary:
                raise _refused(
                    name,
                    "SCORING_CANARY",
                    f"{canary} and {name} are both canaries of endpoint {endpoint}; keep one",
                )
            canary = name
        if options.sticky:
            if sticky not in ("", options.sticky):
                raise _refused(
                    name,
                    "SCORING_STICKY",
                    f"endpoint {endpoint} is sticky by {sticky} already; name one header",
                )
            sticky = options.sticky
    if all(options.mirror or options.canary is not None for _, options in members):
        name, options = members[0]
        raise _refused(
            name,
            "SCORING_MIRROR" if options.mirror else "SCORING_CANARY",
            f"no other module of endpoint {endpoint} answers its requests; add one without it, "
            "or remove it here",
        )


def _refused(module: str, variable: str, message: str) -> ManifestError:
    return ManifestError(UNPARSABLE, f"modules.{module}.env.{variable}.value", message)


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

    def decimal(self, name: str, low: float, high: float, default: float) -> float:
        text = self.text(name)
        if not text:
            return default
        if not _DECIMAL.fullmatch(text) or not low <= float(text) <= high:
            raise self.error(name, f"a number from {low:g} to {high:g}")
        return float(text)

    def clients(self) -> tuple[str, ...]:
        text = self.text("SCORING_CLIENTS")
        names = tuple(dict.fromkeys(word.strip() for word in text.split(","))) if text else ()
        if len(names) > MAX_CLIENTS or not all(
            0 < len(name) <= 64 and name.isprintable() for name in names
        ):
            raise self.error(
                "SCORING_CLIENTS",
                f"up to {MAX_CLIENTS} common names of certificates, such as 'press-7, press-8'",
            )
        return names

    def flag(self, name: str) -> bool:
        text = self.text(name).lower()
        if text in _OFF:
            return False
        if text not in ("1", "true", "on", "yes"):
            raise self.error(name, "true or false")
        return True

    def header(self, name: str) -> str:
        text = self.text(name).lower()
        if text and not _HEADER.fullmatch(text):
            raise self.error(name, "the name of a header, such as x-user-id")
        # The scoring process has no name for its own.
        return "" if text == SESSION_HEADER else text

    def canary(self) -> CanaryRules | None:
        text = self.text("SCORING_CANARY")
        default = CanaryRules((100,))
        prefix = "SCORING_CANARY_"
        seconds = self.decimal(f"{prefix}STEP_S", 0, 1e7, default.step_seconds)
        delta = self.decimal(f"{prefix}MAX_ERROR_DELTA", 0, 1, default.max_error_delta)
        ratio = self.decimal(f"{prefix}MAX_LATENCY_RATIO", 1, 1e6, default.max_latency_ratio)
        requests = self.number(f"{prefix}MIN_REQUESTS", 1, 1_000_000) or default.min_requests
        if not text:
            return None
        words = [word.strip() for word in text.split(",")]
        steps = tuple(int(word) for word in words if _NUMBER.fullmatch(word))
        if (
            len(steps) != len(words)
            or list(steps) != sorted(set(steps))
            or not 1 <= steps[0] <= steps[-1] <= 100
        ):
            raise self.error("SCORING_CANARY", "rising percentages such as '5,25,50,100'")
        return CanaryRules(steps, seconds, delta, ratio, requests)

    def backends(self) -> tuple[str, ...]:
        text = self.text("SCORING_BACKENDS")
        if not text:
            return ()
        names = tuple(word.strip().lower() for word in text.split(","))
        if len(set(names)) != len(names) or not set(names) <= set(BACKENDS):
            raise self.error(
                "SCORING_BACKENDS",
                "each of fpga and cpu (or numpy) at most once, such as 'fpga,cpu'",
            )
        return names
