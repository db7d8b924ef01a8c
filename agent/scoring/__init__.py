"""The scoring process: decode -> route -> run -> encode.

`types`, `errors`, `tensor_codec`, `classification`, `validation`, `batching` and `routing` are
pure; `batching_runner`, `instances`, `loading` and `dataplane` hold models and answer requests
without knowing a protocol. Two transports stand on the data plane: `grpc_server` with the services
of `grpc_service`, and `http_server` (connections in `http_connection`) with `http_service`, whose
bodies are `oip_json`'s and `score_json`'s. `access` (with `keys`, `tokens`, `rate`) and `tls` say
who may call them, `prometheus`, `observation` and `otlp` tell what happened. `control_service` is
the agent's hold on the data plane, `transports` and `process` put all together.
"""
