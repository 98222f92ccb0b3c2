"""What an application calls: each function takes a container, and is about the connections in `connections`."""

from __future__ import annotations

import io
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from alembic import command
from alembic.autogenerate import compare_metadata
from sqlalchemy import Engine, inspect
from sqlalchemy.exc import SQLAlchemyError

from app_db._databases.containers import require_container
from app_db.container import DatabaseContainer
from app_db.errors import InvalidUse
from app_db.migrations._chains import Chain, shown
from app_db.migrations._differences import described
from app_db.migrations._folders import folder_of
from app_db.migrations._migrating import Migration, OnStep, Verb, downward, read_current, stamping, upward
from app_db.migrations._results import Check, Current, Migrated, Revision
from app_db.migrations._running import compared, configure, run_command, run_environment, run_offline
from app_db.migrations._selecting import Names, chains, with_chains, with_chains_or_models, with_engines, with_models
from app_db.models._reflection import connections_in, engine_that_reads
from app_db.models._schema import own_tables

if TYPE_CHECKING:
    from alembic.operations.ops import MigrationScript

T = TypeVar("T")

LOCK_TIMEOUT = 60.0
"""Seconds to wait for another process that migrates."""


def _on_chains(container: DatabaseContainer, names: Sequence[str], folder: Path, work: Callable[[list[Chain]], T]) -> T:
    def work_on(engines: dict[str, Engine]) -> T:
        return work(chains(container, engines, folder))

    return with_engines(container, names, work_on)


def _apply(container: DatabaseContainer, verb: Verb, names: Sequence[str], folder: Path, **options: Any) -> tuple[Migrated, ...]:
    return _on_chains(container, names, folder, lambda found: Migration(container, verb, found, **options).apply())


# ---- changing databases ---------------------------------------------------------------------------------------------------


def upgrade(
    container: DatabaseContainer,
    revision: str = "head",
    *,
    connections: Names = None,
    directory: str | Path | None = None,
    lock_timeout: float = LOCK_TIMEOUT,
    on_step: OnStep | None = None,
) -> tuple[Migrated, ...]:
    """Run the pending revisions up to `revision`, and return what was done to each connection.

    Any number of processes may do it at the same time: one migrates, and the others wait and find nothing left. If nothing is
    pending, nothing is locked. PostgreSQL and SQLite roll back all connections if a revision fails; elsewhere, and for revisions
    with an `autocommit_block`, each revision is committed by itself, after those. `on_step` is called after each revision.
    Raises MigrationFailed, MigrationLockTimeout and UnusableMigrations.
    """
    folder = folder_of(directory)
    names = with_chains(container, connections, folder)
    return _apply(container, upward(revision), names, folder, lock_timeout=lock_timeout, on_step=on_step)


def downgrade(
    container: DatabaseContainer,
    revision: str,
    *,
    connections: Names = None,
    directory: str | Path | None = None,
    lock_timeout: float = LOCK_TIMEOUT,
    on_step: OnStep | None = None,
) -> tuple[Migrated, ...]:
    """Undo revisions down to `revision`: an id, `-1`, or `base` for all of them. Locks and errors are those of `upgrade`.

    Name the connection if several have migrations.
    """
    folder = folder_of(directory)
    names = _the_only(with_chains(container, connections, folder), connections, "downgrade")
    return _apply(container, downward(revision), names, folder, lock_timeout=lock_timeout, on_step=on_step)


def stamp(
    container: DatabaseContainer,
    revision: str = "head",
    *,
    connections: Names = None,
    directory: str | Path | None = None,
    lock_timeout: float = LOCK_TIMEOUT,
) -> tuple[Migrated, ...]:
    """Write that a database is at `revision`, and run nothing: for tables that are there already."""
    folder = folder_of(directory)
    names = with_chains(container, connections, folder)
    return _apply(container, stamping(revision), names, folder, lock_timeout=lock_timeout)


def _the_only(found: list[str], asked: Names, verb: str) -> list[str]:
    if asked is None and len(found) > 1:
        listed = ", ".join(map(repr, found))
        raise InvalidUse(
            f"Several connections have migrations: {listed}", f"Name those to {verb} with `connections` (--connection)"
        )
    return found


# ---- looking at them ----------------------------------------------------------------------------------------------------


