"""Containers that serve models, and model images in a real engine."""

from __future__ import annotations

import asyncio
import json
import sys
import tarfile
import tempfile
import time
from io import BytesIO
from pathlib import Path, PurePosixPath

import gatelet.agent
import grpc
import numpy as np
import pytest
from gatelet.agent.module_spec import ModuleSpec
from gatelet.agent.runtime.container import SCORING_LABEL
from gatelet.agent.runtime.create_body import CreateFacts, create_body
from gatelet.agent.runtime.docker import DockerRuntime
from gatelet.agent.runtime.policy import DockerPolicy
from gatelet.agent.runtime.scoring_module import scoring_socket
from gatelet.agent.scoring.client import ScoringClient
from gatelet.agent.scoring.errors import Code, ScoringError
from gatelet.modules.oci.build import build_model_image
from gatelet.modules.oci.client import RegistryClient
from gatelet.modules.oci.layout import open_layout
from gatelet.modules.oci.push import push_image
from gatelet.modules.oci.reference import ImageRef
from gatelet.modules.oci.transport import RegistrySettings
from gatelet.protos import control_pb2 as pb
from gatelet.protos.services import ScoringStub

from ..bench import onnx_models
from ..bench.scoring_site import TIMEOUT, Site, serve

X = {"x": np.ones((1, 4), np.float32)}


@pytest.fixture
async def runtime(engine, tmp_path):
    runtime = DockerRuntime(engine.socket, tmp_path.name)
    yield runtime
    for view in await runtime.containers():
        await runtime.remove(view.name)
    await runtime.close()


def host_folders() -> list[str]:
    """What a Python of this machine needs to run in a container without files of its own."""
    project = str(Path(gatelet.agent.__file__).parents[1])
    found = ["/usr", "/lib", "/lib64", sys.prefix, sys.base_prefix, project]
    folders = [folder for folder in dict.fromkeys(found) if Path(folder).exists()]
    return [
        one
        for one in folders
        if not any(one.startswith(f"{other}/") for other in folders if other != one)
    ]


async def until(condition):
    deadline = time.monotonic() + TIMEOUT
    while not (found := await condition()):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)
    return found


async def test_a_scoring_container_answers_at_its_endpoint(engine, runtime, tmp_path) -> None:
    folder = onnx_models.scale_folder(tmp_path / "model", 2, name="scaler", version="7")
    pushed = engine.push("scorer:1", config={"Labels": {SCORING_LABEL: "inner"}})
    with tempfile.TemporaryDirectory(prefix="gt-") as short:
        run_dir = PurePosixPath(short)
        folders = host_folders()
        policy = DockerPolicy(mounts=(*(f"{one}:ro" for one in folders), f"{folder}:ro"))
        options = {
            "Entrypoint": [sys.executable, "-m", "gatelet.agent.scoring.process"],
            "Cmd": [
                *("--control-socket", "/run/gatelet/control.sock", "--http-address", ""),
                *("--metrics-address", "", "--grpc-address", "unix:/run/gatelet/scoring.sock"),
            ],
            "HostConfig": {
                "NetworkMode": "none",
                "Binds": [*(f"{one}:{one}:ro" for one in folders), f"{folder}:/model:ro"],
                "Tmpfs": {"/tmp": ""},
                "ReadonlyRootfs": True,
            },
        }
        module = ModuleSpec("scorer", pushed.name, create_options=json.dumps(options))
        facts = CreateFacts(
            digest=pushed.digest,
            run_dir=run_dir,
            image_labels={SCORING_LABEL: "inner"},
            protected=(short,),
        )
        spec = create_body(module, tmp_path.name, policy, facts)
        await runtime.pull(pushed.name, pushed.digest, (), lambda progress: None)
        await runtime.create(spec)
        shared = Path(short) / "modules" / "scorer"
        assert shared.stat().st_mode & 0o777 == 0o770
        await runtime.start(spec.name)
        [view] = await runtime.containers()
        assert (view.state, view.drift) == ("running", ())
        await serve_inner(shared / "control.sock")

        socket = scoring_socket(run_dir, "scorer")
        with serve(tmp_path / "outer.sock") as site:
            await asyncio.to_thread(deploy, site, str(socket))
            with ScoringClient(site.address) as client:
                assert await asyncio.to_thread(scored, client)
                await runtime.stop(spec.name)
                assert not await asyncio.to_thread(scored, client)
                # As after a reboot: the folder in /run is gone, the container is not.
                for left in shared.iterdir():
                    left.unlink()
                shared.rmdir()
                await runtime.start(spec.name)
                await serve_inner(shared / "control.sock")
                await until(lambda: asyncio.to_thread(scored, client))
        await runtime.remove(spec.name)


