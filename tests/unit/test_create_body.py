"""createOptions under the device's policy: what becomes a container, and what is refused."""

from __future__ import annotations

import json
from pathlib import PurePosixPath

import pytest
from gatelet.agent.config import ConfigError, parse_config
from gatelet.agent.document import ManifestError
from gatelet.agent.manifest import Manifest
from gatelet.agent.module_spec import ModuleSpec
from gatelet.agent.runtime.container import SCORING_LABEL
from gatelet.agent.runtime.create_body import (
    CreateFacts,
    container_name,
    create_body,
    ignored_options,
)
from gatelet.agent.runtime.create_schema import HOST_CONFIG
from gatelet.agent.runtime.drift import drift
from gatelet.agent.runtime.policy import (
    DockerPolicy,
    clean_path,
    lies_in,
    mount_refusal,
    protected_paths,
)
from gatelet.agent.runtime.scoring_module import (
    is_scoring,
    scoring_socket,
    shared_folder,
)
from gatelet.agent.scoring_env import scoring_options
from gatelet.agent.unsupported import unsupported
from hypothesis import given
from hypothesis import strategies as st

DIGEST = "sha256:" + "a" * 64
PROTECTED = protected_paths("/var/run/docker.sock", "/var/lib/gatelet", "/run/gatelet")


def spec_of(options=None, env=(), name="cam"):
    return ModuleSpec(
        name, "reg.test:5000/cam:1", env=tuple(env), create_options=json.dumps(options or {})
    )


def body_of(options=None, env=(), policy=None, **facts):
    facts = CreateFacts(digest=DIGEST, protected=PROTECTED, **facts)
    made = create_body(spec_of(options, env), "edge-1", policy or DockerPolicy(), facts)
    return json.loads(made.body)


def refusal(options, policy=None, env=(), **facts):
    with pytest.raises(ManifestError) as refused:
        body_of(options, env, policy, **facts)
    assert refused.value.code == 400
    assert refused.value.path == "modules.cam.settings.createOptions"
    return str(refused.value)


def host(**settings):
    return {"HostConfig": settings}


def test_nothing_given_is_a_safe_container():
    assert body_of() == {
        "Image": "reg.test:5000/cam:1",
        "Env": ["IOTEDGE_DEVICEID=edge-1", "IOTEDGE_MODULEID=cam"],
        "Labels": {
            "io.gatelet.module": "cam",
            "io.gatelet.device": "edge-1",
            "io.gatelet.digest": DIGEST,
        },
        "HostConfig": {
            "RestartPolicy": {"Name": "no", "MaximumRetryCount": 0},
            "LogConfig": {
                "Type": "json-file",
                "Config": {"max-size": "10m", "max-file": "3"},
            },
            "SecurityOpt": ["no-new-privileges:true"],
        },
    }


def test_the_manifest_goes_over_the_options_and_the_device_over_both():
    options = {"Env": ["A=1", "B=2", "GONE", "IOTEDGE_DEVICEID=other", "A=3"]}
    body = body_of(options, [("B", "4"), ("C", "x=y")], hub_host="hub.test", gateway_host="gw")
    assert body["Env"] == [
        "A=3",
        "B=4",
        "C=x=y",
        "GONE",
        "IOTEDGE_DEVICEID=edge-1",
        "IOTEDGE_GATEWAYHOSTNAME=gw",
        "IOTEDGE_IOTHUBHOSTNAME=hub.test",
        "IOTEDGE_MODULEID=cam",
    ]


def test_keys_count_in_any_spelling_and_nulls_do_not():
    body = body_of({"hostconfig": {"memory": 1e6, "binds": None}, "cmd": "serve", "ENTRYPOINT": []})
    assert body["HostConfig"]["Memory"] == 1_000_000
    assert "Binds" not in body["HostConfig"]
    assert body["Cmd"] == ["serve"]
    assert body["Entrypoint"] == []


