from __future__ import annotations

import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from gatelet.agent.scoring.client import ScoringClient
from gatelet.agent.scoring.control_service import ControlService
from gatelet.agent.scoring.dataplane import DataPlane
from gatelet.agent.scoring.errors import Code, ScoringError
from gatelet.agent.scoring.grpc_server import AddressUnavailable, GrpcServer
from gatelet.agent.scoring.process import ControlServer
from gatelet.protos import control_pb2 as pb

from ..bench import onnx_models
from ..bench.scoring_site import Site, serve

X = {"x": np.ones((1, 4), np.float32)}


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with serve(tmp_path / "control.sock") as site:
        yield site


@pytest.fixture
def client(site: Site) -> Iterator[ScoringClient]:
    with ScoringClient(site.address) as client:
        yield client


def refused(code: grpc.StatusCode, message: str) -> object:
    class Refused:
        def __enter__(self) -> None:
            self._raises = pytest.raises(grpc.RpcError)
            self._info = self._raises.__enter__()

        def __exit__(self, *arguments: object) -> bool:
            caught = self._raises.__exit__(*arguments)  # type: ignore[arg-type]
            assert self._info.value.code() is code, self._info.value
            assert message in self._info.value.details()
            return bool(caught)

    return Refused()


def test_load_probe_switch_score_unload(site: Site, client: ScoringClient, tmp_path: Path) -> None:
    folder = onnx_models.scale_folder(tmp_path / "m", 3, name="scaler", version="7")
    assert not client.ready()
    status = site.load("digits@1", folder)
    assert (status.state, status.model, status.version) == (
        pb.InstanceStatus.LOADED,
        "scaler",
        "7",
    )
    assert [b.name for b in status.backends] == ["cpu"]
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "is loaded, not ready; probe it first"):
        site.switch({"digits": [("digits@1", 0, True)]})
    assert site.probe("digits@1").state == pb.InstanceStatus.READY
    assert not client.ready("digits")
    site.switch({"digits": [("digits@1", 0, True)]})
    assert client.ready()
    assert client.ready("digits", "7")
    assert not client.ready("digits", "8")
    assert client.infer("digits", X)["total"].tolist() == [[12.0]]
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "endpoint 'digits' routes to 'digits@1'"):
        site.unload("digits@1")
    answer = site.status()
    assert answer.grpc_address == site.address
    assert [(t.instance, t.percent, t.default) for t in answer.routes[0].targets] == [
        ("digits@1", 100, True)
    ]
    assert answer.instances[0].backends[0].requests >= 1
    site.switch({})
    with pytest.raises(ScoringError, match="model 'digits' is not deployed here; deployed: none"):
        client.infer("digits", X)
    site.unload("digits@1")
    site.unload("digits@1")
    assert not site.status().instances


def announce(site: Site, **endpoints: str) -> None:
    wanted = [pb.WantedEndpoint(endpoint=name, auth=auth) for name, auth in endpoints.items()]
    site.control.announce(pb.AnnounceRequest(endpoints=wanted), 10)


def test_what_is_wanted_is_unavailable_until_it_is_loaded(
    site: Site, client: ScoringClient, tmp_path: Path
) -> None:
    def refusal(endpoint: str) -> ScoringError:
        with pytest.raises(ScoringError) as caught:
            client.infer(endpoint, X)
        return caught.value

    assert not site.status().announced
    assert refusal("digits").code is refusal("nobody").code is Code.UNAVAILABLE
    announce(site, digits="", more="none")
    status = site.status()
    assert (status.announced, [one.endpoint for one in status.endpoints]) == (
        True,
        ["digits", "more"],
    )
    assert refusal("nobody").code is Code.NOT_FOUND
    for endpoint in ("digits", "more"):
        error = refusal(endpoint)
        assert error.code is Code.UNAVAILABLE
        assert error.message == f"model {endpoint!r} is being loaded; try again"
        assert not client.ready(endpoint)
    # Loading leaves it so, and so does a route for another endpoint.
    folder = onnx_models.scale_folder(tmp_path / "m", 3)
    site.load("digits@1", folder)
    site.probe("digits@1")
    assert refusal("digits").code is Code.UNAVAILABLE
    site.switch({"digits": [("digits@1", 0, True)]})
    assert client.infer("digits", X)["total"].tolist() == [[12.0]]
    assert refusal("more").code is Code.UNAVAILABLE
    # Not everything that is wanted has been there yet.
    assert not client.ready()
    site.switch({name: [("digits@1", 0, True)] for name in ("digits", "more")})
    assert client.ready()
    # What a later deployment adds makes nobody look elsewhere.
    announce(site, digits="", more="", third="")
    assert client.ready()
    assert refusal("third").code is Code.UNAVAILABLE
    announce(site)
    assert refusal("third").code is Code.NOT_FOUND
    assert client.ready("digits")


