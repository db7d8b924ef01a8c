"""The least that answers ModelInfer with grpcio's synchronous server and onnxruntime: the bench's
yardstick for what the library itself costs. Arguments: port, then name=path of each model."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import onnxruntime
from gatelet.protos import open_inference_pb2 as oip


def main() -> None:
    port, *models = sys.argv[1:]
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    sessions = {
        name: onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
        for name, _, path in (model.partition("=") for model in models)
    }

    def infer(request: oip.ModelInferRequest, context: grpc.ServicerContext) -> Any:
        tensor = request.inputs[0]
        x = np.frombuffer(request.raw_input_contents[0], np.float32).reshape(tensor.shape)
        (y,) = sessions[request.model_name].run(None, {tensor.name: x})
        answer = oip.ModelInferResponse(model_name=request.model_name, model_version="1")
        answer.outputs.add(name="y", datatype="FP32", shape=y.shape)
        answer.raw_output_contents.append(y.tobytes())
        return answer

    server = grpc.server(ThreadPoolExecutor(4), options=[("grpc.so_reuseport", 0)])
    method = grpc.unary_unary_rpc_method_handler(
        infer,
        request_deserializer=oip.ModelInferRequest.FromString,
        response_serializer=oip.ModelInferResponse.SerializeToString,
    )
    service = grpc.method_handlers_generic_handler(
        "inference.GRPCInferenceService", {"ModelInfer": method}
    )
    server.add_generic_rpc_handlers((service,))
    server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    threading.Event().wait()


if __name__ == "__main__":
    main()
