"""Keys, tokens, TLS and limits of the scoring process, over gRPC and REST alike."""

from __future__ import annotations

import argparse
import http.client
import json
import logging
import os
import ssl
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import grpc
import jwt
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.http as triton_http
from gatelet.agent.cli import score
from gatelet.agent.cli.command import CommandError
from gatelet.agent.scoring import http_server
from gatelet.agent.scoring import keys as keys_module
from gatelet.agent.scoring.dataplane import DataPlane
from gatelet.agent.scoring.grpc_server import AddressUnavailable
from gatelet.agent.scoring.keys import KeyStore
from gatelet.agent.scoring.rate import RateLimit
from gatelet.agent.scoring.settings import ScoringSettings
from gatelet.agent.scoring.tls import TlsFiles, TlsSettings
from gatelet.agent.scoring.tokens import TokenSettings
from gatelet.agent.scoring.transports import is_local, make_access
from gatelet.protos import control_pb2 as pb
from gatelet.protos import open_inference_pb2 as oip
from gatelet.protos.inference import InferenceStub
from gatelet.simulator.pki import CertificateFiles, Pki
from tritonclient.utils import InferenceServerException

from ..bench import onnx_models
from ..bench.scoring_site import TRANSPORTS, Site, serve

pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")

SECRET = b"0123456789abcdef0123456789abcdef"
BODY = json.dumps(
    {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}]}
)


@dataclass
class Guarded:
    site: Site
    keys: KeyStore

    def rest(
        self,
        method: str,
        path: str,
        bearer: str | None = None,
        headers: dict[str, str] | None = None,
        body: str | None = None,
    ) -> tuple[int, dict[str, str], Any]:
        sent = dict(headers or {})
        if bearer is not None:
            sent["Authorization"] = f"Bearer {bearer}"
        connection = http.client.HTTPConnection(self.site.http, timeout=20)
        connection.request(method, path, body, sent)
        response = connection.getresponse()
        raw = response.read()
        connection.close()
        named = {key.lower(): value for key, value in response.getheaders()}
        return response.status, named, json.loads(raw) if raw[:1] in (b"{", b"[") else raw

    def infer(self, endpoint: str, bearer: str | None = None) -> tuple[int, str]:
        """The HTTP status and the gRPC code of one and the same request."""
        path = f"/v2/models/{endpoint}/infer"
        status, _, _ = self.rest("POST", path, bearer, body=BODY)
        request = oip.ModelInferRequest(model_name=endpoint, raw_input_contents=[bytes(16)])
        request.inputs.add(name="x", datatype="FP32", shape=[1, 4])
        metadata = () if bearer is None else (("authorization", f"Bearer {bearer}"),)
        with grpc.insecure_channel(self.site.address) as channel:
            try:
                InferenceStub(channel).model_infer(request, 20, metadata)
            except grpc.RpcError as error:
                return status, error.code().name
        return status, "OK"


def token(**claims: Any) -> str:
    ends = datetime.now(timezone.utc) + timedelta(minutes=5)
    whole = {"iss": "me", "aud": "device", "sub": "app", "exp": ends, **claims}
    return jwt.encode(whole, SECRET, "HS256", {"kid": "k"})


