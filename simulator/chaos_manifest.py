"""What the cloud of a chaos run deploys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def manifest(images: Mapping[str, str]) -> dict[str, Any]:
    """`$edgeAgent`'s desired properties with these images by module."""
    modules = {
        name: {
            "type": "docker",
            "status": "running",
            "restartPolicy": "always",
            "version": "1.0",
            "settings": {"image": image, "createOptions": ""},
        }
        for name, image in images.items()
    }
    return {
        "schemaVersion": "1.1",
        "runtime": {"type": "docker", "settings": {"minDockerVersion": "v1.25"}},
        "systemModules": {"edgeAgent": {"type": "docker", "settings": {"image": "gatelet:1"}}},
        "modules": modules,
    }
