from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gatelet.agent.cli import score
from gatelet.agent.cli.command import CommandError
from gatelet.agent.scoring.client import ScoringClient, make_tensor
from gatelet.agent.scoring.errors import Code, ScoringError

from ..bench import onnx_models
from ..bench.scoring_site import Site, serve


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("scoring")
    with serve(folder / "s") as site:
        site.deploy(
            {
                "scale": onnx_models.scale_folder(folder / "scale", 2.0, version="3"),
                "text": onnx_models.identity_folder(folder / "text", "BYTES"),
                "int": onnx_models.identity_folder(folder / "int", "INT8"),
                "flag": onnx_models.identity_folder(folder / "flag", "BOOL"),
            }
        )
        yield site


def run(site: Site, *words: str) -> int:
    parser = argparse.ArgumentParser()
    score.register(parser.add_subparsers())
    arguments = parser.parse_args(["score", *words, "--url", site.address])
    return int(arguments.run(arguments))


def test_prints_an_answer_for_people(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(site, "scale", "--input", "x=[[1, 2, 3, 4.5]]") == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0] == "scale version 3"
    assert "y FP32[1,4]\n[[2. 4. 6. 9.]]" in out
    assert "total FP32[1,1]\n[[21.]]" in out


def test_prints_json_for_programs(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(site, "scale", "--input", "x=[[1,2,3,4]]", "--output", "total", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {
        "model_name": "scale",
        "model_version": "3",
        "outputs": [{"name": "total", "datatype": "FP32", "shape": [1, 1], "data": [20.0]}],
    }


def test_reads_files(site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "x.npy", np.ones((1, 4), np.float32))
    (tmp_path / "x.json").write_text("[[1, 1, 1, 1]]")
    for name in ("x.npy", "x.json"):
        assert run(site, "scale", "--input", f"x={tmp_path / name}") == 0
        assert "[[8.]]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "value", "expected"),
    [
        ("text", '[["a", "grüße"]]', ["a", "grüße"]),
        ("int", "[[-128, 127]]", [-128, 127]),
        ("flag", "[[true, false]]", [True, False]),
    ],
)
def test_json_becomes_the_models_datatype(
    site: Site, capsys: pytest.CaptureFixture[str], model: str, value: str, expected: list[object]
) -> None:
    assert run(site, model, "--input", f"x={value}", "--json") == 0
    assert json.loads(capsys.readouterr().out)["outputs"][0]["data"] == expected


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["scale"], 2, r"scale takes x FP32\[-1,4\]; give each with --input, found none"),
        (["scale", "--input", "x"], 2, "must be NAME=FILE.npy or NAME=JSON"),
        (["scale", "--input", "x=1", "--input", "x=2"], 2, "given twice"),
        (["scale", "--input", "q=1"], 2, "found q"),
        (["scale", "--input", "x=[[1,2]"], 1, "input x: .*expected a .npy or .json"),
        (["scale", "--input", 'x=[["a"]]'], 1, "FP32 cannot hold"),
        (["scale", "--input", "x=[[1],[2,3]]"], 1, "input x"),
        (["scale", "--input", "x=[[1]]"], 1, "INVALID_ARGUMENT: input 'x': shape"),
        (["scale", "--input", "x=/no/such.npy"], 1, "/no/such.npy cannot be read"),
        (["scale", "--input", "x=/no/such.json"], 1, "/no/such.json cannot be read"),
        (["scale", "--model-version", "9", "--input", "x=[[1]]"], 1, "NOT_FOUND.*no version '9'"),
        (["int", "--input", "x=[[1, 300]]"], 1, "INT8 holds -128 to 127"),
        (["int", "--input", "x=[[1, 1.5]]"], 1, "INT8 cannot hold"),
        (["nothing", "--input", "x=1"], 1, "NOT_FOUND: model 'nothing' is not deployed"),
    ],
)
def test_what_goes_wrong_is_said(site: Site, words: list[str], code: int, message: str) -> None:
    with pytest.raises(CommandError, match=message) as caught:
        run(site, *words)
    assert caught.value.code == code


def test_nobody_there(tmp_path: Path) -> None:
    url = f"unix:{tmp_path / 'nobody'}"
    with ScoringClient(url) as client:
        assert not client.live()
        assert not client.ready()
        with pytest.raises(ScoringError, match=r"nothing answers at unix:.*running") as caught:
            client.infer("m", {"x": [1.0]})
        assert caught.value.code is Code.UNAVAILABLE


def test_the_client_over_a_unix_socket(tmp_path: Path) -> None:
    address = f"unix:{tmp_path / 'oip'}"
    with serve(tmp_path / "s", address=address) as site:
        assert site.address == address
        site.deploy({"m": onnx_models.scale_folder(tmp_path / "m", 2.0)})
        with ScoringClient(address) as client:
            answer = client.infer("m", {"x": np.ones((2, 4), np.float32)})
            assert answer["total"].tolist() == [[8.0], [8.0]]
            assert client.live()
            assert client.server_metadata().name == "gatelet"


def test_a_request_keeps_its_id_and_names_its_version(site: Site) -> None:
    with ScoringClient(site.address) as client:
        x = np.ones((1, 4), np.float32)
        answer = client.request("scale", {"x": x}, outputs=["total"], request_id="7")
        assert (answer.id, answer.version) == ("7", "3")
        assert [tensor.name for tensor in answer.outputs] == ["total"]
        assert [str(spec) for spec in client.metadata("scale").outputs] == [
            "y FP32[-1,4]",
            "total FP32[-1,1]",
        ]


@pytest.mark.parametrize(
    ("values", "datatype"),
    [
        (np.zeros(2, np.float32), "FP32"),
        (np.zeros(2, ">f4"), "FP32"),
        (np.zeros((2, 2), np.float16).T, "FP16"),
        ([1, 2], "INT64"),
        ([True], "BOOL"),
        (["ü", "b"], "BYTES"),
        (np.array(b"x"), "BYTES"),
        (np.float64(1), "FP64"),
    ],
)
def test_the_datatype_follows_the_array(values: object, datatype: str) -> None:
    tensor = make_tensor("x", values)  # type: ignore[arg-type]
    assert tensor.datatype == datatype
    assert tensor.shape == np.asarray(values).shape


@pytest.mark.parametrize("values", [np.zeros(1, np.complex64), np.array([1, None], object)])
def test_arrays_that_no_datatype_fits(values: object) -> None:
    with pytest.raises(ScoringError, match="input 'x'"):
        make_tensor("x", values)  # type: ignore[arg-type]
