"""Which connections a function is about, and the engines to reach them with."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import TypeVar

from sqlalchemy import Engine
from sqlalchemy.util.concurrency import greenlet_spawn

from app_db._databases.containers import require_container
from app_db._databases.engines import build_async_engine
from app_db.container import DatabaseContainer
from app_db.errors import ConnectionNotConfigured, InvalidUse, UnusableMigrations
from app_db.migrations._chains import Chain
from app_db.models._reflection import connections_in
from app_db.models._schema import obstacle_to_changes, own_tables
from app_db.settings._urls import dialect_of, for_threads

T = TypeVar("T")

Names = Sequence[str] | None
"""The names of connections; None stands for all that the function can be about."""


def versions_in(folder: Path, name: str) -> Path:
    """Return the folder of the revisions of one connection."""
    return folder / name / "versions"


def with_chains(container: DatabaseContainer, names: Names, folder: Path) -> list[str]:
    """Return the connections that have migrations, or `names`. Raises an error if one can't have any, or has none."""
    require_container(container)
    if names is not None:
        _require_changeable(container, names)
        for name in names:
            if not versions_in(folder, name).is_dir():
                first = f"Write a first revision (app-db revision --connection {name} -m 'first'), or give another `directory`"
                raise UnusableMigrations(name, f"there is no folder {versions_in(folder, name)}", first)
        return [*dict.fromkeys(names)]
    found = [name for name in changeable(container) if versions_in(folder, name).is_dir()]
    if not found:
        known = ", ".join(map(repr, connections_in(container))) or "none"
        raise InvalidUse(
            f"There are no migrations in {folder}, where each connection has a folder NAME/versions (connections: {known})",
            "Write a first revision (app-db revision -m 'first tables'), give another `directory`, or set migrations in "
            "[tool.app_db] of pyproject.toml",
        )
    return found


def with_chains_or_models(container: DatabaseContainer, names: Names, folder: Path) -> list[str]:
    """Return the connections that have migrations or models, or `names`."""
    require_container(container)
    if names is not None:
        _require_changeable(container, names)
        return [*dict.fromkeys(names)]
    found = [name for name in changeable(container) if own_tables(name) or versions_in(folder, name).is_dir()]
    if not found:
        raise InvalidUse(
            "No connection has models or migrations", "Import the modules of the models before, or name a connection"
        )
    return found


def with_models(names: Sequence[str], *, is_asked: bool) -> list[str]:
    """Return those of `names` that have models. Raises InvalidUse if none has, and if one that the caller has named has none."""
    found = [name for name in names if own_tables(name)]
    if len(found) < len(names) and (is_asked or not found):
        listed = ", ".join(repr(name) for name in names if name not in found)
        raise InvalidUse(
            f"No models of {listed} are imported, so a revision would drop all tables there",
            "Import the modules of the models before, or write an empty revision with `autogenerate=False` (--empty)",
        )
    return found


def changeable(container: DatabaseContainer) -> list[str]:
    """Return the connections whose tables can be changed: neither mirrors, nor read-only, and with settings."""
    found = []
    for name in connections_in(container):
        with suppress(ConnectionNotConfigured):
            if not obstacle_to_changes(container.settings(), name):
                found.append(name)
    return found


def _require_changeable(container: DatabaseContainer, names: Iterable[str]) -> None:
    if isinstance(names, str):
        raise InvalidUse(f"`connections` is a list of names, and not a text ({names!r})", f"Write connections=[{names!r}]")
    for name in connections_in(container, names):
        if obstacle := obstacle_to_changes(container.settings(), name):
            raise InvalidUse(f"The connection {name!r} has no migrations: {obstacle}", "Name a writable connection")


def beside(container: DatabaseContainer, name: str, folder: Path) -> list[str]:
    """Return the other connections that are in the same database and have migrations or models."""
    settings = container.settings()
    place = settings.connection(name).place
    others = [other for other in changeable(container) if other != name and settings.connection(other).place == place]
    return [other for other in others if own_tables(other) or versions_in(folder, other).is_dir()]


def chains(container: DatabaseContainer, engines: dict[str, Engine], folder: Path) -> list[Chain]:
    """Return the chains of the connections that have engines."""
    return [
        Chain(name, versions_in(folder, name), engine, [versions_in(folder, other) for other in beside(container, name, folder)])
        for name, engine in engines.items()
    ]


# ---- engines --------------------------------------------------------------------------------------------------------------


def with_engines(container: DatabaseContainer, names: Sequence[str], work: Callable[[dict[str, Engine]], T]) -> T:
    """Call `work` with the engines of connections, and return what it returns.

    They are the engines for threads, by the driver for threads that belongs to the configured one. Where only the driver for
    coroutines is installed, they are such engines, and `work` runs on an event loop of its own. Raises UnknownConnection.
    """
    connections_in(container, names)
    without_threads = [name for name in names if not _has_driver_for_threads(container, name)]
    engines: dict[str, Engine] = {name: container.providers[f"{name}_engine"]() for name in names if name not in without_threads}
    if not without_threads:
        return work(engines)
    return _on_loop(container, names, without_threads, engines, work)


def _has_driver_for_threads(container: DatabaseContainer, name: str) -> bool:
    if container.providers[f"{name}_engine"].overridden:
        return True
    url = container.settings().connection(name).sqlalchemy_url()
    return not isinstance(dialect_of(for_threads(url)), str) or isinstance(dialect_of(url), str)


def _on_loop(
    container: DatabaseContainer,
    names: Sequence[str],
    awaited: Sequence[str],
    engines: dict[str, Engine],
    work: Callable[[dict[str, Engine]], T],
) -> T:
    async def main() -> T:
        own = {name: build_async_engine(name, container.settings()) for name in awaited}
        found = {**engines, **{name: engine.sync_engine for name, engine in own.items()}}
        try:
            return await greenlet_spawn(work, {name: found[name] for name in names})
        finally:
            for engine in own.values():
                await engine.dispose()

    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(asyncio.run(main()))
        except BaseException as error:  # noqa: BLE001  # it is raised in the thread that waits
            errors.append(error)

    thread = Thread(target=run)  # this one may have a loop that runs
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
