"""Manifests by reference and signed manifests, against real HTTP servers on loopback."""

from __future__ import annotations

import asyncio
import hashlib
import http.server
import json
import ssl
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization as ser
from cryptography.hazmat.primitives.asymmetric import ec
from gatelet.agent.clock import Clock, SystemClock
from gatelet.agent.main import main
from gatelet.agent.manifest import ManifestError
from gatelet.agent.manifest_fetch import FetchFailed, HttpFetch
from gatelet.agent.manifest_reference import find_reference
from gatelet.agent.manifest_source import ManifestSource
from gatelet.agent.reconcile import Reconciler, ReconcileSettings
from gatelet.agent.store import StateStore
from gatelet.agent.trust import Trust
from gatelet.modules.signing import PrivateKey, read_private_key
from gatelet.simulator.pki import Pki
from gatelet.simulator.virtual_time import VirtualClock, run

AGENT = {"type": "docker", "settings": {"image": "agent:1"}}


def manifest(image: str = "m:1", generation: int | None = None) -> bytes:
    document: dict[str, Any] = {
        "schemaVersion": "1.1",
        "runtime": {"type": "docker", "settings": {}},
        "systemModules": {"edgeAgent": AGENT},
        "modules": {"m": {"type": "docker", "status": "running", "settings": {"image": image}}},
    }
    if generation is not None:
        document["signed"] = {"generation": generation}
    return json.dumps(document).encode()


def new_key() -> PrivateKey:
    key = ec.generate_private_key(ec.SECP256R1())
    form = ser.PrivateFormat.PKCS8
    pem = key.private_bytes(ser.Encoding.PEM, form, ser.NoEncryption())
    return read_private_key(pem, None, "key")


KEY, OTHER = new_key(), new_key()