def test_the_same_options_in_another_order_are_the_same_container():
    one = spec_of({"Cmd": ["a"], "HostConfig": {"Memory": 1, "NanoCpus": 2}}, [("A", "1")])
    two = spec_of({"HostConfig": {"NanoCpus": 2, "Memory": 1}, "Cmd": ["a"]}, [("A", "1")])
    prints = [
        create_body(s, "d", DockerPolicy(), CreateFacts(DIGEST)).fingerprint() for s in (one, two)
    ]
    assert prints[0] == prints[1]
    other = create_body(one, "d", DockerPolicy(), CreateFacts("sha256:" + "b" * 64))
    assert other.fingerprint() != prints[0]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"Foo": 1}, "Foo: not a setting of Docker's API 1.41"),
        (host(Privilegd=True), "HostConfig.Privilegd: not a setting"),
        ({"Cmd": [1]}, "Cmd[0]: expected text, found 1"),
        ({"HostConfig": []}, "HostConfig: expected an object"),
        (host(Memory=True), "HostConfig.Memory: expected a whole number, found true"),
        (host(Memory=2**63), "HostConfig.Memory: expected a whole number"),
        (host(Privileged="yes"), 'HostConfig.Privileged: expected true or false, found "yes"'),
        (
            host(PortBindings={"80/tcp": [{"HostPort": 80}]}),
            "HostConfig.PortBindings.80/tcp[0].HostPort: expected text, found 80",
        ),
        ({"HostConfig": {}, "hostConfig": {}}, "hostConfig: given twice"),
        ({"Env": ["=1"]}, "Env[0]: expected NAME=VALUE"),
        ({"Labels": {"io.gatelet.spec": "x"}}, "Labels.io.gatelet.spec: is set by gatelet"),
        (host(Privileged=True), "HostConfig.Privileged: a privileged container"),
        (host(privileged=True), "HostConfig.Privileged: a privileged container"),
        (
            host(Binds=["/etc:/etc:ro"]),
            'HostConfig.Binds[0]: /etc is not allowed by [docker.policy] mounts; add "/etc:ro"',
        ),
        (host(Binds=["v:/a", "/:/host"]), "HostConfig.Binds[1]: / is not allowed"),
        (host(Binds=["/data/../etc:/x"]), "HostConfig.Binds[0]: /data/../etc is not a plain"),
        (host(Binds=["//var//run/docker.sock:/x"]), "/var/run/docker.sock is not allowed"),
        (host(Binds=["../x:/x"]), "HostConfig.Binds[0]: '../x' is neither"),
        (host(Binds=["/x"]), "HostConfig.Binds[0]: /x is not SOURCE:TARGET"),
        (host(Binds=["volume:/x:rshared"]), "HostConfig.Binds[0]: option 'rshared'"),
        (host(Binds=["volume:x"]), "HostConfig.Binds[0]: x is no place in the container"),
        (
            host(Mounts=[{"Type": "bind", "Source": "/etc", "Target": "/e"}]),
            "HostConfig.Mounts[0]: /etc is not allowed",
        ),
        (
            host(Mounts=[{"type": "BIND", "Source": "/etc", "Target": "/e"}]),
            "HostConfig.Mounts[0].Type: 'BIND'",
        ),
        (
            host(Mounts=[{"Type": "volume", "Source": "/etc", "Target": "/e"}]),
            "'/etc' is not the name of a volume",
        ),
        (
            host(
                Mounts=[
                    {
                        "Type": "volume",
                        "Source": "volume",
                        "Target": "/e",
                        "VolumeOptions": {
                            "DriverConfig": {
                                "Name": "local",
                                "Options": {"type": "none", "o": "bind", "device": "/etc"},
                            }
                        },
                    }
                ]
            ),
            "HostConfig.Mounts[0].VolumeOptions.DriverConfig: options of a volume driver",
        ),
        (
            host(Devices=[{"PathOnHost": "/dev/mem"}]),
            "HostConfig.Devices[0]: /dev/mem (rwm) is not allowed",
        ),
        (host(DeviceCgroupRules=["a *:* rwm"]), "HostConfig.DeviceCgroupRules:"),
        (host(DeviceRequests=[{"Count": -1}]), "HostConfig.DeviceRequests:"),
        (host(CapAdd=["CHOWN", "sys_admin"]), "HostConfig.CapAdd[1]: SYS_ADMIN is not allowed"),
        (host(CapAdd="ALL"), "HostConfig.CapAdd[0]: ALL is not allowed"),
        (host(NetworkMode="host"), "HostConfig.NetworkMode: network host"),
        (host(NetworkMode="container:db"), "HostConfig.NetworkMode: network container:db"),
        (
            {"NetworkingConfig": {"EndpointsConfig": {"host": None}}},
            "NetworkingConfig.EndpointsConfig.host:",
        ),
        (host(PidMode="host"), "HostConfig.PidMode: host"),
        (host(PidMode="container:db"), "HostConfig.PidMode: container:db"),
        (host(IpcMode="host"), "HostConfig.IpcMode: host"),
        (host(UTSMode="host"), "HostConfig.UTSMode:"),
        (host(UsernsMode="host"), "HostConfig.UsernsMode:"),
        (host(CgroupnsMode="host"), "HostConfig.CgroupnsMode:"),
        (host(CgroupParent="/x"), "HostConfig.CgroupParent:"),
        (host(SecurityOpt=["seccomp=unconfined"]), "HostConfig.SecurityOpt[0]: seccomp=unconfined"),
        (host(SecurityOpt=["no-new-privileges:false"]), "HostConfig.SecurityOpt[0]:"),
        (host(MaskedPaths=[]), "HostConfig.MaskedPaths:"),
        (host(ReadonlyPaths=[]), "HostConfig.ReadonlyPaths:"),
        (host(VolumesFrom=["db"]), "HostConfig.VolumesFrom:"),
        (host(VolumeDriver="nfs"), "HostConfig.VolumeDriver:"),
        (host(Links=["db"]), "HostConfig.Links:"),
        (host(Runtime="sysbox"), "HostConfig.Runtime: sysbox is not allowed"),
        (host(Sysctls={"net.ipv4.ip_forward": "1"}), "HostConfig.Sysctls.net.ipv4.ip_forward:"),
        (host(OomKillDisable=True), "HostConfig.OomKillDisable:"),
        (host(OomScoreAdj=-1000), "HostConfig.OomScoreAdj:"),
        (host(LogConfig={"Type": "fluentd"}), "HostConfig.LogConfig.Type: fluentd"),
        (host(AutoRemove=True), "HostConfig.AutoRemove: gatelet removes"),
        (host(CpuCount=1), "HostConfig.CpuCount: exists on Windows only"),
        (host(Isolation="hyperv"), "HostConfig.Isolation: hyperv"),
        (host(ContainerIDFile="/etc/x"), "HostConfig.ContainerIDFile:"),
        (host(Tmpfs={"/a/../b": ""}), "HostConfig.Tmpfs: /a/../b is no place"),
    ],
)
def test_refused(options, named):
    assert named in refusal(options)


