"""The hub's web page, used by a person's hands: clicks and keys in headless Chromium."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from gatelet.simulator.background import BackgroundLoop
from gatelet.simulator.iothub.devices import ClientId
from gatelet.simulator.iothub.server import IotHub
from gatelet.simulator.pki import Pki
from required import needs

pytestmark = [
    pytest.mark.e2e,
    needs("chromium", "chromedriver", package="chromium chromium-driver"),
]

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
SECONDS = 20
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
EDGE = ClientId("edge-1")
AGENT = ClientId("edge-1", "$edgeAgent")


class Browser:
    """As much of W3C WebDriver as a test of one page needs."""

    def __init__(self, port: int, folder: Path) -> None:
        self._base = f"http://127.0.0.1:{port}"
        options = {"args": [*FLAGS, f"--user-data-dir={folder}"]}
        wanted = {
            "browserName": "chrome",
            "acceptInsecureCerts": True,
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        answer = self._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self._base += f"/session/{answer['sessionId']}"

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        request = urllib.request.Request(
            self._base + path,
            None if body is None else json.dumps(body).encode(),
            {"Content-Type": "application/json"},
            method=method,
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(json.load(error)["value"]["message"]) from error

    def open(self, url: str) -> None:
        self._call("POST", "/url", {"url": "about:blank"})
        self._call("POST", "/url", {"url": url})

    def resize(self, width: int, height: int) -> None:
        # The window of a headless browser has a least width; the page's own does not.
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.devtools("Emulation.setDeviceMetricsOverride", metrics)

    def devtools(self, command: str, parameters: dict[str, Any]) -> Any:
        return self._call("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def script(self, text: str, *arguments: Any) -> Any:
        return self._call("POST", "/execute/sync", {"script": text, "args": list(arguments)})

    def find(self, css: str) -> str:
        found = self._call("POST", "/element", {"using": "css selector", "value": css})
        return str(found[ELEMENT])

    def click(self, css: str) -> None:
        self._call("POST", f"/element/{self.find(css)}/click", {})

    def type(self, css: str, text: str) -> None:
        element = self.find(css)
        self._call("POST", f"/element/{element}/clear", {})
        self._call("POST", f"/element/{element}/value", {"text": text})

    def text(self, css: str) -> str:
        return str(self._call("GET", f"/element/{self.find(css)}/text"))

    def until(self, css: str, wanted: Callable[[str], bool]) -> str:
        deadline = time.monotonic() + SECONDS
        text = ""
        while time.monotonic() < deadline:
            try:
                text = self.text(css)
            except AssertionError as error:  # not there yet
                text = f"({error})"
            if wanted(text):
                return text
        raise AssertionError(f"{css} shows {text!r}")

    def complaints(self) -> list[str]:
        entries = self._call("POST", "/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] != "INFO"]

    def picture(self, name: str) -> None:
        """Kept where GATELET_PICTURES says, for people to look at."""
        folder = os.environ.get("GATELET_PICTURES")
        if folder:
            png = base64.b64decode(self._call("GET", "/screenshot"))
            (Path(folder) / f"{name}.png").write_bytes(png)

    def close(self) -> None:
        self._call("DELETE", "")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    folder = tmp_path_factory.mktemp("chromium")
    log = folder / "driver.log"
    with log.open("w") as out:
        driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=out, stderr=out)
        try:
            port, deadline = 0, time.monotonic() + SECONDS
            while not port and time.monotonic() < deadline:
                _, found, after = log.read_text().partition("successfully on port ")
                port = int(after.split(".")[0]) if found and "." in after else 0
            browser = Browser(port, folder / "profile")
            yield browser
            browser.close()
        finally:
            driver.terminate()
            driver.wait(10)


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[IotHub, BackgroundLoop]]:
    with BackgroundLoop() as loop:
        hub = loop.call(lambda: IotHub("sim-hub.gatelet.test", Pki(tmp_path_factory.mktemp("pki"))))
        loop.run(hub.start())
        loop.call(furnish, hub)
        yield hub, loop
        loop.run(hub.stop())


def furnish(hub: IotHub) -> None:
    hub.core.put_identity(EDGE, {"capabilities": {"iotEdge": True}})
    hub.core.update_twin(EDGE, {"tags": {"site": "north", "<b>": "<i>"}})
    hub.core.put_identity(ClientId("camera-7"), {})
    agent = {
        "properties.desired": {
            "schemaVersion": "1.1",
            "modules": {"digits": {"settings": {"image": "digits:1"}, "status": "running"}},
        }
    }
    body = {"content": {"modulesContent": {"$edgeAgent": agent}}, "priority": 10}
    hub.core.rollout.put(
        "digits-everywhere", {**body, "targetCondition": "tags.site='north'"}, None
    )
    hub.core.patch_reported(
        AGENT,
        {
            "lastDesiredVersion": hub.core.twin(AGENT).desired.version,
            "lastDesiredStatus": {"code": 200},
            "modules": {"digits": {"runtimeStatus": "running"}},
        },
    )
    for index in range(3):
        body_bytes = json.dumps({"seen": index, "html": "<img src=x onerror=alert(1)>"}).encode()
        hub.core.accept_telemetry(
            ClientId("edge-1", "digits"), body_bytes, "%24.ct=application/json"
        )


def test_a_person_looks_edits_and_breaks_things(
    hub: tuple[IotHub, BackgroundLoop], browser: Browser
) -> None:
    site, loop = hub
    browser.resize(1280, 900)
    browser.open(site.page_url)
    browser.until("#state", lambda text: text == "0 of 2 devices online")
    assert "token" not in browser.script("return location.href")
    browser.until("#device-list", lambda text: "digits" in text and "camera-7" in text)
    browser.picture("devices")

    browser.click('button[data-path="/twins/edge-1/modules/%24edgeAgent"]')
    browser.until("#desired", lambda text: '"image": "digits:1"' in text)
    assert '"lastDesiredVersion"' in browser.text("#reported")
    assert "digits-everywhere applied" in browser.text("#twin-facts")
    browser.picture("twin")

    browser.click('button[data-path="/twins/edge-1"]')
    browser.until("#tags", lambda text: '"<b>": "<i>"' in text)
    browser.click("#edit-desired")
    browser.type("#editor-text", '{"rate": }')
    browser.click("#editor button[type=submit]")
    browser.until("#editor-problem", lambda text: text.startswith("Not saved"))
    browser.picture("editor")
    browser.type("#editor-text", '{"rate": 5, "bad.name": 1}')
    browser.click("#editor button[type=submit]")
    browser.until("#editor-problem", lambda text: "bad.name" in text)
    browser.type("#editor-text", '{"rate": 5}')
    browser.click("#editor button[type=submit]")
    browser.until("#desired", lambda text: '"rate": 5' in text)
    assert loop.call(site.core.twin, EDGE).desired.value == {"rate": 5}

    browser.click("#edit-tags")
    loop.call(site.core.update_twin, EDGE, {"tags": {"other": True}})
    browser.type("#editor-text", '{"site": "south"}')
    browser.click("#editor button[type=submit]")
    browser.until("#editor-problem", lambda text: "somebody else" in text)
    browser.click("#editor-cancel")
    browser.until("#tags", lambda text: '"other": true' in text)

    browser.click("nav [data-view=telemetry]")
    browser.until("#messages", lambda text: '"seen":2' in text)
    assert "edge-1 / digits" in browser.text("#messages tr")
    loop.call(site.core.accept_telemetry, EDGE, b"plain", "")
    browser.until("#messages tr", lambda text: '"plain"' in text)
    browser.picture("telemetry")

    browser.click("nav [data-view=deployments]")
    browser.until("#configurations", lambda text: "digits-everywhere" in text)
    values = browser.script(
        "return [...document.querySelectorAll('.metrics div')].map((d) => d.textContent)"
    )
    assert values == ["targeted1", "applied1", "report success1", "report failure0"]
    browser.picture("deployments")

    browser.click("nav [data-view=faults]")
    browser.type("#fault-lose_desired_patches", "2\ue004")
    browser.until("#fault-count", lambda text: text == "1")
    assert loop.call(lambda: site.faults.lose_desired_patches) == 2
    browser.click("#paused")
    browser.until("#state", lambda text: "unreachable" in text)
    assert site.paused
    browser.picture("faults")
    browser.click("#paused")
    browser.click("#clear-faults")
    browser.until("#fault-count", lambda text: text == "")
    assert not loop.call(lambda: any(site.faults.as_json().values()))
    # A refused save is an HTTP error, which Chromium writes down; nothing else may be.
    left = [c for c in browser.complaints() if "/twins/edge-1" not in c]
    assert left == []


def test_without_the_token_nothing_is_shown(
    hub: tuple[IotHub, BackgroundLoop], browser: Browser
) -> None:
    site, _ = hub
    browser.resize(1280, 900)
    browser.open(f"{site.rest_url}/#token=wrong")
    browser.until("#message", lambda text: "not the hub's" in text)
    assert browser.text("#device-list") == ""
    browser.type("#token", site.page_token)
    browser.click("#login button")
    browser.until("#state", lambda text: "devices online" in text)
    assert browser.script("return document.querySelector('#login').hidden")


@pytest.mark.parametrize(("width", "scheme"), [(400, "dark"), (1280, "dark"), (400, "light")])
def test_every_width_and_scheme(
    hub: tuple[IotHub, BackgroundLoop], browser: Browser, width: int, scheme: str
) -> None:
    site, _ = hub
    browser.resize(width, 860)
    preference = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.devtools("Emulation.setEmulatedMedia", {"features": preference})
    browser.open(site.page_url)
    browser.until("#device-list", lambda text: "camera-7" in text)
    browser.click('button[data-path="/twins/edge-1/modules/%24edgeAgent"]')
    browser.until("#desired", lambda text: "digits:1" in text)
    for view in ("devices", "telemetry", "deployments", "faults"):
        browser.click(f"nav [data-view={view}]")
        browser.picture(f"{view}-{width}-{scheme}")
        too_wide = browser.script("return document.documentElement.scrollWidth > innerWidth")
        assert not too_wide, f"{view} scrolls sideways at {width} pixels"
    assert browser.script(CONTRAST) == []
    assert browser.script(NAMELESS) == []


# Text with less contrast than WCAG AA asks for (4.5).
CONTRAST = """
const light = (c) => { const [r, g, b] = c.match(/[\\d.]+/g).map(Number).map((v) => v / 255)
  .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const ground = (e) => { for (; e; e = e.parentElement) {
  const c = getComputedStyle(e).backgroundColor;
  if (!/, 0\\)$/.test(c)) return c; } return "rgb(255,255,255)"; };
return [...document.querySelectorAll("body *")].filter((e) =>
  [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim()))
  .map((e) => { const a = light(getComputedStyle(e).color), b = light(ground(e));
    return [e.outerHTML.slice(0, 80), (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)]; })
  .filter(([, ratio]) => ratio < 4.5);
"""
# Controls that a screen reader could not name.
NAMELESS = """
return [...document.querySelectorAll("input, textarea, button")]
  .filter((e) => !(e.textContent.trim() || e.labels?.length || e.ariaLabel))
  .map((e) => e.outerHTML.slice(0, 80));
"""
