"""A model that takes the scoring process down in the middle of a run of onnxruntime's."""

from __future__ import annotations

import asyncio
import functools
import http.client
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from gatelet.protos import open_inference_pb2 as oip
from gatelet.protos.inference import InferenceStub
from onnx import TensorProto, helper

from ..bench import onnx_models

pytestmark = pytest.mark.e2e

ENDLESS = 2**60


def looping_folder(folder: Path) -> Path:
    """A model that goes `times` times round a loop inside onnxruntime."""
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go_on"], ["still"]),
            helper.make_node("Add", ["sum", "sum"], ["more"]),
        ],
        "body",
        [
            value("turn", TensorProto.INT64, []),
            value("go_on", TensorProto.BOOL, []),
            value("sum", TensorProto.FLOAT, [1]),
        ],
        [value("still", TensorProto.BOOL, []), value("more", TensorProto.FLOAT, [1])],
    )
    content = onnx_models.build(
        [helper.make_node("Loop", ["times", "", "start"], ["y"], body=body)],
        [("times", "INT64", (1,))],
        [("y", "FP32", (1,))],
        {"start": np.ones(1, np.float32)},
    )
    specs = ([("times", "INT64", (1,))], [("y", "FP32", (1,))])
    return onnx_models.write_folder(folder, content, *specs, name="looping")


def message(times: int) -> oip.ModelInferRequest:
    request = oip.ModelInferRequest(model_name="looping")
    request.inputs.add(name="times", datatype="INT64", shape=[1])
    request.raw_input_contents.append(np.array([times], np.int64).tobytes())
    return request


def over_grpc(address: str, times: int) -> str:
    with grpc.insecure_channel(address) as channel:
        call = InferenceStub(channel).model_infer.future(message(times), 60)
        return str(call.code().name)


def in_a_stream(address: str, times: int) -> str:
    with grpc.insecure_channel(address) as channel:
        requests: Iterator[oip.ModelInferRequest] = iter([message(times)])
        try:
            answers = list(InferenceStub(channel).model_stream_infer(requests, 60))
        except grpc.RpcError as error:
            return str(error.code().name)
        return answers[0].error_message or "OK"


def over_http(address: str, times: int, sent: Callable[[], object] = object) -> str:
    entry = {"name": "times", "datatype": "INT64", "shape": [1], "data": [times]}
    with closing(http.client.HTTPConnection(address, timeout=60)) as connection:
        try:
            connection.request("POST", "/v2/models/looping/infer", json.dumps({"inputs": [entry]}))
            sent()
            return str(connection.getresponse().status)
        except (ConnectionError, http.client.HTTPException) as error:
            return type(error).__name__


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT], ids=lambda n: n.name)
async def test_a_crash_inside_onnxruntime(
    device: Any, make_deployment: Callable[..., dict[str, Any]], number: signal.Signals
) -> None:
    looping = looping_folder(device.folder / "looping")
    content = make_deployment(image=await device.push("v1"))
    modules = content["modulesContent"]["$edgeAgent"]["properties.desired"]["modules"]
    (digits,) = modules.values()
    image = await device.push("v1", looping, name="looping")
    modules["looping"] = {**digits, "settings": {**digits["settings"], "image": image}, "env": {}}
    version = device.desire(content)
    await device.until_good(version)
    addresses = (await device.status())["scoring"]
    http_address = addresses["http"]
    assert await asyncio.to_thread(over_grpc, device.grpc_address, 5) == "OK"

    scoring = psutil.Process(device.processes()["scoring"]["pid"])
    spent = scoring.cpu_times().user
    loop = asyncio.get_running_loop()
    sent = threading.Semaphore(0)
    with ThreadPoolExecutor(6) as clients:
        asked = [
            loop.run_in_executor(clients, way, address, ENDLESS)
            for way, address in (
                (over_grpc, device.grpc_address),
                (in_a_stream, device.grpc_address),
                (functools.partial(over_http, sent=sent.release), http_address),
            )
            for _ in range(2)
        ]
        for _ in range(2):
            assert await asyncio.to_thread(sent.acquire, timeout=30)

        async def running() -> None:
            while scoring.cpu_times().user < spent + 0.5:
                await asyncio.sleep(0.02)

        await asyncio.wait_for(running(), 30)
        assert not any(one.done() for one in asked)
        killed = time.monotonic()
        os.kill(scoring.pid, number)
        answers = await asyncio.wait_for(asyncio.gather(*asked), 20)
        # Nobody is left hanging.
        assert time.monotonic() - killed < 15
    assert answers[:4] == ["UNAVAILABLE"] * 4
    assert set(answers[4:]) <= {"RemoteDisconnected", "ConnectionResetError"}

    # The models come back one after another; what is wanted is never unknown meanwhile.
    async def codes_until_it_answers(way: Callable[[str, int], str], address: str) -> set[str]:
        codes: set[str] = set()
        deadline = time.monotonic() + 40
        while not codes & {"OK", "200"} and time.monotonic() < deadline:
            codes.add(await asyncio.to_thread(way, address, 5))
        return codes

    async def over_http_until_it_answers() -> set[str]:
        # On another port than before.
        status = await device.until(
            lambda s: s["scoring"].get("http") not in (None, http_address), seconds=30
        )
        return await codes_until_it_answers(over_http, status["scoring"]["http"])

    over_both = asyncio.gather(
        codes_until_it_answers(over_grpc, device.grpc_address), over_http_until_it_answers()
    )
    # A device whose status says that it serves an endpoint does.
    await device.until(lambda s: set(s["endpoints"]) == {"digits", "looping"})
    assert await asyncio.to_thread(over_grpc, device.grpc_address, 5) == "OK"
    grpc_codes, http_codes = await over_both
    assert "OK" in grpc_codes
    assert grpc_codes <= {"OK", "UNAVAILABLE"}
    assert "200" in http_codes
    assert http_codes <= {"200", "503"}
    assert device.processes()["scoring"]["restarts"] == 1
    # The model beside it answers again, and so does the one that was running.
    accuracy, versions = await device.accuracy()
    assert (accuracy > 0.8, versions) == (True, {"1"})
    assert (await device.until_good(version))["gatelet"]["deployment"]["phase"] == "good"
