"""The distribution project's registry, from Debian's package, as a process of the test."""

from __future__ import annotations

import json
import queue
import re
import subprocess
import threading
from pathlib import Path
from typing import Any

from required import SEARCHED, program

USER, PASSWORD = "device", "s3cret:pw"
# bcrypt of PASSWORD.
HTPASSWD = f"{USER}:$2y$05$abcdefghijklmnopqrstuugx1ANyULq/LMrIVpiIGARw82GmA9Dae\n"


class DistributionServer:
    """docker-registry on a port of its own; the port stays over `stop` and `start`."""

    def __init__(
        self, folder: Path, *, login: bool = False, tls: tuple[Path, Path] | None = None
    ) -> None:
        self._folder = folder
        self._port = 0
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        folder.mkdir(parents=True, exist_ok=True)
        self._extra: dict[str, Any] = {}
        if login:
            (folder / "htpasswd").write_text(HTPASSWD)
            self._extra["auth"] = {"htpasswd": {"realm": "r", "path": str(folder / "htpasswd")}}
        self._tls = {} if tls is None else {"certificate": str(tls[0]), "key": str(tls[1])}
        self.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._port}"

    def start(self) -> None:
        http: dict[str, Any] = {"addr": self.address}
        if self._tls:
            http["tls"] = self._tls
        config = {
            "version": "0.1",
            "storage": {
                "filesystem": {"rootdirectory": str(self._folder / "data")},
                "delete": {"enabled": True},
            },
            "http": http,
            **self._extra,
        }
        # JSON is YAML too.
        (self._folder / "config.yml").write_text(json.dumps(config))
        self._process = subprocess.Popen(
            [program("docker-registry"), "serve", self._folder / "config.yml"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={"PATH": SEARCHED, "OTEL_TRACES_EXPORTER": "none"},
        )
        lines: queue.Queue[str | None] = queue.Queue()
        stream = self._process.stderr
        assert stream is not None

        def read() -> None:
            for line in stream:
                lines.put(line)
            lines.put(None)

        self._reader = threading.Thread(target=read)
        self._reader.start()
        said = []
        while (line := lines.get(timeout=20)) is not None:
            said.append(line)
            if match := re.search(r"listening on 127\.0\.0\.1:(\d+)", line):
                self._port = int(match[1])
                return
        raise AssertionError("".join(said))

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is None or self._reader is None or process.stderr is None:
            return
        process.terminate()
        process.wait(10)
        self._reader.join(10)
        process.stderr.close()

    def blob_file(self, digest: str) -> Path:
        hexadecimal = digest.partition(":")[2]
        blobs = self._folder / "data/docker/registry/v2/blobs/sha256"
        return blobs / hexadecimal[:2] / hexadecimal / "data"
