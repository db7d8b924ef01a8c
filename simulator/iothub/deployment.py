"""Configuration content (a deployment manifest) laid over the twins of one device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...agent.twin.merge_patch import apply_patch
from .errors import invalid

_DESIRED = "properties.desired"


def desired_sections(content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Module id ("" for the device itself) to the whole desired section it is to have.

    `modulesContent.<module>` and `deviceContent` hold `properties.desired` and, laid over it in the
    order written, `properties.desired.<path>`. Raises HubError 400.
    """
    modules = _object(content.get("modulesContent") or {}, "modulesContent")
    sections = {
        module: _section(_object(parts, f"modulesContent.{module}"), f"modulesContent.{module}")
        for module, parts in modules.items()
    }
    if content.get("deviceContent"):
        sections[""] = _section(_object(content["deviceContent"], "deviceContent"), "deviceContent")
    if not sections:
        raise invalid("the configuration content has neither modulesContent nor deviceContent")
    return sections


def module_ids(sections: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """The module identities a deployment needs: those with content and those edgeAgent runs."""
    agent = sections.get("$edgeAgent", {})
    modules = agent.get("modules")
    system = agent.get("systemModules")
    return {
        *(module for module in sections if module),
        *(modules if isinstance(modules, dict) else ()),
        *(f"${module}" for module in (system if isinstance(system, dict) else ())),
    }


def _section(parts: Mapping[str, Any], where: str) -> dict[str, Any]:
    section: dict[str, Any] = {}
    for name, value in parts.items():
        if name == _DESIRED:
            section = apply_patch(dict(_object(value, f"{where}.{name}")), section)
        elif name.startswith(_DESIRED + "."):
            for key in reversed(name[len(_DESIRED) + 1 :].split(".")):
                value = {key: value}
            section = apply_patch(section, value)
        else:
            raise invalid(f"{where}: {name!r} is neither {_DESIRED} nor {_DESIRED}.<path>")
    return section


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise invalid(f"{where} must be a JSON object")
    return value
