"""Simulated FPGA boards as pynq devices."""
