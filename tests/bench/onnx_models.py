"""Small ONNX models and model folders for tests and benchmarks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

_ELEMENTS = {
    "BOOL": TensorProto.BOOL,
    "UINT8": TensorProto.UINT8,
    "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64,
    "INT8": TensorProto.INT8,
    "INT16": TensorProto.INT16,
    "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64,
    "FP16": TensorProto.FLOAT16,
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
    "BYTES": TensorProto.STRING,
}
DATATYPES = tuple(_ELEMENTS)

# (name, datatype, shape with -1 for a free size)
Spec = tuple[str, str, Sequence[int]]


def build(
    nodes: Sequence[Any],
    inputs: Sequence[Spec],
    outputs: Sequence[Spec],
    constants: dict[str, np.ndarray] | None = None,
) -> bytes:
    def info(spec: Spec) -> Any:
        name, datatype, shape = spec
        sizes = [f"free{axis}" if size == -1 else size for axis, size in enumerate(shape)]
        return helper.make_tensor_value_info(name, _ELEMENTS[datatype], sizes)

    graph = helper.make_graph(
        list(nodes),
        "test",
        [info(spec) for spec in inputs],
        [info(spec) for spec in outputs],
        [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def identity(datatype: str, shape: Sequence[int] = (-1, 2)) -> bytes:
    """y = x."""
    return build(
        [helper.make_node("Identity", ["x"], ["y"])],
        [("x", datatype, shape)],
        [("y", datatype, shape)],
    )


def scale(factor: float, width: int = 4) -> bytes:
    """y = factor * x, total = sum of y over the row."""
    return build(
        [
            helper.make_node("Mul", ["x", "factor"], ["y"]),
            helper.make_node("ReduceSum", ["y", "axes"], ["total"], keepdims=1),
        ],
        [("x", "FP32", (-1, width))],
        [("y", "FP32", (-1, width)), ("total", "FP32", (-1, 1))],
        {"factor": np.array(factor, np.float32), "axes": np.array([1], np.int64)},
    )


def mlp(width: int = 64, hidden: int = 32, classes: int = 10) -> bytes:
    """Two dense layers: what a small sensor model costs."""
    random = np.random.default_rng(1)
    return build(
        [
            helper.make_node("Gemm", ["x", "w1", "b1"], ["h"]),
            helper.make_node("Relu", ["h"], ["r"]),
            helper.make_node("Gemm", ["r", "w2", "b2"], ["y"]),
        ],
        [("x", "FP32", (-1, width))],
        [("y", "FP32", (-1, classes))],
        {
            "w1": random.standard_normal((width, hidden), np.float32),
            "b1": np.zeros(hidden, np.float32),
            "w2": random.standard_normal((hidden, classes), np.float32),
            "b2": np.zeros(classes, np.float32),
        },
    )


def cnn(size: int = 28, channels: int = 16, classes: int = 10) -> bytes:
    """Two 3x3 convolutions and a dense layer on a size x size picture, about 0.6 million MACs."""
    random = np.random.default_rng(2)
    quarter = size // 4
    return build(
        [
            helper.make_node("Conv", ["x", "k1"], ["c1"], pads=[1, 1, 1, 1], strides=[2, 2]),
            helper.make_node("Relu", ["c1"], ["r1"]),
            helper.make_node("Conv", ["r1", "k2"], ["c2"], pads=[1, 1, 1, 1], strides=[2, 2]),
            helper.make_node("Relu", ["c2"], ["r2"]),
            helper.make_node("Flatten", ["r2"], ["f"]),
            helper.make_node("Gemm", ["f", "w"], ["y"]),
        ],
        [("x", "FP32", (-1, 1, size, size))],
        [("y", "FP32", (-1, classes))],
        {
            "k1": random.standard_normal((channels, 1, 3, 3), np.float32),
            "k2": random.standard_normal((2 * channels, channels, 3, 3), np.float32),
            "w": random.standard_normal((2 * channels * quarter * quarter, classes), np.float32),
        },
    )


def write_folder(
    folder: Path,
    content: bytes,
    inputs: Sequence[Spec],
    outputs: Sequence[Spec],
    *,
    name: str = "model",
    version: str = "1",
    sample: dict[str, Any] | None = None,
    more_variants: Sequence[dict[str, str]] = (),
    batching: dict[str, Any] | None = None,
) -> Path:
    """A model folder with model.json and one ONNX variant; the folder."""
    (folder / "onnx").mkdir(parents=True, exist_ok=True)
    (folder / "onnx" / "model.onnx").write_bytes(content)
    document: dict[str, Any] = {
        "name": name,
        "version": version,
        "framework": "onnx",
        "inputs": [{"name": n, "datatype": d, "shape": list(s)} for n, d, s in inputs],
        "outputs": [{"name": n, "datatype": d, "shape": list(s)} for n, d, s in outputs],
        "variants": [*more_variants, {"kind": "onnx", "path": "onnx/model.onnx"}],
    }
    if batching is not None:
        document["batching"] = batching
    if sample is not None:
        (folder / "sample.json").write_text(json.dumps(sample))
        document["sample"] = "sample.json"
    (folder / "model.json").write_text(json.dumps(document))
    return folder


def scale_folder(folder: Path, factor: float, **options: Any) -> Path:
    """A folder of `scale`."""
    return write_folder(
        folder,
        scale(factor),
        [("x", "FP32", (-1, 4))],
        [("y", "FP32", (-1, 4)), ("total", "FP32", (-1, 1))],
        **options,
    )


def identity_folder(folder: Path, datatype: str, **options: Any) -> Path:
    """A folder of `identity`."""
    specs = [("x", datatype, (-1, 2))], [("y", datatype, (-1, 2))]
    return write_folder(folder, identity(datatype), *specs, **options)


def mobilenet(size: int = 96, width: float = 0.75, classes: int = 10) -> bytes:
    """A stack of depthwise-separable convolutions of MobileNet v1's shape on size x size x 3."""
    random = np.random.default_rng(4)
    constants: dict[str, np.ndarray] = {}
    nodes = []
    # (output channels at full width, stride) of the 13 blocks.
    blocks = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)]
    blocks += [(512, 1)] * 5 + [(1024, 2), (1024, 1)]

    def conv(name: str, source: str, inputs: int, outputs: int, **options: Any) -> str:
        kernel = options.pop("kernel", 3)
        group = options.get("group", 1)
        shape = (outputs, inputs // group, kernel, kernel)
        constants[f"{name}w"] = random.standard_normal(shape, np.float32) / np.sqrt(
            np.prod(shape[1:], dtype=np.float32)
        )
        pads = [kernel // 2] * 4
        nodes.append(helper.make_node("Conv", [source, f"{name}w"], [name], pads=pads, **options))
        nodes.append(helper.make_node("Relu", [name], [f"{name}r"]))
        return f"{name}r"

    channels = int(32 * width)
    last = conv("c0", "x", 3, channels, strides=[2, 2])
    for number, (full, stride) in enumerate(blocks):
        last = conv(f"d{number}", last, channels, channels, group=channels, strides=[stride] * 2)
        outputs = int(full * width)
        last = conv(f"p{number}", last, channels, outputs, kernel=1)
        channels = outputs
    constants["dense"] = random.standard_normal((channels, classes), np.float32)
    nodes += [
        helper.make_node("GlobalAveragePool", [last], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("Gemm", ["flat", "dense"], ["y"]),
    ]
    return build(
        nodes, [("x", "FP32", (-1, 3, size, size))], [("y", "FP32", (-1, classes))], constants
    )
