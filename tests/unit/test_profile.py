"""`gatelet profile`: the recommendation, the page, and a folder measured for real."""

from __future__ import annotations

import html
import json
import re
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from gatelet.agent.main import main
from gatelet.agent.profile.charts import Chart, Mark, Series, svg
from gatelet.agent.profile.load import AskFailed, closed_loop
from gatelet.agent.profile.page import page, settings
from gatelet.agent.profile.recommend import recommend
from gatelet.agent.profile.report import Device, Point, Report
from gatelet.agent.profile.sweep import powers_of_two
from gatelet.modules.oci.build import build_model_image
from gatelet.modules.oci.layout import open_layout
from hypothesis import given
from hypothesis import strategies as st
from required import needs

from ..bench import onnx_models
from ..bench.scoring_site import serve


def point(
    phase: str = "batch",
    *,
    backend: str = "cpu",
    threads: int = 1,
    batch: int = 1,
    concurrency: int = 1,
    together: bool = False,
    rate: float = 100.0,
    ms: float = 10.0,
    cores: float | None = 1.0,
    errors: int = 0,
) -> Point:
    return Point(
        phase,  # type: ignore[arg-type]
        backend,
        threads,
        batch,
        concurrency,
        together,
        1.0,
        int(rate),
        rate,
        rate * batch,
        ms,
        ms,
        ms,
        2 * ms,
        None if cores is None else 1000 * cores / rate,
        cores,
        errors,
        "no" if errors else "",
    )


def report(points: list[Point], **more: object) -> Report:
    return Report(
        "digits",
        "1",
        "./digits",
        "2026-01-01T00:00:00+00:00",
        "0.1.0",
        Device("edge-1", "armv7l", "Cortex-A9 <&>", 2, 0.5, "pynq-z2"),
        tuple(points),
        recommend(points),
        **more,  # type: ignore[arg-type]
    )


def test_threads_are_worth_it_only_where_they_help() -> None:
    slow = [point(threads=1, ms=10), point(threads=2, ms=9), point(threads=4, ms=8.9)]
    assert recommend(slow).threads == 1
    fast = [point(threads=1, ms=10), point(threads=2, ms=5.5), point(threads=4, ms=5)]
    assert recommend(fast).threads == 2


def test_the_smallest_batch_that_gives_nearly_all() -> None:
    sizes = [(1, 100.0, 10.0), (8, 50.0, 20.0), (16, 29.0, 35.0), (32, 15.0, 70.0)]
    points = [point(batch=batch, rate=rate, ms=ms) for batch, rate, ms in sizes]
    assert recommend(points).max_batch == 16
    assert recommend(points, limit_ms=50.0).max_batch == 8
    assert recommend(points, limit_ms=1.0).max_batch == 1
    flat = [point(batch=1, rate=100), point(batch=8, rate=13)]
    made = recommend(flat)
    assert made.max_batch == 1
    assert any("no batches" in reason for reason in made.reasons)


def test_no_more_callers_than_bring_something() -> None:
    points = [
        point(),
        *(
            point("concurrency", concurrency=c, rate=rate, ms=ms, cores=cores)
            for c, rate, ms, cores in [
                (1, 100, 10, 0.61),
                (2, 190, 10, 1.23),
                (8, 200, 40, 1.9),
                (32, 201, 160, 2.0),
            ]
        ),
        point("concurrency", concurrency=32, together=True, rate=50, ms=640),
    ]
    made = recommend(points, {"cpu": 300.0})
    assert (made.concurrency, made.cpu, made.memory_in_gb) == (2, 1.3, 0.4)
    assert any("0.2 times as many" in reason for reason in made.reasons)
    assert recommend(points, limit_ms=25.0).concurrency == 2


def test_the_faster_backend_wins_and_the_other_is_named() -> None:
    points = [point(backend="cpu", rate=100), point(backend="fpga", threads=0, rate=900, ms=1)]
    made = recommend(points)
    assert made.backend == "fpga"
    assert "against cpu 100 requests/s" in made.reasons[0]
    assert '"SCORING_BACKENDS": {"value": "fpga,cpu"}' in settings(report(points))
    assert "Backends compared" in page(report(points))


def test_errors_are_no_measurements() -> None:
    with pytest.raises(ValueError, match="no request of one item"):
        recommend([point(errors=3)])


@given(st.integers(1, 5000))
def test_sizes(most: int) -> None:
    sizes = powers_of_two(most)
    assert sizes[0] == 1
    assert sizes[-1] == most
    assert sizes == sorted(set(sizes))


values = st.floats(1e-6, 1e9)


@given(st.lists(st.tuples(values, values), max_size=20), st.booleans(), st.booleans())
def test_charts_are_well_formed_and_stay_inside(
    marks: list[tuple[float, float]], log_x: bool, log_y: bool
) -> None:
    series = Series("<a & b>", tuple(Mark(x, y, "<&>") for x, y in marks), 1)
    drawn = svg(Chart("A < B", "x", "y", (series,), log_x, log_y))
    if not marks:
        assert "nothing was measured" in drawn
        return
    root = ElementTree.fromstring(f"<div>{drawn}</div>")
    line = root.find(".//polyline")
    assert line is not None
    for pair in line.attrib["points"].split():
        x, y = map(float, pair.split(","))
        assert 0 <= x <= 640
        assert 0 <= y <= 340


