"""Other settings for a while: what the providers of a container hold is set aside, and put back afterwards.

Overriding `settings` alone changes nothing for what was made from the old ones. And an override that is laid over the
providers does not protect what is below it: `reset_singletons()` reaches both. So the providers themselves are emptied.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from dependency_injector import providers

from app_db._databases.disposal import disposed
from app_db._databases.providers import AsyncEngineProvider, EngineProvider
from app_db._units.coordinator import Rehearsal
from app_db.container import KINDS, Connection, DatabaseContainer
from app_db.errors import InvalidUse, NothingConfigured, Problem, SettingsError, did_you_mean
from app_db.settings import ConnectionSettings, DatabaseSettings
from app_db.settings.sources import variable_for
from app_db.settings.urls import UNREADABLE_URL, URL_PARTS, parse_url

_NOTHING = object()


class Override:
    """A block, for `with` or `async with`, in which a container has other settings. It gives those settings."""

    def __init__(self, container: DatabaseContainer, settings: DatabaseSettings | Mapping[str, str]) -> None:
        self.container = container
        self._settings = settings
        self._held: list[_Held] = []
        self._rehearsal: Rehearsal | None = None

    def __enter__(self) -> DatabaseSettings:
        if self._held:
            raise InvalidUse("The same override was entered twice", "Make another one for each block")
        settings = self.other_settings()
        self._held = [_Held(provider) for provider in _providers(self.container)]
        coordinator = self.container.coordinator()
        self._rehearsal, coordinator.rehearsal = coordinator.rehearsal, None  # other databases are not isolated
        self.container.settings.override(providers.Object(settings))
        return settings

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._put_back()
        finally:
            self.clean_up()

    async def __aenter__(self) -> DatabaseSettings:
        return self.__enter__()

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        here = [engine for engine in _async_engines(self.container) if engine.is_built_here]
        waits = [wait for engine in here for wait in engine.begin_to_retire()]
        try:
            self._put_back()
        finally:
            try:
                await disposed(waits)
            finally:
                self.clean_up()

    def other_settings(self) -> DatabaseSettings:
        """Return what the container is to have. Nothing was changed yet."""
        given = self._settings
        return given if isinstance(given, DatabaseSettings) else settings_with_urls(self.container, given)

    def clean_up(self) -> None:
        """Do what is left to do when the container has everything back."""

    def _put_back(self) -> None:
        held, self._held = self._held, []
        coordinator = self.container.coordinator()
        with ExitStack() as stack:  # what fails keeps nothing else from being put back
            for one in reversed(held):
                stack.callback(one.put_back)
            stack.callback(setattr, coordinator, "rehearsal", self._rehearsal)
            stack.callback(_close_decision_places, self.container)


def _providers(container: DatabaseContainer) -> Iterator[providers.Provider[Any]]:
    """Yield what follows the settings: first the settings themselves, so that nothing is made from the wrong ones meanwhile."""
    yield container.settings
    yield container.decision_places
    for connection in connections_of(container).values():
        for kind in KINDS:
            yield getattr(connection, kind)


def connections_of(container: DatabaseContainer) -> dict[str, Connection]:
    """Return the connections that a container declares, by name."""
    return {name: provider for name, provider in container.providers.items() if isinstance(provider, Connection)}


def _async_engines(container: DatabaseContainer) -> list[AsyncEngineProvider]:
    return [connection.async_engine for connection in connections_of(container).values()]


def _close_decision_places(container: DatabaseContainer) -> None:
    container.decision_places.reset_override()
    places = _instance_of(container.decision_places)
    if places is not _NOTHING:
        places.close()


# ---- what a provider holds -----------------------------------------------------------------------------------------


class _Held:
    """What a provider was overridden by and what it had made, taken away from it."""

    def __init__(self, provider: providers.Provider[Any]) -> None:
        self._provider = provider
        self._overridden = provider.overridden
        provider.reset_override()
        self._made = _take(provider)

    def put_back(self) -> None:
        """Give it all back, and let go of what took its place, whatever was done to the provider since."""
        self._provider.reset_override()
        _give_back(self._provider, self._made)
        for overriding in self._overridden:
            self._provider.override(overriding)


def _take(provider: providers.Provider[Any]) -> Any:
    if isinstance(provider, (EngineProvider, AsyncEngineProvider)):
        return provider.taken_away()
    if not isinstance(provider, providers.ThreadSafeSingleton):
        return _NOTHING
    lock: Any = provider
    with lock.storage_lock:
        made = _instance_of(provider)
        _forget(provider)
        return made


def _give_back(provider: providers.Provider[Any], made: Any) -> None:
    if isinstance(provider, (EngineProvider, AsyncEngineProvider)):
        provider.give_back(made)
    elif isinstance(provider, providers.ThreadSafeSingleton):
        lock: Any = provider
        with lock.storage_lock:  # or another thread would make one
            _forget(provider)
            if made is not _NOTHING:
                _call_with(provider, made)


def _instance_of(provider: providers.Provider[Any]) -> Any:
    """Return what a singleton has made, without having it made. A provider has no other way to say so than to be called."""
    if not isinstance(provider, providers.ThreadSafeSingleton):
        return _NOTHING
    lock: Any = provider
    with lock.storage_lock:
        made = _call_with(provider, _NOTHING)
        if made is _NOTHING:
            _forget(provider)
        return made


def _call_with(provider: providers.ThreadSafeSingleton[Any], made: Any) -> Any:
    """Call a singleton that, if it has nothing yet, is to have `made`."""
    provides, args, kwargs = provider.provides, provider.args, provider.kwargs
    provider.set_provides(lambda: made)
    provider.clear_args()
    provider.clear_kwargs()
    try:
        return provider()
    finally:
        provider.set_provides(provides)
        provider.set_args(*args)
        provider.set_kwargs(**kwargs)


def _forget(provider: providers.ThreadSafeSingleton[Any]) -> None:
    providers.ThreadSafeSingleton.reset(provider)  # what lasts resets nothing by itself


# ---- settings from settings ----------------------------------------------------------------------------------------


def settings_of(container: DatabaseContainer) -> DatabaseSettings | None:
    """Return the settings of a container, or None where nothing is configured yet."""
    try:
        return container.settings()
    except NothingConfigured:
        return None


def names_of(container: DatabaseContainer, settings: DatabaseSettings | None) -> list[str]:
    """Return all connections there can be: those of the settings, and those that the container declares."""
    return sorted({*connections_of(container), *(settings.connections if settings is not None else ())})


def declared(settings: DatabaseSettings | None, name: str) -> ConnectionSettings | None:
    """Return a connection as the settings have it, its mirror not resolved."""
    return None if settings is None else settings._declared(name)


def settings_with_urls(container: DatabaseContainer, urls: Mapping[str, str]) -> DatabaseSettings:
    """Return a container's settings with other databases for some connections, or raise a SettingsError that lists all wrongs."""
    settings = settings_of(container)
    known = names_of(container, settings)
    problems = [problem for name, url in urls.items() if (problem := _problem_of(name, url, known)) is not None]
    if problems:
        raise SettingsError(problems)
    replaced = {name: with_url(declared(settings, name), str(url)) for name, url in urls.items()}
    if settings is None:
        return DatabaseSettings(connections=replaced)
    return settings.with_connections({**settings.connections, **replaced})


def _problem_of(name: str, url: object, known: list[str]) -> Problem | None:
    variable = variable_for(("connections", name, "url"))
    if name not in known:
        listed = ", ".join(repr(one) for one in known)
        return Problem(variable, f"is for no connection of the container.{did_you_mean(name, known)} There are: {listed}.")
    if not isinstance(url, str) or parse_url(url) is None:
        return Problem(variable, UNREADABLE_URL)
    return None


def with_url(connection: ConnectionSettings | None, url: str) -> ConnectionSettings:
    """Return settings that say the same of how a connection is used, and `url` of which database it is."""
    if connection is None:
        return ConnectionSettings(url=url)
    replaced = {"url", "mirror", *URL_PARTS}
    before, after = connection.read_url(), parse_url(url)
    if after is not None and after.password is not None:
        replaced.add("password_provider")
    if before is None or after is None or before.get_backend_name() != after.get_backend_name():
        replaced |= {"connect_args", "password_provider"}  # meant for another kind of database
    kept = {field: getattr(connection, field) for field in connection.model_fields_set if field not in replaced}
    return ConnectionSettings(**kept, url=url)