def test_all_problems_are_named_up_to_a_bound():
    message = refusal(host(Privileged=True, PidMode="host", Binds=["/a:/a", "/b:/b"]))
    for path in ("Privileged", "PidMode", "Binds[0]", "Binds[1]"):
        assert f"HostConfig.{path}:" in message
    assert "and 12 more" in refusal({f"Key{n}": n for n in range(20)})


@pytest.mark.parametrize(
    ("options", "policy"),
    [
        (host(Privileged=True, Binds=["/:/host"], NetworkMode="host"), {"allow_privileged": True}),
        (host(Binds=["/data/cam:/d", "/data:/e:ro"]), {"mounts": ("/data",)}),
        (host(Binds=["/data:/e:ro,z"]), {"mounts": ("/data:ro",)}),
        (host(Binds=["/var/run/docker.sock:/s"]), {"mounts": ("/var/run/docker.sock",)}),
        (
            host(Binds=["/var:/s"]),
            {
                "mounts": (
                    *("/var", "/var/run/docker.sock"),
                    *("/var/lib/gatelet", "/var/run/gatelet"),
                )
            },
        ),
        (
            host(Devices=[{"PathOnHost": "/dev/uio0", "CgroupPermissions": "r"}]),
            {"devices": ("/dev/uio0:rw",)},
        ),
        (host(Devices=[{"PathOnHost": "/dev/bus/usb/001"}]), {"devices": ("/dev/bus/usb",)}),
        (host(CapAdd=["CAP_NET_ADMIN", "net_raw"]), {"capabilities": ("NET_ADMIN", "cap_net_raw")}),
        (
            host(NetworkMode="host", PidMode="host", IpcMode="host"),
            {"allow_host_network": True, "allow_host_pid": True, "allow_host_ipc": True},
        ),
        (host(SecurityOpt=["seccomp=unconfined"]), {"security_options": ("seccomp=unconfined",)}),
        (host(Sysctls={"net.core.somaxconn": "1"}), {"sysctls": ("net.core.somaxconn",)}),
        (
            host(Runtime="nvidia", DeviceRequests=[{"Count": -1}]),
            {"runtimes": ("nvidia",), "allow_device_requests": True},
        ),
        (host(LogConfig={"Type": "fluentd"}), {"log_drivers": ("fluentd",)}),
    ],
)
def test_permitted(options, policy):
    refusal(options)
    kept = body_of(options, policy=DockerPolicy(**policy))["HostConfig"]
    for key, value in options["HostConfig"].items():
        if key not in ("SecurityOpt", "Devices"):
            assert kept[key] == value


