"""`gatelet sim` and the control API of a site, as a test in another language uses them."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gatelet.simulator.background import BackgroundLoop
from gatelet.simulator.iothub.devices import ClientId
from gatelet.simulator.site import Site
from gatelet.simulator.site_config import SiteConfigError, SiteSettings, parse_settings

pytestmark = pytest.mark.e2e
GATELET = (sys.executable, "-m", "gatelet.agent.main")


class Control:
    """A site, and its control API through urllib."""

    def __init__(self, site: Site, loop: BackgroundLoop) -> None:
        self.site, self.loop = site, loop

    def __call__(
        self, method: str, path: str, body: Any = None, token: str | None = None
    ) -> tuple[int, Any]:
        control = self.site.control
        request = urllib.request.Request(
            control.url + path,
            None if body is None else json.dumps(body).encode(),
            {"Authorization": f"Bearer {control.token if token is None else token}"},
            method=method,
        )
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                status, text = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                status, text = error.code, error.read()
        return status, json.loads(text) if text.startswith((b"{", b"[")) else text


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Control]:
    with BackgroundLoop() as loop:
        site = loop.call(lambda: Site(SiteSettings(tmp_path_factory.mktemp("site"))))
        loop.run(site.start())
        yield Control(site, loop)
        loop.run(site.stop())


def test_faults_by_name(control: Control) -> None:
    status, faults = control("GET", "/faults")
    assert (status, set(faults.values())) == (200, {0})
    status, faults = control("PATCH", "/faults", {"lose_acks": 2, "delay_seconds": 0.5})
    assert (status, faults["lose_acks"], faults["delay_seconds"]) == (200, 2, 0.5)
    assert control.site.hub.faults.lose_acks == 2
    for wrong in ({"lose_acks": 7, "nonsense": 1}, {"lose_acks": -1}, {"lose_acks": "2"}, []):
        status, error = control("PATCH", "/faults", wrong)
        assert status == 400, error
        assert error["Message"]
    assert control.site.hub.faults.lose_acks == 2, "all or nothing"
    assert set(control("DELETE", "/faults")[1].values()) == {0}


def test_nobody_gets_in_without_the_token(control: Control) -> None:
    for method, path in (
        ("GET", "/site"),
        ("GET", "/faults"),
        ("POST", "/connections/hub/drop"),
        ("GET", "/hub/devices"),
        ("GET", "/hub/sim/overview"),
        ("PUT", "/hub/"),
        ("GET", "/nowhere"),
        ("GET", "/hub/page/../sim/overview"),
    ):
        for token in ("", "wrong", "é"):
            status, _ = control(method, path, token=token.encode().decode("latin-1"))
            assert status in (401, 404, 405), (method, path)
            assert status == 401 or path in ("/hub/", "/nowhere")
    assert control("GET", "/hub/", token="")[0] == 200, "the page itself is for everybody"
    assert b"<script" in control("GET", "/hub/", token="")[1]
    assert control("GET", "/hub/page/hub.js", token="")[0] == 200


def test_servers_go_away_and_come_back(control: Control) -> None:
    assert control("POST", "/connections/hub/pause")[0] == 204
    assert control.site.hub.paused
    assert control("POST", "/connections/hub/resume")[0] == 204
    assert not control.site.hub.paused
    for part in ("hub", "broker"):
        assert control("POST", f"/connections/{part}/drop")[0] == 204
    for part, action in (("hub", "explode"), ("nothing", "drop"), ("registry", "drop")):
        assert control("POST", f"/connections/{part}/{action}")[0] in (400, 404)


def test_broker_and_registry(control: Control) -> None:
    message = {"topic": "a/b", "payload": "hello", "qos": 1, "retain": True}
    assert control("POST", "/broker/publish", message)[0] == 204
    assert control("GET", "/broker/retained") == (200, {"a/b": "aGVsbG8="})
    assert control("POST", "/broker/publish", {"topic": "", "qos": 3})[0] == 400
    address = control.site.registry.address
    assert control("POST", "/registry/fail", {"count": 1, "status": 500})[0] == 204
    with pytest.raises(urllib.error.HTTPError, match="500") as caught:
        urllib.request.urlopen(f"http://{address}/v2/", timeout=10)
    caught.value.close()
    assert control("POST", "/registry/heal")[0] == 204
    urllib.request.urlopen(f"http://{address}/v2/", timeout=10).close()
    for fault, body in (
        ("corrupt", {}),
        ("truncate", {"digest": "x", "at": "y"}),
        ("truncate", {"digest": "x", "at": -1}),
        ("fail", {"count": 10**12}),
        ("fail", {"count": 1, "status": 99_999}),
        ("drop", {"after": float("inf")}),
        ("melt", {}),
    ):
        assert control("POST", f"/registry/{fault}", body)[0] == 400


def test_numbers_without_end_do_not_trouble_the_registry(control: Control) -> None:
    address, digits = control.site.registry.address, "9" * 5000
    digest = f"sha256:{hashlib.sha256(b'x').hexdigest()}"
    push = f"http://{address}/v2/x/blobs/uploads/?digest={digest}"
    urllib.request.urlopen(urllib.request.Request(push, b"x", method="POST"), timeout=10).close()
    for path in (f"tags/list?n={digits}", f"blobs/{digest}"):
        request = urllib.request.Request(
            f"http://{address}/v2/x/{path}", headers={"Range": f"bytes={digits}-"}
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            assert answer.status == 200


def test_the_hub_below_the_control_api(control: Control) -> None:
    status, rows = control("POST", "/hub/devices/query", {"query": "SELECT * FROM devices"})
    assert (status, [row["deviceId"] for row in rows]) == (200, ["edge-1"])
    patch = {"properties": {"desired": {"x": 1}}}
    assert control("PATCH", "/hub/twins/edge-1", patch)[1]["properties"]["desired"]["x"] == 1
    device = control.loop.call(control.site.hub.core.twin, ClientId("edge-1"))
    assert device.desired.value == {"x": 1}
    assert control("GET", "/site")[1]["hub"]["hostName"] == control.site.hub.host_name


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("device = ", "not valid TOML"),
        ("devise = 'x'", "devise"),
        ("board = 'abacus'", "abacus"),
        ("parts = ['hub', 'moon']", "parts"),
        ("[ports]\nbroker = 70000", "ports.broker"),
        ("[faults]\nnonsense = 1", "nonsense"),
        ("device = 'a b'", "a b"),
        ("[[devices]]\nedge = true", "id"),
    ],
)
def test_wrong_files_are_named(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(SiteConfigError, match=why) as caught:
        parse_settings(text, "site.toml", tmp_path)
    assert "site.toml" in str(caught.value)


def test_a_site_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text(
        'device = "gateway"\nboard = "none"\n'
        '[[devices]]\nid = "camera"\ntags = { a = 1 }\n'
        "[faults]\nrefuse-connects = 3\n"
    )
    words = ("sim", "up", "--config", "site.toml", "--dir", "state", "--device", "edge-9", "--json")
    process = subprocess.Popen(
        [*GATELET, *words], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        about = json.loads(process.stdout.readline())
        assert about["device"] == "edge-9"
        assert about["board"]["name"] == "none"
        assert "DeviceId=camera" in about["hub"]["deviceConnectionStrings"]["camera"]
        assert (tmp_path / "state" / "agent.toml").is_file()
        assert {"hub", "broker", "registry", "control", "agentConfig"} <= set(about)
        assert about["hub"]["uploadsUrl"].startswith("https://storage.")
        # Its files are its own as long as it runs.
        for other in ("up", "registry"):
            second = subprocess.run(
                [*GATELET, "sim", other, "--dir", "state"],
                cwd=tmp_path,
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            assert second.returncode == 1
            assert "runs in" in second.stderr
            assert "--dir" in second.stderr
    finally:
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (0, "", "")


@pytest.mark.parametrize(
    ("words", "code", "why"),
    [
        (("up", "--config", "missing.toml"), 2, "missing.toml"),
        (("up", "--board", "abacus"), 2, "abacus"),
        (("broker", "--config", "taken.toml"), 1, "cannot start"),
        (("board", "abacus"), 2, "pynq-z2"),
    ],
)
def test_what_cannot_start_says_why(
    tmp_path: Path, control: Control, words: tuple[str, ...], code: int, why: str
) -> None:
    (tmp_path / "taken.toml").write_text(f"[ports]\nbroker = {control.site.broker.port}\n")
    done = subprocess.run(
        [*GATELET, "sim", *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, why in done.stderr) == (code, True), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("words", [("--json",), ()])
def test_a_site_whose_description_nobody_reads_ends_without_a_word(
    tmp_path: Path, words: tuple[str, ...]
) -> None:
    """As every command does whose reader went away: it is no trouble of the site."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        ended = subprocess.run(
            [*GATELET, "sim", "broker", "--dir", tmp_path / "site", *words],
            stdout=writer,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
    finally:
        os.close(writer)
    assert (ended.returncode, ended.stderr) == (1, b"")