@pytest.fixture(scope="module", params=TRANSPORTS)
def guarded(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("guarded")
    jwk = jwt.get_algorithm_by_name("HS256").to_jwk(SECRET, as_dict=True)
    (folder / "jwks.json").write_text(json.dumps({"keys": [{**jwk, "kid": "k"}]}))
    model = onnx_models.scale_folder(folder / "m", 2.0, version="1")
    settings = {
        "keys_dir": str(folder / "keys"),
        "tokens": TokenSettings(folder / "jwks.json", "me", "device"),
        "cors_origins": ("https://app.example",),
        "grpc_transport": request.param,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keys_module, "_FRESH_SECONDS", 0.0)
        with serve(folder / "s", settings=settings) as site:
            for auth in ("none", "key", "token"):
                site.load(auth, model, auth=auth)
                site.probe(auth)
            site.switch({auth: [(auth, 0, True)] for auth in ("none", "key", "token")})
            yield Guarded(site, KeyStore(folder / "keys"))


REFUSED = (401, "UNAUTHENTICATED")
PASSED = (200, "OK")


def test_every_endpoint_asks_for_what_its_deployment_says(guarded: Guarded) -> None:
    keys = guarded.keys.show("key")
    assert guarded.infer("none") == PASSED
    assert guarded.infer("key") == REFUSED
    assert guarded.infer("key", keys.primary) == PASSED
    assert guarded.infer("key", keys.secondary) == PASSED
    assert guarded.infer("key", "wrong") == REFUSED
    assert guarded.infer("key", guarded.keys.show("token").primary) == REFUSED
    assert guarded.infer("token") == REFUSED
    assert guarded.infer("token", keys.primary) == REFUSED
    assert guarded.infer("token", token()) == PASSED
    assert guarded.infer("token", token(endpoints=["token", "x"])) == PASSED
    assert guarded.infer("token", token(endpoints=["x"])) == (403, "PERMISSION_DENIED")
    assert guarded.infer("token", token(aud="other")) == REFUSED


def test_keys_are_regenerated_without_an_outage(guarded: Guarded) -> None:
    keys = guarded.keys.show("key")
    new = guarded.keys.regenerate("key", "primary")
    assert guarded.infer("key", keys.primary) == REFUSED
    assert guarded.infer("key", keys.secondary) == PASSED
    assert guarded.infer("key", new.primary) == PASSED


def test_refusals_say_how(guarded: Guarded) -> None:
    status, headers, answer = guarded.rest("POST", "/v2/models/key/infer", body=BODY)
    assert (status, headers["www-authenticate"]) == (401, "Bearer")
    assert "Authorization: Bearer" in answer["error"]
    status, headers, answer = guarded.rest(
        "POST", "/score/key", "wrong", {"Content-Type": "application/json"}, '{"data": []}'
    )
    assert (status, answer["message"]) == (401, "the key is wrong")
    assert headers["x-ms-run-function-failed"] == "False"


def test_what_concerns_the_whole_server_needs_any_of_the_keys(guarded: Guarded) -> None:
    for method, path in (
        ("GET", "/v2/models/stats"),
        ("POST", "/v2/repository/index"),
        ("GET", "/v2/systemsharedmemory/status"),
        ("GET", "/openapi.json"),
        ("GET", "/v2/models/nothing"),
        ("GET", "/swagger.json"),
    ):
        assert guarded.rest(method, path)[0] == 401, path
        assert guarded.rest(method, path, guarded.keys.show("key").primary)[0] in (200, 404)
        assert guarded.rest(method, path, token())[0] in (200, 404)
    for path in ("/", "/v2", "/v2/health/ready", "/v2/models/key/ready"):
        assert guarded.rest("GET", path)[0] == 200, path
    assert guarded.rest("POST", "/score")[0] == 401
    with grpc.insecure_channel(guarded.site.address) as channel:
        stub = InferenceStub(channel)
        assert stub.server_ready(oip.ServerReadyRequest(), 20).ready
        for call in (
            lambda: stub.repository_index(oip.RepositoryIndexRequest(), 20),
            lambda: stub.system_shared_memory_unregister(
                oip.SystemSharedMemoryUnregisterRequest(), 20
            ),
            lambda: stub.model_metadata(oip.ModelMetadataRequest(name="key"), 20),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                call()
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        request = oip.ModelInferRequest(model_name="key")
        (answer,) = stub.model_stream_infer(iter([request]), 20)
        assert "needs a key" in answer.error_message
    connection = http.client.HTTPConnection(guarded.site.metrics, timeout=20)
    connection.request("GET", "/metrics")
    assert connection.getresponse().status == 401
    connection.close()


def test_endpoints_that_are_being_loaded_ask_for_keys_already(tmp_path: Path) -> None:
    keys = KeyStore(tmp_path / "keys")
    with serve(tmp_path / "s", settings={"keys_dir": str(tmp_path / "keys")}) as site:
        starting = Guarded(site, keys)
        wanted = [pb.WantedEndpoint(endpoint="key", auth="key"), pb.WantedEndpoint(endpoint="open")]
        site.control.announce(pb.AnnounceRequest(endpoints=wanted), 10)
        assert starting.infer("open") == (503, "UNAVAILABLE")
        assert starting.infer("key") == REFUSED
        assert starting.infer("key", keys.show("key").secondary) == (503, "UNAVAILABLE")
        assert starting.infer("unknown", keys.show("key").primary) == (404, "NOT_FOUND")


def test_tritonclients_pass_keys(guarded: Guarded) -> None:
    headers = {"authorization": f"Bearer {guarded.keys.show('key').primary}"}
    for module, address in ((triton, guarded.site.address), (triton_http, guarded.site.http)):
        value = module.InferInput("x", [1, 4], "FP32")
        value.set_data_from_numpy(np.ones((1, 4), np.float32))
        with module.InferenceServerClient(address) as client:
            result = client.infer("key", [value], headers=headers)
            assert result.as_numpy("total").tolist() == [[8.0]]
            with pytest.raises(InferenceServerException):
                client.infer("key", [value])


def test_refused_calls_are_audited_without_the_key(
    guarded: Guarded, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "gatelet.scoring.audit"):
        guarded.infer("key", "the-wrong-key-of-somebody")
    records = [json.loads(record.getMessage()) for record in caplog.records]
    assert [record["operation"] for record in records] == ["infer", "grpc"]
    for record in records:
        assert record["refused"] == "UNAUTHENTICATED"
        assert (record["endpoint"], record["client"][-9:]) == ("key", "127.0.0.1")
        assert "the-wrong-key" not in json.dumps(record)


def test_web_pages_call_only_from_where_they_may(guarded: Guarded) -> None:
    def ask(origin: str, method: str = "POST", path: str = "/v2/models/none/infer") -> Any:
        headers = {"Origin": origin, "Access-Control-Request-Headers": "content-type"}
        return guarded.rest(method, path, None, headers, BODY if method == "POST" else None)

    status, headers, _ = ask("https://app.example")
    assert (status, headers["access-control-allow-origin"]) == (200, "https://app.example")
    assert headers["vary"] == "Origin"
    status, headers, _ = ask("https://evil.example")
    assert (status, "access-control-allow-origin" in headers) == (403, False)
    status, headers, _ = ask("https://app.example", "OPTIONS")
    assert (status, headers["access-control-allow-headers"]) == (200, "content-type")
    assert headers["access-control-allow-methods"] == "POST"
    status, headers, _ = ask("https://evil.example", "OPTIONS")
    assert "access-control-allow-methods" not in headers
    assert ask("https://evil.example", "GET", "/v2")[0] == 200


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_too_many_requests_of_one_client(tmp_path: Path, transport: str) -> None:
    model = onnx_models.scale_folder(tmp_path / "m", 2.0)
    # Slow enough to give nobody a turn while a busy machine gets to the end of the test.
    settings = {"rate": RateLimit(0.02, 3), "grpc_transport": transport}
    with serve(tmp_path / "s", settings=settings) as site:
        site.deploy({"e": model})
        guarded = Guarded(site, KeyStore(tmp_path))
        answers = [guarded.rest("POST", "/v2/models/e/infer", body=BODY) for _ in range(4)]
        assert [status for status, _, _ in answers] == [200, 200, 200, 429]
        assert 1 <= int(answers[-1][1]["retry-after"]) <= 50
        assert guarded.infer("e")[1] == "RESOURCE_EXHAUSTED"
        # Health is never refused: a supervisor would take that for a fault.
        assert guarded.rest("GET", "/v2/health/ready")[0] == 200


# --- addresses and TLS


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("127.0.0.1:1", True),
        ("localhost:1", True),
        ("[::1]:1", True),
        ("unix:/run/x", True),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("192.168.1.2:1", False),
        ("edge-7:1", False),
    ],
)
def test_addresses_that_others_reach_need_tls(address: str, local: bool) -> None:
    assert is_local(address) is local
    settings = ScoringSettings("s", address, "", "")
    if local:
        make_access(DataPlane("t"), settings)
    else:
        with pytest.raises(AddressUnavailable, match="allow-insecure"):
            make_access(DataPlane("t"), settings)
    make_access(DataPlane("t"), ScoringSettings("s", address, "", "", allow_insecure=True))


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


