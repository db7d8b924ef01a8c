"""What README.md shows is accepted by what it is meant for."""

from __future__ import annotations

import re
from pathlib import Path

from gatelet.agent.manifest import parse_manifest
from gatelet.modules.model_json import parse_model

ROOT = Path(__file__).resolve().parents[2]


def test_the_model_and_the_deployment_in_the_readme_are_valid() -> None:
    text = (ROOT / "README.md").read_text()
    model, deployment = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    assert parse_model(model.encode(), strict=True).name == "my-model"
    (module,) = parse_manifest(deployment.encode()).modules
    assert module.name == "my-model"


def test_every_page_the_readme_links_is_there() -> None:
    text = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (ROOT / target).is_file(), target
