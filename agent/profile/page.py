"""A report as one HTML page without anything from elsewhere, for light and dark screens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

import msgspec

from .charts import Chart, Mark, Series, number, svg
from .report import Point, Report

_STYLE = """
:root { color-scheme: light dark; --bg: #fbfbfa; --card: #fff; --text: #1c1e21; --soft: #5b6168;
  --line: #dfe1e4; --c0: #1f66c1; --c1: #c2570c; --c2: #0b7a5b; --c3: #8b3fb5; --c4: #a8324a;
  --c5: #5a6b00; }
@media (prefers-color-scheme: dark) { :root { --bg: #15171a; --card: #1d2024; --text: #e8e9eb;
  --soft: #a3a9b1; --line: #33383e; --c0: #6ea8f5; --c1: #f29a52; --c2: #4cc79e; --c3: #c892ec;
  --c4: #f28a9c; --c5: #bccb55; } }
* { box-sizing: border-box }
body { margin: 0; background: var(--bg); color: var(--text);
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, sans-serif }
main { max-width: 1080px; margin: 0 auto; padding: 32px 20px 64px }
h1 { font-size: 1.7rem; margin: 0 } h2 { font-size: 1.2rem; margin: 40px 0 12px }
h3 { font-size: 1rem; margin: 0 0 8px }
.sub, .note { color: var(--soft) } .sub { margin: 4px 0 0 }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 20px; min-width: 0 }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 12px;
  margin: 0 0 16px }
.tiles div { border: 1px solid var(--line); border-radius: 8px; padding: 10px 14px }
.tiles b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums }
.tiles span { color: var(--soft); font-size: .85rem }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr));
  gap: 16px }
svg { width: 100%; height: auto; display: block }
.grid { stroke: var(--line) } .tick, .axis { fill: var(--soft); font-size: 15px }
.line { fill: none; stroke-width: 2 } .dashed { stroke-dasharray: 5 4; opacity: .75 }
.mark { stroke: none } .mark.dashed { opacity: .75 }
.s0 { stroke: var(--c0) } .s1 { stroke: var(--c1) } .s2 { stroke: var(--c2) }
.s3 { stroke: var(--c3) } .s4 { stroke: var(--c4) } .s5 { stroke: var(--c5) }
.mark.s0 { fill: var(--c0) } .mark.s1 { fill: var(--c1) } .mark.s2 { fill: var(--c2) }
.mark.s3 { fill: var(--c3) } .mark.s4 { fill: var(--c4) } .mark.s5 { fill: var(--c5) }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 4px 18px; padding: 0;
  margin: 10px 0 0; font-size: .85rem; color: var(--soft) }
.legend li { display: flex; align-items: center; gap: 6px } .key { width: 34px; flex: none }
pre { background: var(--bg); border: 1px solid var(--line); border-radius: 8px; padding: 12px;
  overflow-x: auto; margin: 8px 0 0 }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums;
  white-space: nowrap; width: 100% }
th, td { padding: 5px 10px; text-align: right; border-bottom: 1px solid var(--line) }
th { color: var(--soft); font-weight: 600 } th:first-child, td:first-child { text-align: left }
summary { cursor: pointer; margin: 32px 0 12px; font-weight: 600 }
.bad { color: var(--c4) }
/* On a phone a chart has half its size, its letters must not. */
@media (max-width: 560px) { .tick, .axis { font-size: 24px } .line { stroke-width: 3.5 }
  main { padding: 20px 12px 40px } pre { font-size: .76rem } .card { padding: 14px }
  .tiles { grid-template-columns: repeat(2, 1fr) } }
"""


def page(report: Report) -> str:
    """The whole document."""
    device = report.device
    board = f", {device.board}" if device.board else ""
    title = f"{report.model} version {report.version}" if report.version else report.model
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}: profile</title><style>{_STYLE}</style></head><body><main>
<h1>{escape(title)}</h1>
<p class="sub">Profile of {escape(report.target)} on {escape(device.name)} ({device.cores} cores,
{device.memory_in_gb:.1f} GB, {escape(device.processor)}{escape(board)}),
{escape(_day(report.created))}, gatelet {escape(report.gatelet)}</p>
<h2>Recommended</h2><div class="card">{_tiles(report)}{_reasons(report)}</div>
{_comparison(report.points)}
<h2>Measured</h2><div class="charts">
{"".join(f'<section class="card">{svg(chart)}</section>' for chart in charts(report.points))}
</div>
<details><summary>All measurements</summary><div class="card scroll">{_table(report.points)}</div>
</details>
{"".join(f'<p class="note">{escape(note)}</p>' for note in report.notes)}
<p class="note">Callers wait for each answer before they ask again, and share this machine's cores
with the model, so that figures of one report may be compared with each other, and hardly with those
of other machines.</p>
<script type="application/json" id="report">{_embedded(report)}</script>
</main></body></html>
"""


