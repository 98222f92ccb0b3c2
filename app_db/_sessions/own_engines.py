"""Engines of the application's own: they are configuration enough for their connections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from app_db.errors import Problem, SettingsError
from app_db.settings import DatabaseSettings
from app_db.settings._urls import masked

if TYPE_CHECKING:
    from sqlalchemy import URL, Engine
    from sqlalchemy.ext.asyncio import AsyncEngine


def own_engine(*engines: Any) -> Engine | AsyncEngine | None:
    """Return the engine that overrides one of these providers of app_db's engines, if there is one."""
    for provider in engines:
        if provider.overridden:
            engine: Engine | AsyncEngine = provider()
            return engine
    return None


def settings_with(own: Mapping[str, URL], declared: Mapping[str, URL]) -> DatabaseSettings:
    """Return the settings, and for connections that these do not know, the URLs of their own engines.

    `own` has the URLs of all engines that are not app_db's. Those of `declared` belong to
    `Connection(engine=…)`, and must lead where the settings say.
    """
    try:
        settings = DatabaseSettings()
    except SettingsError:  # there are none, or none that say where: READ_ONLY alone, for example
        if not own:
            raise
        return DatabaseSettings(connections=_urls(own))
    missing = {name: url for name, url in own.items() if name not in settings.connections}
    if "writer" in settings.connections:
        missing.pop("reader", None)  # it is the writer, read-only
    problems = [*_contradictions(settings, declared)]
    if problems:
        raise SettingsError(problems)
    return DatabaseSettings(connections=_urls(missing)) if missing else settings


def _urls(engines: Mapping[str, URL]) -> dict[str, dict[str, str]]:
    return {name: {"url": url.render_as_string(hide_password=False)} for name, url in engines.items()}


def _contradictions(settings: DatabaseSettings, declared: Mapping[str, URL]) -> list[Problem]:
    problems = []
    for name, ours in declared.items():
        configured = settings.connections.get(name)
        if configured is None:
            continue
        theirs = configured.sqlalchemy_url()
        if _place(theirs) != _place(ours):
            message = (
                f"names {masked(theirs)}, but Connection(engine=…) of {name!r} was given an engine for {masked(ours)}. "
                "Remove one of them. In a test, override the engine"
            )
            problems.append(Problem(configured.variable("url"), message))
    return problems


def _place(url: URL) -> tuple[object, ...]:
    return url.get_backend_name(), url.host, url.port, url.database
