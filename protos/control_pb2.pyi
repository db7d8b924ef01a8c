# mypy: disable-error-code="type-arg"
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ScoringOptions(_message.Message):
    __slots__ = ("backends", "max_batch", "max_delay_us", "timeout_ms", "threads", "instances", "priority", "clients", "isolate", "auth")
    BACKENDS_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_FIELD_NUMBER: _ClassVar[int]
    MAX_DELAY_US_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    THREADS_FIELD_NUMBER: _ClassVar[int]
    INSTANCES_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    CLIENTS_FIELD_NUMBER: _ClassVar[int]
    ISOLATE_FIELD_NUMBER: _ClassVar[int]
    AUTH_FIELD_NUMBER: _ClassVar[int]
    backends: _containers.RepeatedScalarFieldContainer[str]
    max_batch: int
    max_delay_us: int
    timeout_ms: int
    threads: int
    instances: int
    priority: int
    clients: _containers.RepeatedScalarFieldContainer[str]
    isolate: bool
    auth: str
    def __init__(self, backends: _Optional[_Iterable[str]] = ..., max_batch: _Optional[int] = ..., max_delay_us: _Optional[int] = ..., timeout_ms: _Optional[int] = ..., threads: _Optional[int] = ..., instances: _Optional[int] = ..., priority: _Optional[int] = ..., clients: _Optional[_Iterable[str]] = ..., isolate: bool = ..., auth: _Optional[str] = ...) -> None: ...

class LoadRequest(_message.Message):
    __slots__ = ("instance", "directory", "options", "socket", "model")
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    SOCKET_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    instance: str
    directory: str
    options: ScoringOptions
    socket: str
    model: str
    def __init__(self, instance: _Optional[str] = ..., directory: _Optional[str] = ..., options: _Optional[_Union[ScoringOptions, _Mapping]] = ..., socket: _Optional[str] = ..., model: _Optional[str] = ...) -> None: ...

class LoadResponse(_message.Message):
    __slots__ = ("status",)
    STATUS_FIELD_NUMBER: _ClassVar[int]
    status: InstanceStatus
    def __init__(self, status: _Optional[_Union[InstanceStatus, _Mapping]] = ...) -> None: ...

class ProbeRequest(_message.Message):
    __slots__ = ("instance",)
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    instance: str
    def __init__(self, instance: _Optional[str] = ...) -> None: ...

class ProbeResponse(_message.Message):
    __slots__ = ("status",)
    STATUS_FIELD_NUMBER: _ClassVar[int]
    status: InstanceStatus
    def __init__(self, status: _Optional[_Union[InstanceStatus, _Mapping]] = ...) -> None: ...

class RouteTarget(_message.Message):
    __slots__ = ("instance", "percent", "default", "mirror", "mirror_tolerance")
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    PERCENT_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_FIELD_NUMBER: _ClassVar[int]
    MIRROR_FIELD_NUMBER: _ClassVar[int]
    MIRROR_TOLERANCE_FIELD_NUMBER: _ClassVar[int]
    instance: str
    percent: int
    default: bool
    mirror: int
    mirror_tolerance: float
    def __init__(self, instance: _Optional[str] = ..., percent: _Optional[int] = ..., default: bool = ..., mirror: _Optional[int] = ..., mirror_tolerance: _Optional[float] = ...) -> None: ...

class Route(_message.Message):
    __slots__ = ("endpoint", "targets", "sticky_header")
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    STICKY_HEADER_FIELD_NUMBER: _ClassVar[int]
    endpoint: str
    targets: _containers.RepeatedCompositeFieldContainer[RouteTarget]
    sticky_header: str
    def __init__(self, endpoint: _Optional[str] = ..., targets: _Optional[_Iterable[_Union[RouteTarget, _Mapping]]] = ..., sticky_header: _Optional[str] = ...) -> None: ...

class WantedEndpoint(_message.Message):
    __slots__ = ("endpoint", "auth")
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    AUTH_FIELD_NUMBER: _ClassVar[int]
    endpoint: str
    auth: str
    def __init__(self, endpoint: _Optional[str] = ..., auth: _Optional[str] = ...) -> None: ...

class AnnounceRequest(_message.Message):
    __slots__ = ("endpoints",)
    ENDPOINTS_FIELD_NUMBER: _ClassVar[int]
    endpoints: _containers.RepeatedCompositeFieldContainer[WantedEndpoint]
    def __init__(self, endpoints: _Optional[_Iterable[_Union[WantedEndpoint, _Mapping]]] = ...) -> None: ...

class AnnounceResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SwitchRequest(_message.Message):
    __slots__ = ("routes",)
    ROUTES_FIELD_NUMBER: _ClassVar[int]
    routes: _containers.RepeatedCompositeFieldContainer[Route]
    def __init__(self, routes: _Optional[_Iterable[_Union[Route, _Mapping]]] = ...) -> None: ...

class SwitchResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class UnloadRequest(_message.Message):
    __slots__ = ("instance", "drain_ms")
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    DRAIN_MS_FIELD_NUMBER: _ClassVar[int]
    instance: str
    drain_ms: int
    def __init__(self, instance: _Optional[str] = ..., drain_ms: _Optional[int] = ...) -> None: ...

class UnloadResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class BackendStatus(_message.Message):
    __slots__ = ("name", "healthy", "detail", "requests", "failures", "fallbacks")
    NAME_FIELD_NUMBER: _ClassVar[int]
    HEALTHY_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    FALLBACKS_FIELD_NUMBER: _ClassVar[int]
    name: str
    healthy: bool
    detail: str
    requests: int
    failures: int
    fallbacks: int
    def __init__(self, name: _Optional[str] = ..., healthy: bool = ..., detail: _Optional[str] = ..., requests: _Optional[int] = ..., failures: _Optional[int] = ..., fallbacks: _Optional[int] = ...) -> None: ...

class InstanceStatus(_message.Message):
    __slots__ = ("instance", "state", "error", "model", "version", "backends", "notes", "counts", "mirror", "memory")
    class State(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STATE_UNSPECIFIED: _ClassVar[InstanceStatus.State]
        LOADED: _ClassVar[InstanceStatus.State]
        READY: _ClassVar[InstanceStatus.State]
        FAILED: _ClassVar[InstanceStatus.State]
    STATE_UNSPECIFIED: InstanceStatus.State
    LOADED: InstanceStatus.State
    READY: InstanceStatus.State
    FAILED: InstanceStatus.State
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    BACKENDS_FIELD_NUMBER: _ClassVar[int]
    NOTES_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    MIRROR_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    instance: str
    state: InstanceStatus.State
    error: str
    model: str
    version: str
    backends: _containers.RepeatedCompositeFieldContainer[BackendStatus]
    notes: _containers.RepeatedScalarFieldContainer[str]
    counts: InstanceCounts
    mirror: MirrorCounts
    memory: MemoryStatus
    def __init__(self, instance: _Optional[str] = ..., state: _Optional[_Union[InstanceStatus.State, str]] = ..., error: _Optional[str] = ..., model: _Optional[str] = ..., version: _Optional[str] = ..., backends: _Optional[_Iterable[_Union[BackendStatus, _Mapping]]] = ..., notes: _Optional[_Iterable[str]] = ..., counts: _Optional[_Union[InstanceCounts, _Mapping]] = ..., mirror: _Optional[_Union[MirrorCounts, _Mapping]] = ..., memory: _Optional[_Union[MemoryStatus, _Mapping]] = ...) -> None: ...

class InstanceCounts(_message.Message):
    __slots__ = ("successes", "failures", "success_ns", "time_buckets", "time_counts")
    SUCCESSES_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    SUCCESS_NS_FIELD_NUMBER: _ClassVar[int]
    TIME_BUCKETS_FIELD_NUMBER: _ClassVar[int]
    TIME_COUNTS_FIELD_NUMBER: _ClassVar[int]
    successes: int
    failures: int
    success_ns: int
    time_buckets: _containers.RepeatedScalarFieldContainer[int]
    time_counts: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, successes: _Optional[int] = ..., failures: _Optional[int] = ..., success_ns: _Optional[int] = ..., time_buckets: _Optional[_Iterable[int]] = ..., time_counts: _Optional[_Iterable[int]] = ...) -> None: ...

class MirrorCounts(_message.Message):
    __slots__ = ("compared", "differing", "failed", "dropped", "largest_difference")
    COMPARED_FIELD_NUMBER: _ClassVar[int]
    DIFFERING_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    LARGEST_DIFFERENCE_FIELD_NUMBER: _ClassVar[int]
    compared: int
    differing: int
    failed: int
    dropped: int
    largest_difference: float
    def __init__(self, compared: _Optional[int] = ..., differing: _Optional[int] = ..., failed: _Optional[int] = ..., dropped: _Optional[int] = ..., largest_difference: _Optional[float] = ...) -> None: ...

