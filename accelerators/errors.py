"""What can go wrong in a backend, by who has to act on it."""

from __future__ import annotations


class BackendError(Exception):
    """Base of every error a backend raises; the message says what, where, and what to do."""


class LoadError(BackendError):
    """The model, overlay or package cannot be loaded on this device; trying again will not help."""


class InvalidTensor(BackendError):
    """The caller's tensor does not fit the model (name, datatype, shape or content)."""


class BackendUnavailable(BackendError):
    """The accelerator is busy, sick or gone for now; another backend may answer in its place."""


class DeadlineExceeded(BackendError):
    """The result did not arrive within the time the caller allowed."""
