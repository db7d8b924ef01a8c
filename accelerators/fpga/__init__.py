"""FPGA backend: overlay packages, the fabric process that owns the board, and its client."""
