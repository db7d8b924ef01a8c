"""The chunked `createOptions` of a module: Docker's create body as JSON text in a twin."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .document import Node, canonical, parse_json

CHUNK_CHARACTERS = 512
MAX_CHUNKS = 100

_FIELD = re.compile(r"createOptions(?P<number>[0-9]*)", re.ASCII)


def read_create_options(settings: Node) -> str:
    """Canonical JSON object from `createOptions`, `createOptions01`, ... of a module's settings.

    Blank and "null" mean {}; an object in place of the text is taken as it is. Chunks may be
    longer than edgeAgent writes them. Raises ManifestError 400 when the chunks are not contiguous
    or do not join to a JSON object.
    """
    chunks = _chunks(settings)
    if len(chunks) == 1 and isinstance(chunks[0].value, dict):
        return canonical(chunks[0].value)
    text = "".join(chunk.text() for chunk in chunks)
    path = f"{settings.path}.createOptions"
    if not text.strip() or text.strip() == "null":
        return "{}"
    value = parse_json(text, path)
    if not isinstance(value, dict):
        raise Node(value, path).expected("the text of a JSON object")
    return canonical(value)


def write_create_options(options: str) -> dict[str, str]:
    """`createOptions`, `createOptions01`, ... holding `options` in chunks of 512 characters."""
    chunks = [
        options[start : start + CHUNK_CHARACTERS]
        for start in range(0, max(len(options), 1), CHUNK_CHARACTERS)
    ]
    return {
        "createOptions" if number == 0 else f"createOptions{number:02}": chunk
        for number, chunk in enumerate(chunks)
    }


def _chunks(settings: Node) -> list[Node]:
    found: list[tuple[int, str, Node]] = []
    members: Mapping[str, Any] = settings.members()
    for key, node in members.items():
        match = _FIELD.fullmatch(key)
        if match is not None:
            number = match["number"]
            if len(number) > 3:
                raise node.fail(f"at most {MAX_CHUNKS} chunks, createOptions99 is the last")
            found.append((int(number or -1), number, node))
    found.sort(key=lambda item: item[:2])
    for expected, (_, number, node) in enumerate(found):
        prefix = 'Error while parsing chunked field "createOptions", expected'
        if expected >= MAX_CHUNKS:
            raise node.fail(f"at most {MAX_CHUNKS} chunks, createOptions99 is the last")
        if expected == 0 and number:
            raise node.fail(f'{prefix} empty field number but found "{number}"')
        if expected and int(number) != expected:
            raise node.fail(f"{prefix} createOptions{expected:02} found createOptions{number}")
    return [node for _, _, node in found]
