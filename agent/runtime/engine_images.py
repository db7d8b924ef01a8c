"""Images in an engine. Functions block: they run in the threads of `EngineLink`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from ...modules.errors import InvalidReference
from ...modules.oci.reference import DEFAULT_REGISTRY, ImageRef
from .container import ContainerSpec, EngineImage, PullProgress, RuntimeFailed
from .engine_errors import explained
from .engine_link import Client
from .engine_reader import EngineReader
from .inspection import engine_image
from .pull_progress import PullMeter

Logins = tuple[tuple[str, str, str], ...]

_DOCKER_HUB = (DEFAULT_REGISTRY, "index.docker.io", "https://index.docker.io/v1/")


def reference(image: str) -> ImageRef:
    try:
        return ImageRef.parse(image)
    except InvalidReference as error:
        raise RuntimeFailed(str(error), retryable=False) from error


def login_for(host: str, logins: Logins) -> dict[str, str | None]:
    """The first of `logins` for `host`, or an empty one: with None the SDK would look into
    somebody's ~/.docker."""
    names = _DOCKER_HUB if host == DEFAULT_REGISTRY else (host,)
    for address, username, password in logins:
        if address in names:
            return {"username": username, "password": password}
    return {}


def repository(ref: ImageRef) -> str:
    return f"{ref.registry}/{ref.repository}"


def images(client: Client | EngineReader) -> tuple[EngineImage, ...]:
    return tuple(engine_image(listed) for listed in client.images())


def tag_present(client: Client, ref: ImageRef, digest: str) -> bool:
    """Whether the image is there at `digest`; if so, its name stands for it."""
    from docker.errors import NotFound

    try:
        found = client.inspect_image(f"{repository(ref)}@{digest}")
    except NotFound:
        return False
    if ref.tag is not None:
        client.tag(found["Id"], repository(ref), ref.tag)
    return True


def image_id(client: Client, spec: ContainerSpec, doing: str) -> str:
    """The id of the image that `spec` is pinned to; its name then stands for it."""
    from docker.errors import NotFound

    named: Mapping[str, Any] = {}
    with contextlib.suppress(NotFound):
        named = client.inspect_image(spec.image)
    known = [name.partition("@")[2] for name in named.get("RepoDigests") or []]
    if named and (not spec.digest or spec.digest in (*known, named["Id"])):
        return str(named["Id"])
    for found in images(client):
        if spec.digest and spec.digest in (*found.digests, found.id):
            ref = reference(spec.image)
            if ref.tag is not None:
                client.tag(found.id, repository(ref), ref.tag)
            return found.id
    raise RuntimeFailed(
        f"cannot {doing}: the engine has no {spec.image} at {spec.digest or 'any digest'}; "
        "it has to be pulled first",
        retryable=True,
    )


def pull(
    client: Client,
    ref: ImageRef,
    digest: str,
    logins: Logins,
    doing: str,
    put: Callable[[PullProgress], None],
) -> None:
    """Transfer the image; `put` gets the progress."""
    meter = PullMeter()
    login = login_for(ref.registry, logins)
    messages = client.pull(repository(ref), tag=digest, stream=True, decode=True, auth_config=login)
    failed = ""
    # To the end also after an error: only then does the SDK close what it reads from.
    for message in messages:
        failed = failed or str(message.get("error") or "")
        progress = meter.take(message)
        if progress is not None and not failed:
            put(progress)
    if failed:
        raise explained(doing, failed, host=ref.registry)


def remove_image(client: Client, digest: str) -> None:
    from docker.errors import NotFound

    for found in images(client):
        if digest not in (*found.digests, found.id):
            continue
        for container in client.containers(all=True):
            if container["ImageID"] == found.id:
                name = container["Names"][0].lstrip("/")
                raise RuntimeFailed(
                    f"cannot remove image {digest}: container {name} uses it; remove that first",
                    retryable=True,
                )
        # By each of its names: by id the engine refuses an image with several.
        listed = client.inspect_image(found.id)
        names = [*(listed.get("RepoTags") or []), *(listed.get("RepoDigests") or [])]
        for name in names or [found.id]:
            with contextlib.suppress(NotFound):
                client.remove_image(name)
