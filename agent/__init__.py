"""The control plane and the scoring process of a device."""
