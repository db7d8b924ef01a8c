"""The scoring process: data plane, transports, control service."""
