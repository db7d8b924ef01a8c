"""The requests of the distribution specification one by one: ranges, uploads, mounts, tags."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import pytest
from gatelet.modules.errors import ImageNotFound, InvalidImage
from gatelet.modules.oci.manifest import MANIFEST_TYPE, Descriptor, Manifest, digest_of, encode_json
from gatelet.simulator.registry import Registry
from registries import connect, push
from registries import image as image
from registries import registry as registry
from registries import serve as serve
from registries import simulated as simulated


def test_ranges(registry, image):
    push(registry, image)
    layer = image.manifest.layers[0]
    with image.open_blob(layer.digest) as blob:
        whole = blob.read()
    with connect(registry) as client:
        for offset in (0, 1, 700_000, layer.size - 1):
            with client.open_blob("models/digits", layer.digest, offset) as stream:
                assert stream.offset == offset
                assert b"".join(stream) == whole[offset:]
        for offset in (layer.size, layer.size + 5):
            with client.open_blob("models/digits", layer.digest, offset) as stream:
                assert stream.offset == 0
                assert b"".join(stream) == whole


def test_mounting_sends_nothing(registry, image):
    push(registry, image, "models/one:v1")
    layer = image.manifest.layers[0]

    def unwanted():
        raise AssertionError("uploaded")

    with connect(registry) as client:
        assert client.push_blob("models/two", layer, unwanted, mount_from="models/one") is False
        assert client.has_blob("models/two", layer.digest)
        assert not client.has_blob("models/two", digest_of(b"x"))


def test_a_wrong_upload_is_refused(registry):
    import io

    wrong = Descriptor("application/octet-stream", digest_of(b"right"), 5)
    with connect(registry) as client:
        with pytest.raises(InvalidImage, match="DIGEST_INVALID"):
            client.push_blob("models/a", wrong, lambda: io.BytesIO(b"wrong"))
        with pytest.raises((InvalidImage, ImageNotFound), match="MANIFEST"):
            client.put_manifest(
                "models/a", "v1", MANIFEST_TYPE, encode_json(Manifest(wrong, (wrong,)))
            )


def test_tags_chunks_and_deletion(simulated, image):
    """What `docker push` and registry tools use beyond our own client."""
    import urllib3

    push(simulated, image)
    push(simulated, image, "models/digits:v2")
    base = f"http://{simulated.address}"
    repository = f"{base}/v2/models/digits"
    with urllib3.PoolManager(retries=False) as http:
        assert http.request("GET", f"{base}/v2/").status == 200
        assert http.request("GET", f"{repository}/tags/list").json()["tags"] == ["v1", "v2"]
        assert http.request("GET", f"{repository}/tags/list?n=1&last=v1").json()["tags"] == ["v2"]
        assert http.request("GET", f"{base}/v2/none/tags/list").status == 404
        begun = http.request("POST", f"{repository}/blobs/uploads/")
        where = base + begun.headers["Location"]
        for start, chunk in ((0, b"one "), (4, b"two ")):
            span = {"Content-Range": f"{start}-{start + 3}"}
            sent = http.request("PATCH", where, body=chunk, headers=span)
            assert (sent.status, sent.headers["Range"]) == (202, f"0-{start + 3}")
        late = http.request("PATCH", where, body=b"x", headers={"Content-Range": "99-99"})
        assert (late.status, late.headers["Range"]) == (416, "0-7")
        assert http.request("GET", where).headers["Range"] == "0-7"
        digest = digest_of(b"one two three")
        done = http.request("PUT", f"{where}?digest={digest}", body=b"three")
        assert (done.status, done.headers["Docker-Content-Digest"]) == (201, digest)
        assert http.request("GET", f"{repository}/blobs/{digest}").data == b"one two three"
        assert http.request("PUT", where).status == 404
        begun = http.request("POST", f"{repository}/blobs/uploads/")
        where = base + begun.headers["Location"]
        assert http.request("DELETE", where).status == 204
        assert http.request("GET", where).status == 404
        for path in ("/v2/../../etc/passwd", "/v2/A/tags/list", "/v2/a/manifests/%2e%2e%2fx"):
            assert http.request("GET", base + path).status == 404
        assert http.request("POST", f"{repository}/tags/list").status == 405
        assert http.request("DELETE", f"{repository}/manifests/v2").status == 202
        assert http.request("GET", f"{repository}/tags/list").json()["tags"] == ["v1"]
        assert http.request("DELETE", f"{repository}/manifests/{image.digest}").status == 202
        gone = http.request("GET", f"{repository}/manifests/v1")
        assert gone.status == 404
        assert gone.json()["errors"][0]["code"] == "MANIFEST_UNKNOWN"


@pytest.mark.parametrize("turns", range(5))
async def test_a_registry_that_goes_away_leaves_no_connection_open(tmp_path, turns):
    registry = Registry(tmp_path)
    await registry.start()
    host, _, port = registry.address.partition(":")
    with socket.create_connection((host, int(port))) as client:
        # In the first turns of the loop the connection is not taken, or taken by half.
        for _ in range(turns):
            await asyncio.sleep(0)
        await registry.stop()
        client.setblocking(False)
        ended = asyncio.get_running_loop().sock_recv(client, 1)
        # One that nobody took is reset.
        with contextlib.suppress(ConnectionResetError):
            assert await asyncio.wait_for(ended, 10) == b""
