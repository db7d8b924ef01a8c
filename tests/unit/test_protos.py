from __future__ import annotations

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gatelet.protos
import grpc
import pytest
from gatelet.protos import control_pb2 as control
from gatelet.protos import generate, services
from gatelet.protos import open_inference_pb2 as oip

PROTOS = Path(gatelet.protos.__path__[0])


def test_the_generated_modules_are_what_the_sources_say(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools")
    written = generate.generate(tmp_path)
    assert len(written) == 2 * len(generate.SOURCES)
    for path in written:
        assert path.read_text() == (PROTOS / path.name).read_text(), f"{path.name} is stale"


def test_a_broken_source_is_reported_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("grpc_tools")
    monkeypatch.setattr(generate, "SOURCES", ("missing.proto",))
    with pytest.raises(RuntimeError, match=r"missing\.proto"):
        generate.generate(tmp_path)
    assert generate.main(["--out", str(tmp_path)]) == 1


def test_gencode_runs_on_the_oldest_protobuf_we_allow() -> None:
    for name in ("open_inference_pb2.py", "control_pb2.py"):
        text = (PROTOS / name).read_text()
        assert re.search(r"# Protobuf Python Version: 5\.26\.", text), name
        assert "ValidateProtobufRuntimeVersion" not in text, name


OURS = "import gatelet.protos.open_inference_pb2 as ours"
TRITON = "import tritonclient.grpc.service_pb2 as theirs"


@pytest.mark.parametrize("imports", [(OURS, TRITON), (TRITON, OURS)], ids=["ours", "tritonclient"])
def test_lives_beside_tritonclient_whichever_is_imported_first(imports: tuple[str, str]) -> None:
    script = "; ".join(
        (
            *imports,
            "request = ours.ModelInferRequest(model_name='m', raw_input_contents=[b'1'])",
            "same = theirs.ModelInferRequest.FromString(request.SerializeToString())",
            "assert same.raw_input_contents == [b'1']",
        )
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_the_shared_messages_have_tritons_fields() -> None:
    calls = pytest.importorskip("tritonclient.grpc.service_pb2").DESCRIPTOR
    configs = pytest.importorskip("tritonclient.grpc.model_config_pb2").DESCRIPTOR
    theirs = {**configs.message_types_by_name, **calls.message_types_by_name}
    assert oip.ModelMetadataResponse.DESCRIPTOR.fields_by_name["properties"].number == 6
    compared = 0
    for name, ours in oip.DESCRIPTOR.message_types_by_name.items():
        pending = [(ours, theirs[name])]
        while pending:
            mine, other = pending.pop()
            # Of the model configuration only a part is here.
            names = set(mine.fields_by_name if name in configs.message_types_by_name else ())
            for field in other.fields:
                if names and field.name not in names:
                    continue
                mine_field = mine.fields_by_name[field.name]
                assert (mine_field.number, mine_field.type) == (field.number, field.type)
                assert mine_field.label == field.label
                compared += 1
            pending += [
                (mine.nested_types_by_name[n.name], n)
                for n in other.nested_types
                if not names or n.name in mine.nested_types_by_name
            ]
    assert compared > 200
    mine = {m.name: m for m in oip.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods}
    for method in calls.services_by_name["GRPCInferenceService"].methods:
        same = mine[method.name]
        assert (same.client_streaming, same.server_streaming) == (
            method.client_streaming,
            method.server_streaming,
        )


class _Agent:
    def apply(self, request: control.ApplyRequest, context: object) -> control.ApplyResponse:
        return control.ApplyResponse(code=200, description=request.manifest.decode())

    def status(self, request: object, context: object) -> control.AgentStatusResponse:
        return control.AgentStatusResponse(json=b"{}")

    def watch(self, request: object, context: object) -> object:
        for number in range(3):
            yield control.AgentStatusResponse(json=str(number).encode())

    def preview(self, request: object, context: object) -> control.PreviewResponse:
        return control.PreviewResponse(code=200)

    def rollback(self, request: object, context: object) -> control.ApplyResponse:
        return control.ApplyResponse(code=200)

    def invoke(self, request: object, context: object) -> control.InvokeResponse:
        return control.InvokeResponse(status=200)

    def logs(self, request: object, context: object) -> object:
        yield control.LogsResponse(text="line")


def test_handlers_and_stub_meet(tmp_path: Path) -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers((services.handlers(services.AGENT, _Agent()),))
    address = f"unix:{tmp_path / 'agent.sock'}"
    server.add_insecure_port(address)
    server.start()
    try:
        with grpc.insecure_channel(address) as channel:
            stub = services.AgentStub(channel)
            assert stub.apply(control.ApplyRequest(manifest=b"ok"), timeout=30).description == "ok"
            answers = stub.watch(control.AgentStatusRequest(), timeout=30)
            assert [answer.json for answer in answers] == [b"0", b"1", b"2"]
    finally:
        server.stop(None).wait()


async def test_the_same_handlers_serve_an_asyncio_stub(tmp_path: Path) -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers((services.handlers(services.AGENT, _Agent()),))
    address = f"unix:{tmp_path / 'agent.sock'}"
    server.add_insecure_port(address)
    server.start()
    try:
        async with grpc.aio.insecure_channel(address) as channel:
            stub = services.AsyncAgentStub(channel)
            assert (await stub.apply(control.ApplyRequest(manifest=b"ok"), timeout=30)).code == 200
            seen = [a.json async for a in stub.watch(control.AgentStatusRequest(), timeout=30)]
            assert seen == [b"0", b"1", b"2"]
    finally:
        server.stop(None).wait()


def test_a_missing_method_is_noticed_before_serving() -> None:
    with pytest.raises(AttributeError, match="apply"):
        services.handlers(services.AGENT, object())


@pytest.mark.parametrize(
    ("name", "expected"),
    [("ModelInfer", "model_infer"), ("Load", "load"), ("ServerLive", "server_live")],
)
def test_snake_case(name: str, expected: str) -> None:
    assert services.snake_case(name) == expected