@pytest.mark.parametrize(
    "options",
    [
        host(Binds=["/database:/d"]),
        host(Binds=["/data:/d"], CapAdd=["ALL"]),
        host(Devices=[{"PathOnHost": "/dev/uio00"}]),
        host(Devices=[{"PathOnHost": "/dev/uio0", "CgroupPermissions": "rm"}]),
        host(Binds=["/logs:/l"]),
        host(Binds=["/var/lib:/l:ro"]),
        host(Binds=["/var/lib/gatelet/store:/l:ro"]),
        host(Binds=["/var/run:/l:ro"]),
    ],
)
def test_close_to_what_is_permitted(options):
    policy = DockerPolicy(
        mounts=("/data", "/logs:ro", "/var"), devices=("/dev/uio0:rw",), capabilities=("CHOWN",)
    )
    refusal(options, policy)


def test_settings_of_the_host_all_have_been_looked_at():
    """A new key in the schema is a decision: here is what may pass without any permission."""
    harmless = {
        *("BlkioDeviceReadBps", "BlkioDeviceReadIOps", "BlkioDeviceWriteBps"),
        *("BlkioDeviceWriteIOps", "BlkioWeight", "BlkioWeightDevice", "CapDrop", "ConsoleSize"),
        *("CpuPeriod", "CpuQuota", "CpuRealtimePeriod", "CpuRealtimeRuntime", "CpuShares"),
        *("CpusetCpus", "CpusetMems", "Dns", "DnsOptions", "DnsSearch", "ExtraHosts", "GroupAdd"),
        *("Init", "KernelMemory", "KernelMemoryTCP", "Memory", "MemoryReservation", "MemorySwap"),
        *("MemorySwappiness", "NanoCpus", "PidsLimit", "PortBindings", "PublishAllPorts"),
        *("ReadonlyRootfs", "RestartPolicy", "ShmSize", "StorageOpt", "Ulimits"),
    }
    from gatelet.agent.runtime.create_rules import _HOST_RULES

    assert set(HOST_CONFIG) == harmless | set(_HOST_RULES)


def test_log_options_of_the_runtime():
    text = '{"type": "journald", "config": {"tag": "x"}}'
    found = body_of(logging_options=text)["HostConfig"]["LogConfig"]
    assert found == {"Type": "journald", "Config": {"tag": "x"}}
    own = {"Type": "local"}
    assert body_of(host(LogConfig=own), logging_options=text)["HostConfig"]["LogConfig"] == own
    assert "loggingOptions: expected" in refusal({}, logging_options="[1]")
    assert "LogConfig.Type: gelf" in refusal({}, logging_options='{"type": "gelf"}')


def test_what_gatelet_decides_is_named():
    options = {"name": "x", "Image": "y", "HostConfig": {"RestartPolicy": {"Name": "always"}}}
    assert ignored_options(spec_of(options)) == ("Image", "name", "HostConfig.RestartPolicy")
    body = body_of(options)
    assert body["Image"] == "reg.test:5000/cam:1"
    assert body["HostConfig"]["RestartPolicy"]["Name"] == "no"
    assert ignored_options(spec_of()) == ()


def test_what_gatelet_decides_is_reported():
    options = {"name": "x", "Image": "y", "HostConfig": {"RestartPolicy": {"Name": "always"}}}
    manifest = Manifest("1.1", modules=(spec_of(options),))
    module = f"modules.{manifest.modules[0].name}.settings.createOptions"
    assert [sentence.split(": ")[0] for sentence in unsupported(manifest)] == [
        f"{module}.Image",
        f"{module}.name",
        f"{module}.HostConfig.RestartPolicy",
    ]


def test_the_scoring_label_may_name_the_model():
    def named(options):
        return scoring_options(spec_of(options)).model

    assert named({"Labels": {"io.gatelet.scoring": "resnet"}}) == "resnet"
    assert named({"labels": {"io.gatelet.scoring": " resnet "}}) == "resnet"
    for value in ("", "true", "1", "Yes", "false", "no", "0"):
        assert named({"Labels": {"io.gatelet.scoring": value}}) == ""
    assert named({"Labels": ["io.gatelet.scoring"]}) == named({}) == ""


