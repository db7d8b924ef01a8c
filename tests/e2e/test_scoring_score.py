"""`/score`, `/` and `/swagger.json` as users of Azure ML's inference server know them."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gatelet.protos import control_pb2 as pb

from ..bench import onnx_models
from ..bench.scoring_site import Site, serve

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("score")


@pytest.fixture(scope="module")
def site(folder: Path) -> Iterator[Site]:
    with serve(folder / "s") as site:
        site.deploy({"scale": onnx_models.scale_folder(folder / "scale", 2.0, version="3")})
        yield site


def ask(
    site: Site,
    method: str,
    path: str,
    body: Any = None,
    headers: dict[str, str] | None = None,
) -> tuple[int, dict[str, str], Any]:
    sent = {**(JSON if body is not None else {}), **(headers or {})}
    text = body if body is None or isinstance(body, bytes | str) else json.dumps(body)
    connection = http.client.HTTPConnection(site.http, timeout=20)
    connection.request(method, path, text, sent)
    response = connection.getresponse()
    raw = response.read()
    connection.close()
    named = {key.lower(): value for key, value in response.getheaders()}
    kind = named.get("content-type", "")
    return response.status, named, json.loads(raw) if raw and "json" in kind else raw.decode()


ANSWER = {"y": [[2.0, 4.0, 6.0, 8.0]], "total": [[20.0]]}
ROW = [1, 2, 3, 4]
RECORD = {"a": 1, "b": 2, "c": 3, "d": 4}


@pytest.mark.parametrize(
    "body",
    [
        {"data": [ROW]},
        {"data": [ROW], "method": "predict"},
        {"data": {"x": [ROW]}},
        {"x": [ROW]},
        {"input_data": [ROW]},
        {"input_data": {"columns": ["a", "b", "c", "d"], "index": [0], "data": [ROW]}},
        {"input_data": {"columns": [0, 1, 2, 3], "data": [ROW]}},
        {"data": [{"a": 1, "b": 2, "c": 3, "d": 4}]},
    ],
)
def test_forms_of_the_body(site: Site, body: Any) -> None:
    assert ask(site, "POST", "/score", body)[::2] == (200, ANSWER)
    assert ask(site, "POST", "/score/scale", body)[::2] == (200, ANSWER)


@pytest.mark.parametrize("body", [{"Inputs": {"data": [ROW]}}, {"Inputs": {"input1": [RECORD]}}])
def test_the_designers_form(site: Site, body: Any) -> None:
    assert ask(site, "POST", "/score", body)[::2] == (200, {"Results": ANSWER})


def test_inputs_by_column_and_one_output(site: Site, folder: Path, tmp_path: Path) -> None:
    with serve(tmp_path / "s") as other:
        other.deploy({"text": onnx_models.identity_folder(folder / "text", "BYTES")})
        status, _, answer = ask(other, "POST", "/score", {"data": [["a", "ä"], ["", "b"]]})
        assert (status, answer) == (200, [["a", "ä"], ["", "b"]])


def test_the_query_as_input(site: Site) -> None:
    assert ask(site, "GET", "/score?x=[[1,2,3,4]]")[::2] == (200, ANSWER)
    status, _, answer = ask(site, "GET", "/score")
    assert (status, "none of what is understood" in answer["message"]) == (400, True)


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        (b"", 400, "the body is empty"),
        (b"{", 400, "the body is no JSON"),
        ([ROW], 400, "Expected `object`"),
        ({}, 400, "none of what is understood"),
        ({"other": 1}, 400, "none of what is understood"),
        ({"data": [[1, 2, 3]]}, 400, "expected [-1, 4]"),
        ({"data": ROW}, 400, "expected [-1, 4]"),
        ({"data": [[1, 2], [3]]}, 400, "rows differ in length"),
        ({"data": [["a"] * 4]}, 400, "Expected `float`"),
        ({"data": {"p": 1, "q": 2}}, 400, "'p', 'q' are not the inputs"),
        ({"data": [{"a": 1}, {"b": 2}]}, 400, "every record needs"),
        ({"input_data": {"columns": ["a"], "data": [ROW]}}, 400, "every row needs 1 values"),
    ],
)
def test_bodies_that_are_refused(site: Site, body: Any, status: int, text: str) -> None:
    code, headers, answer = ask(site, "POST", "/score", body)
    assert (code, text in answer["message"]) == (status, True), answer
    assert headers["x-ms-run-function-failed"] == "False"


def test_content_types(site: Site) -> None:
    body = json.dumps({"data": [ROW]})
    for kind, status in (
        ("application/json; charset=utf-8", 200),
        ("application/problem+json", 200),
        ("text/plain", 415),
        ("application/x-www-form-urlencoded", 415),
    ):
        assert ask(site, "POST", "/score", body, {"Content-Type": kind})[0] == status


def test_health_methods_and_unknown_paths(site: Site) -> None:
    status, headers, answer = ask(site, "GET", "/")
    assert (status, answer, headers["content-type"]) == (
        200,
        "Healthy",
        "text/html; charset=utf-8",
    )
    assert headers["x-request-id"] == headers["x-ms-request-id"]
    assert ask(site, "HEAD", "/")[::2] == (200, "")
    assert ask(site, "POST", "/", {})[0] == 405
    assert ask(site, "DELETE", "/score")[0] == 405
    assert ask(site, "OPTIONS", "/score")[::2] == (200, "")
    status, _, answer = ask(site, "GET", "/nosuch")
    assert (status, list(answer)) == (404, ["message"])


def test_request_ids(site: Site) -> None:
    def ids(**sent: str) -> tuple[str | None, ...]:
        headers = {name.replace("_", "-"): value for name, value in sent.items()}
        _, got, _ = ask(site, "POST", "/score", {"data": [ROW]}, headers)
        return tuple(
            got.get(n) for n in ("x-request-id", "x-ms-request-id", "x-ms-client-request-id")
        )

    assert ids(x_request_id="A") == ("A", "A", None)
    assert ids(x_ms_request_id="B")[1:] == ("B", "B")
    assert ids(x_ms_client_request_id="C")[1:] == ("C", "C")
    sent = {"x_request_id": "A", "x_ms_request_id": "B", "x_ms_client_request_id": "C"}
    assert ids(**sent) == ("A", "B", "C")
    status, _, answer = ask(site, "GET", "/", None, {"x-request-id": "i" * 101})
    assert (status, answer["message"]) == (431, "x-request-id must not exceed 100 characters")


def test_what_an_answer_says_of_itself(site: Site) -> None:
    _, headers, _ = ask(site, "POST", "/score", {"data": [ROW]})
    assert headers["x-ms-run-function-failed"] == "False"
    assert float(headers["x-ms-run-fn-exec-ms"]) > 0
    assert headers["azureml-model-deployment"] == "3"
    assert headers["x-ms-server-version"] == "gatelet/test"


def test_several_endpoints(site: Site, folder: Path, tmp_path: Path) -> None:
    with serve(tmp_path / "s") as other:
        # Before anybody said what is deployed, clients are to come back.
        status, headers, answer = ask(other, "POST", "/score", {"data": [ROW]})
        assert (status, headers["retry-after"]) == (503, "1")
        assert answer["message"] == "the deployment's models are not loaded yet; try again"
        assert ask(other, "GET", "/")[0] == 503
        other.switch({})
        status, _, answer = ask(other, "POST", "/score", {"data": [ROW]})
        assert (status, answer["message"]) == (404, "no model is deployed here")
        folder = folder / "scale"
        for name in ("a", "b"):
            other.load(f"{name}-module@1", folder)
            other.probe(f"{name}-module@1")
        other.switch({name: [(f"{name}-module@1", 0, True)] for name in ("a", "b")})
        status, _, answer = ask(other, "POST", "/score", {"data": [ROW]})
        assert (status, "several endpoints are deployed: a, b" in answer["message"]) == (404, True)
        named = {"azureml-model-deployment": "b-module"}
        assert ask(other, "POST", "/score", {"data": [ROW]}, named)[::2] == (200, ANSWER)
        assert ask(other, "POST", "/score/a", {"data": [ROW]})[::2] == (200, ANSWER)
        status, _, answer = ask(other, "POST", "/score/c", {"data": [ROW]})
        assert (status, "deployed: 'a', 'b'" in answer["message"]) == (404, True)


def test_endpoints_that_are_being_loaded(folder: Path, tmp_path: Path) -> None:
    def statuses(*paths: str, **headers: str) -> list[int]:
        sent = {key.replace("_", "-"): value for key, value in headers.items()}
        return [ask(other, "POST", path, {"data": [ROW]}, sent)[0] for path in paths]

    with serve(tmp_path / "s") as other:
        one, two = pb.WantedEndpoint(endpoint="a"), pb.WantedEndpoint(endpoint="b")
        other.control.announce(pb.AnnounceRequest(endpoints=[one]), 10)
        status, headers, answer = ask(other, "POST", "/score", {"data": [ROW]})
        assert (status, headers["retry-after"]) == (503, "1")
        assert answer["message"] == "model 'a' is being loaded; try again"
        assert ask(other, "GET", "/")[0] == 503
        other.control.announce(pb.AnnounceRequest(endpoints=[one, two]), 10)
        assert statuses("/score", "/score/a", "/score/b", "/score/c") == [404, 503, 503, 404]
        assert statuses("/score", azureml_model_deployment="b-module") == [503]
        other.load("a-module@1", folder / "scale")
        other.probe("a-module@1")
        other.switch({"a": [("a-module@1", 0, True)]})
        assert statuses("/score", "/score/a", "/score/b", "/score/c") == [404, 200, 503, 404]
        assert statuses("/score", azureml_model_deployment="b-module") == [503]
        assert statuses("/score", azureml_model_deployment="a-module") == [200]
        # The protocol's own paths.
        for method, path in (
            ("GET", "/v2/models/b"),
            ("GET", "/v2/models/b/ready"),
            ("GET", "/v2/models/b/config"),
            ("GET", "/v2/models/b/stats"),
            ("POST", "/v2/models/b/infer"),
            ("POST", "/v2/repository/models/b/load"),
        ):
            body = {"inputs": []} if path.endswith("infer") else None
            status, headers, answer = ask(other, method, path, body)
            assert (status, headers.get("retry-after")) == (503, "1"), path
            assert answer["error"] == "model 'b' is being loaded; try again"
        assert ask(other, "GET", "/v2/health/ready")[0] == 503
        index = ask(other, "POST", "/v2/repository/index")[2]
        assert {entry["name"]: entry["state"] for entry in index} == {"a": "READY", "b": "LOADING"}
        assert [
            entry["name"]
            for entry in ask(other, "POST", "/v2/repository/index", {"ready": True})[2]
        ] == ["a"]


def test_swagger(site: Site) -> None:
    status, _, two = ask(site, "GET", "/swagger.json")
    assert (status, two["swagger"]) == (200, "2.0")
    assert two["info"]["title"] == "scale"
    assert two["paths"]["/"]["get"]["operationId"] == "ServiceHealthCheck"
    assert two["paths"]["/score"]["post"]["operationId"] == "RunMLService"
    assert two["definitions"]["scale.ServiceInput"]["properties"]["data"] == {
        "type": "array",
        "items": {
            "type": "array",
            "items": {"type": "number"},
            "minItems": 4,
            "maxItems": 4,
        },
    }
    for version in ("3", "3.0", "3.1"):
        assert ask(site, "GET", f"/swagger.json?version={version}")[2]["openapi"] == "3.0.3"
    assert ask(site, "GET", "/swagger.json?version=9")[::2] == (
        404,
        {"message": "Swagger version [9] is not valid. Supported versions: [2, 3]."},
    )
