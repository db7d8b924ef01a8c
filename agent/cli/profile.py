"""`gatelet profile`: what a model costs on this device, and how to run it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..version import VERSION
from .command import (
    CommandError,
    add_config_option,
    add_json_option,
    configuration,
    print_json,
)
from .profile_subject import subject_of
from .scoring_client import add_scoring_options

if TYPE_CHECKING:
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
    add_scoring_options(parser)
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
            subject, target, name, version = subject_of(arguments, cleanup)
            report = _measured(arguments, subject, target, name, version)
    except (CannotProfile, AskFailed, ImageError) as error:
        raise CommandError(str(error)) from error
    files = _write(arguments, report)
    if arguments.json:
        print_json(report)
    else:
        _say(report, files)
    return 0


def _measured(
    arguments: argparse.Namespace,
    subject: FolderSubject | EndpointSubject,
    target: str,
    name: str,
    version: str,
) -> Report:
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
        gatelet=VERSION,
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
        from ..profile.page import amount

        rows.append(("memory", amount(chosen.memory_in_gb)))
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
    threads = f", {_counted(point.threads, 'thread')}" if point.threads else ""
    way = ", together" if point.together else ""
    callers = _counted(point.concurrency, "caller")
    return (
        f"{point.backend}{threads}, batch {point.batch}, {callers}{way}: "
        f"{point.requests_per_second:,.0f}/s, p50 {point.p50_ms:.3g} ms"
    )


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"
