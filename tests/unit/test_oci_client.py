from __future__ import annotations

import http.server
import json
import threading
import urllib.parse

import pytest
from gatelet.accelerators.backend import Variant
from gatelet.modules.errors import (
    DigestMismatch,
    ImageNotFound,
    InvalidImage,
    InvalidReference,
    NoSuitableVariant,
    RegistryUnavailable,
    Unauthorized,
)
from gatelet.modules.oci.auth import Challenge, basic, parse_challenges
from gatelet.modules.oci.client import RegistryClient, RegistrySettings
from gatelet.modules.oci.manifest import (
    VariantLayer,
    digest_of,
    parse_config,
    parse_manifest,
)
from gatelet.modules.oci.pull import choose_layers, suits
from hypothesis import given
from hypothesis import strategies as st

DIGEST = digest_of(b"blob")


class Server:
    """Answers with what `answer(handler)` gives: (status, headers, body)."""

    def __init__(self, answer):
        self.seen = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                outer.seen.append((self.command, self.path, self.headers.get("Authorization")))
                length = int(self.headers.get("Content-Length", 0))
                self.rfile.read(length)
                status, headers, body = answer(self)
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def log_message(self, *_):
                pass

        for method in ("HEAD", "POST", "PUT"):
            setattr(Handler, f"do_{method}", Handler.do_GET)

        class Quiet(http.server.ThreadingHTTPServer):
            def handle_error(self, *_):
                """Clients that hang up are part of these tests."""

        self.server = Quiet(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(10)


@pytest.fixture
def serve():
    running = []

    def serve(answer):
        running.append(Server(answer))
        return running[-1]

    yield serve
    for server in running:
        server.close()


def connect(server, waits=None, **settings):
    return RegistryClient(
        RegistrySettings(server.address, read_timeout=5, connect_timeout=5, **settings),
        sleep=(waits if waits is not None else []).append,
    )


def read(client, digest=DIGEST):
    with client.open_blob("a/b", digest) as stream:
        return b"".join(stream)


@pytest.mark.parametrize(
    ("settings", "url"),
    [
        (RegistrySettings("r.io"), "https://r.io"),
        (RegistrySettings("https://r.io/"), "https://r.io"),
        (RegistrySettings("r.io:5000", insecure=True), "http://r.io:5000"),
        (RegistrySettings("localhost:5000"), "http://localhost:5000"),
        (RegistrySettings("127.9.9.9:5000"), "http://127.9.9.9:5000"),
        (RegistrySettings("[::1]:5000"), "http://[::1]:5000"),
        (RegistrySettings("127.0.0.1.evil.io"), "https://127.0.0.1.evil.io"),
        (RegistrySettings("localhost.evil.io"), "https://localhost.evil.io"),
        (RegistrySettings("127.0.0.1:1", ca_file="ca.pem"), "https://127.0.0.1:1"),
        (RegistrySettings("docker.io"), "https://registry-1.docker.io"),
    ],
)
def test_only_loopback_or_permission_goes_without_tls(settings, url):
    assert settings.base_url == url


def test_an_empty_address_is_refused():
    with pytest.raises(InvalidReference):
        RegistryClient(RegistrySettings(""))


@pytest.mark.parametrize(
    ("header", "parsed"),
    [
        ("", ()),
        ("Negotiate abc", ()),
        ("Basic", (Challenge("basic", {}),)),
        (
            'Bearer realm="https://a/t?x=1,2",service="s", scope="repository:a:pull,push"',
            (
                Challenge(
                    "bearer",
                    {
                        "realm": "https://a/t?x=1,2",
                        "service": "s",
                        "scope": "repository:a:pull,push",
                    },
                ),
            ),
        ),
        (
            'Basic realm="say \\"Bearer, x\\"", Bearer realm=https://b',
            (
                Challenge("basic", {"realm": 'say "Bearer, x"'}),
                Challenge("bearer", {"realm": "https://b"}),
            ),
        ),
    ],
)
def test_challenges(header, parsed):
    assert parse_challenges(header) == parsed


@given(st.text(max_size=80))
def test_any_header_is_read(header):
    parse_challenges(header)
    parse_challenges("Bearer " + header)


def token_registry(serve, lifetime=300, token="t0ken"):
    def answer(handler):
        url = urllib.parse.urlsplit(handler.path)
        if url.path == "/token":
            if handler.headers.get("Authorization") != basic("me", "pw"):
                return 401, {}, b""
            return 200, {}, json.dumps({"token": token, "expires_in": lifetime}).encode()
        if handler.headers.get("Authorization") != "Bearer t0ken":
            realm = f"http://127.0.0.1:{handler.server.server_port}/token"
            asked = f'Bearer realm="{realm}",service="reg",scope="other"'
            return 401, {"WWW-Authenticate": asked}, b""
        return 200, {}, b"blob"

    return serve(answer)


def test_a_token_is_fetched_once_per_scope(serve):
    server = token_registry(serve)
    with connect(server, username="me", password="pw") as client:
        client.ping()
        assert read(client) == read(client) == b"blob"
        assert client.has_blob("a/b", DIGEST)
    tokens = [
        urllib.parse.parse_qs(urllib.parse.urlsplit(path).query)
        for _, path, _ in server.seen
        if path.startswith("/token")
    ]
    assert [token["scope"] for token in tokens] == [
        ["other"],
        ["repository:a/b:pull"],
        ["repository:a/b:pull,push"],
    ]
    assert all(token["service"] == ["reg"] for token in tokens)


def test_a_refused_or_useless_token(serve):
    server = token_registry(serve)
    for settings in ({}, {"username": "me", "password": "no"}):
        with connect(server, **settings) as client, pytest.raises(Unauthorized, match="check user"):
            client.ping()
    for token in ("", 7, None, "a\nb"):
        with (
            connect(token_registry(serve, token=token), username="me", password="pw") as client,
            pytest.raises(RegistryUnavailable, match="no token"),
        ):
            client.ping()


def test_credentials_do_not_follow_a_redirect_to_storage(serve):
    storage = serve(lambda handler: (200, {}, b"blob"))

    def answer(handler):
        if not handler.headers.get("Authorization"):
            return 401, {"WWW-Authenticate": "Basic"}, b""
        return 307, {"Location": f"http://{storage.address}/blob?signed=1"}, b""

    with connect(serve(answer), username="me", password="pw") as client:
        assert read(client) == b"blob"
    assert storage.seen == [("GET", "/blob?signed=1", None)]


def test_redirects_end(serve):
    server = serve(lambda handler: (302, {"Location": handler.path + "x"}, b""))
    with (
        connect(server, attempts=1) as client,
        pytest.raises(RegistryUnavailable, match="redirects more than 5 times"),
    ):
        read(client)
    assert len(server.seen) == 6


def test_retries_are_few_and_waits_are_short(serve):
    answers = iter([(503, {"Retry-After": "3600"}, b"")] + [(502, {}, b"")] * 9)
    server = serve(lambda handler: next(answers))
    waits = []
    with connect(server, waits) as client, pytest.raises(RegistryUnavailable, match="502"):
        client.ping()
    assert len(server.seen) == 4
    assert 10 <= waits[0] <= 10.5
    assert all(0 <= wait <= 8 for wait in waits[1:])


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (204, RegistryUnavailable),
        (304, RegistryUnavailable),
        (400, InvalidImage),
        (401, Unauthorized),
        (403, Unauthorized),
        (404, ImageNotFound),
        (405, InvalidImage),
        (413, InvalidImage),
        (429, RegistryUnavailable),
        (500, RegistryUnavailable),
        (501, RegistryUnavailable),
        (599, RegistryUnavailable),
    ],
)
def test_every_status_is_one_of_our_errors(serve, status, error):
    server = serve(lambda handler: (status, {}, b""))
    with connect(server, attempts=1) as client, pytest.raises(error) as caught:
        read(client)
    assert server.address in str(caught.value)
    assert "a/b" in str(caught.value)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"<html>", ""),
        (b"[]", ""),
        (b'{"errors": 1}', ""),
        (b'{"errors": [1]}', ""),
        (b"[" * 50_000, ""),
        (b"x" * 500_000, ""),
        (b'{"errors":[{"code":"C","message":"a\\u001b[31m"}]}', "(C: a[31m)"),
    ],
)
def test_what_the_registry_says_is_passed_on_with_care(serve, body, said):
    server = serve(lambda handler: (404, {}, body))
    with connect(server, attempts=1) as client, pytest.raises(ImageNotFound) as caught:
        read(client)
    assert said in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_wrong_answers_to_a_range(serve):
    def answer(handler):
        if handler.headers.get("Range"):
            return 206, {"Content-Range": "bytes 1-3/4"}, b"lob"
        return 200, {}, b"blob"

    with connect(serve(answer)) as client, client.open_blob("a/b", DIGEST, 2) as stream:
        assert (stream.offset, b"".join(stream)) == (0, b"blob")


