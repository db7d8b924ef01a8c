"""`/model/model.json`: the contract between whoever packages a model and whoever serves it.

Reading is lenient about fields it does not know (a newer packager may write them) and strict about
everything else; `parse_model(raw, strict=True)`, which packaging uses, refuses unknown fields too,
because there they are typing errors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from ..accelerators.backend import Variant
from ..accelerators.signature import DATATYPE_NAMES, TensorSpec
from .errors import InvalidModel

MODEL_FILE = "model.json"
MAX_MODEL_BYTES = 256 * 1024
MAX_DEPTH = 16
MAX_TENSORS = 256
MAX_VARIANTS = 64
MAX_RANK = 16
MAX_DIMENSION = 2**31 - 1
MAX_BATCH = 65_536
MAX_DELAY_US = 10_000_000
MAX_QUEUE = 65_536
MAX_PATH = 1024

_IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_JSON_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_MSGSPEC_ERROR = re.compile(r"(?P<what>.*?)(?: - at `(?P<path>\$[^`]*)`)?", re.DOTALL)


class Batching(msgspec.Struct, frozen=True, rename="camel"):
    """`max`: the largest batch (size of the first dimension) to send to the model; 1 for none.

    For requests that the server stacks: `preferred` sizes, how long one may wait for company, how
    many may wait, and who is turned away when more come.
    """

    max: int = 1
    preferred: tuple[int, ...] | None = None
    max_delay_us: int | None = None
    max_queue: int | None = None
    overflow: Literal["reject", "shed-oldest"] | None = None


class Resources(msgspec.Struct, frozen=True):
    """What the model needs, in CPU cores and GiB; None where the packager did not say."""

    cpu: float | None = None
    memory_in_gb: float | None = msgspec.field(default=None, name="memoryInGB")


class Model(msgspec.Struct, frozen=True, rename="camel"):
    """A model as its image describes it. Paths are relative to the folder of model.json."""

    name: str
    version: str
    framework: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    variants: tuple[Variant, ...]
    sample: str | None = None
    batching: Batching = Batching()
    resources: Resources = Resources()
    description: str = ""
    tags: Mapping[str, str] = msgspec.field(default_factory=dict)


def parse_model(raw: bytes, *, strict: bool = False) -> Model:
    """The model that `raw` (UTF-8 JSON, at most 256 KiB) describes.

    Raises InvalidModel, whose message has the JSON path, what was found and what is expected.
    """
    document = read_json(raw, MODEL_FILE, MAX_MODEL_BYTES, MAX_DEPTH)
    try:
        model = msgspec.convert(document, type=Model)
    except msgspec.ValidationError as error:
        match = _MSGSPEC_ERROR.fullmatch(str(error))
        what, path = (match["what"], match["path"]) if match else (str(error), None)
        raise _invalid(path or "$", what.replace("`", "")) from None
    _check(model)
    if strict:
        _refuse_unknown(document)
    return model


def load_model(directory: Path) -> Model:
    """The model of an unpacked image or a model folder. Raises InvalidModel."""
    path = directory / MODEL_FILE
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_MODEL_BYTES + 1)
    except OSError as error:
        raise InvalidModel(
            f"{path} cannot be read ({error.strerror}): a model folder holds a {MODEL_FILE}"
        ) from None
    try:
        return parse_model(raw)
    except InvalidModel as error:
        raise InvalidModel(f"{directory}: {error}") from None


def encode_model(model: Model) -> bytes:
    """Canonical JSON: fixed field order, two spaces, no nulls; `parse_model` gives it back."""
    document = {
        key: value
        for key, value in _without_nulls(msgspec.to_builtins(model)).items()
        if value not in ("", {})
    }
    return msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n"


def read_json(raw: bytes, what: str, max_bytes: int, max_depth: int) -> Any:
    """JSON from an untrusted author: bounded in size and depth, no duplicate keys, no NaN.

    Raises InvalidModel whose message starts with `what`, the document's name.
    """
    if len(raw) > max_bytes:
        raise InvalidModel(f"{what}: larger than {max_bytes} bytes; shorten it")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidModel(f"{what}: byte {error.start} is not UTF-8; save it as UTF-8") from None
    # Before parsing: the parser recurses, and a deep document would exhaust its stack.
    depth = 0
    for character in re.sub(r"[^][{}]", "", _JSON_STRING.sub("", text)):
        depth += 1 if character in "[{" else -1
        if depth > max_depth:
            raise InvalidModel(f"{what}: nested deeper than {max_depth} levels")
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise InvalidModel(
            f"{what}: line {error.lineno}, column {error.colno}: not JSON: {error.msg}"
        ) from None
    except ValueError as error:
        raise InvalidModel(f"{what}: {error}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} appears twice in one object; keep one")
    return document


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON; use a finite number")


def _check(model: Model) -> None:
    for field, value in (("name", model.name), ("version", model.version)):
        if not _IDENTIFIER.fullmatch(value):
            raise _invalid(
                f"$.{field}",
                f"found {value!r}, expected 1 to 128 letters, digits, '.', '_' or '-', "
                "starting with a letter or digit",
            )
    _check_tensors("$.inputs", model.inputs)
    _check_tensors("$.outputs", model.outputs)
    _check_variants(model.variants)
    _check_batching(model)
    if model.sample is not None:
        _check_path("$.sample", model.sample)
        for index, variant in enumerate(model.variants):
            if _overlaps(model.sample, variant.path):
                raise _invalid(
                    "$.sample",
                    f"found {model.sample!r} inside $.variants[{index}].path; "
                    "expected a file of its own, beside the variants",
                )
    for field, number in (
        ("cpu", model.resources.cpu),
        ("memoryInGB", model.resources.memory_in_gb),
    ):
        if number is not None and not 0 < number < 1e6:
            raise _invalid(f"$.resources.{field}", f"found {number}, expected a positive number")


def _check_tensors(path: str, specs: Sequence[TensorSpec]) -> None:
    if not 1 <= len(specs) <= MAX_TENSORS:
        raise _invalid(path, f"found {len(specs)} tensors, expected 1 to {MAX_TENSORS}")
    seen: set[str] = set()
    for index, spec in enumerate(specs):
        here = f"{path}[{index}]"
        if not 1 <= len(spec.name) <= 256 or not spec.name.isprintable():
            raise _invalid(
                f"{here}.name", f"found {spec.name[:64]!r}, expected 1 to 256 printable characters"
            )
        if spec.name in seen:
            raise _invalid(f"{here}.name", f"found {spec.name!r} again, expected unique names")
        seen.add(spec.name)
        if spec.datatype not in DATATYPE_NAMES:
            raise _invalid(
                f"{here}.datatype",
                f"found {spec.datatype!r}, expected one of {', '.join(DATATYPE_NAMES)}",
            )
        if len(spec.shape) > MAX_RANK:
            raise _invalid(
                f"{here}.shape", f"found {len(spec.shape)} dimensions, expected {MAX_RANK} at most"
            )
        for axis, size in enumerate(spec.shape):
            if size != -1 and not 1 <= size <= MAX_DIMENSION:
                raise _invalid(
                    f"{here}.shape[{axis}]", f"found {size}, expected a size of 1 or more, or -1"
                )


def _check_variants(variants: Sequence[Variant]) -> None:
    if not 1 <= len(variants) <= MAX_VARIANTS:
        raise _invalid(
            "$.variants", f"found {len(variants)} variants, expected 1 to {MAX_VARIANTS}"
        )
    for index, variant in enumerate(variants):
        here = f"$.variants[{index}]"
        for field, value in (
            ("kind", variant.kind),
            ("board", variant.board),
            ("part", variant.part),
        ):
            if value is not None and not _IDENTIFIER.fullmatch(value):
                raise _invalid(
                    f"{here}.{field}", f"found {value!r}, expected letters, digits, '.', '_', '-'"
                )
        _check_path(f"{here}.path", variant.path)
        if _overlaps(MODEL_FILE, variant.path):
            raise _invalid(f"{here}.path", f"found {variant.path!r}, which is this document")
        for other_index, other in enumerate(variants[:index]):
            if variant == other:
                raise _invalid(here, f"repeats $.variants[{other_index}]; remove one of them")
            # Each path is a layer of its own: one inside another could not be left out.
            if variant.path != other.path and _overlaps(variant.path, other.path):
                raise _invalid(
                    f"{here}.path",
                    f"found {variant.path!r}, which overlaps $.variants[{other_index}].path "
                    f"{other.path!r}; expected folders or files beside one another",
                )


def _check_batching(model: Model) -> None:
    if not 1 <= model.batching.max <= MAX_BATCH:
        raise _invalid("$.batching.max", f"found {model.batching.max}, expected 1 to {MAX_BATCH}")
    for size in model.batching.preferred or ():
        if not 1 <= size <= model.batching.max:
            raise _invalid(
                "$.batching.preferred", f"found {size}, expected 1 to {model.batching.max} (max)"
            )
    for field, number, low, high in (
        ("maxDelayUs", model.batching.max_delay_us, 0, MAX_DELAY_US),
        ("maxQueue", model.batching.max_queue, 1, MAX_QUEUE),
    ):
        if number is not None and not low <= number <= high:
            raise _invalid(f"$.batching.{field}", f"found {number}, expected {low} to {high}")
    if model.batching.max == 1:
        return
    for path, specs in (("$.inputs", model.inputs), ("$.outputs", model.outputs)):
        for index, spec in enumerate(specs):
            if not spec.shape or spec.shape[0] != -1:
                raise _invalid(
                    f"{path}[{index}].shape",
                    f"found {list(spec.shape)}, expected -1 as the first dimension "
                    f"because $.batching.max is {model.batching.max}",
                )


def _check_path(where: str, path: str) -> None:
    parts = path.split("/")
    if (
        not 1 <= len(path.encode("utf-8", "surrogatepass")) <= MAX_PATH
        or not path.isprintable()
        or "\\" in path
        or any(part in ("", ".", "..") or len(part) > 255 for part in parts)
        or any(part.startswith(".wh.") for part in parts)
    ):
        raise _invalid(
            where,
            f"found {path[:80]!r}, expected a relative path with '/' and without '.', '..' or "
            "empty parts, such as 'onnx/model.onnx'",
        )


def _overlaps(one: str, other: str) -> bool:
    return one == other or one.startswith(other + "/") or other.startswith(one + "/")


def _refuse_unknown(document: Mapping[str, Any]) -> None:
    tensor = frozenset(TensorSpec.__dataclass_fields__)
    variant = frozenset(Variant.__dataclass_fields__)
    known: list[tuple[str, Mapping[str, Any], frozenset[str]]] = [
        ("$", document, frozenset(Model.__struct_encode_fields__)),
        ("$.batching", document.get("batching", {}), frozenset(Batching.__struct_encode_fields__)),
        (
            "$.resources",
            document.get("resources", {}),
            frozenset(Resources.__struct_encode_fields__),
        ),
    ]
    for field, names in (("inputs", tensor), ("outputs", tensor), ("variants", variant)):
        known += [(f"$.{field}[{i}]", entry, names) for i, entry in enumerate(document[field])]
    for path, entry, names in known:
        for key in entry:
            if key not in names:
                raise _invalid(
                    f"{path}.{key}", f"unknown field, expected one of {', '.join(sorted(names))}"
                )


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [_without_nulls(item) for item in value]
    return value


def _invalid(path: str, what: str) -> InvalidModel:
    return InvalidModel(f"{MODEL_FILE}: {path}: {what}")
