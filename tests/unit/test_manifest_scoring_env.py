"""Scoring options from the environment of a module."""

from __future__ import annotations

import pytest
from gatelet.agent.manifest import ManifestError, ModuleSpec
from gatelet.agent.scoring_env import ScoringOptions, check_endpoints, scoring_options


def spec(name: str = "digits", status: str = "running", **env: str) -> ModuleSpec:
    variables = tuple(sorted((f"SCORING_{key}", value) for key, value in env.items()))
    return ModuleSpec(name=name, image="a:1", env=variables, status=status)  # type: ignore[arg-type]


def test_defaults() -> None:
    assert scoring_options(spec()) == ScoringOptions(endpoint="digits")


def test_everything_set() -> None:
    options = scoring_options(
        spec(
            ENDPOINT="numbers.v1",
            TRAFFIC="10",
            BACKENDS="FPGA, cpu",
            MAX_BATCH="32",
            MAX_DELAY_US="500",
            TIMEOUT_MS="2000",
        )
    )
    assert options == ScoringOptions("numbers.v1", 10, ("fpga", "cpu"), 32, 500, 2000)


def test_blank_is_not_set_and_other_variables_do_not_matter() -> None:
    module = ModuleSpec(
        name="m", image="a:1", env=(("OTHER", "x"), ("SCORING_ENDPOINT", " "), ("SCORING_AUTH", ""))
    )
    assert scoring_options(module) == ScoringOptions(endpoint="m")


def test_what_this_version_does_not_do_is_named() -> None:
    options = scoring_options(spec(MIRROR="10", AUTH="key", COLLECT="true"))
    assert options.unsupported == ("SCORING_MIRROR", "SCORING_AUTH", "SCORING_COLLECT")
    assert (options.mirror, options.auth, options.collect) == (10, "key", "true")
    assert scoring_options(spec(MIRROR="0", AUTH="none", COLLECT="false")).unsupported == ()


@pytest.mark.parametrize(
    "modules",
    [
        [spec("a"), spec("b")],
        [spec("a"), spec("b", ENDPOINT="a", TRAFFIC="0")],
        [spec("a"), spec("b", ENDPOINT="a", TRAFFIC="60"), spec("c", ENDPOINT="a", TRAFFIC="40")],
        [spec("a"), spec("b", ENDPOINT="a", status="stopped")],
    ],
)
def test_endpoints_that_can_be_shared(modules: list[ModuleSpec]) -> None:
    check_endpoints(modules)


@pytest.mark.parametrize(
    ("modules", "words"),
    [
        ([spec("a"), spec("b", ENDPOINT="a")], "set SCORING_TRAFFIC"),
        ([spec("a", TRAFFIC="60"), spec("b", ENDPOINT="a", TRAFFIC="41")], "claim 101 percent"),
    ],
)
def test_endpoints_that_cannot(modules: list[ModuleSpec], words: str) -> None:
    with pytest.raises(ManifestError, match=words) as caught:
        check_endpoints(modules)
    assert caught.value.path == "modules.b.env.SCORING_TRAFFIC.value"