def test_no_new_privileges_is_said_once():
    for option in ("no-new-privileges", "no-new-privileges:true"):
        assert body_of(host(SecurityOpt=[option]))["HostConfig"]["SecurityOpt"] == [option]
    loose = DockerPolicy(security_options=("no-new-privileges:false",))
    kept = body_of(host(SecurityOpt=["no-new-privileges:false"]), policy=loose)
    assert kept["HostConfig"]["SecurityOpt"] == ["no-new-privileges:false"]


def test_networks():
    joined = body_of(network="modules")
    assert joined["HostConfig"]["NetworkMode"] == "modules"
    assert joined["NetworkingConfig"]["EndpointsConfig"] == {"modules": {"Aliases": ["cam"]}}
    alone = body_of(host(NetworkMode="none"), network="modules")
    assert "NetworkingConfig" not in alone
    other = {"NetworkingConfig": {"EndpointsConfig": {"azure-iot-edge": None}}}
    named = body_of(other, network="modules")["NetworkingConfig"]["EndpointsConfig"]
    assert named == {"azure-iot-edge": {}}


def test_scoring_modules_share_a_folder():
    run = PurePosixPath("/run/gatelet")
    by_image = {"image_labels": {SCORING_LABEL: "digits"}, "run_dir": run}
    by_options = {"run_dir": run}
    for options, facts in (
        ({}, by_image),
        ({"Labels": {SCORING_LABEL: "true"}}, by_options),
    ):
        body = body_of(options, **facts)
        assert "GATELET_SCORING_SOCKET=/run/gatelet/scoring.sock" in body["Env"]
        assert body["HostConfig"]["Mounts"] == [
            {"Type": "bind", "Source": "/run/gatelet/modules/cam", "Target": "/run/gatelet"}
        ]
        assert shared_folder(body) == "/run/gatelet/modules/cam"
        assert is_scoring(body["Labels"])
    assert scoring_socket(run, "cam") == run / "modules/cam/scoring.sock"
    assert shared_folder(body_of()) is None
    off = body_of({"Labels": {SCORING_LABEL: "false"}}, **by_image)
    assert shared_folder(off) is None
    taken = host(Binds=["volume:/run/gatelet/x"])
    assert "where gatelet mounts the scoring socket" in refusal(taken, **by_image)
    long = {"image_labels": {SCORING_LABEL: ""}, "run_dir": PurePosixPath("/" + "r" * 90)}
    assert "more than 107 bytes" in refusal({}, **long)


def test_names_that_docker_refuses():
    assert container_name("cam-1") == "cam-1"
    assert container_name("a") == "gatelet.a"
    assert container_name("_a") == "gatelet._a"


def test_the_policy_in_the_configuration():
    text = """
    [docker]
    enabled = false
    network = "modules"
    [docker.policy]
    allow-host-network = true
    mounts = ["/data:ro"]
    """
    docker = parse_config(text, "agent.toml").docker
    assert (docker.enabled, docker.network) == (False, "modules")
    assert docker.policy == DockerPolicy(allow_host_network=True, mounts=("/data:ro",))
    bounds = ("max-stop-seconds = 0", "max-stop-seconds = 90000", 'max-stop-seconds = "1"')
    paths = ('mounts = ["data"]', 'mounts = ["/a:rx"]', 'devices = ["/d:x"]', "mount = []")
    for bad in (*bounds, *paths):
        with pytest.raises(ConfigError, match="docker"):
            parse_config(f"[docker.policy]\n{bad}", "agent.toml")


PATHS = st.lists(st.sampled_from(["", ".", "..", "a", "b", "a b", "etc"]), max_size=5).map(
    lambda parts: "/" + "/".join(parts)
)


@given(PATHS)
def test_a_clean_path_is_what_the_text_says(path):
    clean = clean_path(path)
    if ".." in path.split("/"):
        assert clean is None
    else:
        assert clean == "/" + str(PurePosixPath(path)).lstrip("/")
        assert clean_path(clean) == clean


