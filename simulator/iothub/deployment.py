"""Configuration content (a deployment manifest, or layers of them) laid over the twins of a device.

A whole `properties.desired` is a base; `properties.desired.<path>` sets what is at that path, so
that a later layer replaces one module or route and leaves the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .errors import invalid
from .twins import DEPTH_LIMIT

EDGE_AGENT = "$edgeAgent"
_DESIRED = "properties.desired"


def desired_sections(content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Module id ("" for the device itself) to the whole desired section it is to have.

    `modulesContent.<module>` and `deviceContent` hold `properties.desired` and
    `properties.desired.<path>`. Raises HubError 400.
    """
    return layered([content])


def layered(contents: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The same for several contents, each laid over those before it. Raises HubError 400."""
    sections: dict[str, dict[str, Any]] = {}
    for content in contents:
        parts = _parts(content)
        if not parts:
            raise invalid("the configuration content has neither modulesContent nor deviceContent")
        for module, members in parts.items():
            where = f"modulesContent.{module}" if module else "deviceContent"
            sections[module] = _laid_over(sections.get(module, {}), members, where)
    return sections


def is_base(content: Mapping[str, Any]) -> bool:
    """Whether an edge deployment stands alone; one without the whole of $edgeAgent is a layer."""
    return _DESIRED in _parts(content).get(EDGE_AGENT, {})


def module_ids(sections: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """The module identities a deployment needs: those with content and those edgeAgent runs."""
    agent = sections.get(EDGE_AGENT, {})
    modules = agent.get("modules")
    system = agent.get("systemModules")
    return {
        *(module for module in sections if module),
        *(modules if isinstance(modules, dict) else ()),
        *(f"${module}" for module in (system if isinstance(system, dict) else ())),
    }


def _parts(content: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    modules = _object(content.get("modulesContent") or {}, "modulesContent")
    parts = {name: _object(value, f"modulesContent.{name}") for name, value in modules.items()}
    if content.get("deviceContent"):
        parts[""] = _object(content["deviceContent"], "deviceContent")
    return parts


def _laid_over(section: dict[str, Any], parts: Mapping[str, Any], where: str) -> dict[str, Any]:
    if _DESIRED in parts:
        section = dict(_object(parts[_DESIRED], f"{where}.{_DESIRED}"))
    for name, value in parts.items():
        if name.startswith(_DESIRED + "."):
            path = name[len(_DESIRED) + 1 :].split(".")
            if len(path) > DEPTH_LIMIT:
                raise invalid(f"{where}: a path has up to {DEPTH_LIMIT} names")
            section = _with_path(section, path, value)
        elif name != _DESIRED:
            raise invalid(f"{where}: {name!r} is neither {_DESIRED} nor {_DESIRED}.<path>")
    return section


def _with_path(section: Mapping[str, Any], path: list[str], value: Any) -> dict[str, Any]:
    name, rest = path[0], path[1:]
    if rest:
        inner = section.get(name)
        value = _with_path(inner if isinstance(inner, dict) else {}, rest, value)
    return {**section, name: value}


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise invalid(f"{where} must be a JSON object")
    return value
