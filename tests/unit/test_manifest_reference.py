"""References to manifests, and the answers of whoever is asked for one."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gatelet.agent.manifest import ManifestError
from gatelet.agent.manifest_fetch import FetchFailed, HttpFetch
from gatelet.agent.manifest_reference import find_reference
from gatelet.simulator.pki import Pki

from .manifest_server import Server, manifest
from .manifest_server import server as server


def test_what_is_a_reference_and_what_is_none() -> None:
    inside = {"url": "http://plain.example:8080/x", "sha256": "sha256:" + "0" * 64}
    for document in ({"manifest": inside, "$version": 3}, {"deployment": {"manifest": inside}}):
        found = find_reference(json.dumps(document).encode(), ("plain.example:8080",))
        assert found is not None
        assert found.sha256 == "0" * 64
    for body in (manifest(), b"", b"{", b'{"manifest"', b'["manifest"]', b'{"a": "manifest"}'):
        assert find_reference(body) is None
    with pytest.raises(ManifestError, match="unknown key"):
        find_reference(json.dumps({"manifest": inside, "modules": {}}).encode())


@pytest.mark.parametrize(
    ("inside", "path", "said"),
    [
        ({"url": "file:///etc/passwd", "sha256": "0" * 64}, "manifest.url", "expected https"),
        ({"url": "ftp://h/x", "sha256": "0" * 64}, "manifest.url", "expected https"),
        ({"url": "http://example.com/x", "sha256": "0" * 64}, "manifest.url", "plain HTTP"),
        ({"url": "http://127.0.0.1.example.com/x", "sha256": "0" * 64}, "manifest.url", "plain"),
        ({"url": "https://u:p@h/x", "sha256": "0" * 64}, "manifest.url", "login"),
        ({"url": "https://h:x/", "sha256": "0" * 64}, "manifest.url", "not a URL"),
        ({"url": "https://[::1", "sha256": "0" * 64}, "manifest.url", "not a URL"),
        ({"url": "https://h/ x", "sha256": "0" * 64}, "manifest.url", "printable ASCII"),
        ({"url": "https://h/x", "sha256": "0" * 63}, "manifest.sha256", "64 lower-case"),
        ({"url": "https://h/x"}, "manifest.sha256", "missing"),
        ({"url": "https://h/x", "sha256": "0" * 64, "keyid": "x"}, "manifest.keyid", "keyId"),
        ({"body": [1]}, "manifest.body", "expected the manifest as text"),
        ({"body": "{}", "sha256": "0" * 64}, "manifest.sha256", "unknown key"),
        ("https://h/x", "manifest", "expected an object"),
    ],
)
def test_references_that_are_refused(inside: Any, path: str, said: str) -> None:
    with pytest.raises(ManifestError, match=said) as refused:
        find_reference(json.dumps({"manifest": inside}).encode())
    assert (refused.value.code, refused.value.path) == (400, path)


def drip(handler: Any) -> None:
    handler.send_response(200)
    handler.end_headers()
    try:
        while True:
            handler.wfile.write(b" ")
            threading.Event().wait(0.02)
    except OSError:
        pass


def large(handler: Any) -> None:
    handler.send_response(200)
    handler.end_headers()
    try:
        for _ in range(40):
            handler.wfile.write(b" " * 65536)
    except OSError:
        pass


def short(handler: Any) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "100")
    handler.end_headers()
    handler.wfile.write(b"only this")


def to(target: str) -> Callable[[Any], None]:
    def redirect(handler: Any) -> None:
        handler.send_response(302)
        handler.send_header("Location", target)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return redirect


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (500, "answered 500"),
        (drip, "not finished after 0.3 s"),
        (large, "larger than 1,048,576 bytes"),
        (short, "connection broke|IncompleteRead"),
        (to("/m.json"), "redirects more than 3 times"),
        (to("http://192.0.2.1/x"), "plain HTTP from 192.0.2.1"),
        (to("file:///etc/passwd"), "expected https://HOST/PATH"),
        (to("http://a:b@127.0.0.1/"), "a URL with a login"),
    ],
)
def test_answers_that_are_no_manifest(server: Server, answer: Any, said: str) -> None:
    server.answers["/m.json"] = answer
    seconds = 0.3 if answer is drip else 30.0
    with pytest.raises(FetchFailed, match=said) as failed:
        HttpFetch(seconds=seconds)(f"http://{server.address}/m.json?sig=secret", lambda: False)
    assert "secret" not in str(failed.value)


def test_a_redirect_is_followed_and_nobody_there_is_said(server: Server) -> None:
    server.answers |= {"/a": to("/b"), "/b": b"here"}
    assert HttpFetch()(f"http://{server.address}/a", lambda: False) == b"here"
    server.close()
    with pytest.raises(FetchFailed, match=r"http://127.0.0.1:\d+/a: .*refused"):
        HttpFetch()(f"http://{server.address}/a?sig=secret", lambda: False)
    server.__init__()  # type: ignore[misc]  # for the fixture to close


def test_https_needs_an_authority_that_is_known(tmp_path: Path) -> None:
    pki = Pki(tmp_path)
    server = Server(pki.server_context(["127.0.0.1"]))
    try:
        server.answers |= {"/m": b"here", "/down": to("http://127.0.0.1:1/m")}
        url = f"https://{server.address}"
        assert HttpFetch(pki.ca_file)(f"{url}/m", lambda: False) == b"here"
        for fetch, path, said in (
            (HttpFetch(), "/m", r"m: .*(certificate|CERTIFICATE)"),
            (HttpFetch(pki.ca_file), "/down", "from https to http, which is not followed"),
            (HttpFetch(tmp_path / "none.pem"), "/m", "manifest-ca-file .*none.pem cannot be used"),
        ):
            with pytest.raises(FetchFailed, match=said):
                fetch(url + path, lambda: False)
    finally:
        server.close()
