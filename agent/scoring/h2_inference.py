"""Inference over the HTTP/2 transport: on the loop, and what came in one turn of it together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from functools import partial
from time import monotonic
from typing import Protocol

from google.protobuf.message import DecodeError

from ...protos import open_inference_pb2 as oip
from .access import Access, Caller
from .batching_job import Job
from .dataplane import DataPlane
from .errors import DEFECT, ScoringError
from .grpc_service import FAULTS, STATUS
from .h2_call import Call
from .h2_grpc import CANCELLED, INTERNAL, Failed, framed
from .h2_plans import AnswerPlans, Plan, RequestPlans
from .instances import Instance
from .observation import TIMING_HEADER, Observer, Served, server_timing
from .oip_messages import Decoded, decode_request, encode_response
from .routing import DEPLOYMENT_HEADER
from .types import InferenceRequest, InferenceResponse

log = logging.getLogger(__name__)

# Larger requests are decoded beside the event loop, which others wait for.
_LARGE = 128 * 1024


class Host(Protocol):
    """What this needs of the server."""

    def here(self) -> bool:
        """Whether this is the loop's thread."""

    def soon(self, work: Callable[[], None]) -> None: ...
    def post(self, work: Callable[[], None]) -> None: ...


class Inferences:
    """`serve` is called on the loop."""

    def __init__(
        self,
        plane: DataPlane,
        host: Host,
        access: Access,
        observer: Observer,
        pool: Executor,
        sent_once: Callable[[Callable[[], None]], None],
    ) -> None:
        """`sent_once` does what it is given, and then sends all answers of it."""
        self._plane = plane
        self._host = host
        self._access = access
        self._observer = observer
        self._pool = pool
        self._sent_once = sent_once
        self._memory = plane.shared_memory
        self._requests = RequestPlans()
        self._answers = AnswerPlans(lambda answer: encode_response(answer, True))
        # Of this turn of the loop; only the loop touches these.
        self._waiting: dict[Instance, None] = {}
        self._joint: dict[Plan, list[tuple[Call, bytes]]] = {}
        self._serving = False

    def serve(self, call: Call, message: bytes | memoryview) -> None:
        if len(message) > _LARGE:
            self._pool.submit(self._decode, call, message, True)
            return
        plain = bytes(message)
        plan = self._requests.match(plain)
        if plan is None:
            self._decode(call, plain, False)
            return
        try:
            self._admit(call, plan.model)
        except ScoringError as error:
            self._refuse(call, plan.model, "", error)
            return
        except Exception:  # noqa: BLE001 - logged there, and the client is told
            self._defect(call)
            return
        headers = call.head.headers
        if plan.rows and not self._is_told(call) and DEPLOYMENT_HEADER not in headers:
            self._joint.setdefault(plan, []).append((call, plain))
            self._serve_soon()
        else:
            self._alone(plan, call, plain)

    def _decode(self, call: Call, given: bytes | memoryview, beside: bool) -> None:
        if not call.open:
            self._fail(call, Failed(CANCELLED, "the call ended"))
            return
        message = bytes(given)
        try:
            parsed = oip.ModelInferRequest.FromString(message)
        except DecodeError:
            self._fail(call, Failed(INTERNAL, "the message is no ModelInferRequest"))
            return

        def work() -> None:
            self._admit(call, parsed.model_name)
            decoded = decode_request(parsed, call.deadline, self._memory, headers=call.head.headers)
            self._requests.learn(message, parsed)
            self._submit(call, decoded.request, decoded, beside)

        self._guarded(call, parsed.model_name, parsed.id, work)

    def _guarded(self, call: Call, model: str, id: str, work: Callable[[], None]) -> None:
        """Whatever happens, the client is answered."""
        try:
            work()
        except ScoringError as error:
            self._refuse(call, model, id, error)
        except Exception:  # noqa: BLE001 - logged there, and the client is told
            self._defect(call)

    def _defect(self, call: Call) -> None:
        # The client gets INTERNAL without our internals, the log the whole traceback.
        log.exception("a scoring request hit a defect of the server")
        self._fail(call, Failed(INTERNAL, DEFECT))

    def _admit(self, call: Call, model: str) -> None:
        if not self._access.open_to_all(model):
            connection = call.connection
            bearer = call.head.headers.get("authorization", "")
            caller = Caller(connection.client, connection.certificate, bearer)
            self._access.admit(caller, model, "grpc")

    def _submit(
        self,
        call: Call,
        request: InferenceRequest,
        decoded: Decoded | None,
        beside: bool = False,
    ) -> None:
        submitted = monotonic()
        plain = decoded is None or (decoded.raw and not decoded.placements)
        told = self._is_told(call)

        def done(answer: InferenceResponse | ScoringError) -> None:
            try:
                if isinstance(answer, ScoringError):
                    self._refuse(call, request.model, request.id, answer)
                    return
                if plain or decoded is None:
                    data = self._answers.write(answer)
                else:
                    message = encode_response(answer, decoded.raw, decoded.placements, self._memory)
                    data = framed(message.SerializeToString())
                more = self._tell(call, request, answer, submitted) if told else None
                if self._host.here():
                    call.connection.answer(call, data, more)
                else:
                    self._host.post(partial(call.connection.answer, call, data, more))
            except ScoringError as error:
                self._refuse(call, request.model, request.id, error)
            except Exception:  # noqa: BLE001 - logged there, and the client is told
                self._defect(call)

        instance, job = self._plane.submit(request, done, wake=beside)
        if beside:
            self._host.post(partial(self._submitted, call, instance, job))
            return
        call.pending = (instance, job)
        self._waiting[instance] = None
        self._serve_soon()

    def _is_told(self, call: Call) -> bool:
        """Whether anybody wants to know more of it than the answer."""
        return self._observer.active or TIMING_HEADER in call.head.headers

    def _serve_soon(self) -> None:
        if not self._serving:
            self._serving = True
            self._host.soon(lambda: self._sent_once(self._serve_waiting))

    def _tell(
        self, call: Call, request: InferenceRequest, answer: InferenceResponse, submitted: float
    ) -> dict[str, str] | None:
        """Trailers of an answer, besides what observers are told."""
        more = None
        if TIMING_HEADER in call.head.headers:
            more = {"server-timing": server_timing(call.started, submitted, monotonic())}
        if self._observer.active:
            self._observe(call, request.model, answer.version, request.id, "OK")
        return more

    def _submitted(self, call: Call, instance: Instance, job: Job) -> None:
        """On the loop, perhaps after the answer."""
        if call.open:
            call.pending = (instance, job)
        elif call.working:
            instance.withdraw(job)

    def _serve_waiting(self) -> None:
        """Whatever came in one turn of the loop."""
        joint, self._joint = self._joint, {}
        for plan, members in joint.items():
            most = self._plane.stackable(plan.model, plan.rows)
            for start in range(0, len(members), most):
                self._together(plan, members[start : start + most])
        waiting, self._waiting = self._waiting, {}
        self._serving = False
        for instance in waiting:
            instance.serve_here()

    def _together(self, plan: Plan, members: Sequence[tuple[Call, bytes]]) -> None:
        """Requests that differ in their tensors' values only: as one, where nothing speaks against
        it, so that what each costs besides is spent once."""
        now = monotonic()
        late = [one for one in members if not _in_time(one[0], now)]
        if late:
            for call, message in late:
                self._alone(plan, call, message)
            members = [one for one in members if _in_time(one[0], now)]
        number = len(members)
        if not number:
            return
        call, message = members[0]
        answer = None
        try:
            if self._plane.may_stack(plan.model, number, plan.rows):
                request = (
                    plan.request(message, call.deadline, call.head.headers)
                    if number == 1
                    else plan.stacked([message for _, message in members])
                )
                answer = self._plane.infer_stacked(request, number)
            if answer is not None:
                parts = self._answers.parts(answer, number)
                for (call, _), data in zip(members, parts, strict=True):
                    call.connection.answer(call, data)
                return
        except ScoringError as error:
            self._refuse(call, plan.model, "", error)
            return
        except Exception:  # noqa: BLE001 - logged there, and the clients are told
            for call, _ in members:
                self._defect(call)
            return
        for call, message in members:
            self._alone(plan, call, message)

    def _alone(self, plan: Plan, call: Call, message: bytes) -> None:
        if not call.open:
            self._fail(call, Failed(CANCELLED, "the call ended"))
            return
        try:
            self._submit(call, plan.request(message, call.deadline, call.head.headers), None)
        except ScoringError as error:
            self._refuse(call, plan.model, "", error)
        except Exception:  # noqa: BLE001 - logged there, and the client is told
            self._defect(call)

    def _refuse(self, call: Call, model: str, id: str, error: ScoringError) -> None:
        more = {}
        if error.retry_after is not None:
            # Clients with a retry policy heed it (gRPC proposal A6).
            more["grpc-retry-pushback-ms"] = str(max(1, round(error.retry_after * 1000)))
        if TIMING_HEADER in call.head.headers:
            more["server-timing"] = server_timing(call.started, 0.0, 0.0)
        if self._observer.active:
            self._observe(call, model, "", id, error.code.value)
        self._fail(call, Failed(STATUS[error.code].value[0], error.message, more))

    def _observe(self, call: Call, model: str, version: str, id: str, status: str) -> None:
        now = monotonic()
        served = Served(
            *("grpc", "infer", model, version, status, status in FAULTS),
            *(now - call.started, now, call.connection.client, id),
        )
        self._observer.note(served, call.head.headers)

    def _fail(self, call: Call, failed: Failed) -> None:
        self._host.post(lambda: call.connection.fail(call, failed))


def _in_time(call: Call, now: float) -> bool:
    return call.open and (call.deadline is None or call.deadline > now)
