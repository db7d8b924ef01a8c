"""Access log, trace context, spans and server timing, asked for over gRPC and REST."""

from __future__ import annotations

import http.client
import json
import logging
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import grpc
import pytest
from gatelet.agent.scoring.trace_context import TraceContext, continued, parse_traceparent
from gatelet.protos import open_inference_pb2 as oip
from gatelet.protos.inference import InferenceStub
from hypothesis import given
from hypothesis import strategies as st

from ..bench import onnx_models
from ..bench.scoring_site import TRANSPORTS, Site, serve

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = f"00-{TRACE}-{SPAN}-01"
BODY = json.dumps(
    {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}]}
)


@contextmanager
def collector() -> Iterator[tuple[str, queue.Queue[Any]]]:
    """An OpenTelemetry collector: its address and what it was sent."""
    got: queue.Queue[Any] = queue.Queue()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            got.put((self.path, json.loads(body)))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1/traces", got
        finally:
            server.shutdown()
            thread.join()


def rest(site: Site, path: str, headers: dict[str, str]) -> tuple[int, dict[str, str]]:
    connection = http.client.HTTPConnection(site.http, timeout=20)
    connection.request("POST", path, BODY, headers)
    response = connection.getresponse()
    response.read()
    connection.close()
    return response.status, {key.lower(): value for key, value in response.getheaders()}


def rpc(site: Site, model: str, *metadata: tuple[str, str]) -> dict[str, str]:
    """The trailing metadata."""
    request = oip.ModelInferRequest(model_name=model, raw_input_contents=[bytes(16)], id="id-1")
    request.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    with grpc.insecure_channel(site.address) as channel:
        call = InferenceStub(channel).model_infer.future(request, 20, metadata)
        call.exception()
        return dict(call.trailing_metadata())


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_the_access_log(tmp_path: Path, caplog: pytest.LogCaptureFixture, transport: str) -> None:
    folder = onnx_models.scale_folder(tmp_path / "m", 2.0, version="7")
    with (
        serve(
            tmp_path / "s", settings={"access_log_sample": 1.0, "grpc_transport": transport}
        ) as site,
        caplog.at_level(logging.INFO, "gatelet.scoring.access"),
    ):
        site.deploy({"e": folder})
        rest(site, "/v2/models/e/infer", {"traceparent": PARENT, "x-request-id": "r"})
        rest(site, "/v2/models/none/infer", {})
        rpc(site, "e", ("traceparent", PARENT))
        rpc(site, "none")
    lines = [json.loads(r.getMessage()) for r in caplog.records if r.name.endswith("access")]
    shown = [
        (line["protocol"], line["operation"], line["endpoint"], line["version"], line["status"])
        for line in lines
    ]
    assert shown == [
        ("http", "infer", "e", "7", "200"),
        ("http", "infer", "none", "", "404"),
        ("grpc", "infer", "e", "7", "OK"),
        ("grpc", "infer", "none", "", "NOT_FOUND"),
    ]
    assert [line.get("traceId") for line in lines] == [TRACE, None, TRACE, None]
    assert [line.get("requestId") for line in lines] == ["r", None, "id-1", "id-1"]
    assert all(line["ms"] > 0 and line["client"] == "127.0.0.1" for line in lines)


def test_nothing_is_logged_unasked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = onnx_models.scale_folder(tmp_path / "m", 2.0)
    with serve(tmp_path / "s") as site, caplog.at_level(logging.INFO, "gatelet.scoring.access"):
        site.deploy({"e": folder})
        status, headers = rest(site, "/v2/models/e/infer", {})
        assert (status, "server-timing" in headers) == (200, False)
        assert "server-timing" not in rpc(site, "e")
    assert not [record for record in caplog.records if record.name.endswith("access")]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_spans_continue_the_callers_trace(tmp_path: Path, transport: str) -> None:
    folder = onnx_models.scale_folder(tmp_path / "m", 2.0, version="7")
    with collector() as (url, got):
        with serve(tmp_path / "s", settings={"otlp_url": url, "grpc_transport": transport}) as site:
            site.deploy({"e": folder})
            rest(site, "/v2/models/e/infer", {"traceparent": PARENT})
            rest(site, "/v2/models/e/infer", {"traceparent": f"00-{TRACE}-{SPAN}-00"})
            rest(site, "/v2/models/e/infer", {"traceparent": "nonsense"})
            rpc(site, "e", ("traceparent", PARENT))
        batches = []
        while not got.empty():
            batches.append(got.get())
    assert {path for path, _ in batches} == {"/v1/traces"}
    resources = [resource for _, body in batches for resource in body["resourceSpans"]]
    spans = [span for one in resources for scope in one["scopeSpans"] for span in scope["spans"]]
    # What the caller does not sample, and what nobody decided about, is not sent.
    assert [span["name"] for span in spans] == ["infer e", "infer e"]
    for span in spans:
        assert (span["traceId"], span["parentSpanId"]) == (TRACE, SPAN)
        assert len(span["spanId"]) == 16
        assert int(span["endTimeUnixNano"]) >= int(span["startTimeUnixNano"]) > 1.7e18
    names = [a["value"]["stringValue"] for a in resources[0]["resource"]["attributes"]]
    assert names == ["gatelet-scoring", "test"]


def test_a_collector_that_is_away_costs_no_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = onnx_models.scale_folder(tmp_path / "m", 2.0)
    settings = {"otlp_url": "http://127.0.0.1:9/v1/traces", "trace_sample": 1.0}
    with serve(tmp_path / "s", settings=settings) as site:
        site.deploy({"e": folder})
        assert rest(site, "/v2/models/e/infer", {})[0] == 200
    assert any("spans are dropped" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_server_timing_on_demand(tmp_path: Path, transport: str) -> None:
    folder = onnx_models.scale_folder(tmp_path / "m", 2.0)
    with serve(tmp_path / "s", settings={"grpc_transport": transport}) as site:
        site.deploy({"e": folder})
        _, headers = rest(site, "/v2/models/e/infer", {"x-gatelet-timing": "1"})
        parts = dict(part.split(";dur=") for part in headers["server-timing"].split(", "))
        assert set(parts) == {"total", "decode", "infer", "encode"}
        total = float(parts.pop("total"))
        assert abs(total - sum(map(float, parts.values()))) < 0.01
        timing = rpc(site, "e", ("x-gatelet-timing", "1"))["server-timing"]
        assert float(timing.split(",")[0].removeprefix("total;dur=")) > 0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "00-" + "0" * 32 + f"-{SPAN}-01",
        f"00-{TRACE}-" + "0" * 16 + "-01",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01-more",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}",
    ],
)
def test_what_is_no_trace_context(text: str) -> None:
    assert parse_traceparent(text) is None


@given(
    st.integers(1, 2**128 - 1), st.integers(1, 2**64 - 1), st.booleans(), st.integers(1, 2**64 - 1)
)
def test_trace_contexts_round_trip(trace: int, parent: int, sampled: bool, span: int) -> None:
    context = TraceContext(f"{trace:032x}", f"{parent:016x}", sampled)
    passed_on = parse_traceparent(continued(context, f"{span:016x}"))
    assert passed_on == TraceContext(context.trace_id, f"{span:016x}", sampled)
    assert parse_traceparent(f"01-{TRACE}-{SPAN}-03-future") == TraceContext(TRACE, SPAN, True)