def test_manifests_are_bounded_and_verified(serve):
    huge = serve(lambda handler: (200, {}, bytes(5 * 2**20)))
    with connect(huge) as client, pytest.raises(InvalidImage, match="larger than"):
        client.get_manifest("a/b", "v1")
    claimed = {"Docker-Content-Digest": digest_of(b"other")}
    lying = serve(lambda handler: (200, claimed, b"{}"))
    with connect(lying) as client:
        with pytest.raises(DigestMismatch):
            client.get_manifest("a/b", "v1")
        with pytest.raises(DigestMismatch):
            client.get_manifest("a/b", DIGEST)
    silent = serve(lambda handler: (200, {}, b"{}"))
    with connect(silent) as client:
        assert client.head_manifest("a/b", "v1") is None
        assert client.get_manifest("a/b", "v1").digest == digest_of(b"{}")


def test_not_http_at_all():
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(10)

        def answer():
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"SSH-2.0-x\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with (
            RegistryClient(RegistrySettings(address, attempts=1)) as client,
            pytest.raises(RegistryUnavailable, match=address),
        ):
            client.ping()
        thread.join(10)


# Which layers a device needs

CPU = Variant("onnx", "m")
Z2 = Variant("finn", "z2", "pynq-z2", "xc7z020clg400-1")


