"""Inference backends: the `Backend`/`Session` contract and its CPU and FPGA implementations.

This layer depends on numpy and the standard library only, so that the fabric process can run in
the Python environment of a PYNQ board; onnxruntime and pynq are imported where they are used.
"""
