"""Direct methods over the hub with its service SDK, over MQTT, and the commands of the device."""

from __future__ import annotations

import asyncio
import base64
import gzip
import io
import json
import os
import re
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from required import needs

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.asyncio(loop_scope="module"),
    # msrest still calls datetime.utcnow and imports what Python 3.12 deprecates.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

Deployment = Callable[..., dict[str, Any]]
SECONDS = 20.0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(shared_device: Any, make_deployment: Deployment) -> Any:
    """A device that serves one model, `digits`."""
    image = await shared_device.push("v1")
    await shared_device.until_good(shared_device.desire(make_deployment(image=image)))
    return shared_device


async def gatelet(device: Any, *words: str, stdin: bytes = b"", **env: str) -> tuple[int, str, str]:
    """Run a command as a user would: (exit code, standard output, standard error)."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gatelet.agent.main", *words),
        *("--config", str(device.folder / "agent.toml")),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **env},
    )
    out, err = await asyncio.wait_for(process.communicate(stdin), 60)
    assert b"Traceback" not in err, err.decode()
    return process.returncode or 0, out.decode(), err.decode()


async def call(
    device: Any, name: str, payload: Any, monkeypatch: pytest.MonkeyPatch
) -> tuple[int, Any]:
    """As an operator's program calls, with the unmodified service SDK."""
    from azure.iot.hub import IoTHubRegistryManager
    from azure.iot.hub.models import CloudToDeviceMethod

    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(device.site.ca_file))
    registry = IoTHubRegistryManager.from_connection_string(
        device.site.hub.service_connection_string
    )
    method = CloudToDeviceMethod(method_name=name, payload=payload, response_timeout_in_seconds=30)
    result = await asyncio.to_thread(
        registry.invoke_device_module_method, "edge-1", "$edgeAgent", method
    )
    return result.status, result.payload