def test_the_page_needs_nothing_from_elsewhere() -> None:
    points = [point(), point(batch=8, rate=60), point("concurrency", concurrency=4, errors=2)]
    text = page(report(points, notes=("fpga: </script><b>",)))
    assert not re.search(r"(src|href|url\()\s*=?\s*[\"']?http", text)
    assert "</script><b>" not in text
    embedded = re.search(r'id="report">(.*?)</script>', text, re.DOTALL)
    assert embedded is not None
    assert json.loads(embedded[1])["recommendation"]["maxBatch"] == 8
    assert "Cortex-A9 &lt;&amp;&gt;" in text
    assert "prefers-color-scheme: dark" in text


@needs("chromium")
@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_fits_phones_and_desks(tmp_path: Path, width: int) -> None:
    points = [point(batch=n, rate=1e5 / n) for n in (1, 2, 4, 64)]
    points += [point("concurrency", concurrency=n, rate=3e4 * n) for n in (1, 2, 32)]
    # What sticks out of the page, of a chart or of its card; letters of charts in screen pixels.
    look = """<script>
      const all = [...document.querySelectorAll('main *:not(.scroll *):not(pre):not(script)')];
      const out = all.filter(one => one.getBoundingClientRect().right > innerWidth + 1
        || one.getBoundingClientRect().left < -1).map(one => one.outerHTML.slice(0, 80));
      const texts = [...document.querySelectorAll('.charts svg[role] text')];
      const least = Math.min(...texts.map(one => one.getBoundingClientRect().height));
      document.title = JSON.stringify({width: innerWidth, out, least,
        scroll: document.documentElement.scrollWidth});
    </script>"""
    file = tmp_path / "page.html"
    file.write_text(page(report(points)).replace("</main>", f"</main>{look}"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    found = subprocess.run(
        [
            *("chromium", *flags, f"--user-data-dir={tmp_path}/profile", "--dump-dom"),
            *(f"--window-size={width},900", file.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    title = re.search(r"<title>(.*?)</title>", found.stdout)
    assert title is not None
    seen = json.loads(html.unescape(title[1]))
    assert seen["out"] == []
    assert seen["scroll"] <= seen["width"] <= 1280
    assert seen["least"] >= 9


def test_a_closed_loop_counts_what_fails() -> None:
    calls = []

    def ask() -> None:
        calls.append(1)
        if len(calls) % 2:
            raise AskFailed("odd")

    timing = closed_loop(ask, 2, 0.1, lambda: None)
    assert timing.errors > 0
    assert timing.error == "odd"
    assert len(timing.times) >= 5
    assert timing.cpu is None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return onnx_models.write_folder(
        tmp_path / "mlp",
        onnx_models.mlp(),
        [("x", "FP32", (-1, 64))],
        [("y", "FP32", (-1, 10))],
        name="mlp",
        batching={"max": 8},
    )


QUICK = ("--seconds", "0.01", "--batches", "1,4", "--callers", "1,4")


def profile(*words: str) -> int:
    return main(["profile", *words, "--config", "/nowhere/agent.toml"])


def test_a_folder_is_measured(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert profile(str(folder), "-o", str(tmp_path / "r.html"), "--threads", "1,2", *QUICK) == 0
    output = capsys.readouterr()
    assert "largest batch" in output.out
    assert "8/8 cpu" in output.err
    document = json.loads((tmp_path / "r.json").read_bytes())
    points = document["points"]
    assert [(p["phase"], p["threads"], p["batch"]) for p in points[:4]] == [
        ("batch", 1, 1),
        ("batch", 1, 4),
        ("batch", 2, 1),
        ("batch", 2, 4),
    ]
    assert [(p["concurrency"], p["together"]) for p in points[4:]] == [
        (1, False),
        (4, False),
        (1, True),
        (4, True),
    ]
    assert all(p["errors"] == 0 and p["p50Ms"] <= p["p99Ms"] and p["cpuMs"] > 0 for p in points)
    assert "<svg" in (tmp_path / "r.html").read_text()
    assert document["memoryMb"]["cpu"] >= 0


def test_an_image_is_measured(folder: Path, tmp_path: Path) -> None:
    layout = tmp_path / "layout"
    build_model_image(folder, layout)
    assert open_layout(layout).digest
    assert profile(str(layout), "-o", str(tmp_path / "r"), "--json", *QUICK) == 0
    assert json.loads((tmp_path / "r.json").read_bytes())["model"] == "mlp"


def test_an_endpoint_is_measured_as_it_is_served(folder: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((1, 64), np.float32))
    with serve(tmp_path / "s") as site:
        site.deploy({"mlp": folder})
        words = ("mlp", "--url", site.address, "--input", f"x={tmp_path / 'x.npy'}")
        assert profile(*words, "-o", str(tmp_path / "r"), *QUICK) == 0
    document = json.loads((tmp_path / "r.json").read_bytes())
    assert (document["version"], document["recommendation"]["threads"]) == ("1", 0)
    assert {p["backend"] for p in document["points"]} == {"served"}
    assert len(document["points"]) == 4


def test_what_cannot_be_measured_is_said(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert profile("absent", "--url", "127.0.0.1:1") == 1
    assert "nothing answers at 127.0.0.1:1" in capsys.readouterr().err
    assert profile("./absent") == 1
    assert "does not exist" in capsys.readouterr().err
    assert profile(str(tmp_path)) == 1
    assert "no model folder and no image" in capsys.readouterr().err
    (folder / "onnx/model.onnx").write_bytes(b"no")
    assert profile(str(folder), *QUICK) == 1
    assert "no variant runs on this device: cpu: onnxruntime cannot load" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        profile("digits", "--batches", "0")
