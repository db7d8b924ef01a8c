"""KServe's model server with ONNX models. Arguments: gRPC port, HTTP port, name=path of each."""

from __future__ import annotations

import sys

import onnxruntime
from kserve import InferOutput, InferRequest, InferResponse, Model, ModelServer


class OnnxModel(Model):  # type: ignore[misc]
    def __init__(self, name: str, path: str) -> None:
        super().__init__(name)
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(
            path, settings, providers=["CPUExecutionProvider"]
        )
        self.ready = True

    def predict(
        self, payload: InferRequest, headers: object = None, response_headers: object = None
    ) -> InferResponse:
        feed = {one.name: one.as_numpy() for one in payload.inputs}
        (y,) = self._session.run(None, feed)
        output = InferOutput(name="y", shape=list(y.shape), datatype="FP32")
        output.set_data_from_numpy(y, binary_data=True)
        return InferResponse(
            response_id=payload.id or "", model_name=self.name, infer_outputs=[output]
        )


if __name__ == "__main__":
    grpc_port, http_port, *models = sys.argv[1:]
    server = ModelServer(
        grpc_port=int(grpc_port), http_port=int(http_port), enable_grpc=True, workers=1
    )
    server.start([OnnxModel(name, path) for name, _, path in (m.partition("=") for m in models)])