def current(
    container: DatabaseContainer, *, connections: Names = None, directory: str | Path | None = None
) -> tuple[Current, ...]:
    """Return the revision of each database, and what is pending."""
    folder = folder_of(directory)

    def look(chain: Chain) -> Current:
        found = read_current(container, chain)
        return Current(chain.name, shown(found), chain.head, _pending(chain, found))

    return _for_each(container, with_chains(container, connections, folder), folder, look)


def history(
    container: DatabaseContainer, *, connections: Names = None, directory: str | Path | None = None
) -> tuple[Revision, ...]:
    """Return all revisions, of each connection from the first to the newest.

    If a database can't be asked, it is not known which of them were run: `is_applied` is None.
    """
    folder = folder_of(directory)

    def look(chain: Chain) -> tuple[Revision, ...]:
        try:
            pending = set(_pending(chain, read_current(container, chain)))
        except (SQLAlchemyError, OSError):
            return tuple(_described(chain, each, None) for each in reversed(chain.revisions))
        return tuple(_described(chain, each, each not in pending) for each in reversed(chain.revisions))

    return sum(_for_each(container, with_chains(container, connections, folder), folder, look), ())


def check(container: DatabaseContainer, *, connections: Names = None, directory: str | Path | None = None) -> tuple[Check, ...]:
    """Return for each connection which revisions are pending, or else how its database differs from its models.

    For CI: `all(each.is_clean for each in check(container))`. Nothing is changed.
    """
    folder = folder_of(directory)

    def look(chain: Chain) -> Check:
        with engine_that_reads(chain.engine, container.settings().connection(chain.name)).connect() as connection:
            pending = _pending(chain, chain.current(connection))
            if pending:
                return Check(chain.name, pending, ())
            options = compared(chain, connection)
            found = compare_metadata(chain.context(connection, **options), options["target_metadata"])
            return Check(chain.name, (), described(found))

    return _for_each(container, with_chains_or_models(container, connections, folder), folder, look)


def _for_each(container: DatabaseContainer, names: Sequence[str], folder: Path, look: Callable[[Chain], T]) -> tuple[T, ...]:
    return _on_chains(container, names, folder, lambda found: tuple(map(look, found)))


def _pending(chain: Chain, found: tuple[str, ...]) -> tuple[str, ...]:
    return () if chain.head is None else tuple(each.revision for each in chain.up_to("head", found))


def _described(chain: Chain, revision: str, is_applied: bool | None) -> Revision:
    script = chain.script.get_revision(revision)
    down = script.down_revision
    shown = down if isinstance(down, str) or down is None else ", ".join(down)
    return Revision(chain.name, revision, shown, script.doc, script.path, is_applied)


# ---- files --------------------------------------------------------------------------------------------------------------


def revision(
    container: DatabaseContainer,
    message: str,
    *,
    connections: Names = None,
    directory: str | Path | None = None,
    autogenerate: bool = True,
    revision_id: str | None = None,
) -> tuple[Revision, ...]:
    """Write a revision for each connection whose models differ from its database, and return those that were written.

    Read what was written before you run it: Alembic does not see all changes, and takes a renamed column for a new one. With
    `autogenerate=False` nothing connects, and an empty revision is written for each connection in `connections`, or for the only
    one with migrations or models.

    A connection whose models are not imported is left out: its revision would drop all tables. If it is named, InvalidUse is
    raised. Raises UnusableMigrations if a file can't be written, with the files that were written before.
    """
    folder = folder_of(directory)
    names = with_chains_or_models(container, connections, folder)
    if not message.strip():
        raise InvalidUse("A revision without a message tells nothing", "Say in a few words what changes")
    if autogenerate:
        names = with_models(names, is_asked=connections is not None)
    else:
        _the_only(names, connections, "write an empty revision for")

    def write(chain: Chain, before: Sequence[Revision]) -> tuple[Revision, ...]:
        given = {"message": message, "rev_id": revision_id}
        if not autogenerate:
            with _explained(chain, before):
                return _written(chain, run_command(chain, command.revision, environment=_nothing, **given))
        with engine_that_reads(chain.engine, container.settings().connection(chain.name)).connect() as connection:

            def environment(context: Any) -> None:
                configure(context, chain, connection, dont_mutate=True, process_revision_directives=_drop_empty)
                context.run_migrations()

            with _explained(chain, before):
                made = run_command(chain, command.revision, environment=environment, autogenerate=True, **given)
        return _written(chain, made)

    def write_all(found: list[Chain]) -> tuple[Revision, ...]:
        if autogenerate:  # all of them before the first file is written, which would be pending at the next try
            for chain in found:
                if pending := _pending(chain, read_current(container, chain)):
                    one = "the revision {} has" if len(pending) == 1 else "the revisions {} have"
                    raise chain.unusable(f"{one.format(', '.join(pending))} not been run", "Run upgrade() first")
        written: tuple[Revision, ...] = ()
        for chain in found:
            written += write(chain, written)
        return written

    return _on_chains(container, names, folder, write_all)


