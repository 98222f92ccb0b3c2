"""Markers in the application's modules: whether their modules are wired, and whether the container has what they name."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from importlib import import_module
from pkgutil import iter_modules
from types import FunctionType, ModuleType
from typing import Any, cast

from dependency_injector import providers
from dependency_injector.errors import Error

from app_db._findings import matters
from app_db._findings.finding import Finding
from app_db._units.markers import evaluated_signature, is_marker, markers_in
from app_db.container import DatabaseContainer
from app_db.errors import InvalidUse


def findings(container: DatabaseContainer, names: Iterable[str]) -> Iterator[Finding]:
    """Yield what is wrong with the markers in modules, and in all modules of packages, and what the container itself lacks."""
    yield from _undefined(container)
    wired = _wired(container)
    hinted = bool(wired)
    for name in dict.fromkeys(_with_submodules(names)):
        try:
            module = import_module(name)
        except (Exception, SystemExit) as error:  # noqa: BLE001  # the application may raise anything
            remedy = "Run this where the application runs, and import the module in Python to see why."
            yield matters.MODULE.found(None, f"The module {name!r} can't be imported: {type(error).__name__}.", name, remedy)
            continue
        marked = list(_marked(module))
        if marked and not hinted:
            hinted = True
            yield _nothing_wired(name)
        elif marked and wired and name not in wired:
            yield _not_wired(name, [function for function, _, _ in marked])
        for function, parameter, marker in marked:
            yield from _unresolved(container, module, function, parameter, marker)


def _undefined(container: DatabaseContainer) -> Iterator[Finding]:
    """Yield the dependencies of the container's own providers that nothing provides."""
    try:
        container.check_dependencies()
    except Error as error:
        remedy = "Provide or override them: dependency-injector raises an error when one of them is asked for."
        yield matters.UNRESOLVED.found(None, f"{str(error).rstrip('.')}.", "the container's class", remedy)


def _with_submodules(names: Iterable[str]) -> Iterator[str]:
    for name in names:
        yield name
        path = None
        with suppress(Exception, SystemExit):  # found when it is imported again
            path = getattr(import_module(name), "__path__", None)
        if path is not None:
            for module in iter_modules(path, f"{name}."):
                if module.ispkg:
                    yield from _with_submodules([module.name])
                elif not module.name.endswith(".__main__"):  # it may start the application
                    yield module.name


# ---- wiring ---------------------------------------------------------------------------------------------------------------


def _wired(container: DatabaseContainer) -> set[str]:
    """Return the modules that the container, or one that it is nested in, was wired to."""
    found: set[str] = set()
    current: Any = container
    while current is not None:
        found |= {module.__name__ for module in getattr(current, "wired_to_modules", ())}
        for package in getattr(current, "wired_to_packages", ()):
            prefix = f"{package.__name__}."
            found |= {package.__name__, *(name for name in sys.modules if name.startswith(prefix))}
        current = getattr(current, "parent", None)
    return found


def _not_wired(module: str, functions: list[str]) -> Finding:
    return matters.NOT_WIRED.found(
        None,
        f"The module {module!r} is not wired, and {', '.join(dict.fromkeys(functions))} would get markers instead of sessions.",
        module,
        f"Wire it: container.wire(modules=[{module}]), or packages=[…].",
    )


def _nothing_wired(module: str) -> Finding:
    return matters.NOTHING_WIRED.found(
        None,
        f"The module {module!r} has markers, and the container wires no module.",
        module,
        "Call container.wire(…) where the application starts. Give --container a function that does it, to have that checked.",
    )


# ---- markers --------------------------------------------------------------------------------------------------------------


def _marked(module: ModuleType) -> Iterator[tuple[str, str, Any]]:
    """Yield each marker in the functions and methods that a module defines, with the names of function and parameter."""
    for name, function in _functions(module):
        try:
            markers = markers_in(evaluated_signature(function, name))
        except (InvalidUse, ValueError, TypeError):
            continue
        for parameter, marker in markers.items():
            yield name, parameter, marker


def _functions(module: ModuleType) -> Iterator[tuple[str, FunctionType]]:
    owners: list[tuple[str, Any]] = [("", module)]
    for prefix, owner in owners:
        for name, value in list(vars(owner).items()):
            if isinstance(value, type) and owner is module and value.__module__ == module.__name__:
                owners.append((f"{name}.", value))
                continue
            function = _original(value)
            if function is not None and function.__module__ == module.__name__:
                yield f"{prefix}{name}", function


def _original(value: object) -> FunctionType | None:
    """Return the function that was decorated. Its parameters still have their markers."""
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    try:
        function = inspect.unwrap(cast("Any", value)) if callable(value) and not is_marker(value) else None
    except ValueError:
        return None
    return function if isinstance(function, FunctionType) else None


def _unresolved(
    container: DatabaseContainer, module: ModuleType, function: str, parameter: str, marker: Any
) -> Iterator[Finding]:
    named = marker.provider
    while is_marker(named):  # Closing[Provide[…]]
        named = named.provider
    if _resolves(container, named):
        return
    shown = repr(named) if isinstance(named, str) else f"a provider ({type(named).__name__}) of another container"
    yield matters.UNRESOLVED.found(
        None,
        f"The parameter {parameter!r} of {function} names {shown}, which the container does not have.",
        f"{module.__name__}.{function}",
        "Correct the name, or add the provider to the container. Names as strings also find what a subclass has replaced.",
    )


def _resolves(container: DatabaseContainer, named: object) -> bool:
    if isinstance(named, str):
        return named == "<container>" or _has_path(container, named)
    while isinstance(
        named, providers.ProvidedInstance | providers.AttributeGetter | providers.ItemGetter | providers.MethodCaller
    ):
        named = named.provides
    if isinstance(named, providers.Delegate):
        named = named.provides
    if not isinstance(named, providers.Provider) or type(named).__name__.endswith("ConfigurationOption"):
        return True  # an option of a configuration is found at run time
    declared = getattr(container, "declarative_parent", None) or container
    return any(provider is named for provider in _all_providers(declared))


def _has_path(container: object, path: str) -> bool:
    found: Any = container
    for part in path.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            return False
    return True


def _all_providers(container: Any) -> Iterator[object]:
    yield container.__self__
    for provider in container.providers.values():
        yield provider
        if isinstance(provider, providers.Container):
            yield from _all_providers(provider.container)
