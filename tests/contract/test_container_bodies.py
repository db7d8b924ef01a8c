"""What a container was made from and what became of it: drift, mounts and networks."""

from __future__ import annotations

import json

import pytest
from engine_benches import bench as bench
from engine_benches import made, unique, until, view
from engine_benches import real as real
from engine_benches import runtime as runtime
from engine_fixture import HEALTHCHECK
from gatelet.agent.module_spec import ModuleSpec
from gatelet.agent.runtime.container import RuntimeFailed
from gatelet.agent.runtime.create_body import CreateFacts, create_body
from gatelet.agent.runtime.docker import DockerRuntime
from gatelet.agent.runtime.drift import drift
from gatelet.agent.runtime.engine_own import EnginesOwn
from gatelet.agent.runtime.policy import DockerPolicy


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"Memory": 64 << 20, "MemorySwap": 64 << 20}, "HostConfig.Memory"),
        ({"NanoCpus": 500_000_000}, "HostConfig.NanoCpus"),
        ({"PidsLimit": 50}, "HostConfig.PidsLimit"),
        ({"CpuShares": 100}, "HostConfig.CpuShares"),
        ({"RestartPolicy": {"Name": "always"}}, "HostConfig.RestartPolicy"),
    ],
)
async def test_settings_changed_by_others_are_seen(bench, runtime, change, named):
    limits = {"Memory": 32 << 20, "MemorySwap": 32 << 20, "PidsLimit": 100}
    spec = await made(bench, runtime, HostConfig=limits)
    assert (await view(runtime, spec)).drift == ()
    bench.update(spec.name, **change)
    assert named in (await view(runtime, spec)).drift
    # Also by an agent that did not create it.
    assert named in (await view(bench.runtime(), spec)).drift
    await runtime.create(spec)
    assert (await view(runtime, spec)).drift == ()


async def test_a_new_name_is_seen(bench, runtime):
    spec = await made(bench, runtime)
    bench.rename(spec.name, unique("renamed"))
    assert (await view(runtime, spec)).drift == ("Name",)


async def test_a_whole_body_does_not_drift(bench, runtime):
    options = {
        "Hostname": "camera",
        "User": "1000:1000",
        "WorkingDir": "/tmp",
        "Env": ["A=1", "B=two words"],
        "Labels": {"team": "vision"},
        "ExposedPorts": {"80/tcp": {}},
        "Volumes": {"/cache": {}},
        "StopSignal": "SIGTERM",
        "StopTimeout": 3,
        "Healthcheck": HEALTHCHECK,
        "HostConfig": {
            "Memory": 64 << 20,
            "MemoryReservation": 32 << 20,
            "NanoCpus": 500_000_000,
            "PidsLimit": 64,
            "CapDrop": ["ALL"],
            "CapAdd": ["net_bind_service", "CAP_CHOWN"],
            "Binds": ["/usr/share:/host:ro", "/etc/hosts:/h:ro"],
            "Mounts": [
                {"Type": "tmpfs", "Target": "/scratch", "TmpfsOptions": {"SizeBytes": 65536}}
            ],
            "Tmpfs": {"/run": "rw,mode=1777"},
            "ReadonlyRootfs": True,
            "Ulimits": [{"Name": "nofile", "Soft": 512, "Hard": 1024}],
            "PortBindings": {"80/tcp": [{"HostPort": "18080"}]},
            "ExtraHosts": ["db:10.0.0.1"],
            "Dns": ["10.0.0.2"],
            "GroupAdd": ["44"],
            "Devices": [{"PathOnHost": "/dev/zero", "PathInContainer": "/dev/nil"}],
            "Init": False,
            "OomScoreAdj": 100,
            "ShmSize": 1 << 20,
            "LogConfig": {"Type": "json-file", "Config": {"max-size": "1m"}},
            "RestartPolicy": {"Name": "always"},
        },
    }
    env = [("B", "3"), ("C", "")]
    spec = await made(bench, runtime, env=env, name="checked:1", **options)
    await until(runtime, spec, lambda found: found.state == "running")
    # A runtime that did not create it knows nothing of the engine's own settings.
    for one in (runtime, bench.runtime()):
        assert (await view(one, spec)).drift == ()


