"""`/metrics` as Prometheus' own parser reads it, and the OpenAPI document under schemathesis."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gatelet.agent.scoring.client import ScoringClient
from gatelet.agent.scoring.errors import ScoringError
from gatelet.agent.scoring.prometheus import Family, render
from prometheus_client.parser import text_string_to_metric_families

from ..bench import onnx_models
from ..bench.scoring_site import Site, serve


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("metrics")
    with serve(folder / "s") as site:
        models = {
            "scale": onnx_models.scale_folder(folder / "scale", 2.0, version="3"),
            "text": onnx_models.identity_folder(folder / "text", "BYTES"),
        }
        site.deploy(models)
        yield site


def scrape(site: Site) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    connection = http.client.HTTPConnection(site.metrics, timeout=20)
    connection.request("GET", "/metrics")
    response = connection.getresponse()
    assert response.status == 200
    assert response.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    text = response.read().decode()
    connection.close()
    values = {}
    for family in text_string_to_metric_families(text):
        assert family.type != "unknown", family.name
        assert family.documentation, family.name
        for sample in family.samples:
            name = sample.name
            if name.startswith("nv_"):
                # The parser gives counters OpenMetrics' suffix, which Triton's names lack.
                name = name.removesuffix("_total")
            key = (name, frozenset(sample.labels.items()))
            assert key not in values, key
            values[key] = sample.value
    return values


def test_metrics_count_what_happened(site: Site) -> None:
    before = scrape(site)
    with ScoringClient(site.address) as client:
        client.infer("scale", {"x": np.ones((5, 4), np.float32)})
        with pytest.raises(ScoringError):
            client.infer("scale", {"x": np.ones((1, 1), np.float32)})
    after = scrape(site)

    def gained(name: str, **labels: str) -> float:
        key = (name, frozenset({"model": "scale", "version": "3", **labels}.items()))
        return after[key] - before.get(key, 0)

    assert gained("nv_inference_request_success") == 1
    assert gained("nv_inference_request_failure", reason="INVALID_ARGUMENT") == 1
    assert gained("nv_inference_count") == 5
    assert gained("nv_inference_exec_count") == 1
    assert gained("gatelet_batch_size_bucket", le="8.0") == 1
    assert gained("gatelet_batch_size_bucket", le="4.0") == 0
    assert gained("gatelet_batch_size_bucket", le="+Inf") == gained("gatelet_batch_size_count")
    assert (
        after[
            "nv_inference_pending_request_count", frozenset({("model", "scale"), ("version", "3")})
        ]
        == 0
    )
    cpu = frozenset({("model", "scale"), ("version", "3"), ("backend", "cpu")})
    assert after["gatelet_backend_healthy", cpu] == 1
    assert after["gatelet_backend_breaker_open", cpu] == 0
    assert after["process_resident_memory_bytes", frozenset()] > 1e7
    assert after["process_cpu_seconds_total", frozenset()] > 0
    assert after["gatelet_http_connections", frozenset()] >= 1


def test_every_metric_of_triton_is_there(site: Site) -> None:
    names = {name for name, _ in scrape(site)}
    assert {
        "nv_inference_request_success",
        "nv_inference_request_failure",
        "nv_inference_count",
        "nv_inference_exec_count",
        "nv_inference_request_duration_us",
        "nv_inference_queue_duration_us",
        "nv_inference_compute_input_duration_us",
        "nv_inference_compute_infer_duration_us",
        "nv_inference_compute_output_duration_us",
        "nv_inference_pending_request_count",
    } <= names


def test_label_values_may_hold_anything() -> None:
    family = Family("m", "gauge", 'a "help"\nof two \\ lines')
    family.add(1.5, (("label", 'quote " back \\ line \n end'),))
    (parsed,) = text_string_to_metric_families(
        render([family, Family("none", "gauge", "-")]).decode()
    )
    assert parsed.samples[0].labels == {"label": 'quote " back \\ line \n end'}
    assert parsed.samples[0].value == 1.5


def test_only_metrics_are_served_there(site: Site) -> None:
    for method, path, status in (("GET", "/", 404), ("POST", "/metrics", 405)):
        connection = http.client.HTTPConnection(site.metrics, timeout=20)
        connection.request(method, path)
        assert connection.getresponse().status == status
        connection.close()


def test_the_server_keeps_to_its_openapi_document(site: Site, tmp_path: Path) -> None:
    # Refusals such as "the deployment decides" are 501 and 503; 500 is never right.
    (tmp_path / "schemathesis.toml").write_text(
        '[checks.not_a_server_error]\nexpected-statuses = ["2xx", "4xx", 501, 503]\n'
    )
    checks = (
        "not_a_server_error",
        "status_code_conformance",
        "content_type_conformance",
        "response_schema_conformance",
    )
    run = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "run", f"http://{site.http}/openapi.json"),
            *("--checks", ",".join(checks), "--max-examples", "5", "--seed", "1"),
            *("--exclude-path-regex", "cudasharedmemory|versions", "--no-color"),
            *("--phases", "coverage,fuzzing", "--warnings", "off"),
        ],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert "Tested:" in run.stdout


def test_the_openapi_document_names_every_model(site: Site) -> None:
    connection = http.client.HTTPConnection(site.http, timeout=20)
    connection.request("GET", "/openapi.json")
    document = json.loads(connection.getresponse().read())
    connection.close()
    assert document["openapi"] == "3.1.0"
    assert {"/v2/models/scale/infer", "/score/text", "/v2/health/ready"} <= set(document["paths"])
    shape = document["components"]["schemas"]["scale.InferRequest"]["properties"]["inputs"]
    assert shape["items"]["properties"]["shape"]["prefixItems"][1] == {"const": 4}
