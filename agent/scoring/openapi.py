"""What the REST service offers, as an OpenAPI document with the loaded models' own schemas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from ...accelerators.tensors import TensorSpec
from .dataplane import DataPlane
from .http_routes import ROUTES
from .types import ModelMetadata

_SUMMARIES = {
    "healthy": "Whether every deployed model can be scored",
    "score": "Score with the conventions of Azure ML",
    "score_query": "Score with the inputs in the query",
    "swagger": "This service in the form of Azure ML",
    "openapi": "This document",
    "server_metadata": "Name, version and extensions of the server",
    "live": "Whether the process answers",
    "ready": "Whether every deployed model can be scored",
    "model_metadata": "Inputs and outputs of a model",
    "model_ready": "Whether a model can be scored",
    "model_config": "How a model runs",
    "statistics": "What models did since they were loaded",
    "infer": "Score, with tensors in JSON or binary",
    "trace_setting": "Trace settings, which clients cannot change",
    "log_settings": "Log settings, which clients cannot change",
    "repository_index": "The endpoints and versions of the deployment",
    "repository_load": "Succeeds where the model is loaded already",
    "repository_unload": "Succeeds where the model is not loaded",
    "memory_status": "Registered shared memory",
    "memory_register": "Register shared memory",
    "memory_unregister": "Forget shared memory",
    "no_cuda": "Not served: these devices have no CUDA",
}
_JSON_TYPES = {
    "BOOL": "boolean",
    "BYTES": "string",
    "FP16": "number",
    "FP32": "number",
    "FP64": "number",
    "BF16": "number",
}
_ERROR_CODES = {
    400: "The request does not fit the model or the protocol",
    401: "A key or token is missing or wrong",
    403: "The caller may not do this",
    404: "There is no such model, version, region or path",
    405: "The path does not know the method",
    408: "The request came too slowly",
    413: "The body is too large",
    415: "The body's type or encoding is not understood",
    424: "The model failed on the request",
    429: "Too many requests, or no room for more shared memory",
    431: "The headers are too large",
    500: "The model or the server failed",
    501: "Not served here",
    503: "No backend can answer for now",
    504: "The deadline passed",
}


def openapi_document(plane: DataPlane) -> dict[str, Any]:
    """OpenAPI 3.1 of every served route; `/infer` and `/score` once more for each loaded model."""
    models = _models(plane)
    paths: dict[str, Any] = {}
    for template, operations in ROUTES.items():
        paths[template] = {
            method.lower(): _operation(template, operation)
            for method, operation in operations.items()
        }
    for model in models:
        name = quote(model.name)
        infer = _operation(f"/v2/models/{name}/infer", "infer", f"{model.name}.infer")
        infer["requestBody"] = _body(f"{model.name}.InferRequest")
        paths[f"/v2/models/{name}/infer"] = {"post": infer}
        score = _operation(f"/score/{name}", "score", f"{model.name}.score")
        score["requestBody"] = _body(f"{model.name}.ScoreRequest")
        paths[f"/score/{name}"] = {"post": score}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "gatelet",
            "description": "Scoring on this device over the Open Inference Protocol v2",
            "version": plane.server_metadata().version,
        },
        "security": [{}, {"bearer": []}],
        "paths": paths,
        "components": {
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
            "schemas": {**_schemas(), **_model_schemas(models)},
        },
    }


def _models(plane: DataPlane) -> list[ModelMetadata]:
    return [plane.model_metadata(name) for name in sorted(plane.table.routes)]


def _operation(template: str, operation: str, identifier: str = "") -> dict[str, Any]:
    names = [word[1:-1] for word in template.split("/") if word.startswith("{")]
    made: dict[str, Any] = {
        "summary": _SUMMARIES[operation],
        "responses": {
            "200": {"description": "It worked", "content": _content(operation)},
            **{
                str(code): {
                    "description": text,
                    "content": {"application/json": {"schema": _ref("Error")}},
                }
                for code, text in _ERROR_CODES.items()
            },
        },
    }
    if identifier:
        made["operationId"] = identifier
    if operation in ("ready", "model_ready"):
        made["responses"]["503"]["content"]["application/json"]["schema"] = {"type": "object"}
    if operation == "healthy":
        made["responses"]["503"]["content"] = {"text/html": {"schema": {"type": "string"}}}
    if operation == "no_cuda":
        del made["responses"]["200"]
    if names:
        made["parameters"] = [
            {
                "name": name,
                "in": "path",
                "required": True,
                "schema": {"type": "string", "minLength": 1},
            }
            for name in names
        ]
    if operation == "swagger":
        made["parameters"] = [
            {"name": "version", "in": "query", "schema": {"enum": ["2", "2.0", "3", "3.0", "3.1"]}}
        ]
    if operation == "infer":
        made["requestBody"] = _body("InferRequest")
    elif operation == "score":
        made["requestBody"] = _body("ScoreRequest")
    elif operation == "memory_register":
        made["requestBody"] = _body("RegisterRequest")
    elif operation == "repository_index":
        made["requestBody"] = {**_body("IndexRequest"), "required": False}
    return made


def _content(operation: str) -> dict[str, Any]:
    if operation == "healthy":
        return {"text/html": {"schema": {"type": "string"}}}
    if operation == "infer":
        return {
            "application/json": {"schema": _ref("InferResponse")},
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        }
    schema: dict[str, Any] = {"type": "object"}
    if operation in ("memory_status", "repository_index"):
        schema = {"type": "array", "items": {"type": "object"}}
    elif operation in ("score", "score_query"):
        schema = {}
    return {"application/json": {"schema": schema}}


def _body(schema: str) -> dict[str, Any]:
    return {"required": True, "content": {"application/json": {"schema": _ref(schema)}}}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _schemas() -> dict[str, Any]:
    tensor = {
        "type": "object",
        "required": ["name", "shape", "datatype"],
        "properties": {
            "name": {"type": "string"},
            "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
            "datatype": {"type": "string"},
            "parameters": {"type": "object"},
            "data": {},
        },
    }
    return {
        "Error": {
            "type": "object",
            "properties": {"error": {"type": "string"}, "message": {"type": "string"}},
        },
        "Tensor": tensor,
        "InferRequest": _infer_request({"type": "array", "items": _ref("Tensor")}),
        "InferResponse": {
            "type": "object",
            "required": ["model_name", "outputs"],
            "properties": {
                "model_name": {"type": "string"},
                "model_version": {"type": "string"},
                "id": {"type": "string"},
                "outputs": {"type": "array", "items": _ref("Tensor")},
            },
        },
        "ScoreRequest": {"type": "object"},
        "RegisterRequest": {
            "type": "object",
            "required": ["key", "byte_size"],
            "properties": {
                "key": {"type": "string"},
                "offset": {"type": "integer", "minimum": 0},
                "byte_size": {"type": "integer", "minimum": 0},
            },
        },
        "IndexRequest": {"type": "object", "properties": {"ready": {"type": "boolean"}}},
    }


def _infer_request(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "required": ["inputs"],
        "properties": {
            "id": {"type": "string"},
            "inputs": inputs,
            "outputs": {
                "type": "array",
                "items": {
                    "type": "object",
                    "required": ["name"],
                    "properties": {"name": {"type": "string"}},
                },
            },
        },
    }


def _model_schemas(models: Sequence[ModelMetadata]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for model in models:
        items = [_input_schema(spec) for spec in model.inputs]
        inputs = {
            "type": "array",
            "minItems": len(items),
            "maxItems": len(items),
            "items": items[0] if len(items) == 1 else {"anyOf": items},
        }
        made[f"{model.name}.InferRequest"] = _infer_request(inputs)
        made[f"{model.name}.ScoreRequest"] = score_schema(model.inputs)
    return made


def _input_schema(spec: TensorSpec) -> dict[str, Any]:
    sizes = [{"type": "integer", "minimum": 0} if n == -1 else {"const": n} for n in spec.shape]
    shape: dict[str, Any] = {
        "type": "array",
        "minItems": len(sizes),
        "maxItems": len(sizes),
        "items": {"type": "integer", "minimum": 0},
    }
    if sizes:
        shape["prefixItems"] = sizes
    return {
        "type": "object",
        "required": ["name", "shape", "datatype", "data"],
        "properties": {
            "name": {"const": spec.name},
            "datatype": {"const": spec.datatype},
            "shape": shape,
            "data": {"type": "array"},
        },
    }


def score_schema(inputs: Sequence[TensorSpec]) -> dict[str, Any]:
    """Of `{"data": ...}`: nested lists of the only input, or every input by its name."""
    if len(inputs) == 1:
        data = value_schema(inputs[0])
    else:
        data = {
            "type": "object",
            "properties": {spec.name: value_schema(spec) for spec in inputs},
            "required": [spec.name for spec in inputs],
        }
    return {"type": "object", "required": ["data"], "properties": {"data": data}}


def value_schema(spec: TensorSpec) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": _JSON_TYPES.get(spec.datatype, "integer")}
    for size in reversed(spec.shape):
        schema = {"type": "array", "items": schema}
        if size != -1:
            schema |= {"minItems": size, "maxItems": size}
    return schema


def swagger_document(plane: DataPlane, version: int) -> dict[str, Any]:
    """`/` and `/score` as Azure ML describes a service, in Swagger 2.0 or OpenAPI 3.0.

    With one endpoint deployed, its schema; with several, one path for each.
    """
    models = _models(plane)
    paths = {"/score": models[0]} if len(models) == 1 else {}
    paths |= {f"/score/{quote(model.name)}": model for model in models}
    title = models[0].name if len(models) == 1 else "gatelet"
    head = {
        "title": title,
        "description": f"API specification for Azure Machine Learning service {title}",
        "version": "1.0",
    }
    error = {
        "type": "object",
        "properties": {"message": {"type": "string"}},
    }
    make = _swagger_2 if version == 2 else _swagger_3
    return make(head, paths, error)


def _swagger_2(
    head: Mapping[str, Any], paths: Mapping[str, ModelMetadata], error: Mapping[str, Any]
) -> dict[str, Any]:
    responses = {
        "200": {"description": "The model's answer", "schema": {}},
        "default": {"description": "An error", "schema": {"$ref": "#/definitions/ErrorResponse"}},
    }
    definitions: dict[str, Any] = {"ErrorResponse": error}
    made: dict[str, Any] = {"/": {"get": _health_check({"type": "string"}, 2)}}
    for path, model in paths.items():
        definitions[f"{model.name}.ServiceInput"] = score_schema(model.inputs)
        made[path] = {
            "post": {
                "operationId": f"RunMLService{path.removeprefix('/score').replace('/', '_')}",
                "parameters": [
                    {
                        "name": "serviceInputPayload",
                        "in": "body",
                        "required": True,
                        "schema": {"$ref": f"#/definitions/{model.name}.ServiceInput"},
                    }
                ],
                "responses": responses,
            }
        }
    return {
        "swagger": "2.0",
        "info": head,
        "schemes": ["http", "https"],
        "consumes": ["application/json"],
        "produces": ["application/json"],
        "securityDefinitions": {
            "Bearer": {"type": "apiKey", "name": "Authorization", "in": "header"}
        },
        "paths": made,
        "definitions": definitions,
    }


def _swagger_3(
    head: Mapping[str, Any], paths: Mapping[str, ModelMetadata], error: Mapping[str, Any]
) -> dict[str, Any]:
    schemas: dict[str, Any] = {"ErrorResponse": error}
    made: dict[str, Any] = {"/": {"get": _health_check({"type": "string"}, 3)}}
    for path, model in paths.items():
        schemas[f"{model.name}.ServiceInput"] = score_schema(model.inputs)
        made[path] = {
            "post": {
                "operationId": f"RunMLService{path.removeprefix('/score').replace('/', '_')}",
                "requestBody": _body(f"{model.name}.ServiceInput"),
                "responses": {
                    "200": {
                        "description": "The model's answer",
                        "content": {"application/json": {"schema": {}}},
                    },
                    "default": {
                        "description": "An error",
                        "content": {"application/json": {"schema": _ref("ErrorResponse")}},
                    },
                },
            }
        }
    return {
        "openapi": "3.0.3",
        "info": head,
        "paths": made,
        "components": {
            "securitySchemes": {"Bearer": {"type": "http", "scheme": "bearer"}},
            "schemas": schemas,
        },
    }


def _health_check(schema: Mapping[str, Any], version: int) -> dict[str, Any]:
    answer: dict[str, Any] = {"description": "Healthy"}
    if version == 2:
        answer["schema"] = schema
    else:
        answer["content"] = {"text/html": {"schema": schema}}
    return {"operationId": "ServiceHealthCheck", "responses": {"200": answer}}