@pytest.mark.parametrize(
    ("variant", "board", "part", "expected"),
    [
        (CPU, None, None, True),
        (CPU, "pynq-z2", "x", True),
        (Z2, None, None, False),
        (Z2, "pynq-z2", None, True),
        (Z2, "Pynq-Z2", "XC7Z020CLG400-1", True),
        (Z2, "pynq-z2", "7z020clg400", True),
        (Z2, "pynq-z2", "xc7z020clg400-2", False),
        (Z2, "pynq-z2", "xc7z010clg400-1", False),
        (Z2, "pynq-z1", "xc7z020clg400-1", False),
        (Z2, None, "xc7z020clg400-1", True),
        (Variant("finn", "z", part="xczu3eg-sbva484-1-e"), "ultra96", "zu3eg-sbva484", True),
        (Variant("finn", "z", part="xczu3eg-sbva484-1-e"), "ultra96", None, False),
        (Variant("finn", "z", "ultra96"), "ultra96", None, True),
        (Variant("finn", "z", "ultra96"), None, "zu3eg-sbva484", False),
    ],
)
def test_which_device_runs_what(variant, board, part, expected):
    assert suits(variant, board, part) is expected


LAYERED = (
    VariantLayer("onnx", "m", 1),
    VariantLayer("finn", "z2", 2, "pynq-z2"),
    VariantLayer("finn", "kv", 3, "kv260"),
)


@pytest.mark.parametrize(
    ("variants", "board", "chosen"),
    [
        (LAYERED, None, (0, 1, 4)),
        (LAYERED, "pynq-z2", (0, 1, 2, 4)),
        (LAYERED, "kv260", (0, 1, 3, 4)),
        (LAYERED[1:], "kv260", (0, 1, 3, 4)),
        (None, None, (0, 1, 2, 3, 4)),
    ],
)
def test_layers_of_other_devices_stay_away(variants, board, chosen):
    assert choose_layers(5, variants, board, None, "image") == chosen


def test_nothing_for_this_device():
    with pytest.raises(NoSuitableVariant, match="finn for kv260"):
        choose_layers(5, LAYERED[1:], "zcu104", None, "image")
    with pytest.raises(NoSuitableVariant):
        choose_layers(1, (), None, None, "image")


# Documents from anyone

BLOB = {"mediaType": "x", "digest": DIGEST, "size": 1}
MANIFEST = {"schemaVersion": 2, "config": BLOB, "layers": [BLOB]}


@pytest.mark.parametrize(
    "document",
    [
        [],
        {},
        MANIFEST | {"schemaVersion": 1},
        MANIFEST | {"layers": [BLOB | {"digest": "sha256:../../etc/passwd"}]},
        MANIFEST | {"layers": [BLOB | {"digest": "sha512:" + "0" * 128}]},
        MANIFEST | {"layers": [BLOB | {"size": -1}]},
        MANIFEST | {"layers": [BLOB | {"size": 2**60}]},
        MANIFEST | {"layers": [BLOB] * 600},
        MANIFEST | {"layers": None},
        {"schemaVersion": 2, "manifests": [{}]},
        {"schemaVersion": 2, "manifests": None},
    ],
)
def test_bad_manifests(document):
    with pytest.raises(InvalidImage, match=r"^r\.io/a: "):
        parse_manifest(json.dumps(document).encode(), "r.io/a")


@given(st.binary(max_size=100))
def test_noise_is_an_invalid_image(noise):
    with pytest.raises(InvalidImage):
        parse_manifest(noise, "x")
    with pytest.raises(InvalidImage):
        parse_config(noise, "x", 1)
