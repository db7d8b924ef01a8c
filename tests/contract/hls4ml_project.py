"""Generates an hls4ml project for a PYNQ-Z2; run by a Python that has hls4ml.

    python hls4ml_project.py SPEC.json

Prints one JSON line with the C simulation's path. Layers are given to hls4ml directly, since its
front ends need whole frameworks.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np


def dense(rng, name, taken, given):
    return {
        "class_name": "Dense", "name": name, "n_in": taken, "n_out": given,
        "weight_data": rng.integers(-8, 8, (taken, given)) / 16.0,
        "bias_data": rng.integers(-8, 8, given) / 8.0,
    }  # fmt: skip


def relu(name, size):
    return {"class_name": "Activation", "name": name, "activation": "relu", "n_in": size}


def layers(spec):
    rng = np.random.default_rng(spec["seed"])
    if spec["network"] == "dense":
        return [
            {"class_name": "InputLayer", "name": "x", "input_shape": [10]},
            dense(rng, "fc1", 10, 8),
            relu("relu1", 8),
            dense(rng, "fc2", 8, 3),
        ]
    return [
        {"class_name": "InputLayer", "name": "x", "input_shape": [5, 6, 2]},
        {
            "class_name": "Conv2D", "name": "conv", "data_format": "channels_last",
            "in_height": 5, "in_width": 6, "out_height": 3, "out_width": 4,
            "n_chan": 2, "n_filt": 3, "filt_height": 3, "filt_width": 3,
            "stride_height": 1, "stride_width": 1, "padding": "valid",
            "pad_top": 0, "pad_bottom": 0, "pad_left": 0, "pad_right": 0,
            "weight_data": rng.integers(-8, 8, (3, 3, 2, 3)) / 16.0,
            "bias_data": rng.integers(-8, 8, 3) / 8.0,
        },
        relu("relu1", 36),
    ]  # fmt: skip


def main():
    from hls4ml.model.graph import ModelGraph
    from hls4ml.utils.config import create_config

    spec = json.loads(Path(sys.argv[1]).read_text())
    config = create_config(
        output_dir=spec["folder"], project_name="net", backend="VivadoAccelerator",
        board="pynq-z2", interface="axi_stream", driver="python", clock_period=10,
        io_type=spec["io"], input_type=spec["input"], output_type=spec["output"],
    )  # fmt: skip
    config["HLSConfig"] = {
        "Model": {"Precision": spec["inner"], "ReuseFactor": 1, "Strategy": "Latency"}
    }
    ModelGraph.from_layer_list(config, layers(spec)).write()
    folder = Path(spec["folder"])
    # hls4ml 1.3.0 writes "fixed<16,6,TRN,WRAP,0>" into C++, where ap_fixed and AP_TRN are needed.
    header = folder / "firmware" / "net_axi.h"
    typedef = r"typedef (u?)fixed<(\d+),(-?\d+),(\w+),(\w+),"
    valid = r"typedef ap_\1fixed<\2,\3,AP_\4,AP_\5,"
    header.write_text(re.sub(typedef, valid, header.read_text()))
    # -O3 takes several times as long and changes no bit.
    script = folder / "build_lib.sh"
    script.write_text(script.read_text().replace("-O3", "-O0"))
    subprocess.run(["bash", "build_lib.sh"], cwd=folder, check=True, capture_output=True)
    (library,) = (folder / "firmware").glob("*.so")
    print(json.dumps({"library": str(library)}))


main()
