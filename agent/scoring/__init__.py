"""The scoring process: decode -> route -> run -> encode.

`types`, `errors`, `tensor_codec`, `validation` and `routing` are pure; `instances`, `loading` and
`dataplane` hold models and answer requests without knowing a protocol; `grpc_server` is a transport
on the data plane, `control_service` is the agent's hold on it, `process` puts all together.
"""
