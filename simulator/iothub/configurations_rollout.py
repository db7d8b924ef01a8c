"""Configurations carried out: kept in the hub's state and laid over twins as devices change."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from ...agent.twin.merge_patch import apply_patch, same, without_nulls
from . import configurations, queries, queries_evaluation
from .configurations import CONFIGURATION_LIMIT, Configuration
from .devices import ClientId
from .errors import HubError
from .queries_tree import Statement
from .state import HubState
from .twins import Twin

_log = logging.getLogger(__name__)


class Owner(Protocol):
    """The hub, as far as deployments go."""

    def now(self) -> str: ...

    def twin(self, client: ClientId) -> Twin: ...

    def twin_view(self, client: ClientId) -> dict[str, Any]: ...

    def set_sections(self, device: str, sections: Mapping[str, Mapping[str, Any]]) -> None: ...

    def state_changed(self) -> None: ...


class Rollout:
    """All operations are atomic on the event loop."""

    def __init__(self, hub: Owner, state: HubState) -> None:
        self._hub = hub
        self._state = state

    def __iter__(self) -> Iterator[Configuration]:
        return iter(sorted(self._state.configurations.values(), key=lambda one: one.id))

    def get(self, id: str) -> Configuration:
        """Raises HubError 404."""
        found = self._state.configurations.get(id)
        if found is None:
            raise HubError(404, "ConfigurationNotFound", f"there is no configuration {id!r}")
        return found

    def put(self, id: str, body: Mapping[str, Any], if_match: str | None) -> Configuration:
        """Creates (no If-Match) or updates. Raises HubError 400, 403, 404, 409, 412 or 413."""
        known = self._state.configurations
        old = known.get(id)
        if old is not None and if_match is None:
            raise HubError(
                409, "ConfigurationAlreadyExists", f"{id} exists: send If-Match to update it"
            )
        if old is None and if_match not in (None, "*", '"*"'):
            self.get(id)
        if old is None and len(known) >= CONFIGURATION_LIMIT:
            raise HubError(
                403, "ConfigurationCountLimitExceeded", f"a hub has {CONFIGURATION_LIMIT} of them"
            )
        if old is not None:
            old.check_match(if_match)
        order = 1 + max((one.order for one in known.values()), default=0)
        made = configurations.described(id, body, old, self._hub.now(), order)
        known[id] = made
        self.evaluate_all()
        return made

    def delete(self, id: str, if_match: str | None) -> None:
        """Devices turn to the next deployment that targets them. Raises HubError 404 or 412."""
        self.get(id).check_match(if_match)
        del self._state.configurations[id]
        self.evaluate_all()

    def evaluate_all(self) -> None:
        for identity in list(self._state.registry):
            if not identity.client.module:
                self.evaluate(identity.client.device, force=True)
        self._hub.state_changed()

    def evaluate(self, device: str, *, force: bool = False) -> None:
        """After anything about a device changed that a target condition may ask for."""
        if not self._state.configurations and not force:
            return
        target = ClientId(device)
        try:
            twin = self._hub.twin_view(target)
            plan = configurations.plan(device, twin, self._state.configurations.values())
        except HubError as error:
            _log.error("deployments for %s do not fit together: %s", device, error.message)
            return
        for client in (target, ClientId(device, "$edgeAgent")):
            if client in plan.status:
                self._state.assignments[client] = dict(plan.status[client])
            else:
                self._state.assignments.pop(client, None)
        sections: dict[str, Mapping[str, Any]] = dict(plan.modules or {})
        if plan.modules is not None:
            for module in self._state.deployed.get(device, ()):
                sections.setdefault(module, {})
            self._state.deployed[device] = sorted(plan.modules)
        if plan.device:
            sections[""] = apply_patch(self._hub.twin(target).desired.value, plan.device)
        try:
            self._hub.set_sections(device, self._changed(device, sections))
        except HubError as error:
            _log.error("deployments for %s make no valid twins: %s", device, error.message)
            for client in plan.status:
                assigned = self._state.assignments[client]
                self._state.assignments[client] = dict.fromkeys(assigned, configurations.TARGETED)

    def forget(self, client: ClientId) -> None:
        self._state.assignments.pop(client, None)
        if not client.module:
            self._state.deployed.pop(client.device, None)

    def _changed(
        self, device: str, sections: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, Mapping[str, Any]]:
        changed = {}
        for module, section in sections.items():
            client = ClientId(device, module)
            old = self._state.twins.get(client)
            known = client in self._state.registry
            has_it = known and old and same(old.desired.value, without_nulls(section))
            if not has_it and (known or section):
                changed[module] = section
        return changed

    # What the service side sees.

    def status(self, client: ClientId) -> dict[str, Any]:
        """For a twin's `configurations` member."""
        assigned = self._state.assignments.get(client, {})
        return {name: {"status": status} for name, status in assigned.items()}

    def query(self, text: str) -> tuple[Statement, list[dict[str, Any]]]:
        """Runs a query over all twins, in the order of their ids. Raises HubError 400."""
        statement = queries.parse_query(text)
        modules = statement.source == "devices.modules"
        wanted = [i.client for i in self._state.registry if bool(i.client.module) is modules]
        rows = queries_evaluation.run(statement, map(self._hub.twin_view, wanted))
        return statement, rows

    def view(self, one: Configuration) -> dict[str, Any]:
        content: dict[str, Any] = {"deviceContent": None, "modulesContent": None}
        return {
            "id": one.id,
            "schemaVersion": configurations.SCHEMA_VERSION,
            "labels": dict(one.labels),
            "content": {**content, **one.content},
            "targetCondition": one.target_condition,
            "createdTimeUtc": one.created,
            "lastUpdatedTimeUtc": one.updated,
            "priority": one.priority,
            "systemMetrics": self._metrics(one.system_queries(), one),
            "metrics": self._metrics(one.metric_queries, None),
            "etag": one.etag,
        }

    def _metrics(self, metric_queries: Mapping[str, str], own: Configuration | None) -> Any:
        nothing = own is not None and not own.target_condition.strip()
        results = {
            name: 0 if nothing and name == "targetedCount" else len(self.query(text)[1])
            for name, text in metric_queries.items()
        }
        return {"results": results, "queries": dict(metric_queries)}