def test_announcements_are_checked(site: Site) -> None:
    twice = [pb.WantedEndpoint(endpoint="a"), pb.WantedEndpoint(endpoint="a", auth="key")]
    for endpoints, message in (
        ([pb.WantedEndpoint()], "endpoints must be named"),
        (twice, "and once each"),
        ([pb.WantedEndpoint(endpoint="a", auth="magic")], "auth must be one of none, key, token"),
    ):
        with refused(grpc.StatusCode.INVALID_ARGUMENT, message):
            site.control.announce(pb.AnnounceRequest(endpoints=endpoints), 10)
    assert not site.status().announced


def test_load_is_idempotent_but_a_name_means_one_thing(site: Site, tmp_path: Path) -> None:
    folder = onnx_models.scale_folder(tmp_path / "m", 3)
    site.load("i", folder, timeout_ms=1000)
    site.probe("i")
    assert site.load("i", folder, timeout_ms=1000).state == pb.InstanceStatus.READY
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "already loaded from"):
        site.load("i", folder, timeout_ms=2000)
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "already loaded from"):
        site.load("i", onnx_models.scale_folder(tmp_path / "other", 3), timeout_ms=1000)
    assert len(site.status().instances) == 1


def test_a_model_that_cannot_run_is_a_failed_precondition(site: Site, tmp_path: Path) -> None:
    folder = onnx_models.scale_folder(tmp_path / "m", 3)
    (folder / "onnx/model.onnx").write_bytes(b"no")
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "onnxruntime cannot load"):
        site.load("i", folder)
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "model.json"):
        site.load("j", tmp_path / "nowhere")
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "must be an absolute path"):
        site.load("j", Path("relative"))
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "instance must be named"):
        site.load("", folder)
    assert not site.status().instances


def test_a_failed_probe_is_reported_and_keeps_the_model_out(site: Site, tmp_path: Path) -> None:
    sample = {
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 1, 1, 1]}],
        "outputs": [{"name": "total", "datatype": "FP32", "shape": [1, 1], "data": [13]}],
    }
    site.load("i", onnx_models.scale_folder(tmp_path / "m", 3, sample=sample))
    status = site.probe("i")
    assert status.state == pb.InstanceStatus.FAILED
    assert "output 'total' of the sample: off by up to 1" in status.error
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "off by up to 1"):
        site.switch({"e": [("i", 0, True)]})


def test_a_switch_is_all_or_nothing(site: Site, client: ScoringClient, tmp_path: Path) -> None:
    site.deploy({"good": onnx_models.scale_folder(tmp_path / "m", 3)})
    with refused(grpc.StatusCode.NOT_FOUND, "instance 'absent' is not loaded"):
        site.switch({"better": [("good", 0, True)], "bad": [("absent", 0, True)]})
    for targets, message in (
        ([("good", 0, True), ("good", 0, True)], "two default targets"),
        ([("good", 50, False), ("good", 50, False)], "has no default target"),
        ([("good", 0, True), ("good", 60, False), ("good", 60, False)], "claim 120 percent"),
        ([], "has no default target"),
    ):
        with refused(grpc.StatusCode.INVALID_ARGUMENT, message):
            site.switch({"e": targets})
    with refused(grpc.StatusCode.NOT_FOUND, "absent"):
        site.probe("absent")
    assert client.ready("good")
    assert not client.ready("better")


def test_traffic_is_split_and_versions_are_reachable(
    site: Site, client: ScoringClient, tmp_path: Path
) -> None:
    for version in ("1", "2"):
        folder = onnx_models.scale_folder(tmp_path / version, float(version), version=version)
        site.load(version, folder)
        site.probe(version)
    site.switch({"e": [("1", 0, True), ("2", 25, False)]})
    site.switch({"e": [("1", 0, True), ("2", 25, False), ("2", 0, False)]})
    with pytest.raises(ScoringError, match=r"has no version '3'; deployed: '1', '2'$"):
        client.infer("e", X, "3")
    site.switch({"e": [("1", 0, True), ("2", 25, False)]})
    assert client.metadata("e").versions == ("1", "2")
    assert client.infer("e", X, "1")["y"][0, 0] == 1.0
    assert client.infer("e", X, "2")["y"][0, 0] == 2.0
    with pytest.raises(ScoringError, match="has no version '3'; deployed: '1', '2'") as caught:
        client.infer("e", X, "3")
    assert caught.value.code is Code.NOT_FOUND
    seen = [client.request("e", X).version for _ in range(400)]
    # 400 draws at 25 %: six standard deviations are 52.
    assert 48 <= seen.count("2") <= 152
    shares = {t.instance: t.percent for t in site.status().routes[0].targets}
    assert shares == {"1": 75, "2": 25}


