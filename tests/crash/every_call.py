"""What the crash tests share: small models in a registry, and a device to kill at any moment."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gatelet.modules.oci.build import build_model_image
from gatelet.modules.oci.client import RegistryClient
from gatelet.modules.oci.layout import open_layout
from gatelet.modules.oci.push import push_image
from gatelet.modules.oci.reference import ImageRef
from gatelet.modules.oci.transport import RegistrySettings
from gatelet.simulator.background import BackgroundLoop
from gatelet.simulator.demo.cloud import deployment
from gatelet.simulator.registry import Registry

SCRIPT = Path(__file__).with_name("small_device.py")
VERSIONS = ("1", "2", "broken")
MODEL_BYTES = 40_000

CHANGING = (
    "openat,write,pwrite64,writev,fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat,"
    "rmdir,mkdir,mkdirat,ftruncate,link,linkat,symlink,chmod,fchmod,fchmodat"
)
"""System calls that change files, or open them. A kill at any other one leaves on the disk what
a kill at the next of these does."""


@dataclass
class Supplies:
    """A registry with the models, and their files' SHA-256 by version."""

    address: str
    known: dict[str, str]
    _registry: Registry
    _loop: BackgroundLoop

    @contextmanager
    def away(self) -> Iterator[None]:
        """Nobody listens where the registry was."""
        self._loop.run(self._registry.stop())
        try:
            yield
        finally:
            self._loop.run(self._registry.start())

    def manifest(self, version: str | None) -> dict[str, Any]:
        """The desired properties of `$edgeAgent`; without modules when `version` is None."""
        image = f"{self.address}/models/digits:{version}"
        content = deployment(image, backends="cpu")["modulesContent"]["$edgeAgent"]
        desired: dict[str, Any] = content["properties.desired"]
        return desired if version is not None else {**desired, "modules": {}}


@contextmanager
def supplies(folder: Path) -> Iterator[Supplies]:
    known = {}
    with BackgroundLoop() as loop:

        async def made() -> Registry:
            return Registry(folder / "registry")

        registry = loop.run(made())
        loop.run(registry.start())
        try:
            for version in VERSIONS:
                model = folder / "models" / version
                (model / "onnx").mkdir(parents=True)
                data = random.Random(version).randbytes(MODEL_BYTES)
                (model / "onnx" / "model.onnx").write_bytes(data)
                known[version] = hashlib.sha256(data).hexdigest()
                tensor = {"name": "x", "datatype": "FP32", "shape": [-1, 4]}
                (model / "model.json").write_text(
                    json.dumps(
                        {
                            "name": "digits",
                            "version": version,
                            "framework": "onnx",
                            "inputs": [tensor],
                            "outputs": [{**tensor, "name": "y"}],
                            "variants": [{"kind": "onnx", "path": "onnx/model.onnx"}],
                        }
                    )
                )
                layout = folder / "layouts" / version
                build_model_image(model, layout)
                name = f"{registry.address}/models/digits:{version}"
                with RegistryClient(RegistrySettings(registry.address, insecure=True)) as client:
                    push_image(client, ImageRef.parse(name), open_layout(layout))
            yield Supplies(registry.address, known, registry, loop)
        finally:
            loop.run(registry.stop())


@dataclass
class Life:
    """One run of the device. `outcome` is None when it was killed."""

    ended: str
    outcome: dict[str, Any] | None
    acknowledged: list[str] = field(default_factory=list)


class SmallDevice:
    """Starts forked devices; strace holds the one that is to suffer."""

    def __init__(self, supplies: Supplies) -> None:
        self.supplies = supplies
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (see close)
        self._server = subprocess.Popen(
            [sys.executable, str(SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def close(self) -> None:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait(20)
        self._server.stdout.close()
        self._errors.close()

    def errors(self) -> str:
        """The end of what the devices wrote to standard error."""
        self._errors.seek(0)
        return self._errors.read()[-4000:]

    def live(
        self,
        folder: Path,
        version: str | None = "",
        *,
        until: dict[str, Any],
        number: int = 2,
        strace: list[str] | None = None,
        thread: str = "ready",
        suffer: Callable[[], None] | None = None,
        **more: Any,
    ) -> Life:
        """Run until a condition holds. `version` "" brings no document, None an empty one.

        `strace` are arguments for it; `thread` "ready" is the main thread, "worker" the other.
        With `suffer` strace lets go when that returns, else when the device ends.
        """
        command = {
            "folder": str(folder),
            "registry": self.supplies.address,
            "known": self.supplies.known,
            "until": until,
            "version": number,
            **more,
        }
        if version != "":
            command["manifest"] = self.supplies.manifest(version)
        self._say(json.dumps(command))
        ready = json.loads(self._hear())
        tracer = None
        if strace is not None:
            tracer = subprocess.Popen(
                ["strace", "-p", str(ready[thread]), *strace],
                stderr=subprocess.PIPE,
                text=True,
            )
            assert tracer.stderr is not None
            line = tracer.stderr.readline()
            assert "attached" in line, line
        self._say("go")
        if tracer is not None and suffer is not None:
            suffer()
            tracer.terminate()
        answer = json.loads(self._hear())
        if tracer is not None:
            assert tracer.stderr is not None
            tracer.stderr.read()
            tracer.stderr.close()
            tracer.wait(20)
        if answer["ended"] not in ("exit 0", "signal 9"):
            raise AssertionError(f"the device ended with {answer['ended']}: {self.errors()}")
        return Life(answer["ended"], answer["outcome"], answer["acknowledged"])

    def _say(self, line: str) -> None:
        assert self._server.stdin is not None
        self._server.stdin.write(line + "\n")
        self._server.stdin.flush()

    def _hear(self) -> str:
        assert self._server.stdout is not None
        line = self._server.stdout.readline()
        if not line:
            raise AssertionError(f"the device's process ended: {self.errors()}")
        return line


def calls(log: Path) -> Counter[str]:
    """How often each system call is in a log of strace."""
    return Counter(re.findall(r"^(?:\d+ +)?(\w+)\(", log.read_text(), re.MULTILINE))


def fresh(template: Path, folder: Path) -> Path:
    """A copy of a device's folder."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(template, folder)
    return folder