def _day(created: str) -> str:
    """2026-01-02 03:04 UTC, of ISO 8601."""
    return f"{created[:16].replace('T', ' ')} UTC" if created.endswith("+00:00") else created


def amount(gigabytes: float) -> str:
    """Memory for people: 50 MB, 1.25 GB."""
    return f"{gigabytes * 1000:.0f} MB" if gigabytes < 1 else f"{gigabytes:.3g} GB"


def charts(points: Sequence[Point]) -> list[Chart]:
    """Latency and throughput, by items in a request and by callers at a time."""
    batches = _grouped(point for point in points if point.phase == "batch" and point.requests)
    loads = _grouped(point for point in points if point.phase == "concurrency" and point.requests)
    several = any(len(group) > 1 for _, group in batches)
    made = []
    if several:
        made += [
            Chart(
                "Time of one request, by items in it",
                "items in a request",
                "milliseconds",
                tuple(
                    Series(name, tuple(_mark(p, p.batch, p.p50_ms) for p in group), slot)
                    for slot, (name, group) in enumerate(batches)
                ),
                log_x=True,
                log_y=True,
            ),
            Chart(
                "Items a second, by items in a request",
                "items in a request",
                "items a second",
                tuple(
                    Series(name, tuple(_mark(p, p.batch, p.items_per_second) for p in group), slot)
                    for slot, (name, group) in enumerate(batches)
                ),
                log_x=True,
            ),
        ]
    made.append(
        Chart(
            "Time of a request, by callers",
            "callers at a time",
            "milliseconds",
            tuple(
                series
                for slot, (name, group) in enumerate(loads)
                for series in _pair(name, group, slot)
            ),
            log_x=True,
            log_y=True,
        )
    )
    made.append(
        Chart(
            "Requests a second, by callers",
            "callers at a time",
            "requests a second",
            tuple(
                Series(
                    name, tuple(_mark(p, p.concurrency, p.requests_per_second) for p in group), slot
                )
                for slot, (name, group) in enumerate(loads)
            ),
            log_x=True,
        )
    )
    return made


def _pair(name: str, group: Sequence[Point], slot: int) -> list[Series]:
    half = tuple(_mark(p, p.concurrency, p.p50_ms) for p in group)
    most = tuple(_mark(p, p.concurrency, p.p99_ms) for p in group)
    return [
        Series(f"{name}, half of the requests", half, slot),
        Series(f"{name}, 99 of 100", most, slot, dashed=True),
    ]


def _grouped(points: Iterable[Point]) -> list[tuple[str, list[Point]]]:
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(_name(point), []).append(point)
    return list(groups.items())


def _name(point: Point) -> str:
    if point.phase == "concurrency":
        way = "run together" if point.together else "run singly"
        return "served" if point.backend == "served" else f"{point.backend}, {way}"
    if not point.threads:
        return point.backend
    return f"{point.backend}, {point.threads} thread{'s' * (point.threads != 1)}"


def _mark(point: Point, x: float, y: float) -> Mark:
    return Mark(x, y, _text(point))


def _text(point: Point) -> str:
    return (
        f"{_name(point)}\n{point.batch} items a request, {point.concurrency} callers\n"
        f"{point.requests_per_second:,.1f} requests/s, {point.items_per_second:,.1f} items/s\n"
        f"p50 {point.p50_ms:.3g} ms, p99 {point.p99_ms:.3g} ms"
    )


