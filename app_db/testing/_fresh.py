"""Copies of a container's databases, for tests of what an isolated test can't show."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from types import TracebackType

from app_db._units.manager import current
from app_db.container import DatabaseContainer
from app_db.errors import CannotMakeDatabase, InvalidUse, IsolationBroken
from app_db.settings import ConnectionSettings, DatabaseSettings
from app_db.settings._urls import is_memory
from app_db.testing._databases import Beside, OwnDatabase, database_in, name_of, written_places
from app_db.testing._marks import Mark
from app_db.testing._outside import activity, checkouts
from app_db.testing._overrides import Override, connections_of, with_url
from app_db.testing._row_counts import RowCounts
from app_db.testing._runner import runner

_MOST = 20
"""How many copies of one database there can be at the same time."""

_templates: list[KeptTemplates] = []


class FreshDatabases(Override):
    """A block in which a container has copies of its databases, with the rows that are committed. They are dropped at the end.

    Raises IsolationBroken at the end if a unit of work is still under way.
    """

    def __init__(self, container: DatabaseContainer, suffix: str) -> None:
        super().__init__(container, {})
        self._suffix = suffix
        self._copies: list[OwnDatabase] = []
        self.kept = False
        """Whether the copies are not dropped at the end."""

    def other_settings(self) -> DatabaseSettings:
        runner().prepare(self.container)
        if self.container.core.coordinator().rehearsal is not None:
            raise InvalidUse(
                "Databases can't be copied in an isolated test, whose rows are not committed",
                "Mark the test with @pytest.mark.app_db(fresh=True), which leaves the isolation out, or use fresh_databases() "
                "outside of isolated() and of IsolatedTestCase",
            )
        settings = self.container.settings()
        templates = next((found for found in _templates if found.state is self.container.core.state()), None)
        if templates is not None:
            templates.drop_outdated()
        own: dict[str, ConnectionSettings] = {}
        try:
            for names in written_places(self.container, settings, in_memory=True):
                copy = self._copied(names[0], settings, templates)
                self._copies.append(copy)
                for name in names:
                    own[name] = with_url(settings.connections[name], _url_of_copy(name, settings, copy.database))
        except BaseException:
            self.clean_up()
            raise
        return settings.with_connections({**settings.connections, **own})

    def _copied(self, name: str, settings: DatabaseSettings, templates: KeptTemplates | None) -> OwnDatabase:
        if templates is None:
            return copied(self.container, name, settings, self._suffix)
        source = templates.of(name, settings)
        copy = free(name, settings, self._suffix, source.beside)
        copy.copy_from(source.database, marked=True)
        return copy

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        problems = self._end_units()
        super().__exit__(kind, error, trace)
        _report(problems, error)

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        problems = self._end_units()
        await super().__aexit__(kind, error, trace)
        _report(problems, error)

    def _end_units(self) -> list[str]:
        unit = current(self.container.core.coordinator().manager)
        if unit is None:
            return []
        place = str(getattr(unit, "owner", "this thread"))
        with suppress(Exception):  # its connections are closed with the engines
            unit.abort()
        return [f"a unit of work is still under way, in {place}"]

    def ways_to_look(self) -> list[str]:
        """Return for each copy the command, without a password, that opens a shell in it."""
        return [f"{copy.name}: {copy.command()}" for copy in self._copies]

    def clean_up(self) -> None:
        for copy in self._copies:
            if self.kept:
                copy.put(Mark(kept=True))
            else:
                copy.drop_at_end()
        self._copies.clear()


def _report(problems: list[str], error: BaseException | None) -> None:
    if problems and error is None:
        raise IsolationBroken(problems)


def _url_of_copy(name: str, settings: DatabaseSettings, database: str) -> str:
    url = settings.connection(name).sqlalchemy_url()
    url = (url.set(query={}) if is_memory(url) else url).set(database=database)
    return url.render_as_string(hide_password=False)


def free(name: str, settings: DatabaseSettings, suffix: str, beside: Beside | None = None) -> OwnDatabase:
    """Return a database that does not exist. What killed runs have left under its name is dropped."""
    url = settings.connection(name).sqlalchemy_url().set(database=database_in(name, settings))
    for number in range(1, _MOST + 1):
        database = name_of(name, url, suffix if number == 1 else f"{suffix}{number}")
        own = OwnDatabase(name, settings, database, beside=beside)
        if not own.exists():
            return own
        mark = own.mark()
        if mark is not None and (mark.kept or mark.is_left):
            own.drop()
            return own
    raise CannotMakeDatabase(
        name, name_of(name, url, suffix), f"there are {_MOST} copies already, of which none is known to be left over"
    )


def copied(container: DatabaseContainer, name: str, settings: DatabaseSettings, suffix: str) -> OwnDatabase:
    """Copy a database that the container uses, without its idle connections, which would be in the way."""
    own = free(name, settings, suffix)
    for other in {*settings.connections, *connections_of(container)}:  # a reader may stand in no settings
        for engine in container.core.state().engines(other):
            engine.dispose()
    own.copy_from(database_in(name, settings))
    return own


# ---- templates ------------------------------------------------------------------------------------------------------------


@dataclass
class KeptTemplates:
    """Copies of a container's databases that nothing connects to, and that other copies are made from."""

    container: DatabaseContainer
    state: object
    """That of the container while it has the databases that the templates are of."""
    made: dict[object, OwnDatabase] = field(default_factory=dict)
    rows: RowCounts | None = None
    """The rows that were committed when the first template was made."""
    are_outdated: bool = False
    """Whether something may have changed rows since, without making them more or fewer."""

    def of(self, name: str, settings: DatabaseSettings) -> OwnDatabase:
        """Return the template of a connection's database. The first call makes it."""
        place = settings.connection(name).place
        if place not in self.made:
            self.rows = self.rows or RowCounts(self.container)
            self.made[place] = copied(self.container, name, settings, "template")
        return self.made[place]

    def drop_outdated(self) -> None:
        """Drop the templates if rows were committed since: by a fixture of a module, for example."""
        if self.rows is not None and (self.are_outdated or self.rows.moved_on()):
            self.drop()

    def watched(self) -> Callable[[], None]:
        """Return a function: call it after something that may have changed rows.

        The templates are made anew if this process has taken a connection meanwhile, or has waited for another process.
        """
        checkouts.watch()
        before = activity()

        def end() -> None:
            self.are_outdated |= activity() != before

        return end

    def drop(self) -> None:
        for own in self.made.values():
            own.drop_at_end()
        self.made.clear()
        self.rows = None
        self.are_outdated = False


@contextmanager
def kept_templates(container: DatabaseContainer) -> Generator[KeptTemplates]:
    """Have `fresh_databases(container)` copy templates, which are made at its first use and dropped at the end of this block.

    Copies of a template are quicker, and nothing may be connected to the databases only when the
    templates are made. They are made anew when a table of the models has more or fewer rows.
    """
    templates = KeptTemplates(container, container.core.state())
    with ExitStack() as stack:
        stack.callback(templates.drop)
        _templates.append(templates)
        stack.callback(_templates.remove, templates)
        yield templates
