from __future__ import annotations

import json

import msgspec
import numpy as np
import pytest
from gatelet.accelerators.backend import Variant
from gatelet.accelerators.tensors import NUMPY_DTYPES, TensorSpec
from gatelet.modules.errors import InvalidImage, InvalidModel
from gatelet.modules.model_json import (
    MAX_MODEL_BYTES,
    Batching,
    Model,
    encode_model,
    load_model,
    parse_model,
)
from gatelet.modules.sample_json import load_sample, parse_sample
from hypothesis import given
from hypothesis import strategies as st

DIGITS = {
    "name": "digits",
    "version": "3",
    "framework": "onnx",
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 64]}],
    "outputs": [{"name": "probabilities", "datatype": "FP32", "shape": [-1, 10]}],
    "variants": [
        {"kind": "onnx", "path": "onnx/model.onnx"},
        {
            "kind": "finn",
            "path": "overlays/pynq-z2",
            "board": "pynq-z2",
            "part": "xc7z020clg400-1",
        },
    ],
    "sample": "sample.json",
    "batching": {"max": 32},
    "resources": {"cpu": 1, "memoryInGB": 0.5},
}


def document(**changes):
    return json.dumps({**DIGITS, **changes}).encode()


def tensor(**changes):
    return [{"name": "x", "datatype": "FP32", "shape": [-1, 64], **changes}]


def variants(*paths):
    return [{"kind": "onnx", "path": path} for path in paths]


def test_the_example_of_the_design_reads_as_the_seam_types():
    model = parse_model(document(), strict=True)
    assert model.inputs == (TensorSpec("x", "FP32", (-1, 64)),)
    assert model.outputs == (TensorSpec("probabilities", "FP32", (-1, 10)),)
    assert model.variants[1] == Variant("finn", "overlays/pynq-z2", "pynq-z2", "xc7z020clg400-1")
    assert (model.batching.max, model.resources.cpu, model.resources.memory_in_gb) == (32, 1, 0.5)
    assert parse_model(encode_model(model), strict=True) == model


@pytest.mark.parametrize(
    ("raw", "path", "said"),
    [
        (document(name="a b"), "$.name", "'a b'"),
        (document(name=""), "$.name", "expected 1 to 128"),
        (document(version=3), "$.version", "got int"),
        (document(version="../1"), "$.version", "'../1'"),
        (document(inputs=[]), "$.inputs", "found 0 tensors"),
        (document(inputs=tensor() * 2), "$.inputs[1].name", "'x' again"),
        (document(inputs=tensor(name="")), "$.inputs[0].name", "printable"),
        (document(inputs=tensor(name="a\nb")), "$.inputs[0].name", "printable"),
        (document(inputs=tensor(datatype="FLOAT")), "$.inputs[0].datatype", "FP32"),
        (document(inputs=tensor(shape=[-1, 0])), "$.inputs[0].shape[1]", "found 0"),
        (document(inputs=tensor(shape=[-1, -2])), "$.inputs[0].shape[1]", "found -2"),
        (document(inputs=tensor(shape=[-1, 2**40])), "$.inputs[0].shape[1]", "found 1099"),
        (document(inputs=tensor(shape=[-1, 1.5])), "$.inputs[0].shape[1]", "got float"),
        (document(inputs=tensor(shape=[-1, True])), "$.inputs[0].shape[1]", "got bool"),
        (document(inputs=tensor(shape=[-1] * 17)), "$.inputs[0].shape", "17 dimensions"),
        (document(inputs=[{"name": "x", "shape": []}]), "$.inputs[0]", "datatype"),
        (document(inputs=tensor(shape=[64])), "$.inputs[0].shape", "$.batching.max is 32"),
        (document(variants=[]), "$.variants", "found 0"),
        (document(variants=variants("/etc/passwd")), "$.variants[0].path", "/etc/passwd"),
        (document(variants=variants("../m")), "$.variants[0].path", "'../m'"),
        (document(variants=variants("a/./m")), "$.variants[0].path", "relative path"),
        (document(variants=variants("a//m")), "$.variants[0].path", "relative path"),
        (document(variants=variants("a\\m")), "$.variants[0].path", "relative path"),
        (document(variants=variants("a/\u0000")), "$.variants[0].path", "relative path"),
        (document(variants=variants("\ud800")), "$.variants[0].path", "relative path"),
        (document(variants=variants("")), "$.variants[0].path", "relative path"),
        (document(variants=variants("a" * 256)), "$.variants[0].path", "relative path"),
        (document(variants=variants("m/.wh.x")), "$.variants[0].path", "relative path"),
        (document(variants=variants("model.json")), "$.variants[0].path", "this document"),
        (document(variants=variants("m", "m")), "$.variants[1]", "repeats $.variants[0]"),
        (document(variants=variants("m", "m/n")), "$.variants[1].path", "overlaps"),
        (document(variants=variants(*map(str, range(65)))), "$.variants", "found 65"),
        (document(sample="overlays/pynq-z2/s.json"), "$.sample", "inside $.variants[1]"),
        (document(sample="../s.json"), "$.sample", "relative path"),
        (document(batching={"max": 0}), "$.batching.max", "found 0"),
        (document(resources={"cpu": -1}), "$.resources.cpu", "found -1"),
        (document(tags={"a": 1}), "$.tags[...]", "got int"),
        (b"[]", "$", "Expected object"),
        (b'{"a": 1', "line 1, column 8", "not JSON"),
        (b'{"name": "a", "name": "b"}', "model.json", "'name' appears twice"),
        (document(batching={"max": float("nan")}), "model.json", "NaN"),
        (b'{"name": ' + b"9" * 5000 + b"}", "model.json", ""),
        (b"\xff{}", "byte 0", "UTF-8"),
        (b"[" * 100_000, "model.json", "deeper than"),
        (b" " * (MAX_MODEL_BYTES + 1), "model.json", "larger than"),
    ],
)
def test_a_broken_rule_is_named_with_its_place(raw, path, said):
    with pytest.raises(InvalidModel) as caught:
        parse_model(raw)
    assert path in str(caught.value)
    assert said in str(caught.value)
    assert isinstance(caught.value, InvalidImage)


