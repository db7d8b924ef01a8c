"""`gatelet score`: one inference request from the command line."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .command import CommandError, add_json_option, print_json, wrong_use
from .scoring_client import add_scoring_options, scoring_client

if TYPE_CHECKING:
    from ...accelerators.tensors import Array, TensorSpec
    from ..scoring.client import ScoringClient
    from ..scoring.types import InferenceResponse, Tensor


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "score",
        help="ask a deployed model for a prediction",
        description="Sends one request over the Open Inference Protocol and prints the answer.",
        epilog="Example: gatelet score digits --input 'x=[[0, 0.5, 1]]'",
    )
    parser.add_argument("model", help="the endpoint's name")
    parser.add_argument(
        "--input",
        dest="inputs",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an input: a .npy or .json file, or JSON itself such as x=[[1,2]]; repeat for others",
    )
    parser.add_argument(
        "--output", dest="outputs", action="append", default=[], help="only this output; repeatable"
    )
    add_scoring_options(parser)
    parser.add_argument("--model-version", default="", metavar="V", help="ask this version")
    parser.add_argument(
        "--timeout", type=float, default=30.0, metavar="S", help="give up after S seconds"
    )
    add_json_option(parser)
    parser.set_defaults(run=_score)


def _score(arguments: argparse.Namespace) -> int:
    from ..scoring.errors import ScoringError

    texts = dict(named(text) for text in arguments.inputs)
    if len(texts) != len(arguments.inputs):
        wrong_use("an --input is given twice")
    try:
        with scoring_client(arguments, arguments.timeout) as client:
            inputs = _inputs(client, arguments.model, arguments.model_version, texts)
            answer = client.request(
                arguments.model, inputs, arguments.model_version, arguments.outputs
            )
    except ScoringError as error:
        raise CommandError(f"{error.code.value}: {error.message}") from error
    if arguments.json:
        print_json(_document(answer))
    else:
        print(f"{answer.model} version {answer.version}")
        for tensor in answer.outputs:
            shape = ",".join(map(str, tensor.shape))
            print(f"{tensor.name} {tensor.datatype}[{shape}]")
            print(_readable(tensor))
    return 0


def named(text: str) -> tuple[str, str]:
    """NAME=VALUE in its parts."""
    name, separator, value = text.partition("=")
    if not (name and separator and value):
        wrong_use(f"--input {text!r} must be NAME=FILE.npy or NAME=JSON")
    return name, value


def _inputs(
    client: ScoringClient, model: str, version: str, texts: dict[str, str]
) -> dict[str, Array]:
    specs = {spec.name: spec for spec in client.metadata(model, version).inputs}
    if set(texts) != set(specs):
        wrong_use(
            f"{model} takes {', '.join(map(str, specs.values()))}; give each with --input, "
            f"found {', '.join(texts) or 'none'}"
        )
    return {name: read_value(specs[name], value) for name, value in texts.items()}


def read_value(spec: TensorSpec, value: str) -> Array:
    """The array of a .npy or .json file, or of JSON itself. Raises CommandError."""
    import numpy as np

    if value.endswith(".npy"):
        try:
            array: Array = np.load(value, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise CommandError(f"{value} cannot be read as .npy: {error}") from error
        return array
    text = value
    if value.endswith(".json"):
        try:
            text = Path(value).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CommandError(f"{value} cannot be read: {error}") from error
    try:
        return _from_json(spec, json.loads(text))
    except (ValueError, RecursionError) as error:
        raise CommandError(
            f"input {spec.name}: {error}; expected a .npy or .json file or JSON numbers such as "
            "[[1, 2]]"
        ) from error


def _from_json(spec: TensorSpec, value: Any) -> Array:
    """JSON tells neither width nor signedness, so the model's datatype decides.

    Raises ValueError for values that the datatype cannot hold.
    """
    import numpy as np

    from ...accelerators.tensors import NUMPY_DTYPES

    found: Array = np.array(value)
    wanted = NUMPY_DTYPES[spec.datatype]
    kinds = {"b": "b", "i": "iu", "u": "iu", "f": "iuf", "O": "U"}[wanted.kind]
    if found.size and found.dtype.kind not in kinds:
        raise ValueError(f"{spec.datatype} cannot hold {_text_of(value)}")
    if found.size and wanted.kind in "iu":
        limits = np.iinfo(wanted)  # type: ignore[type-var]
        if not limits.min <= int(found.min()) <= int(found.max()) <= limits.max:
            raise ValueError(f"{spec.datatype} holds {limits.min} to {limits.max}")
    return found if wanted.kind == "O" else found.astype(wanted)


def _text_of(value: Any) -> str:
    """`value` as JSON, cut to a length that fits a message."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _document(answer: InferenceResponse) -> dict[str, Any]:
    return {
        "model_name": answer.model,
        "model_version": answer.version,
        "outputs": [
            {
                "name": tensor.name,
                "datatype": tensor.datatype,
                "shape": list(tensor.shape),
                "data": _values(tensor).ravel().tolist(),
            }
            for tensor in answer.outputs
        ],
    }


def _readable(tensor: Tensor) -> str:
    import numpy as np

    return np.array2string(_values(tensor), precision=6, suppress_small=True)


def _values(tensor: Tensor) -> Array:
    """The array, with BYTES as text."""
    import numpy as np

    if tensor.datatype != "BYTES":
        return tensor.array
    texts = np.empty(tensor.array.size, np.object_)
    for index, element in enumerate(tensor.array.ravel().tolist()):
        texts[index] = element.decode("utf-8", "backslashreplace")
    return texts.reshape(tensor.shape)
