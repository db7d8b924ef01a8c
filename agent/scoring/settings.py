"""How the scoring process is started."""

from __future__ import annotations

from dataclasses import dataclass

from .rate import RateLimit
from .tls import TlsSettings
from .tokens import TokenSettings


@dataclass(frozen=True, slots=True)
class ScoringSettings:
    """Addresses: host:port or unix:path, "" for none.

    `fabric_socket` None: no FPGA; `board` and `part` say which one it is. `threads`: intra-op
    threads of a model, `grpc_threads`: calls answered at once, each 0 for what fits the cores.
    `grpc_transport`: grpcio or http2.
    `drain_seconds`: for running requests when told to end. `memory_budget_mb`: of resident
    models together, the longest unused leaves; 0: no limit.

    `keys_dir`: where the endpoints' keys are. Other addresses than loopback and Unix sockets need
    `tls`, and keys, tokens or certificates of clients, unless `allow_insecure`. `cors_origins`:
    of web pages that may call ("*": all). `rate`: of each client's requests.

    `access_log_sample`: which part of the requests is logged, 0 for none. `otlp_url`: of an
    OpenTelemetry collector's traces; `trace_sample`: of requests that bring no trace."""

    control_socket: str
    grpc_address: str = "127.0.0.1:8001"
    http_address: str = "127.0.0.1:8000"
    metrics_address: str = "127.0.0.1:8002"
    fabric_socket: str | None = None
    board: str | None = None
    part: str | None = None
    threads: int = 0
    grpc_threads: int = 0
    grpc_transport: str = "http2"
    max_message_bytes: int = 64 * 1024 * 1024
    drain_seconds: float = 10.0
    memory_budget_mb: int = 0
    keys_dir: str | None = None
    tls: TlsSettings | None = None
    tokens: TokenSettings | None = None
    allow_insecure: bool = False
    cors_origins: tuple[str, ...] = ()
    rate: RateLimit | None = None
    access_log_sample: float = 0.0
    otlp_url: str = ""
    trace_sample: float = 0.0
