"""A runtime of MLServer that runs ONNX models as its own do: decode, predict, encode."""

from __future__ import annotations

import onnxruntime
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class OnnxModel(MLModel):  # type: ignore[misc]
    async def load(self) -> bool:
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(
            self.settings.parameters.uri, settings, providers=["CPUExecutionProvider"]
        )
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        feed = {one.name: NumpyCodec.decode_input(one) for one in payload.inputs}
        (y,) = self._session.run(None, feed)
        return InferenceResponse(
            id=payload.id,
            model_name=self.name,
            model_version="1",
            outputs=[NumpyCodec.encode_output("y", y)],
        )
