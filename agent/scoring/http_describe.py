"""Health, descriptions and Triton's extensions over REST: what needs no tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from ...accelerators.tensors import TensorSpec
from ...protos import open_inference_pb2 as oip
from . import oip_extensions as extensions
from . import repository
from .dataplane import DataPlane
from .errors import Code, ScoringError
from .http_call import Call, json_response
from .http_types import HttpResponse, Refusal
from .json_arrays import decode
from .message_json import to_json
from .openapi import openapi_document, swagger_document

_OBJECT = msgspec.json.Decoder(dict[str, msgspec.Raw])
_INDEX = msgspec.json.Decoder(dict[str, bool])


class _LoadBody(msgspec.Struct):
    parameters: dict[str, msgspec.Raw] = {}


class _RegisterBody(msgspec.Struct):
    key: str
    byte_size: int
    offset: int = 0


_LOAD = msgspec.json.Decoder(_LoadBody)
_REGISTER = msgspec.json.Decoder(_RegisterBody)
_PLAIN = msgspec.json.Decoder(bool | int | float | str | list[str] | None)


class Descriptions:
    """`operations`: by the names of `http_routes`. They raise ScoringError and Refusal."""

    def __init__(self, plane: DataPlane) -> None:
        self._plane = plane
        self._memory = plane.shared_memory
        self.operations: dict[str, Callable[[Call], HttpResponse | None]] = {
            "healthy": self._healthy,
            "swagger": self._swagger,
            "openapi": self._openapi,
            "server_metadata": self._server_metadata,
            "live": self._live,
            "ready": self._ready,
            "model_metadata": self._model_metadata,
            "model_ready": self._model_ready,
            "model_config": self._model_config,
            "statistics": self._statistics,
            "trace_setting": self._trace_setting,
            "log_settings": self._log_settings,
            "repository_index": self._repository_index,
            "repository_load": self._repository_load,
            "repository_unload": self._repository_unload,
            "memory_status": self._memory_status,
            "memory_register": self._memory_register,
            "memory_unregister": self._memory_unregister,
            "no_cuda": self._no_cuda,
        }

    def _healthy(self, call: Call) -> HttpResponse:
        if self._plane.ready():
            return HttpResponse(200, b"Healthy", "text/html; charset=utf-8")
        return HttpResponse(503, b"Not ready", "text/html; charset=utf-8")

    def _live(self, call: Call) -> HttpResponse:
        return json_response({"live": self._plane.live()})

    def _ready(self, call: Call) -> HttpResponse:
        ready = self._plane.ready()
        return json_response({"ready": ready}, 200 if ready else 503)

    def _model_ready(self, call: Call) -> HttpResponse:
        name, version = call.params["model"], call.params.get("version", "")
        self._plane.model_metadata(name, version)
        ready = self._plane.model_ready(name, version)
        return json_response({"name": name, "ready": ready}, 200 if ready else 503)

    def _server_metadata(self, call: Call) -> HttpResponse:
        metadata = self._plane.server_metadata()
        extensions_ = list(metadata.extensions)
        return json_response(
            {"name": metadata.name, "version": metadata.version, "extensions": extensions_}
        )

    def _model_metadata(self, call: Call) -> HttpResponse:
        name, version = call.params["model"], call.params.get("version", "")
        metadata = self._plane.model_metadata(name, version)
        return json_response(
            {
                "name": metadata.name,
                "versions": metadata.versions,
                "platform": metadata.platform,
                "inputs": [_spec(spec) for spec in metadata.inputs],
                "outputs": [_spec(spec) for spec in metadata.outputs],
                "properties": dict(metadata.properties),
            }
        )

    def _model_config(self, call: Call) -> HttpResponse:
        name, version = call.params["model"], call.params.get("version", "")
        return json_response(to_json(extensions.model_config(self._plane, name, version).config))

    def _statistics(self, call: Call) -> HttpResponse:
        name, version = call.params.get("model", ""), call.params.get("version", "")
        return json_response(to_json(extensions.model_statistics(self._plane, name, version)))

    def _openapi(self, call: Call) -> HttpResponse:
        return json_response(openapi_document(self._plane))

    def _swagger(self, call: Call) -> HttpResponse:
        query = dict(part.partition("=")[::2] for part in call.request.query.split("&"))
        version = query.get("version", "2")
        if version.split(".")[0] not in ("2", "3"):
            raise Refusal(
                404,
                f"Swagger version [{version[:20]}] is not valid. Supported versions: [2, 3].",
            )
        return json_response(swagger_document(self._plane, int(version[0])))

    # --- Triton's extensions

    def _trace_setting(self, call: Call) -> HttpResponse:
        request = oip.TraceSettingRequest()
        for key, value in _settings(call).items():
            values = value if isinstance(value, list) else [value]
            request.settings[key].value.extend(str(one) for one in values)
        answer = extensions.trace_setting(request)
        return json_response(
            {
                key: list(one.value) if key == "trace_level" else one.value[0]
                for key, one in answer.settings.items()
            }
        )

    def _log_settings(self, call: Call) -> HttpResponse:
        request = oip.LogSettingsRequest()
        for key, value in _settings(call).items():
            setting = request.settings[key]
            if isinstance(value, bool):
                setting.bool_param = value
            elif isinstance(value, int) and 0 <= value < 2**32:
                setting.uint32_param = value
            else:
                setting.string_param = str(value)
        answer = extensions.log_settings(request)
        return json_response(
            {
                key: getattr(one, one.WhichOneof("parameter_choice") or "string_param")
                for key, one in answer.settings.items()
            }
        )

    def _repository_index(self, call: Call) -> HttpResponse:
        body = call.request.body
        wanted = decode(_INDEX, body, "the body") if body else {}
        return json_response(
            to_json(extensions.repository_index(self._plane, wanted.get("ready", False)))["models"]
        )

    def _repository_load(self, call: Call) -> HttpResponse:
        body = call.request.body
        asked = decode(_LOAD, body, "the body").parameters if body else {}
        repository.load(self._plane, call.params["model"], bool(asked))
        return json_response({})

    def _repository_unload(self, call: Call) -> HttpResponse:
        repository.unload(self._plane, call.params["model"])
        return json_response({})

    def _memory_status(self, call: Call) -> HttpResponse:
        regions = self._memory.regions(call.params.get("region", ""))
        return json_response(
            [
                {
                    "name": region.name,
                    "key": region.key,
                    "offset": region.offset,
                    "byte_size": region.byte_size,
                }
                for region in regions
            ]
        )

    def _memory_register(self, call: Call) -> HttpResponse:
        asked = decode(_REGISTER, call.request.body, "the body")
        self._memory.register(call.params["region"], asked.key, asked.offset, asked.byte_size)
        return json_response({})

    def _memory_unregister(self, call: Call) -> HttpResponse:
        self._memory.unregister(call.params.get("region", ""))
        return json_response({})

    def _no_cuda(self, call: Call) -> HttpResponse:
        raise ScoringError(
            Code.UNIMPLEMENTED,
            "this device has no CUDA; use system shared memory or send the tensors",
        )


def _spec(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}


def _settings(call: Call) -> dict[str, Any]:
    if call.request.method != "POST" or not call.request.body:
        return {}
    raw = decode(_OBJECT, call.request.body, "the body")
    return {key: _plain(key, value) for key, value in raw.items()}


def _plain(key: str, value: msgspec.Raw) -> Any:
    return decode(_PLAIN, value, f"setting {key!r}")
