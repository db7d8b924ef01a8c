"""Which operation a method and a path name: one table for the server and for its OpenAPI document.

Sources: KServe, Open Inference Protocol REST; Triton Inference Server, HTTP/REST extensions; the
Azure ML inference server's `/`, `/score` and `/swagger.json`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import unquote


@dataclass(frozen=True, slots=True)
class Match:
    """`operations`: by method. `params`: what the placeholders of the path stand for."""

    template: str
    operations: Mapping[str, str]
    params: Mapping[str, str]


def _models(rest: str, operations: Mapping[str, str]) -> dict[str, Mapping[str, str]]:
    return {
        f"/v2/models/{{model}}{rest}": operations,
        f"/v2/models/{{model}}/versions/{{version}}{rest}": operations,
    }


ROUTES: Mapping[str, Mapping[str, str]] = {
    "/": {"GET": "healthy"},
    "/score": {"POST": "score", "GET": "score_query"},
    "/score/{endpoint}": {"POST": "score", "GET": "score_query"},
    "/swagger.json": {"GET": "swagger"},
    "/openapi.json": {"GET": "openapi"},
    "/v2": {"GET": "server_metadata"},
    "/v2/health/live": {"GET": "live"},
    "/v2/health/ready": {"GET": "ready"},
    "/v2/models/stats": {"GET": "statistics"},
    **_models("", {"GET": "model_metadata"}),
    **_models("/ready", {"GET": "model_ready"}),
    **_models("/config", {"GET": "model_config"}),
    **_models("/stats", {"GET": "statistics"}),
    **_models("/infer", {"POST": "infer"}),
    "/v2/models/{model}/trace/setting": {"GET": "trace_setting", "POST": "trace_setting"},
    "/v2/trace/setting": {"GET": "trace_setting", "POST": "trace_setting"},
    "/v2/logging": {"GET": "log_settings", "POST": "log_settings"},
    "/v2/repository/index": {"POST": "repository_index"},
    "/v2/repository/models/{model}/load": {"POST": "repository_load"},
    "/v2/repository/models/{model}/unload": {"POST": "repository_unload"},
    "/v2/systemsharedmemory/status": {"GET": "memory_status"},
    "/v2/systemsharedmemory/unregister": {"POST": "memory_unregister"},
    "/v2/systemsharedmemory/region/{region}/status": {"GET": "memory_status"},
    "/v2/systemsharedmemory/region/{region}/register": {"POST": "memory_register"},
    "/v2/systemsharedmemory/region/{region}/unregister": {"POST": "memory_unregister"},
    "/v2/cudasharedmemory/status": {"GET": "no_cuda"},
    "/v2/cudasharedmemory/unregister": {"POST": "no_cuda"},
    "/v2/cudasharedmemory/region/{region}/status": {"GET": "no_cuda"},
    "/v2/cudasharedmemory/region/{region}/register": {"POST": "no_cuda"},
    "/v2/cudasharedmemory/region/{region}/unregister": {"POST": "no_cuda"},
}
"""Path -> method -> operation. A fixed word goes before a placeholder."""

_SPLIT = tuple((template, tuple(template.split("/")[1:])) for template in ROUTES)


@functools.lru_cache(maxsize=1024)
def match(path: str) -> Match | None:
    """`path` is percent-encoded, without its query; None when nothing is served there."""
    words = path.split("/")[1:]
    if len(words) > 1 and not words[-1]:
        words.pop()
    for template, pattern in _SPLIT:
        if len(pattern) != len(words):
            continue
        params: dict[str, str] = {}
        for expected, word in zip(pattern, words, strict=True):
            if expected.startswith("{"):
                if not word:
                    break
                params[expected[1:-1]] = unquote(word)
            elif expected != word:
                break
        else:
            return Match(template, ROUTES[template], params)
    return None
