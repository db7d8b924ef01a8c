"""Containers on a Docker engine, through its SDK."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ...modules.errors import InvalidReference
from ...modules.oci.reference import DEFAULT_REGISTRY, ImageRef
from .container import (
    DEVICE_LABEL,
    MODULE_LABEL,
    SPEC_LABEL,
    ContainerSpec,
    ContainerView,
    EngineImage,
    EngineInfo,
    LogFilter,
    LogLine,
    PullProgress,
    RuntimeFailed,
    canonical_body,
)
from .create_rules import CREATED_LABEL
from .drift import drift
from .engine_errors import explained, unreachable
from .inspection import container_view, engine_image
from .log_frames import LogDecoder
from .policy import DockerPolicy, mount_refusal
from .pull_progress import PullMeter
from .thread_stream import thread_stream

if TYPE_CHECKING:
    from .engine_connection import EngineConnection

T = TypeVar("T")

Client = Any
"""`docker.APIClient`, whose stubs leave most of what is used here untyped."""

_EVENTS = (
    *("create", "start", "restart", "stop", "kill", "die", "oom", "destroy"),
    *("pause", "unpause", "rename", "update", "health_status"),
)
"""Not exec_create and the like: each health check makes some."""

_DOCKER_HUB = (DEFAULT_REGISTRY, "index.docker.io", "https://index.docker.io/v1/")
_REMOVAL_SECONDS = 20.0
_FOLLOW_PAUSE = 0.5


class DockerRuntime:
    """`ContainerRuntime` on the engine at `socket`, for the containers of `device_id`.

    `logins` are the device's own (address, username, password), for registries that the caller's
    credentials do not name. `network` is made when a container wants it and it is missing. With a
    `policy`, what a mounted path really leads to must be permitted too. `timeout`: seconds that
    the engine may be silent. Nothing is imported or connected before the first call.
    """

    def __init__(
        self,
        socket: Path,
        device_id: str,
        *,
        logins: tuple[tuple[str, str, str], ...] = (),
        network: str = "",
        policy: DockerPolicy | None = None,
        protected: tuple[str, ...] = (),
        timeout: int = 60,
    ) -> None:
        self._socket = socket
        self._device = device_id
        self._logins = logins
        self._network = network
        self._policy = policy
        self._protected = protected
        self._timeout = timeout
        self._threads = ThreadPoolExecutor(4, "engine")
        self._lock = threading.Lock()
        self._api_version = ""
        self._connection: EngineConnection | None = None
        self._streams: set[EngineConnection] = set()
        self._image_configs: dict[str, Mapping[str, Any]] = {}
        # What an engine made of a body by itself right when it created it, by container id.
        self._engines_own: dict[str, frozenset[str]] = {}

    # The engine

    async def info(self) -> EngineInfo:
        def work(client: Client) -> EngineInfo:
            version, info = client.version(), client.info()
            return EngineInfo(
                version=version.get("Version", ""),
                api_version=version.get("ApiVersion", ""),
                os=info.get("OSType", ""),
                architecture=version.get("Arch", ""),
                root_dir=info.get("DockerRootDir", ""),
            )

        return await self._call("ask the engine", work)

    async def close(self) -> None:
        with self._lock:
            streams = [*self._streams]
            connection, self._connection = self._connection, None
        for stream in streams:
            stream.abort()
        if connection is not None:
            connection.abort()
            connection.close()
        await asyncio.to_thread(self._threads.shutdown)

    # Images

    async def images(self) -> tuple[EngineImage, ...]:
        return await self._call("list images", _images)

    async def pull(
        self,
        image: str,
        digest: str,
        credentials: tuple[tuple[str, str, str], ...],
        on_progress: Callable[[PullProgress], None],
    ) -> None:
        ref = _reference(image)
        doing = f"pull {image} at {digest}"
        if await self._call(doing, lambda client: _tag_present(client, ref, digest)):
            return
        login = self._login(ref.registry, credentials)

        def produce(connection: EngineConnection, put: Callable[[PullProgress], None]) -> None:
            meter = PullMeter()
            messages = connection.client.pull(
                _repository(ref), tag=digest, stream=True, decode=True, auth_config=login
            )
            for message in messages:
                if said := message.get("error"):
                    raise explained(doing, str(said), host=ref.registry)
                progress = meter.take(message)
                if progress is not None:
                    put(progress)

        async for progress in self._stream(doing, produce, host=ref.registry):
            on_progress(progress)
        if not await self._call(doing, lambda client: _tag_present(client, ref, digest)):
            raise RuntimeFailed(
                f"cannot {doing}: the engine ended the transfer without the image; "
                "it is tried again",
                retryable=True,
            )

    async def remove_image(self, digest: str) -> None:
        def work(client: Client) -> None:
            from docker.errors import NotFound

            for found in _images(client):
                if digest not in (*found.digests, found.id):
                    continue
                for container in client.containers(all=True):
                    if container["ImageID"] == found.id:
                        name = container["Names"][0].lstrip("/")
                        raise RuntimeFailed(
                            f"cannot remove image {digest}: container {name} uses it; "
                            "remove that first",
                            retryable=True,
                        )
                listed = client.inspect_image(found.id)
                # By each of its names: by id the engine refuses an image with several.
                names = [*(listed.get("RepoTags") or []), *(listed.get("RepoDigests") or [])]
                for name in names or [found.id]:
                    with contextlib.suppress(NotFound):
                        client.remove_image(name)
                self._image_configs.pop(found.id, None)

        await self._call(f"remove image {digest}", work)

    # Containers

    async def containers(self) -> tuple[ContainerView, ...]:
        def work(client: Client) -> tuple[ContainerView, ...]:
            from docker.errors import NotFound

            wanted = {"label": [f"{DEVICE_LABEL}={self._device}", MODULE_LABEL]}
            views = []
            for listed in client.containers(all=True, filters=wanted):
                with contextlib.suppress(NotFound):
                    inspect = client.inspect_container(listed["Id"])
                    views.append(container_view(inspect, self._drift(client, inspect)))
            self._engines_own = {
                view.id: own
                for view in views
                if (own := self._engines_own.get(view.id)) is not None
            }
            return tuple(sorted(views, key=lambda view: (view.module, view.name)))

        return await self._call("list containers", work)

    async def create(self, spec: ContainerSpec) -> None:
        doing = f"create container {spec.name}"
        await self._call(doing, lambda client: self._create(client, spec, doing))

    async def start(self, name: str) -> None:
        await self._call(f"start container {name}", lambda client: client.start(name))

    async def stop(self, name: str, timeout: float = 10.0) -> None:
        def work(client: Client) -> None:
            from docker.errors import NotFound

            with contextlib.suppress(NotFound):
                client.stop(name, timeout=math.ceil(timeout))

        await self._call(f"stop container {name}", work)

    async def remove(self, name: str) -> None:
        await self._call(f"remove container {name}", lambda client: _remove(client, name))

    async def logs(self, name: str, wanted: LogFilter, *, follow: bool) -> AsyncIterator[LogLine]:
        doing = f"read the logs of container {name}"

        def produce(connection: EngineConnection, put: Callable[[LogLine], None]) -> None:
            client = connection.client
            query: dict[str, Any] = {"stdout": 1, "stderr": 1, "timestamps": 1}
            query["follow"] = int(follow)
            query["tail"] = "all" if wanted.tail is None else str(wanted.tail)
            for key, at in (("since", wanted.since), ("until", wanted.until)):
                if at is not None:
                    query[key] = _timestamp(at)
            identity = ""
            while (inspect := _inspect(client, name)) is not None:
                if identity not in ("", inspect["Id"]):
                    return
                identity = inspect["Id"]
                decoder = LogDecoder(bool(inspect["Config"].get("Tty")))
                _read_logs(client, identity, query, decoder, put)
                if not follow:
                    return
                if decoder.last:
                    query |= {"since": _after(decoder.last), "tail": "all"}
                if not _runs_again(client, identity):
                    return
            if not identity:
                raise RuntimeFailed(
                    f"cannot {doing}: there is no such container; 'gatelet list' names all",
                    retryable=False,
                )

        async for line in self._stream(doing, produce):
            yield line

    async def events(self) -> AsyncIterator[None]:
        doing = "watch the engine"
        waiting = threading.Event()

        def produce(connection: EngineConnection, put: Callable[[None], None]) -> None:
            wanted = {
                "type": ["container"],
                "label": [f"{DEVICE_LABEL}={self._device}"],
                "event": list(_EVENTS),
            }
            messages = connection.client.events(decode=True, filters=wanted)
            # What happened before the engine listened to us may be news as well.
            put(None)
            for _ in messages:
                if not waiting.is_set():
                    waiting.set()
                    put(None)
            raise unreachable(doing, str(self._socket), "it ended the connection")

        async for _ in self._stream(doing, produce):
            waiting.clear()
            yield None

    # What the calls share

    async def _call(self, doing: str, work: Callable[[Client], T]) -> T:
        def run() -> T:
            with self._explaining(doing):
                return work(self._shared().client)

        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, run)
        except RuntimeError as error:
            # The executor takes nothing more after `close`.
            raise RuntimeFailed(f"cannot {doing}: {error}", retryable=True) from error

    async def _stream(
        self,
        doing: str,
        produce: Callable[[EngineConnection, Callable[[T], None]], None],
        *,
        host: str = "the registry",
    ) -> AsyncIterator[T]:
        """On a connection of its own, which ends with it."""
        connection: EngineConnection | None = None
        stopped = threading.Event()

        def run(put: Callable[[T], None]) -> None:
            nonlocal connection
            with self._explaining(doing, host):
                connection = self._connect()
                with self._lock:
                    self._streams.add(connection)
                try:
                    if not stopped.is_set():
                        produce(connection, put)
                finally:
                    with self._lock:
                        self._streams.discard(connection)
                    connection.close()

        def abort() -> None:
            stopped.set()
            if connection is not None:
                connection.abort()

        items = thread_stream(run, abort)
        try:
            async for item in items:
                yield item
        finally:
            await items.aclose()  # type: ignore[attr-defined]

    def _shared(self) -> EngineConnection:
        with self._lock:
            if self._connection is None:
                self._connection = self._connect_unlocked()
            return self._connection

    def _connect(self) -> EngineConnection:
        with self._lock:
            return self._connect_unlocked()

    def _connect_unlocked(self) -> EngineConnection:
        from .engine_connection import EngineConnection, negotiate

        if not self._api_version:
            self._api_version = negotiate(self._socket, self._timeout)
        return EngineConnection(self._socket, self._api_version, self._timeout)

    @contextlib.contextmanager
    def _explaining(self, doing: str, host: str = "the registry") -> Iterator[None]:
        """Everything the SDK raises becomes RuntimeFailed."""
        import requests
        import urllib3
        from docker.errors import APIError, DockerException

        from .engine_connection import UnsupportedEngine

        try:
            yield
        except APIError as error:
            said = str(error.explanation or error)
            raise explained(doing, said, status=error.status_code, host=host) from error
        except UnsupportedEngine as error:
            raise RuntimeFailed(f"cannot {doing}: {error}", retryable=True) from error
        except (
            DockerException,
            requests.RequestException,
            urllib3.exceptions.HTTPError,
            OSError,
        ) as error:
            # Another engine may answer next time.
            self._api_version = ""
            raise unreachable(doing, str(self._socket), _innermost(error)) from error
        except (KeyError, TypeError, ValueError) as error:
            raise RuntimeFailed(
                f"cannot {doing}: the engine's answer is not understood ({error!r})",
                retryable=True,
            ) from error

    def _login(
        self, host: str, credentials: tuple[tuple[str, str, str], ...]
    ) -> dict[str, str | None]:
        """Never nothing: the SDK would look into somebody's ~/.docker."""
        names = _DOCKER_HUB if host == DEFAULT_REGISTRY else (host,)
        for address, username, password in (*credentials, *self._logins):
            if address in names:
                return {"username": username, "password": password}
        return {}

    def _create(self, client: Client, spec: ContainerSpec, doing: str) -> None:
        leftover = _inspect(client, spec.name)
        if leftover is not None:
            labels = leftover["Config"].get("Labels") or {}
            if labels.get(DEVICE_LABEL) != self._device or MODULE_LABEL not in labels:
                raise RuntimeFailed(
                    f"cannot {doing}: container {leftover['Id'][:12]} of image "
                    f"{leftover['Config'].get('Image')} has this name and is not gatelet's; "
                    f"remove or rename it ('docker rename {spec.name} NEW')",
                    retryable=False,
                )
            if (
                labels.get(SPEC_LABEL) == spec.fingerprint()
                and leftover["State"]["Status"] == "created"
                and not leftover["State"].get("Error")
                and not self._drift(client, leftover)
            ):
                return
            _remove(client, leftover["Id"])
        image_id = _image_id(client, spec, doing)
        body: dict[str, Any] = json.loads(spec.body)
        self._check_mounts(body, doing)
        created = {"name": spec.name, "image": image_id, "body": body}
        sent = dict(body)
        sent["Labels"] = {
            **(body.get("Labels") or {}),
            SPEC_LABEL: spec.fingerprint(),
            CREATED_LABEL: canonical_body(created),
        }
        identity = self._send(client, spec.name, sent)
        inspect = client.inspect_container(identity)
        own = frozenset(self._compare(client, inspect, created))
        if "Image" in own:
            _remove(client, identity)
            raise RuntimeFailed(
                f"cannot {doing}: {spec.image} was given to another image meanwhile; "
                "it is tried again",
                retryable=True,
            )
        self._engines_own[identity] = own

    def _send(self, client: Client, name: str, body: Mapping[str, Any]) -> str:
        from docker.errors import NotFound

        try:
            return str(client.create_container_from_config(body, name)["Id"])
        except NotFound:
            networks = (body.get("NetworkingConfig") or {}).get("EndpointsConfig") or {}
            if not self._network or self._network not in networks:
                raise
        if not client.networks(names=[self._network]):
            client.create_network(self._network, check_duplicate=True)
        return str(client.create_container_from_config(body, name)["Id"])

    def _check_mounts(self, body: Mapping[str, Any], doing: str) -> None:
        """A link on the host, made by another module for example, must not lead out of what the
        policy permits."""
        if self._policy is None:
            return
        host = body.get("HostConfig") or {}
        sources = [
            (bind.split(":")[0], "ro" in bind.rpartition(":")[2].split(","))
            for bind in host.get("Binds") or []
        ]
        sources += [
            (mount.get("Source", ""), mount.get("ReadOnly", False))
            for mount in host.get("Mounts") or []
            if mount.get("Type") == "bind"
        ]
        for source, read_only in sources:
            if not source.startswith("/"):
                continue
            real = str(Path(source).resolve())
            if real == str(Path(source)):
                continue
            reason = mount_refusal(self._policy, real, read_only, self._protected)
            if reason is not None:
                raise RuntimeFailed(
                    f"cannot {doing}: {source} is a link to {real}; {reason}", retryable=False
                )

    def _drift(self, client: Client, inspect: Mapping[str, Any]) -> tuple[str, ...]:
        labels = inspect["Config"].get("Labels") or {}
        try:
            created = json.loads(labels.get(CREATED_LABEL, ""))
        except ValueError:
            return (f"Labels.{CREATED_LABEL}",)
        own = self._engines_own.get(inspect["Id"], frozenset())
        return tuple(name for name in self._compare(client, inspect, created) if name not in own)

    def _compare(
        self, client: Client, inspect: Mapping[str, Any], created: Mapping[str, Any]
    ) -> tuple[str, ...]:
        image = inspect["Image"]
        config = self._image_configs.get(image)
        if config is None:
            from docker.errors import NotFound

            with contextlib.suppress(NotFound):
                config = client.inspect_image(image).get("Config") or {}
                self._image_configs[image] = config
        return drift(created["name"], created["image"], created["body"], inspect, config)