def _tiles(report: Report) -> str:
    chosen = report.recommendation
    tiles = [("backend", chosen.backend)] if chosen.backend != "served" else []
    if chosen.threads:
        tiles.append(("threads of a run", str(chosen.threads)))
    tiles += [
        ("largest batch", str(chosen.max_batch)),
        ("requests at a time", str(chosen.concurrency)),
        ("requests a second", number(chosen.requests_per_second)),
        ("half within", f"{chosen.p50_ms:.3g} ms"),
        ("99 of 100 within", f"{chosen.p99_ms:.3g} ms"),
    ]
    if chosen.cpu is not None:
        tiles.append(("CPU cores", f"{chosen.cpu:g}"))
    if chosen.memory_in_gb is not None:
        tiles.append(("memory", amount(chosen.memory_in_gb)))
    cells = "".join(
        f"<div><b>{escape(value)}</b><span>{name}</span></div>" for name, value in tiles
    )
    return f'<div class="tiles">{cells}</div>'


def _reasons(report: Report) -> str:
    reasons = "".join(f"<li>{escape(reason)}</li>" for reason in report.recommendation.reasons)
    listed = f"<ul>{reasons}</ul>" if reasons else ""
    return f"{listed}<h3>In the deployment manifest</h3><pre>{escape(settings(report))}</pre>"


def settings(report: Report) -> str:
    """The environment of the model's module that follows the recommendation."""
    chosen = report.recommendation
    env: dict[str, str] = {}
    if chosen.backend != "served":
        env["SCORING_BACKENDS"] = "cpu" if chosen.backend == "cpu" else f"{chosen.backend},cpu"
    if chosen.threads:
        env["SCORING_THREADS"] = str(chosen.threads)
    env["SCORING_MAX_BATCH"] = str(chosen.max_batch)
    lines = ",\n".join(f'  "{name}": {{"value": "{value}"}}' for name, value in env.items())
    return f'"env": {{\n{lines}\n}}'


def _comparison(points: Sequence[Point]) -> str:
    """CPU against FPGA, where both ran."""
    singles = [p for p in points if p.phase == "batch" and p.batch == 1 and p.requests]
    names = list(dict.fromkeys(point.backend for point in singles))
    if len(names) < 2:
        return ""
    rows = []
    for name in names:
        mine = [p for p in points if p.backend == name and p.requests]
        single = min((p for p in singles if p.backend == name), key=lambda p: p.p50_ms)
        most = max(mine, key=lambda p: p.items_per_second)
        cpu = "" if single.cpu_ms is None else f"{single.cpu_ms:.3g}"
        rows.append(
            f"<tr><td>{escape(name)}</td><td>{single.p50_ms:.3g}</td><td>{single.p99_ms:.3g}</td>"
            f"<td>{cpu}</td><td>{most.items_per_second:,.0f}</td><td>{most.batch}</td>"
            f"<td>{most.concurrency}</td></tr>"
        )
    return (
        '<h2>Backends compared</h2><div class="card scroll"><table><tr><th>backend</th>'
        "<th>one item, p50 ms</th><th>p99 ms</th><th>CPU ms</th><th>most items/s</th>"
        f"<th>with batch</th><th>and callers</th></tr>{''.join(rows)}</table></div>"
    )


def _table(points: Sequence[Point]) -> str:
    rows = []
    for p in points:
        cores = "" if p.cores is None else f"{p.cores:.2f}"
        cpu = "" if p.cpu_ms is None else f"{p.cpu_ms:.3g}"
        errors = (
            f'<span class="bad" title="{escape(p.error)}">{p.errors}</span>' if p.errors else "0"
        )
        rows.append(
            f"<tr><td>{escape(_name(p))}</td><td>{p.batch}</td><td>{p.concurrency}</td>"
            f"<td>{p.requests_per_second:,.1f}</td><td>{p.items_per_second:,.1f}</td>"
            f"<td>{p.p50_ms:.3g}</td><td>{p.p90_ms:.3g}</td><td>{p.p99_ms:.3g}</td>"
            f"<td>{cpu}</td><td>{cores}</td><td>{errors}</td></tr>"
        )
    return (
        "<table><tr><th>how</th><th>batch</th><th>callers</th><th>requests/s</th><th>items/s</th>"
        "<th>p50 ms</th><th>p90 ms</th><th>p99 ms</th><th>CPU ms</th><th>cores</th><th>errors</th>"
        f"</tr>{''.join(rows)}</table>"
    )


def _embedded(report: Report) -> str:
    # Nothing in it may end the script element.
    return msgspec.json.encode(report).decode().replace("<", "\\u003c")