def place(files: CertificateFiles, folder: Path) -> TlsSettings:
    """Copies that a test may replace, as an administrator would: each at once."""
    folder.mkdir(exist_ok=True)
    for source, name in ((files.key, "key.pem"), (files.certificate, "cert.pem")):
        (folder / "new").write_bytes(source.read_bytes())
        os.replace(folder / "new", folder / name)
    return TlsSettings(folder / "cert.pem", folder / "key.pem")


def https(site: Site, context: ssl.SSLContext, path: str, bearer: str = "") -> tuple[int, bytes]:
    """The status, and the certificate that the server showed."""
    connection = http.client.HTTPSConnection(
        f"localhost:{site.http.rpartition(':')[2]}", timeout=20, context=context
    )
    try:
        connection.request("GET", path, headers={"Authorization": f"Bearer {bearer}"})
        shown = connection.sock.getpeercert(binary_form=True)  # type: ignore[union-attr]
        return connection.getresponse().status, shown
    finally:
        connection.close()


def command(words: list[str]) -> int:
    parser = argparse.ArgumentParser()
    score.register(parser.add_subparsers())
    arguments = parser.parse_args([*words, "--timeout", "20"])
    return int(arguments.run(arguments))


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_wide_addresses_ask_for_keys_and_renew_certificates(
    tmp_path: Path, pki: Pki, monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    monkeypatch.setattr(http_server, "_RELOAD_SECONDS", 0.1)
    model = onnx_models.scale_folder(tmp_path / "m", 2.0)
    settings = {
        "tls": place(pki.server(["localhost"]), tmp_path / "tls"),
        "keys_dir": str(tmp_path / "keys"),
        "metrics_address": "",
        "grpc_transport": transport,
    }
    wide = "0.0.0.0:0"
    trust = pki.client_context()
    roots = grpc.ssl_channel_credentials(pki.ca_file.read_bytes())
    metadata = (("authorization", f"Bearer {KeyStore(tmp_path / 'keys').show('e').primary}"),)
    with serve(tmp_path / "s", settings=settings, address=wide, http_address=wide) as site:
        site.deploy({"e": model})
        key = KeyStore(tmp_path / "keys").show("e").primary
        path = "/v2/models/e"
        assert https(site, trust, path)[0] == 401
        status, before = https(site, trust, path, key)
        assert status == 200
        target = f"localhost:{site.address.rpartition(':')[2]}"
        request = oip.ModelMetadataRequest(name="e")
        asked = ["score", "e", "--input", "x=[[1, 2, 3, 4]]", "--url", target]
        asked += ["--ca-file", str(pki.ca_file)]
        with pytest.raises(CommandError, match="needs a key or token"):
            command(asked)
        monkeypatch.setenv("GATELET_SCORING_KEY", key)
        assert command(asked) == 0
        with pytest.raises(CommandError, match="nothing answers"):
            command(asked[:-2])
        with grpc.secure_channel(target, roots) as channel:
            with pytest.raises(grpc.RpcError) as caught:
                InferenceStub(channel).model_metadata(request, 20)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            assert InferenceStub(channel).model_metadata(request, 20, metadata).name == "e"
        other = Pki(tmp_path / "other")
        place(other.server(["localhost"]), tmp_path / "tls")
        trust.load_verify_locations(other.ca_file)
        deadline = time.monotonic() + 30
        while https(site, trust, path, key)[1] == before:
            assert time.monotonic() < deadline, "the old certificate is still served"
        roots = grpc.ssl_channel_credentials(other.ca_file.read_bytes())
        with grpc.secure_channel(target, roots) as channel:
            assert InferenceStub(channel).model_metadata(request, 20, metadata).name == "e"


def test_nobody_is_left_hanging_while_certificates_are_renewed(
    tmp_path: Path, pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "_RELOAD_SECONDS", 0.0)
    monkeypatch.setattr(http_server, "_SWEEP_SECONDS", 0.001)
    renewed: list[TlsFiles] = []

    def renew(files: TlsFiles) -> ssl.SSLContext:
        renewed.append(files)
        return files.context()

    monkeypatch.setattr(TlsFiles, "renewed", renew)
    settings = {"tls": place(pki.server(["localhost"]), tmp_path / "tls"), "grpc_address": ""}
    trust = pki.client_context()
    with (
        serve(tmp_path / "s", settings=settings, http_address="0.0.0.0:0") as site,
        ThreadPoolExecutor(8) as clients,
    ):
        asked = clients.map(lambda _: https(site, trust, "/v2")[0], range(200))
        assert set(asked) == {200}
    assert len(renewed) > 20


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_mutual_tls(tmp_path: Path, pki: Pki, transport: str) -> None:
    model = onnx_models.scale_folder(tmp_path / "m", 2.0)
    files = pki.server(["localhost"])
    tls = TlsSettings(files.certificate, files.key, pki.ca_file, True)
    settings, wide = {"tls": tls, "grpc_transport": transport}, "0.0.0.0:0"
    with serve(tmp_path / "s", settings=settings, address=wide, http_address=wide) as site:
        site.deploy({"e": model})
        device = pki.device("app")
        assert https(site, pki.client_context(device), "/v2/models/e")[0] == 200
        with pytest.raises((ssl.SSLError, ConnectionError, http.client.RemoteDisconnected)):
            https(site, pki.client_context(), "/v2/models/e")
        target = f"localhost:{site.address.rpartition(':')[2]}"
        roots, chain = pki.ca_file.read_bytes(), device.certificate.read_bytes()
        request = oip.ModelMetadataRequest(name="e")
        proven = grpc.ssl_channel_credentials(roots, device.key.read_bytes(), chain)
        with grpc.secure_channel(target, proven) as channel:
            assert InferenceStub(channel).model_metadata(request, 20).name == "e"
        with grpc.secure_channel(target, grpc.ssl_channel_credentials(roots)) as channel:
            with pytest.raises(grpc.RpcError) as caught:
                InferenceStub(channel).model_metadata(request, 20)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("transport", ["grpcio", "http2"])
def test_endpoints_for_some_certificates_only(tmp_path: Path, pki: Pki, transport: str) -> None:
    model = onnx_models.scale_folder(tmp_path / "m", 2.0)
    files = pki.server(["localhost"])
    # grpcio asks for certificates only where it may insist on them.
    required = transport == "grpcio"
    settings = {
        "tls": TlsSettings(files.certificate, files.key, pki.ca_file, required),
        "keys_dir": str(tmp_path / "keys"),
        "grpc_transport": transport,
        "allow_insecure": True,
    }
    key = KeyStore(tmp_path / "keys").show("both").primary
    with serve(
        tmp_path / "s", settings=settings, address="0.0.0.0:0", http_address="0.0.0.0:0"
    ) as site:
        for name, options in (
            ("press", {"clients": ["press-7", "press-8"]}),
            ("both", {"clients": ["press-7"], "auth": "key"}),
            ("open", {}),
        ):
            site.load(name, model, **options)
            site.probe(name)
        site.switch({name: [(name, 0, True)] for name in ("press", "both", "open")})
        roots, target = pki.ca_file.read_bytes(), f"localhost:{site.address.rpartition(':')[2]}"

        def over_grpc(endpoint: str, shown: CertificateFiles | None, bearer: str) -> int:
            proof = (
                (None, None)
                if shown is None
                else (shown.key.read_bytes(), shown.certificate.read_bytes())
            )
            metadata = (("authorization", f"Bearer {bearer}"),) if bearer else ()
            with grpc.secure_channel(target, grpc.ssl_channel_credentials(roots, *proof)) as ch:
                call = InferenceStub(ch).model_metadata
                try:
                    call(oip.ModelMetadataRequest(name=endpoint), 20, metadata)
                except grpc.RpcError as error:
                    return {"UNAUTHENTICATED": 401, "PERMISSION_DENIED": 403}[error.code().name]
            return 200

        def asked(endpoint: str, shown: CertificateFiles | None = None, bearer: str = "") -> int:
            """The status, which is the same over both protocols."""
            context = pki.client_context() if shown is None else pki.client_context(shown)
            status = https(site, context, f"/v2/models/{endpoint}", bearer)[0]
            assert over_grpc(endpoint, shown, bearer) == status
            return status

        seven, eight, other = (pki.device(name) for name in ("press-7", "press-8", "press-9"))
        assert [asked("press", one) for one in (seven, eight, other)] == [200, 200, 403]
        assert [asked("both", one) for one in (seven, eight)] == [401, 403]
        assert [asked("both", one, key) for one in (seven, eight)] == [200, 403]
        assert asked("open", other) == 200
        if not required:
            assert [asked(one, None, key) for one in ("press", "both", "open")] == [401, 401, 200]
        # What concerns the whole server is for whoever may call an endpoint that asks.
        stats = [
            https(site, pki.client_context(*shown), "/v2/models/stats")[0]
            for shown in ((seven,), (other,))
        ]
        assert stats == [200, 403]


def test_broken_files_leave_the_old_certificate(tmp_path: Path, pki: Pki) -> None:
    settings = place(pki.server(["localhost"]), tmp_path / "tls")
    files = TlsFiles(settings)
    assert files.renewed() is None
    settings.cert_file.write_text("no certificate")
    assert files.renewed() is None
    place(pki.server(["localhost", "127.0.0.1"]), tmp_path / "tls")
    assert files.renewed() is not None
