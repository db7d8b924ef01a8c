"""JSON merge patch (RFC 7386) over plain JSON values: the way twins change.

A patch cannot carry a null as a value: null deletes. Lists are replaced whole. Nothing here mutates
its arguments or returns parts of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def apply_patch(document: Mapping[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    """The document after the patch (RFC 7386 section 2, for a patch that is an object)."""
    result = {key: _copy(value) for key, value in document.items() if key not in patch}
    for key, change in patch.items():
        if change is None:
            continue
        if isinstance(change, Mapping):
            old = document.get(key)
            result[key] = apply_patch(old if isinstance(old, Mapping) else {}, change)
        else:
            result[key] = _copy(change)
    return result


def make_patch(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The smallest patch that turns `old` into `new`; empty when they hold the same.

    A null member of an object in `new` counts as absent, since no patch can set it.
    """
    patch: dict[str, Any] = {}
    for key, before in old.items():
        after = new.get(key)
        if after is None:
            patch[key] = None
        elif isinstance(before, Mapping) and isinstance(after, Mapping):
            inner = make_patch(before, after)
            if inner:
                patch[key] = inner
        elif not same(before, after):
            patch[key] = without_nulls(after)
    for key, after in new.items():
        if key not in old and after is not None:
            patch[key] = without_nulls(after)
    return patch


def without_nulls(value: Any) -> Any:
    """A copy without null members of objects; nulls inside lists stay, as RFC 7386 leaves them."""
    if isinstance(value, Mapping):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return _copy(value)


def same(left: Any, right: Any) -> bool:
    """Equality as JSON sees it: unlike Python's, true is not 1."""
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return left.keys() == right.keys() and all(same(v, right[k]) for k, v in left.items())
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_copy(item) for item in value]
    return value