def tables_before_revisions(
    container: DatabaseContainer, *, connections: Names = None, directory: str | Path | None = None
) -> dict[str, list[str]]:
    """Return the tables of models that exist where a connection has no revision yet, as after `create_all()`, by connection.

    A first revision would not create them: it is the difference between the models and the database.
    """
    folder = folder_of(directory)
    names = with_models(with_chains_or_models(container, connections, folder), is_asked=connections is not None)

    def look(chain: Chain) -> tuple[str, list[str]]:
        if chain.head is not None:
            return chain.name, []
        with engine_that_reads(chain.engine, container.settings().connection(chain.name)).connect() as connection:
            known = inspect(connection)
            return chain.name, [each.fullname for each in own_tables(chain.name) if known.has_table(each.name, each.schema)]

    return {name: tables for name, tables in _for_each(container, names, folder, look) if tables}


@contextmanager
def _explained(chain: Chain, before: Sequence[Revision]) -> Generator[None]:
    """Raise UnusableMigrations if the file of a revision can't be written. `before` are those that were written."""
    try:
        yield
    except OSError as error:
        if error.filename is None:  # it is about the connection to the database
            raise
        problem = f"no revision can be written into {chain.versions} ({error.strerror}: {error.filename})"
        advice = "Make that folder one that can be written, or give another `directory` (--directory)"
        if before:
            problem += f", and for other connections these were written: {', '.join(each.path for each in before)}"
            advice += ". Delete the files that were written before you try again, or run their revisions"
        raise chain.unusable(problem, advice) from error


def _nothing(context: Any) -> None:
    """Do what an env.py does for commands that need no database."""


def _drop_empty(context: Any, revision: object, directives: list[MigrationScript]) -> None:
    """Write no file if there are no differences."""
    if all(each.is_empty() for each in directives[0].upgrade_ops_list):
        directives[:] = []


def _written(chain: Chain, made: Any) -> tuple[Revision, ...]:
    scripts = made if isinstance(made, list) else [made]
    if not scripts or scripts[0] is None:
        return ()
    chain.reload()
    return (_described(chain, scripts[0].revision, False),)


def sql(
    container: DatabaseContainer,
    revision: str | None = None,
    *,
    start: str | None = None,
    downgrade: bool = False,
    connections: Names = None,
    directory: str | Path | None = None,
) -> dict[str, str]:
    """Return the SQL of the revisions after `start` up to `revision`, by connection, and connect to no database.

    It is the SQL of all revisions, unless these are given. With `downgrade=True` it is the SQL that undoes the revisions from
    `start` down to `revision`.
    """
    folder = folder_of(directory)
    verb, first, last = (command.downgrade, "head", "base") if downgrade else (command.upgrade, "base", "head")
    start, revision = first if start is None else start, last if revision is None else revision

    def write(chain: Chain) -> tuple[str, str]:
        for each in (start, revision):
            chain.named(each)
        buffer = io.StringIO()

        def environment(context: Any) -> None:
            run_offline(context, chain, output_buffer=buffer)

        run_command(chain, verb, f"{start}:{revision}", environment=environment, sql=True)
        return chain.name, buffer.getvalue()

    return dict(_for_each(container, with_chains(container, connections, folder), folder, write))


# ---- env.py -------------------------------------------------------------------------------------------------------------


def run(container: DatabaseContainer, connection: str | None = None, *, lock_timeout: float = LOCK_TIMEOUT) -> None:
    """Be the environment of Alembic's own command line. It is all that an `env.py` in `migrations/NAME` needs to call.

        from app_db.migrations import run
        from shop import container

        run(container)

    `connection` is the name of the folder that the `env.py` is in, if it is not given.
    """
    from alembic import context

    place = Path(context.script.dir).absolute()
    name = place.name if connection is None else connection
    require_container(container)
    connections_in(container, [name])
    folder = place.parent

    def work(found: list[Chain]) -> None:
        run_environment(context, found[0], lock_timeout)

    _on_chains(container, with_chains(container, [name], folder), folder, work)
