"""Containers on a Docker engine, through its SDK."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

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
from .engine_errors import unreachable
from .engine_images import image_id, images, pull, reference, remove_image, tag_present
from .engine_link import Client, EngineLink, inspected
from .engine_logs import read_logs
from .engine_own import EnginesOwn
from .engine_reader import EngineReader
from .inspection import container_view
from .policy import DockerPolicy, mount_refusal, stop_seconds
from .scoring_module import shared_folder

_EVENTS = (
    *("create", "start", "restart", "stop", "kill", "die", "oom", "destroy"),
    *("pause", "unpause", "rename", "update", "health_status"),
)
"""Not exec_create and the like: each health check makes some."""

_REMOVAL_SECONDS = 20.0
_STALE_TASK = re.compile(r"\btask [0-9a-f]{12,}: already exists")


class DockerRuntime:
    """`ContainerRuntime` on the engine at `socket`, for the containers of `device_id`.

    `logins` are the device's own (address, username, password), for registries that the caller's
    credentials do not name. `network` is made when a container wants it and it is missing. With a
    `policy`, what a mounted path really leads to must be permitted too. `timeout`: seconds that
    the engine may be silent. Nothing is connected before the first call, and the SDK is imported
    with the first one that does more than look.
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
        engines_own: EnginesOwn | None = None,
    ) -> None:
        self._socket = socket
        self._device = device_id
        self._logins = logins
        self._network = network
        self._policy = policy
        self._protected = protected
        self._link = EngineLink(socket, timeout)
        self._networks = threading.Lock()
        self._image_configs: dict[str, Mapping[str, Any]] = {}
        self._engines_own = EnginesOwn() if engines_own is None else engines_own

    # The engine

    async def info(self) -> EngineInfo:
        def work(reader: EngineReader) -> EngineInfo:
            version, info = reader.version(), reader.info()
            return EngineInfo(
                version=version.get("Version", ""),
                api_version=version.get("ApiVersion", ""),
                os=info.get("OSType", ""),
                architecture=version.get("Arch", ""),
                root_dir=info.get("DockerRootDir", ""),
            )

        return await self._link.read("ask the engine", work)

    async def close(self) -> None:
        await self._link.close()

    # Images

    async def images(self) -> tuple[EngineImage, ...]:
        return await self._link.read("list images", images)

    async def pull(
        self,
        image: str,
        digest: str,
        credentials: tuple[tuple[str, str, str], ...],
        on_progress: Callable[[PullProgress], None],
    ) -> None:
        ref = reference(image)
        doing = f"pull {image} at {digest}"

        def present(client: Client) -> bool:
            return tag_present(client, ref, digest)

        def produce(client: Client, put: Callable[[PullProgress], None]) -> None:
            pull(client, ref, digest, (*credentials, *self._logins), doing, put)

        if await self._link.call(doing, present):
            return
        async for progress in self._link.stream(doing, produce, host=ref.registry):
            on_progress(progress)
        if not await self._link.call(doing, present):
            raise RuntimeFailed(
                f"cannot {doing}: the engine ended the transfer without the image; "
                "it is tried again",
                retryable=True,
            )

    async def remove_image(self, digest: str) -> None:
        doing = f"remove image {digest}"
        await self._link.call(doing, lambda client: remove_image(client, digest))

    # Containers

    async def containers(self) -> tuple[ContainerView, ...]:
        def work(reader: EngineReader) -> tuple[ContainerView, ...]:
            wanted = {"label": [f"{DEVICE_LABEL}={self._device}", MODULE_LABEL]}
            views = []
            for listed in reader.containers(wanted):
                inspect = reader.inspect_container(listed["Id"])
                if inspect is not None:
                    views.append(container_view(inspect, self._drift(inspect)))
            return tuple(sorted(views, key=lambda view: (view.module, view.name)))

        return await self._link.read("list containers", work)

    async def create(self, spec: ContainerSpec) -> None:
        doing = f"create container {spec.name}"
        await self._link.call(doing, lambda client: self._create(client, spec, doing))

    async def start(self, name: str) -> None:
        def work(client: Client) -> None:
            from docker.errors import APIError

            inspect = client.inspect_container(name)
            # Folders in /run do not outlive a reboot, containers do.
            _make_shared_folder({**inspect["Config"], "HostConfig": inspect["HostConfig"]})
            self._make_network(client, inspect["HostConfig"])
            try:
                client.start(name)
            except APIError as error:
                if _STALE_TASK.search(str(error.explanation)) is None:
                    raise
                # An engine that was killed while it started this container never starts it again.
                _remove(client, name)
                raise RuntimeFailed(
                    f"cannot start container {name}: the engine holds on to a start that was cut "
                    "short; the container was removed, to be made anew",
                    retryable=True,
                ) from error

        await self._link.call(f"start container {name}", work)

    async def stop(self, name: str, timeout: float | None = None) -> None:
        def work(client: Client) -> None:
            from docker.errors import NotFound

            inspect = inspected(client, name)
            if inspect is None:
                return
            seconds = stop_seconds(self._policy, inspect["Config"].get("StopTimeout"))
            with contextlib.suppress(NotFound):
                client.stop(inspect["Id"], seconds if timeout is None else math.ceil(timeout))

        await self._link.long_call(f"stop container {name}", work)

    async def remove(self, name: str) -> None:
        await self._link.call(f"remove container {name}", lambda client: _remove(client, name))

    async def logs(self, name: str, wanted: LogFilter, *, follow: bool) -> AsyncIterator[LogLine]:
        doing = f"read the logs of container {name}"

        def produce(client: Client, put: Callable[[LogLine], None]) -> None:
            read_logs(client, name, wanted, follow, doing, put)

        async for line in self._link.stream(doing, produce):
            yield line

    async def events(self) -> AsyncIterator[None]:
        doing = "watch the engine"
        waiting = threading.Event()

        def produce(reader: EngineReader, put: Callable[[None], None]) -> None:
            wanted = {
                "type": ["container"],
                "label": [f"{DEVICE_LABEL}={self._device}"],
                "event": list(_EVENTS),
            }
            with reader.events(wanted) as events:
                # What happened before the engine listened to us may be news as well.
                put(None)
                for _ in events:
                    if not waiting.is_set():
                        waiting.set()
                        put(None)
            raise unreachable(doing, str(self._socket), "it ended the connection")

        async for _ in self._link.watch(doing, produce):
            waiting.clear()
            yield None

    def _create(self, client: Client, spec: ContainerSpec, doing: str) -> None:
        leftover = inspected(client, spec.name)
        if leftover is not None:
            labels = leftover["Config"].get("Labels") or {}
            owner = labels.get(DEVICE_LABEL)
            if MODULE_LABEL in labels and owner not in (None, self._device):
                raise RuntimeFailed(
                    f"cannot {doing}: gatelet's device {owner} has a container of this name on the "
                    "same engine; give one of the two modules another name",
                    retryable=False,
                )
            if owner != self._device or MODULE_LABEL not in labels:
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
                and not self._drift(leftover)
            ):
                return
            _remove(client, leftover["Id"])
        image = image_id(client, spec, doing)
        body: dict[str, Any] = json.loads(spec.body)
        self._check_mounts(body, doing)
        _make_shared_folder(body)
        created = {"name": spec.name, "image": image, "body": body}
        sent = dict(body)
        sent["Labels"] = {
            **(body.get("Labels") or {}),
            SPEC_LABEL: spec.fingerprint(),
            CREATED_LABEL: canonical_body(created),
        }
        self._make_network(client, body.get("HostConfig") or {})
        identity = str(client.create_container_from_config(sent, spec.name)["Id"])
        inspect = client.inspect_container(identity)
        own = frozenset(self._compare(inspect, created))
        if "Image" in own:
            _remove(client, identity)
            raise RuntimeFailed(
                f"cannot {doing}: {spec.image} was given to another image meanwhile; "
                "it is tried again",
                retryable=True,
            )
        self._engines_own.note(identity, own)

    def _make_network(self, client: Client, host: Mapping[str, Any]) -> None:
        """The network that modules join by default, which somebody may have pruned."""
        name = self._network
        if not name or host.get("NetworkMode") != name:
            return
        with self._networks:
            # The engine's filter finds parts of names too, and it lets names be given twice.
            if all(found["Name"] != name for found in client.networks(names=[name])):
                client.create_network(name, check_duplicate=True)

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
        own = shared_folder(body)
        for source, read_only in sources:
            if not source.startswith("/") or source == own:
                continue
            real = str(Path(source).resolve())
            if real == str(Path(source)):
                continue
            reason = mount_refusal(self._policy, real, read_only, self._protected)
            if reason is not None:
                raise RuntimeFailed(
                    f"cannot {doing}: {source} is a link to {real}; {reason}", retryable=False
                )

    def _drift(self, inspect: Mapping[str, Any]) -> tuple[str, ...]:
        labels = inspect["Config"].get("Labels") or {}
        try:
            created = json.loads(labels.get(CREATED_LABEL, ""))
        except ValueError:
            return (f"Labels.{CREATED_LABEL}",)
        own = self._engines_own.of(inspect["Id"])
        return tuple(name for name in self._compare(inspect, created) if name not in own)

    def _compare(self, inspect: Mapping[str, Any], created: Mapping[str, Any]) -> tuple[str, ...]:
        image = inspect["Image"]
        config = self._image_configs.get(image)
        if config is None:
            found = self._link.reader.inspect_image(image)
            if found is not None:
                config = self._image_configs[image] = found.get("Config") or {}
        return drift(created["name"], created["image"], created["body"], inspect, config)


def _make_shared_folder(body: Mapping[str, Any]) -> None:
    """For the socket of a scoring module; the agent's group reaches it, and the container's user
    where that is a number."""
    path = shared_folder(body)
    if path is None:
        return
    folder = Path(path)
    user = str(body.get("User") or "").partition(":")[0]
    try:
        folder.mkdir(mode=0o770, parents=True, exist_ok=True)
        if user.isdecimal() and os.geteuid() == 0:
            os.chown(folder, int(user), -1)
        # The socket made there belongs to the group too.
        folder.chmod(0o2770)
    except OSError as error:
        raise RuntimeFailed(
            f"cannot make {folder} for the module's scoring socket: {error.strerror}; "
            "check device.run-dir",
            retryable=True,
        ) from error


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
