"""Transports that bring deployments and carry reports."""
