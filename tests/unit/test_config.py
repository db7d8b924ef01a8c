"""agent.toml: what is read, and how mistakes are told."""

from __future__ import annotations

from pathlib import Path

import pytest
from gatelet.agent.config import ConfigError, load_config, parse_config, read_secret

FULL = """
[device]
id = "press-7"
state-dir = "/data/gatelet"
run-dir = "/run/gatelet"
board = "pynq-z2"
[iothub]
connection-string-file = "/etc/gatelet/hub"
[mqtt]
host = "broker"
port = 8883
ca-file = "/etc/ssl/site.pem"
[[registry]]
address = "registry.example"
username = "puller"
password-file = "/etc/gatelet/registry"
[deployment]
probation-seconds = 30
"""


def test_every_section_is_read() -> None:
    config = parse_config(FULL, "agent.toml")
    assert config.device_id == "press-7"
    assert config.agent_socket == Path("/run/gatelet/agent.sock")
    assert config.mqtt is not None
    assert config.mqtt.ca_file == Path("/etc/ssl/site.pem")
    assert config.registry[0].username == "puller"
    assert config.deployment.probation_seconds == 30


def test_an_empty_file_is_a_device_without_a_cloud() -> None:
    config = parse_config("", "agent.toml")
    assert config.iothub is None
    assert config.mqtt is None
    assert config.device_id


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[device", r"agent\.toml is not valid TOML"),
        ("[device]\nidd = 'a'", r"agent\.toml.*idd.*device"),
        ("[mqtt]\nport = 1", r"host"),
        ("[device]\nstate-dir = 3", r"state-dir"),
        ("[scoring]\ngrpc-address = 1", r"grpc"),
        (f"[device]\nrun-dir = '/{'x' * 120}'", r"too long for Unix sockets"),
    ],
)
def test_a_mistake_is_named_with_its_place(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_config(text, "agent.toml")


def test_a_missing_or_unreadable_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="gatelet sim up"):
        load_config(tmp_path / "agent.toml")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="binary"):
        load_config(tmp_path / "binary")


def test_a_secret_comes_from_its_file_without_the_newline(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("hunter2\n")
    assert read_secret("", file, "mqtt.password-file") == "hunter2"
    assert read_secret("inline", None, "mqtt.password-file") == "inline"
    with pytest.raises(ConfigError, match=r"mqtt\.password-file.*missing"):
        read_secret("", tmp_path / "missing", "mqtt.password-file")