async def serve_inner(control: Path) -> None:
    """Make the process in the container serve the model that is mounted there."""

    async def there() -> bool:
        return control.exists()

    await until(there)

    def work() -> None:
        with grpc.insecure_channel(f"unix:{control}") as channel:
            Site("", ScoringStub(channel)).deploy({"inner": Path("/model")})

    await asyncio.to_thread(work)


def deploy(site: Site, socket: str) -> None:
    request = pb.LoadRequest(instance="scorer@1", socket=socket, model="inner")
    status = site.control.load(request, TIMEOUT).status
    assert (status.model, status.version) == ("inner", "7")
    assert site.probe("scorer@1").state == pb.InstanceStatus.READY
    site.switch({"scale": [("scorer@1", 0, True)]})


def scored(client: ScoringClient) -> bool:
    try:
        return client.infer("scale", X)["total"].tolist() == [[8.0]]
    except ScoringError as error:
        if error.code is not Code.UNAVAILABLE:
            raise
        return False


@pytest.mark.parametrize("compress", [False, True], ids=["plain", "gzip"])
async def test_the_engine_takes_model_images_and_shares_their_layers(
    engine, runtime, tmp_path, compress
) -> None:
    def push(version: str) -> tuple[str, str, list[str]]:
        folder = onnx_models.write_folder(
            tmp_path / version,
            onnx_models.mlp(hidden=2048),
            [("x", "FP32", (-1, 64))],
            [("y", "FP32", (-1, 10))],
            name="m" + "-gzip" * compress,
            version=version,
        )
        layout = tmp_path / f"{version}.layout"
        built = build_model_image(folder, layout, compress=compress)
        name = f"{engine.registry.address}/models/{'gzip' if compress else 'plain'}:{version}"
        with RegistryClient(RegistrySettings(engine.registry.address)) as client:
            push_image(client, ImageRef.parse(name), open_layout(layout))
        return name, built.digest, [layer.digest for layer in built.manifest.layers]

    first, first_digest, first_layers = push("1")
    second, second_digest, second_layers = push("2")
    shared = set(first_layers) & set(second_layers)
    assert len(shared) == len(first_layers) - 1
    seen = []
    await runtime.pull(first, first_digest, (), seen.append)
    assert seen[-1].layers_done == len(first_layers)
    begin = seen[-1].bytes_done
    seen.clear()
    await runtime.pull(second, second_digest, (), seen.append)
    assert seen[-1].layers_done == len(second_layers)
    # Only model.json.
    assert begin > 500_000 > 10_000 > seen[-1].bytes_done
    images = {digest: one for one in await runtime.images() for digest in one.digests}
    assert images[second_digest].labels["io.gatelet.model"].endswith(":2")
    # What our own pull would unpack is what is in the engine's image.
    client = engine.client
    made = client.create_container_from_config({"Image": second, "Cmd": ["/none"]})["Id"]
    try:
        chunks, _ = client.get_archive(made, "/model/model.json")
        with tarfile.open(fileobj=BytesIO(b"".join(chunks))) as archive:
            member = archive.extractfile("model.json")
            assert member is not None
            assert json.load(member)["version"] == "2"
    finally:
        client.remove_container(made)
    for digest in (first_digest, second_digest):
        await runtime.remove_image(digest)