def _reference(image: str) -> ImageRef:
    try:
        return ImageRef.parse(image)
    except InvalidReference as error:
        raise RuntimeFailed(str(error), retryable=False) from error


def _repository(ref: ImageRef) -> str:
    return f"{ref.registry}/{ref.repository}"


def _images(client: Client) -> tuple[EngineImage, ...]:
    return tuple(engine_image(listed) for listed in client.images())


def _tag_present(client: Client, ref: ImageRef, digest: str) -> bool:
    """Whether the image is there at `digest`; if so, its name stands for it."""
    from docker.errors import NotFound

    try:
        found = client.inspect_image(f"{_repository(ref)}@{digest}")
    except NotFound:
        return False
    if ref.tag is not None:
        client.tag(found["Id"], _repository(ref), ref.tag)
    return True


def _image_id(client: Client, spec: ContainerSpec, doing: str) -> str:
    """The id of the image that `spec` is pinned to; its name then stands for it."""
    from docker.errors import NotFound

    named: Mapping[str, Any] = {}
    with contextlib.suppress(NotFound):
        named = client.inspect_image(spec.image)
    known = [name.partition("@")[2] for name in named.get("RepoDigests") or []]
    if named and (not spec.digest or spec.digest in (*known, named["Id"])):
        return str(named["Id"])
    for found in _images(client):
        if spec.digest and spec.digest in (*found.digests, found.id):
            ref = _reference(spec.image)
            if ref.tag is not None:
                client.tag(found.id, _repository(ref), ref.tag)
            return found.id
    raise RuntimeFailed(
        f"cannot {doing}: the engine has no {spec.image} at {spec.digest or 'any digest'}; "
        "it has to be pulled first",
        retryable=True,
    )


