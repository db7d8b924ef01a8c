"""The scoring process: decode -> route -> run -> encode.

`types`, `errors`, `tensor_codec`, `classification`, `validation`, `batching` and `routing` are
pure; `batching_runner`, `instances`, `loading` and `dataplane` hold models and answer requests
without knowing a protocol; `grpc_server` is a transport on the data plane with the services of
`grpc_service`, `control_service` is the agent's hold on it, `process` puts all together.
"""