async def finished(
    device: Any, answer: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """The end of a task, asked for as edgeAgent's users do."""
    assert answer["status"] == "Running"
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        about = {"schemaVersion": "1.0", "correlationId": answer["correlationId"]}
        status, answer = await call(device, "GetTaskStatus", about, monkeypatch)
        assert status == 200
        if answer["status"] != "Running":
            return answer
        await asyncio.sleep(0.05)
    pytest.fail(f"not finished: {answer}")


async def test_ping_and_unknown_methods(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert await call(site, "ping", None, monkeypatch) == (200, None)
    assert (await call(site, "PING", {}, monkeypatch))[0] == 200
    status, answer = await call(site, "Reboot", {}, monkeypatch)
    assert status == 400
    assert "GetModuleLogs" in answer["message"]


async def test_logs_of_modules_and_of_the_agent(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    status, answer = await call(
        site,
        "GetModuleLogs",
        {
            "schemaVersion": "1.0",
            "items": [{"id": "^digits$", "filter": {"since": "1 hour"}}, {"id": "edgeAgent"}],
            "encoding": "none",
            "contentType": "text",
        },
        monkeypatch,
    )
    assert status == 200
    logs = {entry["id"]: entry["payload"] for entry in answer}
    assert set(logs) == {"digits", "edgeAgent"}
    assert "load digits" in logs["digits"]
    assert re.search(r"^<6> \d{4}-\d\d-\d\d [\d:.]{12} \+00:00 \[INF\]", logs["edgeAgent"])
    assert "agent ready on" in logs["edgeAgent"]
    assert "agent ready on" not in logs["digits"]


async def test_logs_as_json_compressed_and_filtered(
    site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    item = {"id": "edgeAgent", "filter": {"tail": 1, "loglevel": 6, "regex": "deployment .* is "}}
    request = {"items": [item], "encoding": "gzip", "contentType": "json"}
    status, answer = await call(site, "GetModuleLogs", request, monkeypatch)
    assert status == 200
    (entry,) = answer
    (line,) = json.loads(gzip.decompress(base64.b64decode(entry["payloadBytes"])))
    assert "deployment 1 is good" in line["text"]
    assert line["device"] == "edge-1"
    assert line["id"] == "edgeAgent"
    assert line["iothub"].endswith("gatelet.test")
    assert line["loglevel"] == 6
    assert line["timestamp"].endswith("Z")


async def test_bad_payloads_are_refused_with_the_place(
    site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, payload, where in (
        ("GetModuleLogs", {"items": [{"id": "all", "filter": {"tail": "x"}}]}, "filter.tail"),
        ("GetModuleLogs", None, "payload"),
        ("RestartModule", {}, "payload.id"),
        ("UploadModuleLogs", {"items": [{"id": "all"}]}, "payload.sasUrl"),
        ("UploadSupportBundle", {"sasUrl": "http://evil.example/c?sig=s3cret"}, "https"),
    ):
        status, answer = await call(site, name, payload, monkeypatch)
        assert status == 400, name
        assert where in answer["message"]
        assert "s3cret" not in answer["message"]
    status, answer = await call(
        site, "GetTaskStatus", {"correlationId": "no-such-task"}, monkeypatch
    )
    assert (status, answer) == (
        200,
        {"status": "Unknown", "message": "", "correlationId": "no-such-task"},
    )


async def test_logs_that_are_too_long_for_an_answer(
    site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = site.folder / "state" / "logs" / "fabric.log"
    before = log.read_bytes() if log.exists() else b""
    log.write_bytes(before + b"<6> 2026-11-21 05:47:00.000 +00:00 [INF] [x] long line\n" * 3000)
    request = {"items": [{"id": "^fabric$"}]}
    status, answer = await call(site, "GetModuleLogs", request, monkeypatch)
    assert status == 400
    assert "127000" in answer["message"]
    assert (await call(site, "GetModuleLogs", {**request, "encoding": "gzip"}, monkeypatch))[
        0
    ] == 200
    log.write_bytes(before)


async def test_logs_are_uploaded_to_blobs_with_edge_agents_names(
    site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads = site.site.hub.core.uploads
    request = {
        "schemaVersion": "1.0",
        "items": [{"id": "digits"}, {"id": "edgeAgent", "filter": {"tail": 10}}],
        "encoding": "gzip",
        "contentType": "json",
        "sasUrl": uploads.container_url(),
    }
    status, answer = await call(site, "UploadModuleLogs", request, monkeypatch)
    assert status == 200
    end = await finished(site, answer, monkeypatch)
    assert end["status"] == "Completed", end
    names = {
        found[1]: blob
        for name, blob in uploads.blobs.items()
        if (found := re.search(r"/edge-1/(\w+)-\d{4}-\d\d-\d\d--\d\d-\d\d-\d\d\.json\.gz$", name))
    }
    assert set(names) == {"digits", "edgeAgent"}
    assert names["digits"].content_type == "application/json"
    lines = json.loads(gzip.decompress(names["digits"].body))
    assert any("load digits" in line["text"] for line in lines)
    # The signature is nowhere on the device.
    signature = uploads.container_url().split("sig=")[1]
    for file in (site.folder / "state" / "logs").iterdir():
        assert signature not in file.read_text()
    assert signature not in (site.folder / "agent.log").read_text()


async def test_a_refused_upload_says_why_without_the_signature(
    site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = re.sub(r"sig=[^&]+", "sig=wr0ngsignature", site.site.hub.core.uploads.container_url())
    request = {"items": [{"id": "digits"}], "sasUrl": url}
    status, answer = await call(site, "UploadModuleLogs", request, monkeypatch)
    assert status == 200
    end = await finished(site, answer, monkeypatch)
    assert end["status"] == "Failed"
    assert "403" in end["message"]
    assert "wr0ng" not in json.dumps(end)
    assert "wr0ng" not in (site.folder / "agent.log").read_text()


async def test_a_support_bundle_is_uploaded(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    uploads = site.site.hub.core.uploads
    request = {"schemaVersion": "1.0", "sasUrl": uploads.container_url(), "since": "1 day"}
    status, answer = await call(site, "UploadSupportBundle", request, monkeypatch)
    assert status == 200
    end = await finished(site, answer, monkeypatch)
    assert end["status"] == "Completed", end
    body = next(b.body for name, b in uploads.blobs.items() if "support-bundle" in name)
    inside = zipfile.ZipFile(io.BytesIO(body))
    assert {"about.json", "status.json", "check.json", "logs/agent.log"} <= set(inside.namelist())
    assert "logs/modules/digits.log" in inside.namelist()
    key = site.site.hub.core.state
    assert key is not None
    config = (site.folder / "agent.toml").read_text()
    (secret,) = re.findall(r"SharedAccessKey=([^;\"]+)", config)
    password = re.search(r'password = "([^"]+)"', config)
    everything = "".join(inside.read(name).decode() for name in inside.namelist())
    assert secret not in everything
    assert password is None or password[1] not in everything


async def test_a_restart_serves_on_and_repeats_harmlessly(
    site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def instance(status: dict[str, Any]) -> str:
        (target,) = status["endpoints"]["digits"]
        return target["instance"]

    before = instance(await site.status())
    request = {"schemaVersion": "1.0", "id": "digits"}
    answers = await asyncio.gather(
        *(call(site, "RestartModule", request, monkeypatch) for _ in range(3)), site.accuracy(20)
    )
    assert [answer[:2] for answer in answers[:3]] == [(200, None)] * 3
    await site.until(lambda status: instance(status) != before)
    assert (await site.accuracy(20))[0] > 0.8
    status, answer = await call(site, "RestartModule", {"id": "nobody"}, monkeypatch)
    assert status == 500
    assert "nobody" in answer["message"]
    status, answer = await call(site, "RestartModule", {"id": "edgeAgent"}, monkeypatch)
    assert status == 500
    assert "systemctl" in answer["message"]


@needs("mosquitto_rr", package="mosquitto-clients")
async def test_the_same_methods_over_mqtt(site: Any) -> None:
    about = site.site.describe()["broker"]
    topics = "gatelet/v1/edge-1"

    async def request(name: str, payload: Any) -> Any:
        process = await asyncio.create_subprocess_exec(
            *("mosquitto_rr", "-V", "mqttv5", "-h", about["host"], "-p", str(about["port"])),
            *("-u", about["username"], "-P", about["password"], "-W", "10"),
            *("-t", f"{topics}/cmd/{name}", "-e", "answers/1"),
            *("-m", json.dumps(payload)),
            stdout=asyncio.subprocess.PIPE,
        )
        out, _ = await process.communicate()
        assert process.returncode == 0
        return json.loads(out)

    assert await request("ping", {}) is None
    (entry,) = await request("GetModuleLogs", {"items": [{"id": "digits"}]})
    assert "load digits" in entry["payload"]
    refused = await request("getmodulelogs", {"items": []})
    assert "payload.items" in refused["message"]


# -- commands ----------------------------------------------------------------------------------


async def test_method_and_restart_commands(site: Any) -> None:
    code, out, _ = await gatelet(site, "method", "ping")
    assert (code, out) == (0, "ok\n")
    payload = '{"items": [{"id": "digits", "filter": {"tail": 1}}]}'
    code, out, _ = await gatelet(
        site, "method", "GetModuleLogs", "-", "--json", stdin=payload.encode()
    )
    assert code == 0
    assert json.loads(out)["payload"][0]["id"] == "digits"
    code, again, err = await gatelet(site, "method", "GetModuleLogs", "--json", payload)
    assert (code, json.loads(again)["payload"][0]["id"]) == (0, "digits"), err
    code, _, err = await gatelet(site, "method", "ping", "{}", "more")
    assert (code, "unrecognized arguments: more" in err) == (2, True)
    code, _, err = await gatelet(site, "method", "Reboot")
    assert code == 1
    assert "known: ping" in err
    code, _, err = await gatelet(site, "method", "ping", "{nonsense")
    assert code == 2
    assert "not JSON" in err
    code, out, _ = await gatelet(site, "restart", "digits")
    assert (code, out) == (0, "digits is being restarted\n")
    code, out, err = await gatelet(site, "restart", "digits", "--wait")
    assert code == 0, err
    assert out.startswith("digits was restarted: serving digits version ")
    code, out, _ = await gatelet(site, "restart", "digits", "--wait", "--json")
    assert code == 0
    assert json.loads(out)["restarted"] is True
    code, _, err = await gatelet(site, "restart", "nobody")
    assert code == 1
    assert "nobody" in err


async def test_logs_command(site: Any) -> None:
    code, out, _ = await gatelet(site, "logs", "edgeAgent", "--tail", "3")
    assert code == 0
    assert len(out.splitlines()) == 3
    code, out, _ = await gatelet(site, "logs", "digits", "--since", "1h", "-t", "--json")
    assert code == 0
    assert all({"time", "stream", "text"} == set(json.loads(line)) for line in out.splitlines())
    assert "load digits" in out
    for words, expected, hint in (
        (("logs", "nobody"), 1, "edgeAgent"),
        (("logs", "digits", "--since", "soon"), 1, "expected a time"),
        (("logs", "digits", "--tail", "-1"), 2, "--tail"),
    ):
        code, _, err = await gatelet(site, *words)
        assert code == expected
        assert hint in err


async def test_logs_follow(site: Any) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gatelet.agent.main", "logs", "-f", "--tail", "0", "digits"),
        *("--config", str(site.folder / "agent.toml")),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        line = asyncio.ensure_future(process.stdout.readline())
        deadline = time.monotonic() + SECONDS
        while not line.done() and time.monotonic() < deadline:
            # Asked again and again: the command may not listen yet at the first time.
            await gatelet(site, "restart", "digits")
            await asyncio.wait({line}, timeout=1)
        assert b"digits" in line.result()
    finally:
        process.terminate()
        await process.wait()


async def test_diff_and_dry_run_change_nothing(
    site: Any, make_deployment: Deployment, tmp_path: Path
) -> None:
    before = (await site.status())["deployment"]["generation"]
    image = await site.push("v2")
    manifest = make_deployment(image=image, backends="fpga,cpu")
    desired = manifest["modulesContent"]["$edgeAgent"]["properties.desired"]
    desired["modules"]["digits"]["env"]["API_TOKEN"] = {"value": "t0psecret"}
    file = tmp_path / "deployment.json"
    file.write_text(json.dumps(manifest))
    for words in (("diff", str(file)), ("apply", "--dry-run", str(file))):
        code, out, _ = await gatelet(site, *words)
        assert code == 0
        assert "~ digits changed" in out
        assert re.search(r"settings\.image: \S+:v1 -> \S+:v2", out)
        assert "env.API_TOKEN.value: nothing -> (hidden)" in out
        assert "t0psecret" not in out
        assert "digits:v2 for digits" in out
        assert "\x1b" not in out
    code, out, _ = await gatelet(site, "diff", "--json")
    assert code == 0
    assert json.loads(out)["modules"][0]["change"] == "unchanged"
    code, _, err = await gatelet(site, "diff", "-", stdin=b"{}")
    assert code == 1
    assert "417" in err
    assert (await site.status())["deployment"]["generation"] == before


async def test_rollback_returns_to_the_deployment_before(
    site: Any, make_deployment: Deployment, tmp_path: Path
) -> None:
    file = tmp_path / "deployment.json"
    file.write_text(json.dumps(make_deployment(image=await site.push("v2"))))
    code, _, err = await gatelet(site, "apply", "--wait", str(file))
    assert code == 0, err
    code, out, err = await gatelet(site, "rollback", "--wait")
    assert code == 0, err
    assert "is good" in out
    (module,) = (await site.status())["modules"]
    assert module["image"].endswith(":v1")
    code, _, err = await gatelet(site, "rollback", "4711")
    assert code == 1
    assert "4711" in err
    assert (await gatelet(site, "rollback", "x"))[0] == 2


async def test_list_as_iotedge_prints_it(site: Any) -> None:
    code, out, _ = await gatelet(site, "list")
    assert code == 0
    head, row = out.splitlines()
    assert head.split() == ["NAME", "STATUS", "DESCRIPTION", "CONFIG"]
    assert re.match(r"digits +running +Up (\d+ \w+|less than a second) +\S+:v\d$", row)


async def test_top(site: Any) -> None:
    code, out, _ = await gatelet(site, "top")
    assert code == 0, "one table where there is no terminal"
    head, fabric, _, titles, row = out.splitlines()
    assert re.search(r"^edge-1: deployment \d+ good; .*agent \d+ MiB", head)
    assert fabric.startswith("fpga: "), "this device has a board"
    assert titles.split()[:3] == ["NAME", "STATUS", "REQ/S"]
    assert row.startswith("digits  running")
    scoring = asyncio.ensure_future(site.accuracy(200))
    code, out, _ = await gatelet(site, "top", "--json", "--interval", "2")
    await scoring
    (module,) = json.loads(out)["modules"]
    assert module["requestsPerSecond"] >= 0
    assert (await gatelet(site, "top", "--interval", "0"))[0] == 2


async def test_check_finds_a_healthy_device(site: Any) -> None:
    code, out, _ = await gatelet(site, "check", "--json")
    about = json.loads(out)
    by_name = {check["name"]: check for check in about["checks"]}
    assert [c for c in about["checks"] if c["status"] == "error"] == []
    assert code == 0
    for name in ("configuration", "agent", "hub TLS", "hub link", "broker", "clock", "fpga"):
        assert by_name[name]["status"] in ("ok", "warning"), by_name[name]
    assert any(name.startswith("registry ") for name in by_name)
    code, out, _ = await gatelet(site, "check")
    assert code == 0
    assert re.search(r"^OK +hub TLS: ", out, re.MULTILINE)
    assert out.splitlines()[-1].endswith("0 errors")


async def test_support_bundle_command(site: Any, tmp_path: Path) -> None:
    file = tmp_path / "bundle.zip"
    code, out, _ = await gatelet(site, "support-bundle", "-o", str(file), "--json")
    assert code == 0
    assert json.loads(out)["file"] == str(file)
    assert file.stat().st_mode & 0o077 == 0
    inside = zipfile.ZipFile(file)
    assert json.loads(inside.read("status.json"))["device"] == "edge-1"
    assert "load digits" in inside.read("logs/modules/digits.log").decode()
    assert (await gatelet(site, "support-bundle", "-o", "/nonexistent/x.zip"))[0] == 1


async def test_without_an_agent_logs_check_and_bundle_still_work(site: Any, tmp_path: Path) -> None:
    await site.stop_agent()
    try:
        code, out, _ = await gatelet(site, "logs", "agent", "--tail", "5")
        assert code == 0
        assert len(out.splitlines()) == 5
        code, out, _ = await gatelet(site, "check")
        assert re.search(r"^Warning +agent: not running", out, re.MULTILINE)
        assert code == 0, out
        code, _, err = await gatelet(site, "support-bundle", "-o", str(tmp_path / "b.zip"))
        assert code == 0
        assert "does not answer" in err
        code, _, err = await gatelet(site, "restart", "digits")
        assert code == 1
        assert "gatelet run" in err
    finally:
        await site.start_agent()