async def test_what_the_engine_makes_of_a_body_by_itself_is_known_after_a_restart(
    real, monkeypatch
):
    """An engine of a kind that no rule foresees: it changes every body in the same way."""

    def of_another_kind(*what):
        return (*drift(*what), "HostConfig.Quirk")

    monkeypatch.setattr("gatelet.agent.runtime.docker.drift", of_another_kind)
    saved = []
    own = EnginesOwn("", saved.append)
    runtime = DockerRuntime(real.engine.socket, real.device, engines_own=own)
    real.runtimes.append(runtime)
    spec = await made(real, runtime)
    assert (await view(runtime, spec)).drift == ()
    again = DockerRuntime(real.engine.socket, real.device, engines_own=EnginesOwn(saved[-1]))
    real.runtimes.append(again)
    assert (await view(again, spec)).drift == ()
    real.update(spec.name, PidsLimit=50)
    assert (await view(again, spec)).drift == ("HostConfig.PidsLimit",)
    assert (await view(real.runtime(), spec)).drift == ("HostConfig.PidsLimit", "HostConfig.Quirk")


async def test_a_link_on_the_host_must_be_permitted_too(real, tmp_path):
    image, digest = real.publish("probe:1")
    policy = DockerPolicy(mounts=(str(tmp_path),))
    runtime = DockerRuntime(real.engine.socket, real.device, policy=policy)
    real.runtimes.append(runtime)
    await runtime.pull(image, digest, (), lambda progress: None)
    (tmp_path / "inside").mkdir()
    (tmp_path / "good").symlink_to(tmp_path / "inside")
    (tmp_path / "bad").symlink_to("/etc")
    for name, good in (("inside", True), ("good", True), ("bad", False)):
        options = {"HostConfig": {"NetworkMode": "none", "Binds": [f"{tmp_path}/{name}:/d"]}}
        module = ModuleSpec(unique(), image, create_options=json.dumps(options))
        spec = create_body(module, real.device, policy, CreateFacts(digest=digest))
        if good:
            await runtime.create(spec)
        else:
            with pytest.raises(RuntimeFailed, match=r"is a link to /etc; /etc is not allowed"):
                await runtime.create(spec)


async def test_the_network_of_the_modules_is_made_when_it_is_missing(real):
    name = unique("net")
    runtime = DockerRuntime(real.engine.socket, real.device, network=name)
    real.runtimes.append(runtime)
    image, digest = real.publish("probe:1")
    await runtime.pull(image, digest, (), lambda progress: None)
    try:
        for module in (ModuleSpec(unique(), image), ModuleSpec(unique(), image)):
            facts = CreateFacts(digest=digest, network=name)
            spec = create_body(module, real.device, DockerPolicy(), facts)
            await runtime.create(spec)
            await runtime.start(spec.name)
            assert (await view(runtime, spec)).drift == ()
            networks = real.api.inspect_container(spec.name)["NetworkSettings"]["Networks"]
            assert spec.module in networks[name]["Aliases"]
        real.api.disconnect_container_from_network(spec.name, name)
        assert (await view(runtime, spec)).drift == ("Networks",)
        [found] = real.api.networks(names=[name])
        # One that nobody here asked for stays missing.
        other = {"HostConfig": {"NetworkMode": unique("other")}}
        module = ModuleSpec(unique(), image, create_options=json.dumps(other))
        facts = CreateFacts(digest=digest, network=name)
        spec = create_body(module, real.device, DockerPolicy(), facts)
        await runtime.create(spec)
        with pytest.raises(RuntimeFailed, match="make the network"):
            await runtime.start(spec.name)
    finally:
        for one in await runtime.containers():
            await runtime.remove(one.name)
        for found in real.api.networks(names=[name]):
            real.api.remove_network(found["Id"])
