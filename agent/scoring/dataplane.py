"""Answers inference requests from whatever transport: route -> validate -> run."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterable, Mapping

from ...accelerators.tensors import Array
from .batching_choice import has_batch_axis
from .batching_job import Job
from .classification import classify
from .errors import Code, ScoringError
from .instances import Instance
from .mirror import Mirror
from .routing import DEPLOYMENT_HEADER, Route, RoutingTable, Target, choose, copies, place
from .shared_memory import SharedMemory
from .types import (
    InferenceRequest,
    InferenceResponse,
    ModelMetadata,
    ServerMetadata,
    Tensor,
)
from .validation import check_request

_NAMES_IN_MESSAGE = 10
# What clients are told to wait: models load in less, or in very much more.
_LOADING_SECONDS = 1.0
EXTENSIONS = (
    "binary_tensor_data",
    "classification",
    "logging",
    "model_configuration",
    "model_repository",
    "parameters",
    "schedule_policy",
    "statistics",
    "system_shared_memory",
    "trace",
)
"""Triton's names of what is served beyond the Open Inference Protocol."""


class DataPlane:
    """Thread-safe. The routing table is one immutable object that `switch` replaces, so a request
    sees either the old or the new table."""

    def __init__(
        self,
        version: str,
        *,
        draw: Callable[[], float] = random.random,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """`version` is the server's; `draw` gives numbers uniform in [0, 1)."""
        self._metadata = ServerMetadata("gatelet", version, EXTENSIONS)
        self.shared_memory = SharedMemory()
        self.mirror = Mirror()
        self._draw = draw
        self._now = now
        self._table: RoutingTable[Instance] | None = None
        self._changing = threading.Lock()
        # Whether everything that was wanted has been served once.
        self._complete = False
        self._stopping = False

    @property
    def table(self) -> RoutingTable[Instance]:
        return self._table or RoutingTable()

    def switch(self, routes: Iterable[Route[Instance]]) -> None:
        """Replace all routes at once."""
        with self._changing:
            self._replace({route.endpoint: route for route in routes}, self.table.coming)

    def announce(self, coming: Mapping[str, str]) -> None:
        """Say which endpoints are wanted (endpoint -> none, key or token): requests for one without
        a route are answered UNAVAILABLE, for any other NOT_FOUND."""
        with self._changing:
            self._replace(self.table.routes, dict(coming))

    def _replace(self, routes: Mapping[str, Route[Instance]], coming: Mapping[str, str]) -> None:
        table = RoutingTable(routes, coming)
        self._complete = self._complete or not table.absent
        self._table = table

    def require_routes(self) -> None:
        """Raises ScoringError UNAVAILABLE before the first `switch` or `announce`: just started,
        perhaps after a crash, nobody can say what is deployed, and clients may try again."""
        if self._table is None:
            raise ScoringError(
                Code.UNAVAILABLE,
                "the deployment's models are not loaded yet; try again",
                _LOADING_SECONDS,
            )

    def require_served(self, endpoint: str) -> None:
        """Raises ScoringError UNAVAILABLE when `endpoint` is wanted and not served yet."""
        self.require_routes()
        table = self.table
        if endpoint in table.coming and endpoint not in table.routes:
            raise ScoringError(
                Code.UNAVAILABLE,
                f"model {endpoint!r} is being loaded; try again",
                _LOADING_SECONDS,
            )

    def stop(self) -> None:
        """Report "not ready" from now on, so that balancers look elsewhere."""
        self._stopping = True

    def close(self) -> None:
        """End what runs besides requests. Idempotent."""
        self.mirror.close()

    def live(self) -> bool:
        return True

    def ready(self) -> bool:
        """Whether routes have been set and every endpoint's default instance has a backend.

        After a start, every endpoint that is wanted must have been there once; what a later
        deployment adds makes nobody look elsewhere for the others.
        """
        table = self._table
        return (
            not self._stopping
            and table is not None
            and self._complete
            and all(route.default.instance.healthy for route in table.routes.values())
        )

    def model_ready(self, name: str, version: str = "") -> bool:
        """False also for a model or version that is not deployed."""
        route = self.table.routes.get(name)
        if route is None or self._stopping:
            return False
        target = choose(route, version, 0.0) if version else route.default
        return target is not None and target.instance.healthy

    def server_metadata(self) -> ServerMetadata:
        return self._metadata

    def model_metadata(self, name: str, version: str = "") -> ModelMetadata:
        """Of the default version unless another is asked for. Raises ScoringError NOT_FOUND."""
        route = self._route(name)
        target = self._target(route, version, at=1.0)
        instance = target.instance
        return ModelMetadata(
            name=name,
            versions=tuple(dict.fromkeys(target.version for target in route.targets)),
            platform=instance.platform,
            inputs=instance.inputs,
            outputs=instance.outputs,
            properties={"model": instance.model},
        )

    def infer(self, request: InferenceRequest) -> InferenceResponse:
        """Raises ScoringError NOT_FOUND, INVALID_ARGUMENT, UNAVAILABLE, DEADLINE_EXCEEDED or
        INTERNAL."""
        route, target = self._claim(request)
        instance = target.instance
        started = self._now()
        try:
            outputs = check_request(request, instance.inputs, instance.outputs, instance.optional)
            inputs = {tensor.name: tensor.array for tensor in request.inputs}
            deadline = self._deadline(request, instance)
            results = instance.run(inputs, outputs, deadline, request.priority)
            if route.mirrors:
                self._copy(route, target, inputs, results)
            return self._response(request, target, outputs, results)
        except ScoringError as error:
            instance.statistics.failed(error.code, int((self._now() - started) * 1e9))
            raise
        finally:
            instance.end()

    def submit(
        self,
        request: InferenceRequest,
        done: Callable[[InferenceResponse | ScoringError], None],
        wake: bool = True,
    ) -> tuple[Instance, Job]:
        """As `infer` for event loops: returns at once, and `done` is called once, perhaps on
        another thread. Raises ScoringError as `infer` for what is refused before it waits.

        The instance that is to answer, and what it may `withdraw` while it waits. With `wake` False
        the instance's `serve_here` must be called, after whatever else arrived with this request.
        """
        route, target = self._claim(request)
        instance = target.instance
        started = self._now()
        inputs = {tensor.name: tensor.array for tensor in request.inputs}

        def finish(value: dict[str, Array] | ScoringError) -> None:
            answer: InferenceResponse | ScoringError
            try:
                if isinstance(value, ScoringError):
                    raise value
                if route.mirrors:
                    self._copy(route, target, inputs, value)
                answer = self._response(request, target, outputs, value)
            except ScoringError as error:
                # Given up by its client, which is nobody's failure here.
                if error.code is not Code.CANCELLED:
                    instance.statistics.failed(error.code, int((self._now() - started) * 1e9))
                answer = error
            finally:
                instance.end()
            done(answer)

        try:
            outputs = check_request(request, instance.inputs, instance.outputs, instance.optional)
            deadline = self._deadline(request, instance)
            job = instance.submit(inputs, outputs, deadline, request.priority, finish, wake)
        except ScoringError as error:
            instance.statistics.failed(error.code, int((self._now() - started) * 1e9))
            instance.end()
            raise
        return instance, job

    def stackable(self, model: str, rows: int) -> int:
        """How many requests with so many rows each are best stacked for `infer_stacked`."""
        route = self.table.routes.get(model)
        largest = 1 if route is None else route.default.instance.batching.max_batch
        return max(1, largest // rows)

    def may_stack(self, model: str, requests: int, rows: int) -> bool:
        """Whether `infer_stacked` is likely to answer, before anything is stacked."""
        route = self.table.routes.get(model)
        if route is None or route.bounds or route.mirrors:
            return False
        return route.default.instance.may_stack(requests, requests * rows)

    def infer_stacked(self, request: InferenceRequest, requests: int) -> InferenceResponse | None:
        """Several requests that arrived together and differ in their tensors' values only, stacked
        along the first dimension: their answers, stacked likewise, or None where each has to be
        submitted by itself (as when one fails, has to wait, or is routed by lot). Of requests
        without priority and classes, on event loops: never waits. Raises ScoringError for one."""
        table = self._table
        route = None if table is None else table.routes.get(request.model)
        if route is None or route.bounds or route.mirrors or request.version:
            return None
        target = route.default
        instance = target.instance
        if instance.timeout is not None or not instance.begin():
            return None
        started = self._now()
        try:
            outputs = check_request(request, instance.inputs, instance.outputs, instance.optional)
            inputs = {tensor.name: tensor.array for tensor in request.inputs}
            results = instance.serve_stacked(inputs, outputs, requests)
            return None if results is None else self._response(request, target, outputs, results)
        except ScoringError as error:
            if requests > 1:
                return None
            instance.statistics.failed(error.code, int((self._now() - started) * 1e9))
            raise
        finally:
            instance.end()

    def _response(
        self,
        request: InferenceRequest,
        target: Target[Instance],
        outputs: tuple[str, ...],
        results: dict[str, Array],
    ) -> InferenceResponse:
        datatypes = target.instance.output_datatypes
        tensors = tuple([Tensor(name, datatypes[name], results[name]) for name in outputs])
        if request.classes:
            batched = has_batch_axis(target.instance.inputs, target.instance.outputs)
            tensors = tuple(
                classify(one, request.classes[one.name], batched=batched)
                if one.name in request.classes
                else one
                for one in tensors
            )
        return InferenceResponse(request.model, target.version, tensors, request.id)

    def _copy(
        self,
        route: Route[Instance],
        target: Target[Instance],
        inputs: dict[str, Array],
        results: dict[str, Array],
    ) -> None:
        chosen = copies(route, target, self._draw)
        if chosen:
            self.mirror.offer(chosen, inputs, results)

    def _claim(self, request: InferenceRequest) -> tuple[Route[Instance], Target[Instance]]:
        headers = request.headers
        name = headers.get(DEPLOYMENT_HEADER, "") if headers else ""
        while True:
            table = self._table
            route = None if table is None else table.routes.get(request.model)
            if route is None:
                route = self._route(request.model)
            if route.bounds or request.version or name:
                at = place(route, headers, self._draw)
                target = self._target(route, request.version, at, name)
            else:
                target = route.default
            if target.instance.begin():
                return route, target
            # It is being closed: a switch happened since the table was read.
            if table is self._table:
                raise ScoringError(
                    Code.UNAVAILABLE, f"model {request.model!r} is being unloaded; try again"
                )

    def _route(self, name: str) -> Route[Instance]:
        routes = self.table.routes
        route = routes.get(name)
        if route is None:
            self.require_served(name)
            known = sorted(routes)
            shown = ", ".join(repr(n) for n in known[:_NAMES_IN_MESSAGE])
            more = (
                ""
                if len(known) <= _NAMES_IN_MESSAGE
                else f" and {len(known) - _NAMES_IN_MESSAGE} more"
            )
            raise ScoringError(
                Code.NOT_FOUND,
                f"model {name!r} is not deployed here; deployed: {shown or 'none'}{more}",
            )
        return route

    def _target(
        self, route: Route[Instance], version: str, at: float, name: str = ""
    ) -> Target[Instance]:
        target = choose(route, version, at, name)
        if target is None and name:
            names = ", ".join(repr(target.name) for target in route.targets)
            raise ScoringError(
                Code.NOT_FOUND,
                f"model {route.endpoint!r} has no deployment {name!r}"
                f"{f' of version {version!r}' if version else ''}; deployed: {names}",
            )
        if target is None:
            # Several modules may have the same one.
            found = dict.fromkeys(repr(target.version) for target in route.targets)
            versions = ", ".join(found)
            raise ScoringError(
                Code.NOT_FOUND,
                f"model {route.endpoint!r} has no version {version!r}; deployed: {versions}",
            )
        return target

    def _deadline(self, request: InferenceRequest, instance: Instance) -> float | None:
        if instance.timeout is None:
            return request.deadline
        own = self._now() + instance.timeout
        return own if request.deadline is None else min(own, request.deadline)
