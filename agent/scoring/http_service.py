"""The REST service: Open Inference Protocol with Triton's extensions, and Azure ML's `/score`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from time import monotonic
from typing import Protocol

from .access import Access
from .dataplane import DataPlane
from .errors import DEFECT, Code, ScoringError
from .http_call import Call, azure_ids
from .http_describe import Descriptions
from .http_encoding import SMALLEST, accepted, compress, decompress
from .http_routes import match
from .http_types import (
    BINARY,
    JSON,
    HttpLimits,
    HttpRequest,
    HttpResponse,
    Refusal,
    as_refusal,
    error_response,
    retry_after,
)
from .instances import Instance
from .observation import TIMING_HEADER, Observer, Served, server_timing
from .oip_json import DecodedJson, decode_json, decode_only_tensor, encode_json
from .routing import DEPLOYMENT_HEADER
from .score_json import Score, decode_query, decode_score, encode_score
from .types import InferenceRequest, InferenceResponse

log = logging.getLogger(__name__)

HEADER_LENGTH = "Inference-Header-Content-Length"
# Larger bodies are read and unpacked beside the event loop, which others wait for.
_LARGE = 128 * 1024
_UNGUARDED = frozenset(
    {"healthy", "live", "ready", "model_ready", "server_metadata", "score", "score_query"}
)
_SLOW = frozenset({"repository_load", "repository_unload", "openapi", "swagger"})


class Host(Protocol):
    """What the service needs of its server."""

    def soon(self, work: Callable[[], None]) -> None:
        """Do `work` once whatever arrived in this turn of the event loop has been read."""

    def reserve(self, size: int) -> bool: ...
    def release(self, size: int) -> None: ...


class HttpService:
    """A `Handler`: called on the event loop, answers from whatever thread."""

    def __init__(
        self,
        plane: DataPlane,
        limits: HttpLimits | None = None,
        host: Host | None = None,
        *,
        access: Access | None = None,
        origins: Collection[str] = (),
        observer: Observer | None = None,
    ) -> None:
        """`origins`: of web pages that may call, "*" for all.

        `host` None: every request is handed to the models' threads, and unpacked bodies are not
        counted.
        """
        self._host = host
        self._observer = observer or Observer()
        self._access = access or Access(plane)
        self._origins = frozenset(origins)
        # Instances with requests of this turn; only the loop touches it.
        self._waiting: dict[Instance, None] = {}
        self._plane = plane
        self._memory = plane.shared_memory
        self._limits = limits or HttpLimits()
        self._server_version = plane.server_metadata().version
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="http-body")
        self._operations: dict[str, Callable[[Call], HttpResponse | None]] = {
            "infer": self._infer,
            "score": self._score,
            "score_query": self._score,
            **Descriptions(plane).operations,
        }

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def __call__(self, request: HttpRequest) -> None:
        call = Call(request, "", {}, monotonic())
        try:
            found = match(request.path)
            if found is None:
                raise Refusal(404, f"nothing is served at {request.path[:200]!r}")
            method = "GET" if request.method == "HEAD" else request.method
            call.params = found.params
            operation = found.operations.get(method)
            call.operation = operation or next(iter(found.operations.values()))
            if operation is None:
                allowed = ", ".join(sorted(found.operations))
                if method == "OPTIONS":
                    self._finish(call, self._preflight(request, allowed))
                    return
                raise Refusal(
                    405,
                    f"{request.method[:20]} is not served at {request.path[:200]!r}; use {allowed}",
                    (("Allow", allowed),),
                )
            if call.azure:
                call.headers += azure_ids(request.headers)
        except Refusal as refusal:
            self._refuse(call, refusal)
            return
        if len(request.body) > _LARGE or operation in _SLOW:
            call.on_loop = False
            self._pool.submit(self._perform, call, self._operations[operation])
        else:
            self._perform(call, self._operations[operation])

    def _perform(self, call: Call, operation: Callable[[Call], HttpResponse | None]) -> None:
        def work() -> HttpResponse | None:
            request = call.request
            self._check_origin(call)
            if call.operation not in _UNGUARDED:
                self._access.admit_request(request, call.params.get("model", ""), call.operation)
            encoding = request.headers.get("content-encoding")
            if encoding is not None:
                request.body = decompress(request.body, encoding, self._limits.max_body_bytes)
                self._reserve(call, len(request.body))
            return operation(call)

        self._guarded(call, work)

    def _guarded(self, call: Call, work: Callable[[], HttpResponse | None]) -> None:
        """Whatever happens, the client is answered."""
        try:
            response = work()
        except ScoringError as error:
            self._fail(call, error)
        except Refusal as refusal:
            self._refuse(call, refusal)
        except Exception:
            # The client gets 500 without our internals, the log the whole traceback.
            log.exception("an HTTP request hit a defect of the server")
            self._refuse(call, Refusal(500, DEFECT))
        else:
            if response is not None:
                self._finish(call, response)

    def _fail(self, call: Call, error: ScoringError) -> None:
        refusal = as_refusal(error)
        if call.azure:
            failed = error.code in (Code.INTERNAL, Code.DEADLINE_EXCEEDED)
            call.headers.append(("x-ms-run-function-failed", str(failed)))
            if error.code is Code.INTERNAL:
                # What Azure ML answers when it is the model that failed.
                hint = (
                    ("ms-azureml-model-error-reason", "model_error"),
                    ("ms-azureml-model-error-statuscode", "500"),
                )
                refusal = Refusal(424, error.message, (*refusal.headers, *hint))
        self._refuse(call, refusal)

    def _refuse(self, call: Call, refusal: Refusal) -> None:
        self._finish(call, error_response(refusal, "message" if call.azure else "error"))

    def _finish(self, call: Call, response: HttpResponse) -> None:
        if call.reserved and self._host is not None:
            self._host.release(call.reserved)
            call.reserved = 0
        headers = call.request.headers
        body, extra = response.body, list(response.headers)
        if "accept-encoding" in headers and len(body) >= SMALLEST:
            encoding = accepted(headers["accept-encoding"])
            if encoding:
                body = compress(body, encoding)
                extra += [("Content-Encoding", encoding), ("Vary", "Accept-Encoding")]
        if "origin" in headers and self._trusts(headers["origin"]):
            extra += [
                ("Access-Control-Allow-Origin", headers["origin"]),
                ("Access-Control-Expose-Headers", HEADER_LENGTH),
                ("Vary", "Origin"),
            ]
        extra += call.headers
        if TIMING_HEADER in headers:
            timing = server_timing(call.started, call.submitted, call.computed)
            extra.append(("Server-Timing", timing))
        if self._observer.active:
            self._observe(call, response.status)
        call.request.respond(
            HttpResponse(response.status, body, response.content_type, tuple(extra))
        )

    def _reserve(self, call: Call, size: int) -> None:
        if self._host is not None and size > _LARGE:
            if not self._host.reserve(size):
                raise Refusal(503, "too much is being received already; try again", retry_after(1))
            call.reserved = size

    def _observe(self, call: Call, status: int) -> None:
        now, request = monotonic(), call.request
        served = Served(
            "http",
            call.operation or "unknown",
            call.endpoint or call.params.get("model", ""),
            call.version,
            str(status),
            status >= 500 or status == 424,
            now - call.started,
            now,
            request.client,
            request.headers.get("x-request-id", ""),
        )
        self._observer.note(served, request.headers)

    # --- web pages

    def _trusts(self, origin: str) -> bool:
        return origin in self._origins or "*" in self._origins

    def _check_origin(self, call: Call) -> None:
        """A page from elsewhere must not change anything here, even if it cannot read the answer.

        Azure ML's paths change nothing, and answer any page. Raises Refusal 403.
        """
        origin = call.request.headers.get("origin")
        if origin is None or call.azure or call.request.method != "POST":
            return
        if not self._trusts(origin):
            raise Refusal(
                403, f"pages of {origin[:200]!r} may not call; add it to scoring.cors-origins"
            )

    def _preflight(self, request: HttpRequest, allowed: str) -> HttpResponse:
        headers = [("Allow", allowed)]
        if self._trusts(request.headers.get("origin", "")):
            asked = request.headers.get("access-control-request-headers", "")
            headers += [
                ("Access-Control-Allow-Methods", allowed),
                ("Access-Control-Allow-Headers", asked),
                ("Access-Control-Max-Age", "600"),
            ]
        return HttpResponse(200, b"", headers=tuple(headers))

    # --- inference

    def _infer(self, call: Call) -> HttpResponse | None:
        request, model = call.request, call.params["model"]
        version = call.params.get("version", "")
        call.endpoint = model
        length = _header_length(request.headers)
        if length == 0:
            metadata = self._plane.model_metadata(model, version)
            if len(metadata.inputs) != 1:
                raise ScoringError(
                    Code.INVALID_ARGUMENT,
                    f"model {model!r} has {len(metadata.inputs)} inputs; only for a single one may "
                    "the body be the tensor alone",
                )
            spec = metadata.inputs[0]
            decoded = decode_only_tensor(request.body, spec, model, version, request.headers)
        else:
            decoded = decode_json(
                request.body,
                length,
                model,
                version,
                memory=self._memory,
                headers=request.headers,
            )
        self._submit(call, decoded.request, lambda answer: self._inferred(decoded, answer))
        return None

    def _inferred(self, decoded: DecodedJson, answer: InferenceResponse) -> HttpResponse:
        body, length = encode_json(answer, decoded, self._memory)
        if length is None:
            return HttpResponse(200, body)
        return HttpResponse(200, body, BINARY, ((HEADER_LENGTH, str(length)),))

    def _submit(
        self,
        call: Call,
        inference: InferenceRequest,
        encode: Callable[[InferenceResponse], HttpResponse],
    ) -> None:
        call.submitted = monotonic()

        def done(answer: InferenceResponse | ScoringError) -> None:
            call.computed = monotonic()
            if isinstance(answer, ScoringError):
                self._fail(call, answer)
                return
            call.version = answer.version
            self._guarded(call, lambda: encode(answer))

        host = self._host
        if host is None or not call.on_loop:
            self._plane.submit(inference, done)
            return
        instance, _ = self._plane.submit(inference, done, wake=False)
        if not self._waiting:
            host.soon(self._serve_waiting)
        self._waiting[instance] = None

    def _serve_waiting(self) -> None:
        waiting, self._waiting = self._waiting, {}
        for instance in waiting:
            instance.serve_here()

    def _score(self, call: Call) -> HttpResponse | None:
        request = call.request
        try:
            endpoint = call.endpoint = self._endpoint(call)
        except Refusal:
            # Names are for those who may call one of them.
            self._access.admit_request(request, "", call.operation)
            raise
        self._access.admit_request(request, endpoint, call.operation)
        metadata = self._plane.model_metadata(endpoint)
        body = request.body
        if call.operation == "score_query":
            body = decode_query(request.query)
        elif not _is_json(request.headers.get("content-type", JSON)):
            raise Refusal(415, "send the header Content-Type: application/json")
        score = decode_score(body, metadata.inputs)
        inference = InferenceRequest(
            model=endpoint,
            inputs=score.tensors,
            id=request.headers.get("x-ms-request-id", ""),
            headers=request.headers,
        )
        self._submit(call, inference, lambda answer: self._scored(call, score, answer))
        return None

    def _scored(self, call: Call, score: Score, answer: InferenceResponse) -> HttpResponse:
        milliseconds = (monotonic() - call.started) * 1000
        call.headers += [
            ("x-ms-run-function-failed", "False"),
            ("x-ms-run-fn-exec-ms", f"{milliseconds:.3f}"),
            (DEPLOYMENT_HEADER, answer.version),
            ("x-ms-server-version", f"gatelet/{self._server_version}"),
        ]
        return HttpResponse(200, encode_score(answer, results=score.results))

    def _endpoint(self, call: Call) -> str:
        """Which endpoint `/score` means. Raises Refusal 404, and ScoringError UNAVAILABLE."""
        self._plane.require_routes()
        table = self._plane.table
        endpoints = table.endpoints
        named = call.params.get("endpoint")
        if named is not None:
            if named not in endpoints:
                known = ", ".join(map(repr, sorted(endpoints)[:10])) or "none"
                raise Refusal(404, f"endpoint {named!r} is not deployed here; deployed: {known}")
            return named
        if len(endpoints) == 1:
            return next(iter(endpoints))
        wanted = call.request.headers.get(DEPLOYMENT_HEADER)
        if wanted is not None:
            having = [
                endpoint
                for endpoint, route in table.routes.items()
                if any(target.name == wanted for target in route.targets)
            ]
            if len(having) == 1:
                return having[0]
            # Perhaps a module of an endpoint that is not there yet.
            for endpoint in sorted(table.absent):
                self._plane.require_served(endpoint)
        if not endpoints:
            raise Refusal(404, "no model is deployed here")
        known = ", ".join(sorted(endpoints)[:10])
        raise Refusal(404, f"several endpoints are deployed: {known}; use /score/ENDPOINT")


def _header_length(headers: Mapping[str, str]) -> int | None:
    text = headers.get("inference-header-content-length")
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise ScoringError(
            Code.INVALID_ARGUMENT, f"{HEADER_LENGTH} must be a number of bytes, found {text[:20]!r}"
        )
    return int(text)


def _is_json(content_type: str) -> bool:
    kind = content_type.partition(";")[0].strip().lower()
    return kind == JSON or kind.endswith("+json")
