"""Containers on this device: the engine behind a narrow seam, and what a module may ask of it."""
