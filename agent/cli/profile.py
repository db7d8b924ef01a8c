"""`gatelet profile`: what a model costs on this device, and how to run it."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .command import (
    CommandError,
    add_config_option,
    add_json_option,
    configuration,
    print_json,
    wrong_use,
)

if TYPE_CHECKING:
    from ...accelerators.backend import Backend
    from ...accelerators.tensors import Array, TensorSpec
    from ..profile.report import Device, Point, Report
    from ..profile.subjects import EndpointSubject, FolderSubject
    from ..profile.sweep import Setting

_BATCHES = 64
_CALLERS = 32


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "profile",
        help="measure a model on this device and recommend how to run it",
        description="Measures latency and throughput of a model by batch size and by callers at a "
        "time, and writes a report with a recommendation.",
        epilog="Examples: gatelet profile digits (as it is served); gatelet profile ./digits "
        "--output digits.html (a model folder or an image made with `image build -o`, run here)",
    )
    parser.add_argument(
        "model", help="an endpoint's name, a folder with model.json, or an image as OCI layout"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="write the report as FILE.html and FILE.json (default: MODEL-profile)",
    )
    parser.add_argument(
        "--url", default="127.0.0.1:8001", help="of a served model (default: %(default)s)"
    )
    parser.add_argument("--model-version", default="", metavar="V", help="ask this version")
    parser.add_argument(
        "--input",
        dest="inputs",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="one item of an input, as for `score`; default: the model's sample, else random",
    )
    parser.add_argument(
        "--batches", type=_numbers, metavar="N,N", help="sizes to try (default: 1, 2, 4 ... 64)"
    )
    parser.add_argument(
        "--callers", type=_numbers, metavar="N,N", help="callers to try (default: 1, 2, 4 ... 32)"
    )
    parser.add_argument(
        "--threads", type=_numbers, metavar="N,N", help="threads of a run to try, for a folder"
    )
    parser.add_argument(
        "--seconds", type=_positive, default=1.0, help="for each measurement (default: %(default)s)"
    )
    parser.add_argument(
        "--latency-ms",
        type=_positive,
        metavar="MS",
        help="recommend what keeps 99 of 100 requests within this",
    )
    add_config_option(parser)
    add_json_option(parser)
    parser.set_defaults(run=_profile)


def _numbers(text: str) -> list[int]:
    try:
        numbers = sorted({int(word) for word in text.split(",")})
    except ValueError:
        numbers = [0]
    if not 1 <= numbers[0] <= numbers[-1] <= 65_536:
        raise argparse.ArgumentTypeError("whole numbers of 1 or more, such as 1,8,32")
    return numbers


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError("a number above 0")
    return value


def _profile(arguments: argparse.Namespace) -> int:
    from ...modules.errors import ImageError
    from ..profile.load import AskFailed
    from ..profile.subjects import CannotProfile

    try:
        with ExitStack() as cleanup:
            subject, target, name, version = _subject(arguments, cleanup)
            report = _measured(arguments, subject, target, name, version)
    except (CannotProfile, AskFailed, ImageError) as error:
        raise CommandError(str(error)) from error
    files = _write(arguments, report)
    if arguments.json:
        print_json(report)
    else:
        _say(report, files)
    return 0


def _subject(
    arguments: argparse.Namespace, cleanup: ExitStack
) -> tuple[FolderSubject | EndpointSubject, str, str, str]:
    """What to measure, and how to call it: target, model and version."""
    from ...modules.model_json import load_model
    from ..profile.subjects import EndpointSubject, FolderSubject
    from ..scoring.client import ScoringClient

    path = Path(arguments.model)
    subject: FolderSubject | EndpointSubject
    if path.exists():
        folder = _unpacked(path, cleanup)
        # Named in errors before anything is loaded.
        specs = load_model(folder).inputs if arguments.inputs else ()
        subject = FolderSubject(
            folder,
            _backends(arguments, cleanup),
            _given(arguments, specs),
            tuple(arguments.threads) if arguments.threads else None,
        )
        cleanup.callback(subject.close)
        return subject, str(path), subject.model.name, subject.model.version
    if "/" in arguments.model or arguments.model.startswith("."):
        raise CommandError(f"{arguments.model} does not exist; name a folder or an endpoint")
    client = cleanup.enter_context(ScoringClient(arguments.url))
    if arguments.threads:
        wrong_use("--threads is for a folder; a served model has its own: set SCORING_THREADS")
    subject = EndpointSubject(
        client, arguments.model, arguments.model_version, pid=_scoring_pid(arguments)
    )
    if arguments.inputs:
        given = _given(arguments, subject.metadata.inputs)
        subject = EndpointSubject(
            client, arguments.model, arguments.model_version, given, _scoring_pid(arguments)
        )
    version = arguments.model_version or ", ".join(subject.metadata.versions)
    return subject, arguments.url, arguments.model, version


def _given(arguments: argparse.Namespace, specs: Sequence[TensorSpec]) -> dict[str, Array]:
    from .score import named, read_value

    texts = dict(named(text) for text in arguments.inputs)
    by_name = {spec.name: spec for spec in specs}
    for name in texts:
        if name not in by_name:
            wrong_use(f"{arguments.model} takes {', '.join(map(str, specs))}, not {name}")
    return {name: read_value(by_name[name], value) for name, value in texts.items()}


def _unpacked(path: Path, cleanup: ExitStack) -> Path:
    """The model folder of a folder or of an image as OCI layout."""
    from ...modules.errors import ImageError
    from ...modules.oci.layout import open_layout
    from ...modules.oci.unpack import MODEL_FOLDER, UnpackLimits, unpack_layer

    if (path / "model.json").exists():
        return path
    folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="gatelet-profile-")))
    limits = UnpackLimits()
    left = limits.bytes
    try:
        image = open_layout(path)
        diff_ids = image.config.rootfs.diff_ids
        for layer, diff_id in zip(image.manifest.layers, diff_ids, strict=True):
            with image.open_blob(layer.digest) as blob:
                _, size = unpack_layer(blob, layer, diff_id, folder, limits, left, lambda _: None)
            left -= size
    except (ImageError, OSError) as error:
        raise CommandError(f"{path} is no model folder and no image: {error}") from error
    return folder / MODEL_FOLDER


def _backends(arguments: argparse.Namespace, cleanup: ExitStack) -> dict[str, Backend]:
    """The CPU, and the FPGA where the configuration names a board whose process runs."""
    from ...accelerators.cpu import CpuBackend

    backends: dict[str, Backend] = {}
    if arguments.config.exists():
        from ..roles import board_of

        config = configuration(arguments)
        board = board_of(config)
        if board is not None and config.fabric_socket.exists():
            from ...accelerators.fpga.backend import FpgaBackend

            fpga = FpgaBackend(config.fabric_socket, board.name, board.part)
            cleanup.callback(fpga.close)
            backends[fpga.name] = fpga
    cpu = CpuBackend()
    backends[cpu.name] = cpu
    return backends


def _scoring_pid(arguments: argparse.Namespace) -> int | None:
    """Of the scoring process, if the agent of this machine says so."""
    if not arguments.config.exists():
        return None
    from .agent_client import AgentClient

    try:
        with AgentClient(configuration(arguments).agent_socket) as agent:
            found = agent.status()["processes"].get("scoring", {}).get("pid")
    except CommandError:
        return None
    return int(found) if found else None


def _measured(
    arguments: argparse.Namespace,
    subject: FolderSubject | EndpointSubject,
    target: str,
    name: str,
    version: str,
) -> Report:
    from importlib.metadata import version as installed

    from ..clock import SystemClock
    from ..profile import recommend, sweep
    from ..profile.report import Report

    sizes = arguments.batches or sweep.powers_of_two(_BATCHES)
    sizes = [size for size in sizes if size <= subject.most_batch] or [1]
    if 1 not in sizes:
        sizes = [1, *sizes]
    callers = arguments.callers or sweep.powers_of_two(_CALLERS)
    batches = sweep.batch_settings(subject, sizes)
    chosen = dict.fromkeys(subject.backends, 0)
    total = len(batches) + len(sweep.concurrency_settings(subject, chosen, callers))
    with _progress(name, total, quiet=arguments.json) as step:
        points = _points(arguments, subject, batches, step)
        for backend in subject.backends:
            mine = [point for point in points if point.backend == backend]
            chosen[backend] = _recommended(recommend.recommend, mine, {}, None).threads
        loads = sweep.concurrency_settings(subject, chosen, callers)
        points += _points(arguments, subject, loads, step)
    return Report(
        model=name,
        version=version,
        target=target,
        created=SystemClock().now().isoformat(timespec="seconds"),
        gatelet=installed("gatelet"),
        device=_device(arguments),
        points=tuple(points),
        recommendation=_recommended(
            recommend.recommend, points, subject.memory_mb, arguments.latency_ms
        ),
        memory_mb={name: round(value, 1) for name, value in subject.memory_mb.items()},
        latency_limit_ms=arguments.latency_ms,
        notes=tuple(subject.notes),
    )


def _recommended(decide: Callable[..., Any], points: Sequence[Point], *more: Any) -> Any:
    from ..profile.load import AskFailed

    try:
        return decide(points, *more)
    except ValueError as error:
        reason = next((point.error for point in points if point.error), str(error))
        raise AskFailed(f"{error}: {reason}") from error


def _points(
    arguments: argparse.Namespace,
    subject: FolderSubject | EndpointSubject,
    settings: Sequence[Setting],
    step: Callable[[Point], None],
) -> list[Point]:
    from ..profile.sweep import point

    points = []
    for setting in settings:
        measured = point(setting, subject.measure(setting, arguments.seconds))
        points.append(measured)
        step(measured)
    return points


def _device(arguments: argparse.Namespace) -> Device:
    from ..profile.device import this_device

    board = ""
    if arguments.config.exists():
        from ..roles import board_of

        found = board_of(configuration(arguments))
        board = found.name if found is not None else ""
    return this_device(board)


def _write(arguments: argparse.Namespace, report: Report) -> tuple[Path, Path]:
    import msgspec

    from ..profile.page import page

    base = arguments.output or Path(f"{report.model}-profile")
    if base.suffix in (".html", ".json"):
        base = base.with_suffix("")
    html, document = base.with_name(base.name + ".html"), base.with_name(base.name + ".json")
    try:
        html.write_text(page(report), encoding="utf-8")
        document.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    except OSError as error:
        raise CommandError(f"the report cannot be written: {error}") from error
    return html, document


def _say(report: Report, files: Sequence[Path]) -> None:
    chosen = report.recommendation
    print(f"{report.model} version {report.version}, {len(report.points)} measurements")
    rows = [("backend", chosen.backend)] if chosen.backend != "served" else []
    if chosen.threads:
        rows.append(("threads", str(chosen.threads)))
    rows += [
        ("largest batch", str(chosen.max_batch)),
        ("requests at a time", str(chosen.concurrency)),
        ("requests a second", f"{chosen.requests_per_second:,.0f}"),
        ("half within", f"{chosen.p50_ms:.3g} ms"),
        ("99 of 100 within", f"{chosen.p99_ms:.3g} ms"),
    ]
    if chosen.cpu is not None:
        rows.append(("CPU cores", f"{chosen.cpu:g}"))
    if chosen.memory_in_gb is not None:
        rows.append(("memory", f"{chosen.memory_in_gb:g} GB"))
    for name, value in rows:
        print(f"  {name:<20}{value}")
    for reason in chosen.reasons:
        print(f"- {reason}")
    failed = sum(point.errors for point in report.points)
    if failed:
        print(f"- {failed} requests failed; see the report", file=sys.stderr)
    print(f"report: {files[0]} and {files[1]}")


@contextmanager
def _progress(name: str, total: int, *, quiet: bool) -> Iterator[Callable[[Point], None]]:
    if quiet or not sys.stderr.isatty():
        count = 0

        def line(point: Point) -> None:
            nonlocal count
            count += 1
            if not quiet:
                print(f"{count}/{total} {_shown(point)}", file=sys.stderr, flush=True)

        yield line
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(name, total=total)

        def advance(point: Point) -> None:
            progress.update(task, advance=1, description=f"{name}: {_shown(point)}")

        yield advance


def _shown(point: Point) -> str:
    threads = f", {point.threads} threads" if point.threads else ""
    way = ", together" if point.together else ""
    return (
        f"{point.backend}{threads}, batch {point.batch}, {point.concurrency} callers{way}: "
        f"{point.requests_per_second:,.0f}/s, p50 {point.p50_ms:.3g} ms"
    )
