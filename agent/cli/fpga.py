"""`gatelet fpga`: overlay packages, looked at without a board."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .command import CommandError, add_json_option, print_json, wrong_use


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "fpga", help="overlay packages for FPGAs", description="Overlay packages for FPGAs."
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    inspect = actions.add_parser(
        "inspect",
        help="what an overlay package is, and whether it fits a board",
        description="Reads a package of FINN, hls4ml, BNN-PYNQ, DPU-PYNQ or gatelet without "
        "running any of its code. Ends with 1 when a check fails.",
    )
    inspect.add_argument("directory", type=Path, help="the package")
    inspect.add_argument("--board", help="check against this board, such as pynq-z2")
    inspect.add_argument(
        "--model", type=Path, metavar="FILE", help="model.json with the names and shapes of tensors"
    )
    add_json_option(inspect)
    inspect.set_defaults(run=_inspect)


def _inspect(arguments: argparse.Namespace) -> int:
    from ...accelerators.errors import LoadError
    from ...accelerators.fpga.board import KNOWN_PARTS
    from ...accelerators.fpga.packages import NotAPackage, probe
    from ...accelerators.fpga.preflight import Device, examine, look

    directory: Path = arguments.directory
    if not directory.is_dir():
        wrong_use(f"{directory} is no directory; name the folder of a package")
    part = None
    if arguments.board is not None:
        part = KNOWN_PARTS.get(arguments.board.lower())
        if part is None:
            wrong_use(f"no board {arguments.board!r}; there are {', '.join(sorted(KNOWN_PARTS))}")
    try:
        package = probe(directory, _signature(arguments.model))
        found = look(package)
        checks = examine(package, found, Device(part))
    except NotAPackage as error:
        guesses = [
            {"kind": guess.kind, "found": guess.found, "missing": guess.missing}
            for guess in error.guesses
        ]
        if not arguments.json:
            raise CommandError(str(error)) from error
        print_json({"ok": False, "error": str(error), "kinds": guesses})
        return 1
    except LoadError as error:
        if not arguments.json:
            raise CommandError(str(error)) from error
        print_json({"ok": False, "error": str(error)})
        return 1
    good = all(check.ok is not False for check in checks)
    document = _document(package, found, checks, good)
    if arguments.json:
        print_json(document)
    else:
        print("\n".join(_lines(document)))
    return 0 if good else 1


def _signature(path: Path | None) -> Any:
    from ...accelerators.fpga.package import Signature

    if path is None:
        return Signature()
    from ...modules.errors import InvalidModel
    from ...modules.model_json import parse_model

    try:
        model = parse_model(path.read_bytes())
    except OSError as error:
        raise CommandError(f"{path}: {error.strerror}") from error
    except InvalidModel as error:
        raise CommandError(str(error)) from error
    return Signature(model.inputs, model.outputs)


def _document(package: Any, found: Any, checks: Any, good: bool) -> dict[str, Any]:
    from ...accelerators.fpga.package import PackedWire

    def port(one: Any) -> dict[str, Any]:
        wire = one.wire
        packed = isinstance(wire, PackedWire)
        return {
            "name": one.spec.name,
            "datatype": one.spec.datatype,
            "shape": one.spec.shape,
            "wire": wire.element.name if packed else wire.dtype,
            "bytes": wire.item_bytes,
            **({"rows": wire.rows, "inner": wire.inner} if packed else {}),
        }

    return {
        "ok": good,
        "kind": package.kind,
        "name": package.name,
        "board": package.board,
        "part": package.part,
        "clockMhz": package.clock_mhz,
        "bitstream": {
            "path": str(package.bit),
            "bytes": found.size,
            "storedBytes": package.bit.stat().st_size,
            "sha256": package.sha256,
        },
        "transport": type(package.transport).__name__,
        "maxBatch": package.max_batch,
        "inputs": [port(one) for one in package.inputs],
        "outputs": [port(one) for one in package.outputs],
        "checks": [{"name": c.name, "ok": c.ok, "detail": c.detail} for c in checks],
    }


def _lines(document: dict[str, Any]) -> list[str]:
    bitstream = document["bitstream"]
    stored = bitstream["storedBytes"]
    lines = [
        f"{document['name']}: {document['kind']} package for part {document['part']}"
        + (f" ({document['board']})" if document["board"] else "")
        + f" at {document['clockMhz']:g} MHz",
        f"  bitstream  {bitstream['path']}, {bitstream['bytes']} bytes"
        + ("" if stored == bitstream["bytes"] else f" ({stored} compressed)")
        + ", "
        f"sha256 {bitstream['sha256']}",
    ]
    for side in ("inputs", "outputs"):
        for one in document[side]:
            shape = ",".join(map(str, one["shape"]))
            lines.append(
                f"  {side[:-1]:<9}  {one['name']} {one['datatype']}[{shape}], on the wire "
                f"{one['wire']}, {one['bytes']} bytes per item"
            )
        if not document[side]:
            lines.append(f"  {side[:-1]:<9}  not described here; name model.json with --model")
    marks = {True: "ok  ", False: "FAIL", None: "note"}
    lines += [f"  {marks[c['ok']]} {c['name']}: {c['detail']}" for c in document["checks"]]
    return lines