class Server:
    """`answers` maps paths to bodies, statuses, or functions of the handler."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        outer = self
        self.answers: dict[str, Any] = {}
        self.asked: list[str] = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(self.path)
                answer = outer.answers.get(self.path.partition("?")[0], 404)
                if callable(answer):
                    answer(self)
                elif isinstance(answer, int):
                    self.send_error(answer)
                else:
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(answer)))
                    self.end_headers()
                    self.wfile.write(answer)

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = False
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
            self._server.handle_error = lambda *_: None  # type: ignore[method-assign]
        self.address = f"127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)

    def reference(self, body: bytes, path: str = "/m.json", key: PrivateKey | None = None) -> bytes:
        inside = {
            "url": f"http://{self.address}{path}",
            "sha256": hashlib.sha256(body).hexdigest(),
        }
        if key is not None:
            inside["signature"] = key.sign(body)
        return json.dumps({"manifest": inside}).encode()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


class Device:
    def __init__(
        self, folder: Path, trust: Trust | None = None, clock: Clock | None = None, **options: Any
    ) -> None:
        clock = clock or SystemClock()
        self.store = StateStore(folder / "state.db", clock)

        reconciler = Reconciler(
            self.store,
            None,  # type: ignore[arg-type]  # nothing is carried out here
            clock,
            ReconcileSettings(),
            lambda snapshot: None,
        )
        self.source = ManifestSource(
            self.store,
            reconciler,
            clock,
            trust=trust,
            jitter=Random(1),
            **{"retry_seconds": (0.01, 0.02), **options},
        )
        self._job: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Device:
        self._job = asyncio.create_task(self.source.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._job is not None
        assert not self._job.done()
        self._job.cancel()
        await asyncio.gather(self._job, return_exceptions=True)
        self.store.close()

    async def until(self, condition: Callable[[], bool]) -> None:
        deadline = asyncio.get_running_loop().time() + 10
        while not condition():
            assert asyncio.get_running_loop().time() < deadline, self.source.awaited
            await asyncio.sleep(0.005)

    async def settled(self) -> tuple[int, str]:
        await self.until(lambda: self.source.awaited is None)
        seen = self.store.seen()[0]
        return seen.code, seen.description


REQUIRE = Trust(True, {"release": KEY.public})


async def test_a_reference_becomes_a_deployment_and_a_reboot_needs_no_network(
    server: Server, tmp_path: Path
) -> None:
    body = manifest()
    reference = server.reference(body, "/m.json?sig=secret")
    async with Device(tmp_path) as device:
        verdict = device.source.submit("iothub", 3, reference)
        assert (verdict.code, verdict.generation) == (202, 0)
        assert "secret" not in verdict.description
        await device.until(lambda: bool(device.source.awaited and device.source.awaited.error))
        awaited = device.source.awaited
        assert awaited is not None
        assert "answered 404" in awaited.description
        assert "secret" not in awaited.description
        assert device.source.submit("iothub", 4, reference).code == 202
        server.answers["/m.json"] = body
        assert await device.settled() == (200, "")
        assert device.store.seen()[0].version == 4
        latest = device.store.latest()
        assert latest is not None
        assert (latest.body, latest.version, latest.source) == (body, 4, "iothub")
        assert device.store.pending() is None
    asked = len(server.asked)
    async with Device(tmp_path) as device:
        assert device.source.submit("iothub", 4, reference).code == 200
        # Another address of the same manifest: it is here.
        moved = server.reference(body, "/elsewhere.json")
        assert device.source.submit("iothub", 5, moved).code == 200
        assert device.source.awaited is None
    assert len(server.asked) == asked


async def test_what_was_to_be_fetched_survives_a_reboot(server: Server, tmp_path: Path) -> None:
    body = manifest()
    async with Device(tmp_path) as device:
        assert device.source.submit("local", 0, server.reference(body), always=True).code == 202
    server.answers["/m.json"] = body
    async with Device(tmp_path) as device:
        await device.until(lambda: device.store.latest() is not None)
        assert device.store.seen()[0].source == "local"


async def test_a_newer_document_ends_the_fetch(server: Server, tmp_path: Path) -> None:
    hold, entered = threading.Event(), threading.Event()

    def held(handler: Any) -> None:
        entered.set()
        hold.wait(10)
        handler.send_error(500)

    server.answers["/m.json"] = held
    try:
        async with Device(tmp_path) as device:
            reference = server.reference(manifest("old:1"))
            device.source.submit("mqtt", 0, manifest("first:1"))
            device.source.submit("iothub", 1, reference)
            await device.until(entered.is_set)
            # What another source sent before, and what it is refused, ends nothing.
            assert device.source.submit("mqtt", 0, manifest("first:1")).code == 200
            assert device.source.submit("mqtt", 0, b"{").code == 400
            assert device.source.awaited is not None
            assert device.source.submit("mqtt", 0, manifest("new:1")).code == 200
            assert device.source.awaited is None
            assert device.store.pending() is None
            # It does not come back with the next connection.
            verdict = device.source.submit("iothub", 1, reference)
            assert (verdict.code, device.source.awaited) == (409, None)
            assert "a newer document from mqtt" in verdict.description
            reference = server.reference(manifest("old:2"))
            # The same source: back to what it had, or to something that is refused.
            for again in (manifest("newer:1"), manifest("newer:1"), b"{"):
                device.source.submit("iothub", 2, reference)
                assert device.source.awaited is not None
                device.source.submit("iothub", 3, again)
                assert device.source.awaited is None
            hold.set()
    finally:
        hold.set()
    store = StateStore(tmp_path / "state.db", SystemClock())
    assert not any(b"old:" in deployment.body for deployment in store.deployments())
    store.close()


async def test_a_wrong_hash_is_never_parsed_and_tried_again(server: Server, tmp_path: Path) -> None:
    body = manifest("right:1")
    server.answers["/m.json"] = manifest("wrong:1")
    async with Device(tmp_path) as device:
        device.source.submit("iothub", 1, server.reference(body))
        await device.until(lambda: bool(device.source.awaited and device.source.awaited.error))
        assert device.store.latest() is None
        awaited = device.source.awaited
        assert awaited is not None
        assert "has sha256" in awaited.error
        server.answers["/m.json"] = body
        assert await device.settled() == (200, "")


async def test_what_was_fetched_and_is_no_manifest_is_refused_for_good(
    server: Server, tmp_path: Path
) -> None:
    bodies = (b"{", server.reference(b"x"), manifest("no image"))
    async with Device(tmp_path) as device:
        for number, body in enumerate(bodies):
            server.answers["/m.json"] = body
            device.source.submit("iothub", number, server.reference(body))
            code, description = await device.settled()
            assert code == 400
            assert description
        asked = len(server.asked)
        assert device.source.submit("iothub", 9, server.reference(bodies[-1])).code == 400
        assert len(server.asked) == asked


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
    with pytest.raises(FetchFailed, match=said) as failed:
        HttpFetch(seconds=0.3)(f"http://{server.address}/m.json?sig=secret", lambda: False)
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


def inline(body: bytes, signature: str, key_id: str = "") -> bytes:
    inside = {"body": [body[:100].decode(), body[100:].decode()], "signature": signature}
    return json.dumps({"manifest": inside | ({"keyId": key_id} if key_id else {})}).encode()


SIX = manifest("m:6", 6)
REFUSED = {
    "unsigned, whole": (manifest("m:8", 8), 403, "is not signed"),
    "unsigned, by reference": (inline(manifest("m:8", 8), ""), 403, "missing; this device takes"),
    "unknown key id": (inline(SIX, KEY.sign(SIX), "x"), 403, 'the key "x" is not trusted here'),
    "wrong key": (inline(SIX, OTHER.sign(SIX)), 403, "not made with the key release"),
    "wrong key, right id": (inline(SIX, OTHER.sign(SIX), "release"), 403, "not made with the key"),
    "tampered": (inline(manifest("m:7", 6), KEY.sign(SIX)), 403, "over these bytes"),
    "a blank more": (inline(SIX + b" ", KEY.sign(SIX)), 403, "over these bytes"),
    "no generation": (inline(manifest(), KEY.sign(manifest())), 403, "generation"),
    "older": (inline(SIX, KEY.sign(SIX)), 409, "generation 6 is older than 7"),
    "as new, but different": (
        inline(manifest("m:9", 7), KEY.sign(manifest("m:9", 7))),
        409,
        "generation 7 was another manifest",
    ),
    "no signature at all": (b'{"manifest": {"body": ""}}', 403, "missing"),
}


@pytest.mark.parametrize(("document", "code", "said"), REFUSED.values(), ids=REFUSED)
async def test_what_a_device_that_wants_signatures_refuses(
    tmp_path: Path, document: bytes, code: int, said: str
) -> None:
    seven = manifest("m:7", 7)
    async with Device(tmp_path, REQUIRE) as device:
        assert (
            device.source.submit("iothub", 1, inline(seven, KEY.sign(seven), "release")).code == 200
        )
    # After a reboot too, and from any source.
    for source in ("iothub", "mqtt", "local"):
        async with Device(tmp_path, REQUIRE) as device:
            verdict = device.source.submit(source, 2, document, always=source == "local")
            assert verdict.code == code
            assert said in verdict.description
            latest = device.store.latest()
            assert latest is not None
            assert latest.body == seven


async def test_an_authentic_old_reference_played_back_is_refused(
    server: Server, tmp_path: Path
) -> None:
    references = []
    async with Device(tmp_path, REQUIRE) as device:
        for generation in (1, 2):
            body = manifest(f"m:{generation}", generation)
            server.answers[f"/{generation}.json"] = body
            references.append(server.reference(body, f"/{generation}.json", KEY))
            device.source.submit("iothub", generation, references[-1])
            assert (await device.settled())[0] == 200
    async with Device(tmp_path, REQUIRE) as device:
        # The body is stored, but the generation decides.
        assert device.source.submit("iothub", 3, references[0]).code == 409
        assert device.source.submit("mqtt", 1, references[1]).code == 200
        wrong = server.reference(b"never fetched", "/x", OTHER)
        named = json.loads(wrong)
        named["manifest"]["keyId"] = "elsewhere"
        assert device.source.submit("iothub", 4, json.dumps(named).encode()).code == 403
        assert "/x" not in server.asked
        server.answers["/x"] = b"never fetched"
        assert device.source.submit("iothub", 5, wrong).code == 202
        code, description = await device.settled()
        assert (code, "not made with the key release" in description) == (403, True)


async def test_a_key_that_is_withdrawn_is_not_trusted_and_leaves_no_lock(tmp_path: Path) -> None:
    high = manifest("m:1", 2**53 - 1)
    both = Trust(True, {"release": KEY.public, "lost": OTHER.public})
    async with Device(tmp_path, both) as device:
        assert device.source.submit("iothub", 1, inline(high, OTHER.sign(high))).code == 200
        assert device.source.submit("iothub", 2, inline(SIX, KEY.sign(SIX))).code == 409
    async with Device(tmp_path, REQUIRE) as device:
        assert device.source.submit("iothub", 3, inline(high, OTHER.sign(high))).code == 403
        assert device.source.submit("iothub", 4, inline(SIX, KEY.sign(SIX))).code == 200


async def test_a_full_disk_delays_and_loses_nothing(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = manifest()
    async with Device(tmp_path) as device:
        (pages,) = device.store._db.execute("PRAGMA page_count").fetchone()
        device.store._db.execute(f"PRAGMA max_page_count={pages}")
        wide = {"url": f"http://{server.address}/m.json?{'x' * 1900}"}
        inside = json.loads(server.reference(body))["manifest"] | wide
        reference = json.dumps({"manifest": inside, "$metadata": {"x": "x" * 9000}}).encode()
        # It is not stored, and fetched all the same.
        assert device.source.submit("local", 0, reference).code == 202
        assert device.store.pending() is None
        await device.until(lambda: bool(device.source.awaited and device.source.awaited.error))
        # Refusals cannot be stored either.
        assert device.source.submit("mqtt", 0, b"{" + b" " * 9000).code in (400, 500)
        device.store._db.execute("PRAGMA max_page_count=100000")
        await device.until(lambda: device.store.pending() is not None)
        server.answers["/m.json"] = body
        assert (await device.settled())[0] == 200
        assert device.store.pending() is None


def test_three_days_without_a_network(tmp_path: Path) -> None:
    body = manifest()
    inside = {"url": "https://h/m", "sha256": hashlib.sha256(body).hexdigest()}
    asked: list[float] = []

    async def days(clock: VirtualClock) -> float:
        def fetch(url: str, stop: Callable[[], bool]) -> bytes:
            asked.append(clock.monotonic())
            if clock.monotonic() < 72 * 3600:
                raise FetchFailed("no route to host")
            return body

        async with Device(tmp_path, clock=clock, fetch=fetch, retry_seconds=(1.0, 60.0)) as device:
            device.source.submit("iothub", 1, json.dumps({"manifest": inside}).encode())
            await asyncio.sleep(72 * 3600)
            assert device.store.latest() is None
            device.source.retry_now()
            began = clock.monotonic()
            assert await device.settled() == (200, "")
            return clock.monotonic() - began

    assert run(days) < 0.1
    pauses = [after - before for before, after in pairwise(asked)]
    assert max(pauses) <= 60.0
    # Full jitter: half of the cap on average, and no two devices alike.
    assert 25 < sum(pauses[10:]) / len(pauses[10:]) < 35


async def test_a_preview_judges_and_fetches_nothing(server: Server, tmp_path: Path) -> None:
    async with Device(tmp_path, REQUIRE) as device:
        for document, code, said in (
            (manifest("m:8", 8), 403, "is not signed"),
            (inline(SIX, OTHER.sign(SIX)), 403, "not made with the key"),
            (server.reference(SIX, key=KEY), 202, "name the file itself"),
            (b'{"manifest": {"url": "file:///x", "sha256": ""}}', 400, "expected https"),
        ):
            found = device.source.preview(document)
            assert (found.code, said in found.description) == (code, True), found
        assert device.source.preview(b"").code == 200
        found = device.source.preview(inline(SIX, KEY.sign(SIX)))
        assert [change.module for change in found.modules] == ["m"]
        assert server.asked == []
        assert device.store.seen() == ()
        assert device.store.proofs("manifest") == ()


async def test_a_rollback_ends_the_fetch(server: Server, tmp_path: Path) -> None:
    async with Device(tmp_path) as device:
        for number in (1, 2):
            device.source.submit("iothub", number, manifest(f"m:{number}"))
            device.store.set_phase(number, "good")
        assert device.source.submit("iothub", 3, server.reference(SIX)).code == 202
        assert device.source.rollback(7).code == 400
        assert device.source.awaited is not None
        assert device.source.rollback().code == 200
        assert device.source.awaited is None
        latest = device.store.latest()
        assert latest is not None
        assert latest.body == manifest("m:1")


async def test_without_a_policy_signatures_are_not_looked_at(tmp_path: Path) -> None:
    async with Device(tmp_path, Trust(False, {"release": KEY.public})) as device:
        assert device.source.submit("iothub", 1, inline(SIX, "junk", "who")).code == 200
        assert device.store.proofs("manifest") == ()


async def test_the_command_signs_what_devices_take(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    public = key.public_key().public_bytes(ser.Encoding.PEM, ser.PublicFormat.SubjectPublicKeyInfo)
    form = ser.PrivateFormat.PKCS8
    (tmp_path / "k").write_bytes(key.private_bytes(ser.Encoding.PEM, form, ser.NoEncryption()))
    (tmp_path / "p").write_bytes(public)
    (tmp_path / "m.json").write_bytes(manifest())
    sign = ["manifest", "sign", str(tmp_path / "m.json"), "--key", str(tmp_path / "k")]
    assert main(sign) == 1
    assert "give it one with --generation" in capsys.readouterr().err
    url = f"http://{server.address}/m.json"
    assert main([*sign, "--generation", "4", "--url", url]) == 2
    capsys.readouterr()
    out = tmp_path / "signed.json"
    assert main([*sign, "--generation", "4", "--url", url, "-o", str(out), "--key-id", "r"]) == 0
    reference = capsys.readouterr().out.encode()
    assert main([*sign, "--generation", "5"]) == 0
    whole = capsys.readouterr().out.encode()
    trust = Trust(True, {"r": read_private_key((tmp_path / "k").read_bytes(), None, "k").public})
    async with Device(tmp_path / "device", trust) as device:
        server.answers["/m.json"] = out.read_bytes()
        device.source.submit("iothub", 1, reference)
        assert (await device.settled())[0] == 200
        assert device.source.submit("iothub", 2, whole).code == 200
    (tmp_path / "r.json").write_bytes(reference)
    (tmp_path / "w.json").write_bytes(whole)
    verify = ["manifest", "verify", "--key", str(tmp_path / "p")]
    assert main([*verify, str(tmp_path / "w.json")]) == 0
    assert main([*verify, str(tmp_path / "r.json")]) == 2
    assert main([*verify, str(tmp_path / "r.json"), "--manifest", str(out), "--json"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith('{"key":')
    assert main([*verify, str(tmp_path / "r.json"), "--manifest", str(tmp_path / "m.json")]) == 1
    assert main([*verify, str(tmp_path / "m.json")]) == 1
