"""A device that wants signatures: manifests by reference, signed images, old ones played back."""

from __future__ import annotations

import asyncio
import hashlib
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization as ser
from cryptography.hazmat.primitives.asymmetric import ec
from gatelet.agent.main import main
from gatelet.modules.signing import PrivateKey, read_private_key

pytestmark = pytest.mark.e2e

Deployment = Callable[..., dict[str, Any]]


class Files(dict[str, bytes]):
    """Path -> content, served on loopback."""

    address: str


@pytest.fixture
def files() -> Iterator[Files]:
    files = Files()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = files.get(self.path)
            self.send_response(404 if body is None else 200)
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    files.address = f"127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield files
    server.shutdown()
    server.server_close()
    thread.join(10)


def reference(files: Files, key: PrivateKey, manifest: dict[str, Any], generation: int) -> Any:
    body = json.dumps({"signed": {"generation": generation}, **manifest}).encode()
    files[f"/{generation}.json"] = body
    return {
        "manifest": {
            "url": f"http://{files.address}/{generation}.json",
            "sha256": hashlib.sha256(body).hexdigest(),
            "signature": key.sign(body),
            "keyId": "release",
        }
    }


async def test_a_device_takes_what_is_signed_and_never_an_older_one(
    device: Any, make_deployment: Deployment, files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = ec.generate_private_key(ec.SECP256R1())
    pem = pair.private_bytes(ser.Encoding.PEM, ser.PrivateFormat.PKCS8, ser.NoEncryption())
    form = ser.PublicFormat.SubjectPublicKeyInfo
    private, public = device.folder / "release.key", device.folder / "release.pub"
    private.write_bytes(pem)
    public.write_bytes(pair.public_key().public_bytes(ser.Encoding.PEM, form))
    key = read_private_key(pem, None, "key")
    await device.stop_agent()
    config = device.folder / "agent.toml"
    registry = device.site.registry.address
    config.write_text(
        f"{config.read_text()}\n[trust]\nmanifests = 'require'\n"
        f"keys = [{{id = 'release', file = '{public}'}}]\n"
        f"images = [{{prefix = '{registry}/models'}}]\n"
    )
    await device.start_agent()

    async def sign(image: str) -> None:
        words = ["image", "sign", image, "--key", str(private), "--generation", "1"]
        assert await asyncio.to_thread(main, words) == 0

    first, second = await device.push("v1"), await device.push("v2")
    unsigned = device.desire(make_deployment(image=first))
    reported = await device.until_reported(
        lambda r: r.get("lastDesiredVersion") == unsigned and r["lastDesiredStatus"]["code"] == 403
    )
    assert "is not signed" in reported["lastDesiredStatus"]["description"]

    one = reference(files, key, make_deployment(image=first), 1)
    held = files.pop("/1.json")
    version = device.desire_raw(one)
    reported = await device.until_reported(
        lambda r: r.get("lastDesiredVersion") == version and "fetch" in r["gatelet"]
    )
    await device.until_reported(lambda r: "answered 404" in r["lastDesiredStatus"]["description"])
    files["/1.json"] = held
    # The manifest is here; its image is not signed yet, and nothing of it is used.
    reported = await device.until_reported(
        lambda r: r.get("modules", {}).get("digits", {}).get("runtimeStatus") == "backoff"
    )
    assert "is not signed" in reported["modules"]["digits"]["statusDescription"]
    assert "fetch" not in reported["gatelet"]
    await sign(first)
    await device.until_good(version)

    await sign(second)
    version = device.desire_raw(reference(files, key, make_deployment(image=second), 2))
    await device.until_good(version)

    # After a reboot without the server: what ran goes on, and the old reference is refused.
    await device.stop_agent()
    files.clear()
    version = device.desire_raw(one)
    await device.start_agent()
    reported = await device.until_reported(
        lambda r: r.get("lastDesiredVersion") == version and r["lastDesiredStatus"]["code"] == 409
    )
    assert "older than 2" in reported["lastDesiredStatus"]["description"]
    await device.until_reported(
        lambda r: r.get("modules", {}).get("digits", {}).get("runtimeStatus") == "running"
    )
    accuracy, versions = await device.accuracy()
    assert accuracy > 0.9
    assert versions == {"2"}

    # The same from a file on the device, waiting for the manifest and for its modules.
    async def apply(document: dict[str, Any]) -> int:
        file = device.folder / "document.json"
        file.write_text(json.dumps(document))
        words = ["apply", str(file), "--wait", "--timeout", "30", "--config", str(config)]
        return await asyncio.to_thread(main, words)

    third = reference(files, key, make_deployment(image=first), 3)
    held = files.pop("/3.json")
    applied = asyncio.ensure_future(apply(third))
    await device.until(lambda status: bool(status["fetch"] and status["fetch"]["error"]))
    assert not applied.done()
    files["/3.json"] = held
    assert await applied == 0
    assert (await device.accuracy())[1] == {"1"}
    assert await apply(one) == 1
    assert "(409): signed.generation" in capsys.readouterr().err