class MemoryStatus(_message.Message):
    __slots__ = ("resident", "bytes", "loads", "evictions")
    RESIDENT_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    LOADS_FIELD_NUMBER: _ClassVar[int]
    EVICTIONS_FIELD_NUMBER: _ClassVar[int]
    resident: bool
    bytes: int
    loads: int
    evictions: int
    def __init__(self, resident: bool = ..., bytes: _Optional[int] = ..., loads: _Optional[int] = ..., evictions: _Optional[int] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusResponse(_message.Message):
    __slots__ = ("pid", "instances", "routes", "boot_id", "grpc_address", "http_address", "metrics_address", "announced", "endpoints", "fabric")
    PID_FIELD_NUMBER: _ClassVar[int]
    INSTANCES_FIELD_NUMBER: _ClassVar[int]
    ROUTES_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    GRPC_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    HTTP_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    METRICS_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    ANNOUNCED_FIELD_NUMBER: _ClassVar[int]
    ENDPOINTS_FIELD_NUMBER: _ClassVar[int]
    FABRIC_FIELD_NUMBER: _ClassVar[int]
    pid: int
    instances: _containers.RepeatedCompositeFieldContainer[InstanceStatus]
    routes: _containers.RepeatedCompositeFieldContainer[Route]
    boot_id: str
    grpc_address: str
    http_address: str
    metrics_address: str
    announced: bool
    endpoints: _containers.RepeatedCompositeFieldContainer[WantedEndpoint]
    fabric: bytes
    def __init__(self, pid: _Optional[int] = ..., instances: _Optional[_Iterable[_Union[InstanceStatus, _Mapping]]] = ..., routes: _Optional[_Iterable[_Union[Route, _Mapping]]] = ..., boot_id: _Optional[str] = ..., grpc_address: _Optional[str] = ..., http_address: _Optional[str] = ..., metrics_address: _Optional[str] = ..., announced: bool = ..., endpoints: _Optional[_Iterable[_Union[WantedEndpoint, _Mapping]]] = ..., fabric: _Optional[bytes] = ...) -> None: ...

class ApplyRequest(_message.Message):
    __slots__ = ("manifest",)
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    manifest: bytes
    def __init__(self, manifest: _Optional[bytes] = ...) -> None: ...

class ApplyResponse(_message.Message):
    __slots__ = ("code", "description", "generation")
    CODE_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    code: int
    description: str
    generation: int
    def __init__(self, code: _Optional[int] = ..., description: _Optional[str] = ..., generation: _Optional[int] = ...) -> None: ...

class PreviewRequest(_message.Message):
    __slots__ = ("manifest",)
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    manifest: bytes
    def __init__(self, manifest: _Optional[bytes] = ...) -> None: ...

class PreviewResponse(_message.Message):
    __slots__ = ("code", "description", "json")
    CODE_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    JSON_FIELD_NUMBER: _ClassVar[int]
    code: int
    description: str
    json: bytes
    def __init__(self, code: _Optional[int] = ..., description: _Optional[str] = ..., json: _Optional[bytes] = ...) -> None: ...

class RollbackRequest(_message.Message):
    __slots__ = ("generation",)
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    generation: int
    def __init__(self, generation: _Optional[int] = ...) -> None: ...

class InvokeRequest(_message.Message):
    __slots__ = ("method", "payload")
    METHOD_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    method: str
    payload: bytes
    def __init__(self, method: _Optional[str] = ..., payload: _Optional[bytes] = ...) -> None: ...

class InvokeResponse(_message.Message):
    __slots__ = ("status", "payload")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    status: int
    payload: bytes
    def __init__(self, status: _Optional[int] = ..., payload: _Optional[bytes] = ...) -> None: ...

class LogsRequest(_message.Message):
    __slots__ = ("module", "tail", "since", "until", "follow")
    MODULE_FIELD_NUMBER: _ClassVar[int]
    TAIL_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    UNTIL_FIELD_NUMBER: _ClassVar[int]
    FOLLOW_FIELD_NUMBER: _ClassVar[int]
    module: str
    tail: int
    since: str
    until: str
    follow: bool
    def __init__(self, module: _Optional[str] = ..., tail: _Optional[int] = ..., since: _Optional[str] = ..., until: _Optional[str] = ..., follow: bool = ...) -> None: ...

class LogsResponse(_message.Message):
    __slots__ = ("at", "stream", "text")
    AT_FIELD_NUMBER: _ClassVar[int]
    STREAM_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    at: str
    stream: str
    text: str
    def __init__(self, at: _Optional[str] = ..., stream: _Optional[str] = ..., text: _Optional[str] = ...) -> None: ...

class AgentStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AgentStatusResponse(_message.Message):
    __slots__ = ("json",)
    JSON_FIELD_NUMBER: _ClassVar[int]
    json: bytes
    def __init__(self, json: _Optional[bytes] = ...) -> None: ...
