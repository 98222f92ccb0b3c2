"""Finds everything about an application's databases that can be known before its first unit of work."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from sqlalchemy import URL
from sqlalchemy.orm import Session

from app_db._findings import across, matters, servers, tables, two_phase, wiring
from app_db._findings.asking import Asked, Question, answers, at_once, refusals, silence
from app_db._findings.finding import SEVERITIES, Finding, place_of, place_of_database
from app_db.container import DatabaseContainer
from app_db.errors import ConnectionNotConfigured, SettingsError
from app_db.models._bases import metadata_of
from app_db.models._reflection import connections_in
from app_db.settings import DatabaseSettings
from app_db.settings._urls import dialect_of, for_threads

PATIENCE = 5.0
"""Seconds that a database has to answer."""


def find(
    container: DatabaseContainer, modules: Iterable[str] = (), *, now: Callable[[], float] = time.time, patience: float = PATIENCE
) -> list[Finding]:
    """Return what is wrong, or may go wrong, with the databases of a container. A sound set-up has no findings.

    All databases are asked at the same time, and each has `patience` seconds. Nothing is written, but for a decision about no
    unit of work in the decision log. `modules` are names of the application's modules and packages, whose markers are checked.
    `now` is the clock that those of the servers are compared with.
    """
    of_modules = [*wiring.findings(container, modules)]  # first: their tables are known once they are imported
    try:
        settings = container.settings()
    except SettingsError as error:
        return [*refusals(None, error), *of_modules]
    found = [
        *_not_configured(container, settings),
        *across.separate_rows(settings),
        *two_phase.apart(settings),
        *tables.stray_migrations(container),
        *_databases(container, settings, now, patience),
        *of_modules,
    ]
    names = [*settings.connections]
    order = {name: position for position, name in enumerate(names)}
    return sorted(
        found, key=lambda finding: (order.get(finding.connection or "", len(names)), SEVERITIES.index(finding.severity))
    )


def _not_configured(container: DatabaseContainer, settings: DatabaseSettings) -> Iterator[Finding]:
    for name in connections_in(container):
        try:
            settings.connection(name)
        except ConnectionNotConfigured:
            variable = settings.variable("connections", name, "url")
            yield matters.NOT_CONFIGURED.found(
                name,
                f"The container has the connection {name!r}, and it has no settings: what asks for it gets an error.",
                variable,
                f"Set {variable}, or remove the connection from the container.",
            )


# ---- asking the databases -----------------------------------------------------------------------------------------------


def _databases(
    container: DatabaseContainer, settings: DatabaseSettings, now: Callable[[], float], patience: float
) -> Iterator[Finding]:
    asked = {name: Asked(name, container, settings, now, patience) for name in settings.connections}
    asked = {name: each for name, each in asked.items() if _questions(each)}
    jobs = {}
    for name, each in asked.items():
        obstacles = [*_obstacles(each)]
        yield from obstacles
        if not obstacles:
            jobs[name] = partial(answers, each, _questions(each))
    for name, found in at_once(jobs, patience).items():
        yield from [silence(asked[name])] if found is None else found
    reached = {name: each.server for name, each in asked.items() if each.server is not None}
    yield from across.replicas(settings, reached)
    yield from across.room(container, settings, reached)
    yield from _decision_log(container, settings, reached, patience)


def _questions(asked: Asked) -> Sequence[Question]:
    """Return what to ask. A mirror has the database of another connection, which is asked for the rest."""
    if asked.settings.connections[asked.name].mirror is None:
        return [*servers.QUESTIONS, *tables.QUESTIONS, *two_phase.QUESTIONS]
    return tables.SCHEMA if metadata_of(asked.name).tables else []


def _obstacles(asked: Asked) -> Iterator[Finding]:
    """Yield what keeps a connection from being made, or would change the database if it was."""
    url = asked.own.sqlalchemy_url()
    yield from _no_driver(asked, url)
    yield from _session_classes(asked)
    dialect, level = dialect_of(url), asked.own.isolation_level
    if level is not None and not isinstance(dialect, str):
        nothing: Any = None  # no dialect of SQLAlchemy's asks the server
        levels = [*dialect().get_isolation_level_values(nothing)]
        if level not in levels:
            yield matters.ISOLATION_LEVEL.found(
                asked.name,
                f"{dialect.name} does not have the isolation level {level}.",
                asked.place("isolation_level"),
                f"Set one of {', '.join(levels)}, or unset it.",
            )
    file = asked.database.file_of(url)
    if file is not None and not file.exists():
        what = f"The file {file} does not exist" if file.parent.exists() else f"The directory {file.parent} does not exist"
        remedy = "Make the tables: container.create_all() creates the file."
        if not file.parent.exists():
            remedy = "Create the directory, or correct the path: sqlite:/// begins a relative path, sqlite://// an absolute one."
        yield matters.NO_FILE.found(asked.name, f"{what}.", asked.place_of_database(), remedy)


def _no_driver(asked: Asked, url: URL) -> Iterator[Finding]:
    """Yield the lack of the driver for threads, by which app_db asks, where the application may do with that for coroutines."""
    problem = dialect_of(for_threads(url))
    if isinstance(problem, str) and not isinstance(dialect_of(url), str):
        yield matters.UNASKED.found(
            asked.name,
            f"The database can't be asked: {asked.place_of_database()} {problem}.",
            asked.place_of_database(),
            "Install the driver for the check alone. The check, and recovery, ask without coroutines.",
        )


def _session_classes(asked: Asked) -> Iterator[Finding]:
    """Yield the classes of sessions that can't be imported."""
    try:
        asked.own.load_session_class("class", Session)
        if asked.own.session.async_class is not None:
            from sqlalchemy.ext.asyncio import AsyncSession

            asked.own.load_session_class("async_class", AsyncSession)
    except SettingsError as error:
        yield from refusals(asked.name, error)


def _decision_log(
    container: DatabaseContainer, settings: DatabaseSettings, reached: across.Servers, patience: float
) -> Iterator[Finding]:
    if not container.core.decision_logs().two_phase():
        return
    name = two_phase.place_of_log(container, settings)
    if name is not None and name not in reached:
        return  # its database can't be reached, which is a finding already
    found = at_once({"decision log": partial(two_phase.decision_log, container, settings)}, patience)["decision log"]
    if found is None:
        where = place_of(settings, "decision_log") if name is None else place_of_database(settings, name)
        what = f"No decision could be written to the decision log within {patience:g} s."
        yield matters.SILENT.found(name, what, where, "See whether another process holds it, or a lock in its database.")
    else:
        yield from found
