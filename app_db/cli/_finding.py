"""The application's container: which one is meant, and by what it is named."""

from __future__ import annotations

import os
import sys
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from inspect import iscoroutinefunction
from pathlib import Path
from types import ModuleType
from typing import cast

from app_db.cli._calls import CannotRun
from app_db.container import Connection, DatabaseContainer, container_of
from app_db.errors import AppDbError
from app_db.settings import DatabaseSettings
from app_db.settings._project import project_file

VARIABLE = "APP_DB_CONTAINER"
"""The environment variable that names the container. It is no setting: the container has the settings."""


def find_container(option: str | None) -> DatabaseContainer:
    """Return the container that `--container` names, or else APP_DB_CONTAINER, or else pyproject.toml.

    Without any of them, it is a container with all connections in the settings. Raises CannotRun or an AppDbError.
    """
    named = _named(option)
    if named is None:
        return container_of(*DatabaseSettings().connections)()  # given settings would be an override, which graph shows
    return named.container()


def _named(option: str | None) -> _Named | None:
    if option is not None:
        return _Named(option, f"--container {option}", Path.cwd())
    variable = os.environ.get(VARIABLE)
    if variable is not None:
        return _Named(variable, f"{VARIABLE}={variable}", Path.cwd())
    return _named_in_project()


# ---- pyproject.toml -----------------------------------------------------------------------------------------------------


def import_modules(given: Sequence[str]) -> None:
    """Import the modules that are given, or else those of `modules` in [tool.app_db]. Raises CannotRun or an AppDbError."""
    for module in _named_modules(given):
        module.imported(module.name)


def module_names(given: Sequence[str]) -> list[str]:
    """Return the names of these modules, which can be imported from now on. Raises CannotRun."""
    modules = _named_modules(given)
    for module in modules:
        module.enter()
    return [module.name for module in modules]


def _named_modules(given: Sequence[str]) -> list[_Named]:
    if given:
        return [_Named(name, f"--modules {name}", Path.cwd()) for name in given]
    file = project_file()
    names = [] if file is None else _table_of(file).get("modules", [])
    if file is None:
        return []
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise CannotRun(f'{file}: modules in [tool.app_db] is no list of texts. Write modules = ["shop.models"]')
    return [_Named(name, f"{file}: {name!r} among the modules in [tool.app_db]", file.parent) for name in names]


def _named_in_project() -> _Named | None:
    file = project_file()
    if file is None:
        return None
    name = _table_of(file).get("container")
    if name is None:
        return None
    if not isinstance(name, str):
        raise CannotRun(f'{file}: container in [tool.app_db] is no text. Write container = "MODULE:NAME"')
    return _Named(name, f"{file}: container = {name!r} in [tool.app_db]", file.parent)


def _table_of(file: Path) -> dict[str, object]:
    try:
        project: dict[str, object] = tomllib.loads(file.read_text("utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise CannotRun(f"{file}: it is not valid TOML: {str(error).splitlines()[0]}. Correct it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CannotRun(f"{file}: it can't be read ({type(error).__name__}). Correct it, or give --container") from None
    for name, path in (("tool", "tool"), ("app_db", "tool.app_db")):
        table = project.get(name, {})
        if not isinstance(table, dict):
            raise CannotRun(f'{file}: {path} is no table. Write [tool.app_db], and below it container = "MODULE:NAME"')
        project = table
    return project


# ---- what a name names ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Named:
    """A container's name, and where that was set. No message quotes an error of the application, which may hold secrets."""

    name: str
    where: str
    place: Path
    """The directory from which modules are imported."""

    def container(self) -> DatabaseContainer:
        """Return the container: what is named, or what calling that returns."""
        module, _, path = self.name.partition(":")
        found: object = self.imported(module)
        for part in (path or "container").split("."):
            try:
                found = getattr(found, part)
            except AttributeError:
                raise self._wrong(f"there is no {part!r}. Name a container, its class, or a function: MODULE:NAME") from None
        if iscoroutinefunction(found):
            raise self._wrong("it is a coroutine function. Name a function that returns the container without waiting")
        made = self._called(found) if callable(found) and not isinstance(found, Connection) else found
        if not hasattr(made, "session_of"):
            raise self._wrong("it is no database container. Name one, its class, or a function that returns it: MODULE:NAME")
        return cast("DatabaseContainer", made)

    def imported(self, module: str) -> ModuleType:
        """Return a module. The working directory is among the places where it is looked for."""
        if not module:
            raise self._wrong("the module is missing. Give MODULE:NAME")
        self.enter()
        try:
            return import_module(module)
        except AppDbError:
            raise
        except ModuleNotFoundError as error:
            raise self._wrong(f"there is no module {error.name!r}. Run this where the application runs") from None
        except (Exception, SystemExit) as error:  # noqa: BLE001  # the application may raise anything
            raise self._wrong(
                f"the module {module!r} can't be imported ({type(error).__name__}). Import it in Python to see why"
            ) from None

    def enter(self) -> None:
        """Add the working directory to the places where modules are looked for."""
        here = str(self.place)
        if here not in sys.path:
            sys.path.insert(0, here)

    def _called(self, make: Callable[[], object]) -> object:
        try:
            return make()
        except AppDbError:
            raise
        except (Exception, SystemExit) as error:  # noqa: BLE001  # the application may raise anything
            raise self._wrong(f"calling it failed ({type(error).__name__}). Call it in Python to see why") from None

    def _wrong(self, message: str) -> CannotRun:
        return CannotRun(f"{self.where}: {message}")
