"""The scoring process's share of a plan: which models to load and probe, and where requests go."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from .plan_types import (
    Load,
    Observed,
    Probe,
    Route,
    Step,
    Target,
    Wanted,
    WantedEndpoint,
    WantedModule,
)
from .scoring_env import AUTH_MODES


def instance_step(module: WantedModule, observed: Observed) -> Step | None:
    """What brings the module's instance nearer to ready; its image is there, or its container runs.

    None when it is ready, or while nobody knows.
    """
    if module.digest is None or module.instance is None or not observed.scoring_up:
        return None
    state = instance_state(observed, module.instance)
    if state is None:
        return Load(module.name, module.instance, module.digest, module.options, module.socket)
    if state in ("loaded", "failed"):
        return Probe(module.name, module.instance)
    return None


def ready_endpoints(wanted: Wanted, observed: Observed) -> set[str]:
    """The endpoints of which every running module is ready."""
    waiting = {
        module.options.endpoint
        for module in wanted.modules
        if module.running and module.scores and instance_state(observed, module.instance) != "ready"
    }
    return wanted_endpoints(wanted) - waiting


def wanted_endpoints(wanted: Wanted) -> set[str]:
    return {m.options.endpoint for m in wanted.modules if m.running and m.scores}


def announced_endpoints(modules: Iterable[WantedModule]) -> tuple[WantedEndpoint, ...]:
    """The endpoints of running modules that certainly score, with what their clients must show."""
    strictest: dict[str, str] = {}
    for module in modules:
        if module.running and module.kind in ("model", "scoring"):
            options = module.options
            known = strictest.get(options.endpoint, AUTH_MODES[0])
            strictest[options.endpoint] = max(known, options.auth, key=AUTH_MODES.index)
    return tuple(WantedEndpoint(*pair) for pair in sorted(strictest.items()))


def wanted_routes(wanted: Wanted, fallback: Wanted | None, observed: Observed) -> tuple[Route, ...]:
    """Routes by endpoint name: the new targets where all are ready, else what serves it now.

    What serves now is the present route as far as its instances are alive, else the ready ones
    of `fallback`, else those of the new targets that are ready, once the default one is.
    """
    ready = ready_endpoints(wanted, observed)
    present = {route.endpoint: route for route in observed.routes}
    old = routes_of(fallback.modules) if fallback is not None else {}
    routes = []
    for endpoint, route in routes_of(wanted.modules).items():
        if endpoint in ready:
            routes.append(route)
            continue
        for candidate in (present.get(endpoint), old.get(endpoint), _begun(route, observed)):
            if candidate is not None and all(
                instance_state(observed, target.instance) == "ready" for target in candidate.targets
            ):
                routes.append(candidate)
                break
    return tuple(sorted(routes, key=lambda route: route.endpoint))


def _begun(route: Route, observed: Observed) -> Route | None:
    """`route` without the targets that are not ready, whose share the default one takes."""
    default, *others = route.targets
    if instance_state(observed, default.instance) != "ready":
        return None
    there = [one for one in others if instance_state(observed, one.instance) == "ready"]
    rest = max(0, 100 - sum(target.percent for target in there))
    return replace(route, targets=(replace(default, percent=rest), *there))


def routes_of(modules: Iterable[WantedModule]) -> dict[str, Route]:
    """Endpoint -> route for the running modules, as if all of them were ready."""
    shares: dict[str, list[WantedModule]] = {}
    for module in modules:
        if module.running and module.scores:
            shares.setdefault(module.options.endpoint, []).append(module)
    return {
        endpoint: Route(
            endpoint,
            _targets(sharing),
            next((m.options.sticky for m in sharing if m.options.sticky), ""),
        )
        for endpoint, sharing in shares.items()
    }


def _targets(modules: list[WantedModule]) -> tuple[Target, ...]:
    # Without an explicit default the first module without a share is it; if each has a share,
    # the first one that is no canary or mirror takes the remainder.
    ordered = sorted(
        modules,
        key=lambda module: (
            module.options.traffic is not None,
            bool(module.options.mirror) or module.options.canary is not None,
            module.name,
        ),
    )
    default, *others = ordered
    percent = [module.options.traffic or 0 for module in others]
    return (
        Target(default.instance or "", max(0, 100 - sum(percent)), True),
        *(
            Target(
                module.instance or "",
                share,
                False,
                module.options.mirror,
                module.options.mirror_tolerance if module.options.mirror else 0.0,
            )
            for module, share in zip(others, percent, strict=True)
        ),
    )


def instance_state(observed: Observed, instance: str | None) -> str | None:
    view = observed.instances.get(instance) if instance is not None else None
    return None if view is None else view.state