@given(PATHS, PATHS, PATHS)
def test_a_mount_that_passes_lies_in_what_is_listed_and_shows_nothing_protected(
    source, allowed, secret
):
    allowed, secret = clean_path(allowed) or "/a", clean_path(secret) or "/b"
    policy = DockerPolicy(mounts=(allowed,))
    if mount_refusal(policy, source, False, (secret,)) is None:
        clean = clean_path(source)
        assert clean is not None
        assert lies_in(clean, allowed)
        overlap = lies_in(secret, clean) or lies_in(clean, secret)
        assert not overlap or lies_in(allowed, secret)


KEYS = st.sampled_from(
    ["HostConfig", "hostconfig", "Env", "Labels", "Cmd", "NetworkingConfig", "Mounts", *HOST_CONFIG]
)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
    | st.sampled_from(["/", "/etc:/x", "host", "ALL", "volume:/a"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(max_size=6), inner, max_size=4)
    ),
    max_leaves=20,
)
REACHING = ("Privileged", "Devices", "CapAdd", "PidMode", "UTSMode", "VolumesFrom", "MaskedPaths")


@given(st.dictionaries(KEYS, JSON | st.dictionaries(KEYS, JSON, max_size=4), max_size=4))
def test_whatever_comes_is_refused_or_stays_inside(options):
    try:
        body = body_of(options)
    except ManifestError:
        return
    settings = body["HostConfig"]
    assert not any(settings.get(key) for key in REACHING)
    assert settings.get("NetworkMode") != "host"
    assert not any(bind.startswith("/") for bind in settings.get("Binds", []))
    assert set(settings) <= set(HOST_CONFIG)


# createOptions in the style of modules that people run on IoT Edge today.
PUBLISHED = {"1433/tcp": [{"HostPort": "1433"}]}


@pytest.mark.parametrize(
    ("options", "policy"),
    [
        ({}, {}),
        (host(PortBindings={f"{port}/tcp": [{"HostPort": str(port)}] for port in (443, 5671)}), {}),
        (host(Binds=["blobs:/blobroot"], PortBindings={"11002/tcp": [{"HostPort": "11002"}]}), {}),
        (
            {
                "Env": ["ACCEPT_EULA=Y"],
                "HostConfig": {
                    "CapAdd": ["SYS_PTRACE"],
                    "Mounts": [{"Type": "volume", "Source": "db", "Target": "/var/opt/db"}],
                    "PortBindings": PUBLISHED,
                },
            },
            {"capabilities": ("SYS_PTRACE",)},
        ),
        (
            {"Hostname": "publisher", "Cmd": ["--aa"], **host(Binds=["/iiotedge:/appdata"])},
            {"mounts": ("/iiotedge",)},
        ),
        (
            {
                "ExposedPorts": {"8554/tcp": {}},
                "HostConfig": {
                    "runtime": "nvidia",
                    "ShmSize": 268435456,
                    "Devices": [{"PathOnHost": "/dev/video0", "PathInContainer": "/dev/video0"}],
                },
            },
            {"runtimes": ("nvidia",), "devices": ("/dev/video0",)},
        ),
        (
            {
                "NetworkingConfig": {"EndpointsConfig": {"host": {}}},
                "HostConfig": {"NetworkMode": "host"},
            },
            {"allow_host_network": True},
        ),
        (
            {"User": "root", **host(Privileged=True, Binds=["/dev:/dev"])},
            {"allow_privileged": True},
        ),
    ],
)
def test_options_of_today(options, policy):
    if policy:
        refusal(options)
    body = body_of(options, policy=DockerPolicy(**policy))
    assert body["HostConfig"]["RestartPolicy"]["Name"] == "no"


@given(st.dictionaries(KEYS, JSON | st.dictionaries(KEYS, JSON, max_size=4), max_size=4))
def test_what_was_just_created_has_not_drifted(options):
    """Whatever may be in a body, as an engine that changes nothing gives it back."""
    try:
        body = body_of(options, policy=DockerPolicy(allow_privileged=True))
    except ManifestError:
        return
    settings = body["HostConfig"]
    mode = settings.get("NetworkMode") or "default"
    networks = body.get("NetworkingConfig", {}).get("EndpointsConfig", {})
    inspect = {
        "Name": "/cam",
        "Image": "sha256:1",
        "Config": {"Cmd": None, **body, "Env": [e for e in body["Env"] if "=" in e]},
        "HostConfig": {**settings, "NetworkMode": mode},
        "NetworkSettings": {"Networks": dict.fromkeys((*networks, mode))},
    }
    assert drift("cam", "sha256:1", body, inspect, {}) == ()