def _inspect(client: Client, name: str) -> dict[str, Any] | None:
    from docker.errors import NotFound

    try:
        return dict(client.inspect_container(name))
    except NotFound:
        return None


def _remove(client: Client, name: str) -> None:
    from docker.errors import APIError, NotFound

    deadline = time.monotonic() + _REMOVAL_SECONDS
    while True:
        try:
            client.remove_container(name, v=True, force=True)
        except NotFound:
            return
        except APIError as error:
            # A removal that goes on already.
            if error.status_code != 409 or time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            return


def _read_logs(
    client: Client,
    identity: str,
    query: Mapping[str, Any],
    decoder: LogDecoder,
    put: Callable[[LogLine], None],
) -> None:
    """The SDK's own `logs` does not say which stream a line came from."""
    from docker.errors import APIError

    url = f"{client.base_url}/v{client.api_version}/containers/{identity}/logs"
    with client.get(url, params=query, stream=True, timeout=None) as response:
        if not response.ok:
            raise APIError(
                f"{response.status_code}", response=response, explanation=response.text[:600]
            )
        for data in response.raw.stream(64 * 1024, decode_content=False):
            for line in decoder.feed(data):
                put(line)
        for line in decoder.end():
            put(line)


def _runs_again(client: Client, identity: str) -> bool:
    """Waits until a stopped container runs again; False when it is removed."""
    while (inspect := _inspect(client, identity)) is not None:
        if inspect["State"].get("Running"):
            return True
        time.sleep(_FOLLOW_PAUSE)
    return False


def _timestamp(at: datetime) -> str:
    return f"{at.timestamp():.6f}"


def _after(stamp: str) -> str:
    """One nanosecond after `stamp`, as Docker writes times."""
    head, _, fraction = stamp.removesuffix("Z").partition(".")
    nanoseconds = int(fraction.ljust(9, "0")[:9] or 0) + 1
    whole = int(datetime.fromisoformat(f"{head}+00:00").timestamp())
    return f"{whole + nanoseconds // 10**9}.{nanoseconds % 10**9:09}"


def _innermost(error: BaseException) -> str:
    """What is wrong, without the layers of libraries around it."""
    import re

    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    text = str(error) or type(error).__name__
    return re.sub(r"<[^>]*object at 0x[0-9a-f]+>", "", text)
