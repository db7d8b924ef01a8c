"""The direct methods' table, its background tasks and what becomes of them, without a network."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from gatelet.agent.clock import SystemClock
from gatelet.agent.config import parse_config
from gatelet.agent.daemon_thread import in_daemon_thread
from gatelet.agent.methods.blobs import BlobStorage, UploadFailed
from gatelet.agent.methods.commands import CommandRefused
from gatelet.agent.methods.operations import Operations, without_secrets
from gatelet.agent.methods.tasks import TASKS_KEPT, BackgroundTasks, TaskFailed, TooBusy
from gatelet.agent.preview import FieldChange, Preview
from gatelet.agent.submissions import Verdict

SAS = "?sr=c&sig=s3cret"


async def ended(tasks: BackgroundTasks, task: str) -> str:
    for _ in range(1000):
        if tasks.status(task).state != "Running":
            break
        await asyncio.sleep(0.005)
    return tasks.status(task).state


async def test_tasks_end_in_each_of_edge_agents_states() -> None:
    tasks = BackgroundTasks(seconds=0.05)

    async def fine() -> None:
        pass

    async def fails() -> None:
        raise TaskFailed("the storage said no: https://h/c?sig=abc")

    async def broken() -> None:
        raise ZeroDivisionError

    async def slow() -> None:
        await asyncio.Event().wait()

    outcomes = {}
    for work in (fine, fails, broken, slow):
        begun = tasks.start("work", work)
        assert begun.state == "Running"
        await ended(tasks, begun.id)
        outcomes[work.__name__] = tasks.status(begun.id)
    assert {name: status.state for name, status in outcomes.items()} == {
        "fine": "Completed", "fails": "Failed", "broken": "Failed", "slow": "Failed"
    }  # fmt: skip
    assert outcomes["fails"].message == "work: the storage said no: https://h/c?sig=(hidden)"
    assert "ZeroDivisionError" in outcomes["broken"].message
    assert "not done after" in outcomes["slow"].message
    assert tasks.status("other").document() == {
        "status": "Unknown", "message": "", "correlationId": "other",
    }  # fmt: skip


async def test_tasks_are_bounded_and_cancelled_at_the_end() -> None:
    tasks = BackgroundTasks(at_once=2)
    cleaned = []

    async def slow() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cleaned.append(1)

    begun = [tasks.start("slow", slow) for _ in range(2)]
    with pytest.raises(TooBusy):
        tasks.start("slow", slow)
    await asyncio.sleep(0)
    await tasks.close()
    assert [tasks.status(task.id).state for task in begun] == ["Cancelled"] * 2
    assert cleaned == [1, 1]

    async def fine() -> None:
        pass

    for _ in range(TASKS_KEPT + 10):
        await ended(tasks, tasks.start("fine", fine).id)
    assert tasks.status(begun[0].id).state == "Unknown", "the oldest outcomes are forgotten"


async def test_a_thread_that_hangs_does_not_hold_up_the_end() -> None:
    never = threading.Event()
    job = asyncio.ensure_future(in_daemon_thread(lambda: never.wait(30)))
    await asyncio.sleep(0)
    job.cancel()
    with pytest.raises(asyncio.CancelledError):
        await job
    never.set()
    with pytest.raises(ZeroDivisionError):
        await in_daemon_thread(lambda: 1 // 0)


def test_storage_that_cannot_be_reached_is_said_without_the_signature(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gatelet.agent.methods.blobs._RETRY_BASE", 0.001)
    with pytest.raises(UploadFailed) as caught:
        BlobStorage().put(f"http://127.0.0.1:1/c/x{SAS}", b"x", "text/plain")
    assert "127.0.0.1 cannot be reached" in str(caught.value)
    assert "s3cret" not in str(caught.value)


class FakeDeployments:
    def __init__(self) -> None:
        self.restarted: list[str] = []

    def preview(self, body: bytes = b"") -> Preview:
        return Preview(200)

    def rollback(self, generation: int = 0) -> Verdict:
        return Verdict(200, "", generation + 1)

    def restart(self, module: str) -> Verdict:
        if module != "m":
            return Verdict(400, f"there is no module {module}")
        self.restarted.append(module)
        return Verdict(200, "")


@pytest.fixture
def operations(tmp_path: Path) -> Operations:
    config = parse_config(f'[device]\nid="d"\nstate-dir="{tmp_path}"\nrun-dir="{tmp_path}"\n', "x")

    async def status() -> dict[str, Any]:
        return {"deployment": None, "modules": [], "links": [], "processes": {}, "refused": []}

    return Operations(
        config, SystemClock(), FakeDeployments(), lambda: {"m": "model"}, status, None
    )


async def test_every_method_answers_and_none_raises(operations: Operations) -> None:
    for name in operations.methods():
        for payload in (None, [], 1, {}, {"id": 1}, {"items": [{"id": "all"}]}, "text"):
            answer = await operations.invoke(name, payload)
            assert answer.status in (200, 400, 500)
            assert answer.status == 200 or answer.payload["message"]
    assert (await operations.invoke("RESTARTMODULE", {"id": "m"})).status == 200
    assert (await operations.invoke("RestartModule", {"id": "x"})).status == 500
    assert (await operations.invoke("Format", None)).status == 400
    one = {"items": [{"id": "all"}], "sasUrl": "https://h/c/b?sr=b&sig=s3cret"}
    refused = await operations.invoke("UploadModuleLogs", one)
    assert (refused.status, "single blob" in refused.payload["message"]) == (400, True)
    await operations.close()


async def test_logs_of_what_is_not_there(operations: Operations) -> None:
    for module, since in (("nobody", ""), ("m", "soon")):
        with pytest.raises(CommandRefused):
            async for _ in operations.logs(module, None, since, "", follow=False):
                pass
    assert [line async for line in operations.logs("m", None, "", "", follow=False)] == []


@pytest.mark.parametrize(
    ("path", "after", "hidden"),
    [
        ("env.API_TOKEN.value", "t0k", True),
        ("settings.createOptions.Env", ["DB_PASSWORD=t0k"], True),
        ("settings.createOptions.Labels.secret", "t0k", True),
        ("settings.createOptions.Cmd", ["--token", "t0k"], True),
        ("env.MODE.value", "t0k", False),
        ("settings.image", "host/t0k:1", False),
    ],
)
def test_previews_hide_secrets(path: str, after: Any, hidden: bool) -> None:
    shown = without_secrets(FieldChange(path, None, after))
    assert shown.before is None
    assert ("t0k" not in str(shown.after)) == hidden
