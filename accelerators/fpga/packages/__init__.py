"""Whatever tool built an overlay package: read it without running any of its code."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...errors import LoadError
from ..package import KINDS, Package, Signature
from .bnn_pynq import is_bnn_pynq, read_bnn_pynq
from .dpu import find_xmodel, read_dpu
from .files import list_files, read_json
from .finn import find_driver, find_settings, read_finn
from .hls4ml import CONFIG, find_config, read_hls4ml
from .overlay_json import OVERLAY_JSON, read_overlay_json

__all__ = ["NotAPackage", "probe"]


@dataclass(frozen=True, slots=True)
class Guess:
    """One kind of package, and what a directory lacks to be of that kind."""

    kind: str
    found: tuple[str, ...]
    missing: tuple[str, ...]


class NotAPackage(LoadError):
    """A directory that fits no kind; `guesses` say what it has and lacks for each."""

    def __init__(self, directory: Path, guesses: tuple[Guess, ...]) -> None:
        self.directory = directory
        self.guesses = guesses
        nearest = max(guesses, key=lambda guess: (len(guess.found), -len(guess.missing)))
        have = ", ".join(nearest.found) or "nothing of any kind"
        super().__init__(
            f"{directory}: no overlay package; nearest to {nearest.kind}: it has {have} and lacks "
            f"{', '.join(nearest.missing)}"
        )


def probe(directory: Path, signature: Signature | None = None, kind: str | None = None) -> Package:
    """What the package in `directory` is and holds.

    `signature` gives tensors the names and shapes of model.json; `kind` is the one a variant
    names, None to find out. Raises NotAPackage, or LoadError when it is damaged.
    """
    if kind is not None and kind not in KINDS:
        raise LoadError(f"{directory}: no package kind {kind!r}; there are {', '.join(KINDS)}")
    promised = signature or Signature()
    if (directory / OVERLAY_JSON).is_file():
        # Its tensors are described in full: model.json has to agree, which the loader checks.
        package = read_overlay_json(directory)
    else:
        files = list_files(directory)
        chosen = kind or _kind_of(files)
        if chosen == "finn":
            package = read_finn(directory, files, promised)
        elif chosen == "hls4ml":
            package = read_hls4ml(directory, files, promised)
        elif chosen == "bnn-pynq":
            package = read_bnn_pynq(directory, files, promised)
        elif chosen == "dpu":
            package = read_dpu(directory, files, promised)
        else:
            raise NotAPackage(directory, guesses(files))
    if kind is not None and package.kind != kind:
        raise LoadError(f"{directory}: a package of kind {package.kind}, not {kind}")
    return package


def _kind_of(files: list[Path]) -> str | None:
    settings = find_settings(files)
    if settings is not None and "driver_information" in read_json(settings):
        return "finn"
    if find_driver(files) is not None:
        return "finn"
    if find_config(files) is not None:
        return "hls4ml"
    if find_xmodel(files) is not None:
        return "dpu"
    return "bnn-pynq" if is_bnn_pynq(files) else None


def guesses(files: list[Path]) -> tuple[Guess, ...]:
    """For each kind, what is there and what is missing."""
    suffixes = {path.suffix for path in files}
    base = {".bit file": ".bit" in suffixes, ".hwh file": ".hwh" in suffixes}
    wanted = {
        "stream": {OVERLAY_JSON: False, **base},
        "finn": {
            "driver.py with io_shape_dict, or settings.json": find_driver(files) is not None,
            **base,
        },
        "hls4ml": {CONFIG: find_config(files) is not None, **base},
        "bnn-pynq": {"LAYER-UNIT-weights.bin files": is_bnn_pynq(files), **base},
        "dpu": {".xmodel file": find_xmodel(files) is not None, **base},
    }
    return tuple(
        Guess(
            kind,
            tuple(name for name, there in parts.items() if there),
            tuple(name for name, there in parts.items() if not there),
        )
        for kind, parts in wanted.items()
    )
