"""Scoring options from the environment of a module."""

from __future__ import annotations

import pytest
from gatelet.agent.canary import CanaryRules
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
    options = scoring_options(spec(AUTH="key", COLLECT="true"))
    assert options.unsupported == ("SCORING_COLLECT",)
    assert (options.auth, options.collect) == ("key", "true")
    assert scoring_options(spec(AUTH="none", COLLECT="false")).unsupported == ()


def test_how_a_model_runs() -> None:
    options = scoring_options(spec(PRIORITY="2", INSTANCES="3", THREADS="4", STICKY="X-User"))
    assert (options.priority, options.instances, options.threads) == (2, 3, 4)
    assert options.sticky == "x-user"
    assert not options.isolate
    assert options.clients == ()
    assert scoring_options(spec(CLIENTS="a, b c,a")).clients == ("a", "b c")
    assert scoring_options(spec(ISOLATE="True")).isolate
    assert not scoring_options(spec(ISOLATE="off")).isolate
    assert scoring_options(spec(STICKY="X-Gatelet-Session")).sticky == ""


def test_a_mirror_takes_no_share() -> None:
    options = scoring_options(spec(MIRROR="10", MIRROR_TOLERANCE="0.5"))
    assert (options.mirror, options.mirror_tolerance, options.traffic) == (10, 0.5, 0)
    assert scoring_options(spec(MIRROR="0")).traffic is None


def test_a_canary_begins_with_its_first_step() -> None:
    options = scoring_options(
        spec(
            CANARY="5, 25,100",
            CANARY_STEP_S="1.5",
            CANARY_MAX_ERROR_DELTA="0.02",
            CANARY_MAX_LATENCY_RATIO="2",
            CANARY_MIN_REQUESTS="10",
        )
    )
    assert options.canary == CanaryRules((5, 25, 100), 1.5, 0.02, 2.0, 10)
    assert options.traffic == 5


@pytest.mark.parametrize(
    ("env", "variable"),
    [
        ({"CANARY": "25,5"}, "CANARY"),
        ({"CANARY": "5,x"}, "CANARY"),
        ({"CANARY": "0"}, "CANARY"),
        ({"CANARY": "5,101"}, "CANARY"),
        ({"CANARY": "5,5"}, "CANARY"),
        ({"CANARY": "5", "TRAFFIC": "5"}, "TRAFFIC"),
        ({"CANARY": "5", "MIRROR": "5"}, "MIRROR"),
        ({"MIRROR": "5", "TRAFFIC": "5"}, "TRAFFIC"),
        ({"CANARY_MAX_ERROR_DELTA": "1.1"}, "CANARY_MAX_ERROR_DELTA"),
        ({"CANARY_STEP_S": "-1"}, "CANARY_STEP_S"),
        ({"STICKY": "a header"}, "STICKY"),
        ({"STICKY": "trace-bin"}, "STICKY"),
        ({"PRIORITY": "11"}, "PRIORITY"),
        ({"INSTANCES": "0"}, "INSTANCES"),
        ({"ISOLATE": "maybe"}, "ISOLATE"),
        ({"CLIENTS": "a,,b"}, "CLIENTS"),
        ({"CLIENTS": "x" * 65}, "CLIENTS"),
    ],
)
def test_what_is_out_of_bounds_is_named(env: dict[str, str], variable: str) -> None:
    with pytest.raises(ManifestError) as caught:
        scoring_options(spec(**env))
    assert caught.value.path == f"modules.digits.env.SCORING_{variable}.value"


@pytest.mark.parametrize(
    "modules",
    [
        [spec("a"), spec("b")],
        [spec("a"), spec("b", ENDPOINT="a", TRAFFIC="0")],
        [spec("a"), spec("b", ENDPOINT="a", TRAFFIC="60"), spec("c", ENDPOINT="a", TRAFFIC="40")],
        [spec("a"), spec("b", ENDPOINT="a", status="stopped")],
        [spec("a"), spec("b", ENDPOINT="a", CANARY="5,100"), spec("c", ENDPOINT="a", MIRROR="9")],
        [spec("a", STICKY="x-user"), spec("b", ENDPOINT="a", TRAFFIC="5", STICKY="X-User")],
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


@pytest.mark.parametrize(
    ("modules", "path", "words"),
    [
        ([spec("a", MIRROR="9")], "a.env.SCORING_MIRROR", "no other module"),
        ([spec("a", CANARY="9")], "a.env.SCORING_CANARY", "no other module"),
        (
            [spec("a"), spec("b", ENDPOINT="a", CANARY="9"), spec("c", ENDPOINT="a", CANARY="9")],
            "c.env.SCORING_CANARY",
            "both canaries",
        ),
        (
            [spec("a"), spec("b", ENDPOINT="a", TRAFFIC="9"), spec("c", ENDPOINT="a", CANARY="92")],
            "c.env.SCORING_CANARY",
            "claim 101 percent",
        ),
        (
            [spec("a", STICKY="x-a"), spec("b", ENDPOINT="a", TRAFFIC="9", STICKY="x-b")],
            "b.env.SCORING_STICKY",
            "sticky by x-a already",
        ),
    ],
)
def test_companions_that_cannot(modules: list[ModuleSpec], path: str, words: str) -> None:
    with pytest.raises(ManifestError, match=words) as caught:
        check_endpoints(modules)
    assert caught.value.path == f"modules.{path}.value"
