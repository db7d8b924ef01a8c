"""The examples of docs/scoring-rest.md, run as they stand."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

from required import needs

from ..bench import onnx_models
from ..bench.scoring_site import serve

DOCS = Path(__file__).parents[2] / "docs"
EXAMPLES = re.findall(
    r"```sh\n(curl.*?)```\n\n```json\n(.*?)```", (DOCS / "scoring-rest.md").read_text(), re.DOTALL
)


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 3


@needs("curl")
def test_curl_examples(tmp_path: Path) -> None:
    with serve(tmp_path / "s") as site:
        site.deploy({"my-model": onnx_models.scale_folder(tmp_path / "m", 2.0)})
        for command, answer in EXAMPLES:
            run = subprocess.run(
                ["sh", "-c", command.replace("127.0.0.1:8000", site.http)],
                capture_output=True,
                text=True,
                timeout=20,
                check=True,
            )
            assert json.loads(run.stdout) == json.loads(answer)