def test_the_sockets_owner_only(site: Site, tmp_path: Path) -> None:
    assert stat.S_IMODE((tmp_path / "control.sock").stat().st_mode) == 0o600


def test_a_second_server_does_not_take_the_socket_or_the_port(site: Site, tmp_path: Path) -> None:
    service = ControlService(DataPlane("t"), {})
    with pytest.raises(AddressUnavailable, match="another scoring process listens"):
        ControlServer(service, tmp_path / "control.sock")
    with pytest.raises(AddressUnavailable, match=f"cannot listen on {site.address}"):
        GrpcServer(DataPlane("t"), site.address)
    with pytest.raises(AddressUnavailable, match="too long for a Unix socket"):
        ControlServer(service, tmp_path / ("x" * 120))
    assert site.status().pid > 0


def test_a_socket_left_by_a_dead_process_is_replaced(tmp_path: Path) -> None:
    import socket

    path = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with serve(path) as site:
        assert site.status().boot_id


def test_every_start_has_its_own_boot_id(tmp_path: Path) -> None:
    with serve(tmp_path / "a") as one, serve(tmp_path / "b") as other:
        assert one.status().boot_id != other.status().boot_id


def test_status_answers_while_a_model_loads(site: Site, tmp_path: Path) -> None:
    folders = [onnx_models.scale_folder(tmp_path / str(n), n) for n in range(1, 9)]
    threads = [
        threading.Thread(target=site.load, args=(str(n), folder))
        for n, folder in enumerate(folders)
    ]
    for thread in threads:
        thread.start()
    site.status()
    for thread in threads:
        thread.join(20)
    assert len(site.status().instances) == 8


def test_runs_at_a_time_and_the_usual_priority_can_be_chosen(site: Site, tmp_path: Path) -> None:
    folder = onnx_models.scale_folder(tmp_path / "m", 3)
    site.load("e", folder, instances=3, priority=2)
    site.probe("e")
    site.switch({"e": [("e", 0, True)]})
    config = site.server_instance("e").batching
    assert (config.slots, config.priority) == (3, 2)


def test_sticky_sessions_named_deployments_and_mirrors_over_grpc(
    site: Site, tmp_path: Path
) -> None:
    import tritonclient.grpc as triton

    for version in ("1", "2"):
        folder = onnx_models.scale_folder(tmp_path / version, float(version), version=version)
        site.load(f"m{version}@x", folder)
        site.probe(f"m{version}@x")
    targets = [
        pb.RouteTarget(instance="m1@x", default=True),
        pb.RouteTarget(instance="m2@x", percent=50),
    ]
    route = pb.Route(endpoint="e", targets=targets, sticky_header="X-User")
    site.control.switch(pb.SwitchRequest(routes=[route]), 10)
    assert site.status().routes[0].sticky_header == "x-user"
    x = triton.InferInput("x", [1, 4], "FP32")
    x.set_data_from_numpy(X["x"])
    with triton.InferenceServerClient(site.address) as client:

        def version(**headers: str) -> str:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            return str(client.infer("e", [x], headers=named).get_response().model_version)

        by_user = {user: {version(x_user=user) for _ in range(5)} for user in "abcdefghij"}
        assert all(len(versions) == 1 for versions in by_user.values())
        assert {"1", "2"} == set().union(*by_user.values())
        assert version(azureml_model_deployment="m2") == "2"
        with pytest.raises(triton.InferenceServerException, match="deployed: 'm1', 'm2'"):
            version(azureml_model_deployment="m3")
        mirrored = [targets[0], pb.RouteTarget(instance="m2@x", mirror=100, mirror_tolerance=0.1)]
        route = pb.Route(endpoint="e", targets=mirrored)
        site.control.switch(pb.SwitchRequest(routes=[route]), 10)
        assert {version() for _ in range(10)} == {"1"}
    deadline = time.monotonic() + 30
    while (counts := site.status().instances[1].mirror).compared < 10:
        assert time.monotonic() < deadline, counts
    assert (counts.differing, counts.failed, counts.dropped) == (10, 0, 0)
    assert site.status().routes[0].targets[1].mirror == 100
    assert site.status().instances[0].counts.successes >= 10