def test_brackets_in_strings_are_not_depth():
    assert parse_model(document(description='[{"' * 40)).description == '[{"' * 40


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"smaple": "sample.json"}, "$.smaple"),
        ({"batching": {"maximum": 2}}, "$.batching.maximum"),
        ({"resources": {"memoryInGb": 2}}, "$.resources.memoryInGb"),
        ({"inputs": tensor(dtype="FP32")}, "$.inputs[0].dtype"),
        ({"variants": [{"kind": "onnx", "path": "m", "boards": "x"}]}, "$.variants[0].boards"),
    ],
)
def test_unknown_fields_are_typing_errors_when_packaging_and_the_future_when_reading(changes, path):
    parse_model(document(**changes))
    with pytest.raises(InvalidModel) as caught:
        parse_model(document(**changes), strict=True)
    assert path in str(caught.value)


names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)
specs = st.lists(
    st.builds(
        TensorSpec,
        names,
        st.sampled_from(sorted(NUMPY_DTYPES)),
        st.lists(st.one_of(st.just(-1), st.integers(1, 1000)), max_size=4).map(
            lambda shape: (-1, *shape)
        ),
    ),
    min_size=1,
    max_size=4,
    unique_by=lambda spec: spec.name,
).map(tuple)


@given(
    st.builds(
        Model,
        name=names,
        version=names,
        framework=st.sampled_from(["onnx", "sklearn"]),
        inputs=specs,
        outputs=specs,
        variants=st.lists(
            st.builds(Variant, names, names.map("v/".__add__), st.none() | names, st.none()),
            min_size=1,
            max_size=3,
            unique_by=lambda variant: variant.path,
        ).map(tuple),
        sample=st.none() | st.just("sample.json"),
        batching=st.builds(Batching, st.integers(1, 64)),
        description=st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
        tags=st.dictionaries(names, names, max_size=2),
    )
)
def test_encoding_loses_nothing(model):
    assert parse_model(encode_model(model), strict=True) == model


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_noise_is_only_ever_an_invalid_model(raw):
    with pytest.raises(InvalidModel):
        parse_model(raw)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(sorted(DIGITS)), _json, max_size=4))
def test_any_json_in_place_of_a_field_is_a_model_or_an_invalid_model(changes):
    try:
        parse_model(document(**changes), strict=True)
    except InvalidModel:
        pass


def test_a_folder_without_model_json_says_so(tmp_path):
    with pytest.raises(InvalidModel, match=r"model\.json cannot be read"):
        load_model(tmp_path)
    (tmp_path / "model.json").write_bytes(b"{}")
    with pytest.raises(InvalidModel) as caught:
        load_model(tmp_path)
    assert str(tmp_path) in str(caught.value)


def sample(**changes):
    return {
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2.5], **changes}]
    }


MODEL = Model(
    name="m",
    version="1",
    framework="onnx",
    inputs=(TensorSpec("x", "FP32", (-1, 2)),),
    outputs=(TensorSpec("y", "INT8", (-1,)), TensorSpec("s", "BYTES", (-1,))),
    variants=(Variant("onnx", "m.onnx"),),
    sample="sample.json",
)


def test_a_sample_becomes_arrays(tmp_path):
    text = sample(data=[[1, 2.5]]) | {
        "outputs": [
            {"name": "y", "datatype": "INT8", "shape": [2], "data": [-128, 127]},
            {"name": "s", "datatype": "BYTES", "shape": [1], "data": ["é"]},
        ]
    }
    (tmp_path / "sample.json").write_text(json.dumps(text))
    loaded = load_sample(tmp_path, MODEL)
    assert loaded.inputs["x"].dtype == np.float32
    np.testing.assert_array_equal(loaded.inputs["x"], [[1, 2.5]])
    assert loaded.outputs["y"].dtype == np.int8
    assert loaded.outputs["s"].tolist() == ["é".encode()]
    assert load_sample(tmp_path, msgspec.structs.replace(MODEL, sample=None)) is None
    (tmp_path / "sample.json").unlink()
    with pytest.raises(InvalidModel, match=r"\$\.sample in model\.json names it"):
        load_sample(tmp_path, MODEL)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ({"inputs": []}, "no data for x"),
        (sample(name="z"), "$.inputs[0].name"),
        (sample(datatype="FP64"), "$.inputs[0].datatype"),
        (sample(shape=[2]), "$.inputs[0].shape"),
        (sample(shape=[-1, 2]), "$.inputs[0].shape"),
        (sample(data=[1]), "found 1 values, expected 2"),
        (sample(data=[1, "2"]), "found '2'"),
        (sample(data=[1, True]), "found True"),
        (sample(data=[1, 1e300]), "too large for FP32"),
        (sample(data=[1, {}]), "found {}"),
        (sample(data=3), "Expected array"),
        (
            sample()
            | {"outputs": [{"name": "y", "datatype": "INT8", "shape": [1], "data": [128]}]},
            "expected -128 to 127",
        ),
    ],
)
def test_a_bad_sample_is_named(text, said):
    with pytest.raises(InvalidModel) as caught:
        parse_sample(json.dumps(text).encode(), MODEL)
    assert said in str(caught.value)
