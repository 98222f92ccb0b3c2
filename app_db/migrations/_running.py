"""Runs Alembic's commands on a connection, and its environment for a connection of app_db."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import decode_source
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any

from sqlalchemy import Table, event, inspect

from app_db._compat.clocks import monotonic
from app_db._compat.os import after_fork_in_child
from app_db._databases.statements import transaction_verb
from app_db.errors import MigrationLockTimeout
from app_db.migrations._chains import AUTOCOMMIT_BLOCK, VERSION_TABLE, Chain
from app_db.models._bases import REFLECTED, metadata_of
from app_db.models._schema import include_name

if TYPE_CHECKING:
    from alembic.script import Script
    from sqlalchemy import Connection

Environment = Any
"""Alembic's EnvironmentContext, as its module `alembic.context` shows it."""


class _Alembic:
    """Alembic, which has one `context` and one `op` in a process."""

    lock = RLock()
    """Held while it runs."""


def _forget_parents_lock() -> None:
    _Alembic.lock = RLock()


after_fork_in_child(_forget_parents_lock)


def run_command(
    chain: Chain, command: Callable[..., Any], *arguments: object, environment: Callable[..., None], **more: Any
) -> Any:
    """Run one of `alembic.command` with this environment, and return what it returns."""
    with _Alembic.lock:
        return command(chain.config(app_db=environment), *arguments, **more)


def configure(context: Environment, chain: Chain, connection: Connection, *, one_by_one: bool = False, **options: Any) -> None:
    """Configure Alembic for a connection: what autogenerate compares, and where the revision is.

    Alembic leaves a transaction that is open to the caller. With `one_by_one` none is, and it begins one for each revision.
    """
    version_table = chain.version_table(connection)
    if one_by_one:
        connection.rollback()
    context.configure(
        connection=connection,
        version_table=version_table,
        transaction_per_migration=one_by_one,
        render_as_batch=chain.database.migrating.alters_by_copying,
        **compared(chain, connection),
        **options,
    )


def compared(chain: Chain, connection: Connection) -> dict[str, Any]:
    """Return the options by which Alembic compares the models of a connection with its database.

    It leaves out app_db's own tables, version tables, reflected tables, views, and the tables of other connections.
    """
    metadata = metadata_of(chain.name)
    reflected = {(table.schema, table.name) for table in metadata.tables.values() if table.info.get(REFLECTED)}
    others = {
        (table.schema, table.name)
        for versions in chain.beside
        for table in metadata_of(versions.parent.name).tables.values()
        if table.key not in metadata.tables
    }
    schemas = {table.schema for table in metadata.tables.values()}

    def is_ours(name: str | None, kind: str, parents: dict[str, str | None]) -> bool:
        if kind == "schema":
            return name in schemas or name is None
        if kind == "table" and (str(name).startswith(VERSION_TABLE) or (parents.get("schema_name"), name) in others | reflected):
            return False
        return include_name(name, kind, parents)

    def is_created(element: object, name: str | None, kind: str, is_in_database: bool, found: object) -> bool:
        if not isinstance(element, Table):
            return True
        if element.info.get(REFLECTED):
            return False
        # Alembic looks for tables only. What it did not find may be a view.
        return is_in_database or found is not None or not inspect(connection).has_table(element.name, schema=element.schema)

    return {
        "target_metadata": metadata,
        "include_schemas": bool(schemas - {None}),
        "include_name": is_ours,
        "include_object": is_created,
    }


def leaves_transaction(script: Script) -> bool:
    """Return whether a revision commits in its middle: it says `autocommit = True`, or has an `autocommit_block`."""
    source = decode_source(Path(script.path).read_bytes())
    return bool(getattr(script.module, "autocommit", False)) or AUTOCOMMIT_BLOCK in source


# ---- the transaction ----------------------------------------------------------------------------------------------------


class EndsTransaction(Exception):
    """A revision ends the transaction that app_db has begun. The text is a phrase for MigrationFailed."""


class Transaction:
    """The transaction in which revisions run. It holds the lock, and a failure must be able to undo all of it.

    While it is guarded, a commit is refused before it is sent. A rollback is sent, because it may be the answer to an error; the
    next statement is refused, which would run without the lock.
    """

    def __init__(self, connection: Connection, chain: Chain) -> None:
        self._connection = connection
        self._database = chain.database
        self._begun = connection.get_transaction()

    @contextmanager
    def guarded(self) -> Generator[None]:
        """Refuse in this block what ends the transaction."""
        listeners: dict[str, Callable[..., Any]] = {
            "commit": self._refuse_commit,
            "before_cursor_execute": self._refuse_statement,
        }
        # Not on the connection: SQLAlchemy 2.0 refuses listeners to one of an engine with execution options.
        engine = self._connection.engine
        for name, listener in listeners.items():
            event.listen(engine, name, listener)
        try:
            yield
        finally:
            for name, listener in listeners.items():
                event.remove(engine, name, listener)

    def _refuse_commit(self, connection: Connection) -> None:
        if connection is not self._connection:
            return
        connection.connection.rollback()  # SQLAlchemy sends no ROLLBACK after a commit whose listener has raised
        raise self._error("commit")

    def _refuse_statement(self, connection: Connection, cursor: object, statement: str, *_: object) -> None:
        if connection is not self._connection:
            return
        if verb := transaction_verb(statement, self._database.syntax):
            raise self._error(verb)
        if connection.get_transaction() is not self._begun:
            raise self._error("rollback")

    def _error(self, verb: str) -> EndsTransaction:
        alone = ", or write `autocommit = True` into the file" if self._database.migrating.has_autocommit_blocks else ""
        return EndsTransaction(
            f"it sends {verb.upper()}, but the transaction is that of app_db, which commits all revisions at the end. "
            f"Leave it out{alone}"
        )


def commit_rest(connection: Connection) -> None:
    """Commit what a revision that is committed by itself has written since it ended the transaction that Alembic began.

    Alembic commits its own transaction only. The revision's id, which it writes last, would be rolled back.
    """
    if connection.in_transaction():
        connection.commit()


# ---- the lock ---------------------------------------------------------------------------------------------------------------

_FIRST_PAUSE, _LONGEST_PAUSE = 0.02, 0.5
"""Seconds between two attempts to take the lock."""


class Patience:
    """Asks for a lock again and again, for some seconds.

    It never waits on the server: a transaction that waits there would keep the process that holds the lock from CREATE INDEX
    CONCURRENTLY, and a connection from other clients of a transaction pooler.
    """

    def __init__(self, seconds: float, committed: Sequence[str] = ()) -> None:
        self._seconds = seconds
        self._committed = committed
        self._give_up = monotonic() + seconds
        self._pause = _FIRST_PAUSE

    def wait(self, chain: Chain, holder: Callable[[], str]) -> None:
        """Wait a moment. Raise MigrationLockTimeout, which names the holder, if the time is over."""
        remaining = self._give_up - monotonic()
        if remaining <= 0:
            raise MigrationLockTimeout(chain.name, self._seconds, holder(), self._committed)
        time.sleep(min(self._pause, remaining))
        self._pause = min(self._pause * 1.5, _LONGEST_PAUSE)


def locks_of(group: Sequence[Chain]) -> list[str]:
    """Return the names of the locks of chains."""
    return [f"app_db migrations {name}" for name in sorted(chain.name for chain in group)]


@contextmanager
def locked(group: Sequence[Chain], seconds: float, committed: Sequence[str] = ()) -> Generator[Connection]:
    """Give a connection that holds the locks of chains in one database, in a transaction if its end releases them.

    Raise MigrationLockTimeout if they are not free within `seconds`.
    """
    rules, locks = group[0].database.migrating, locks_of(group)
    patience = Patience(seconds, committed)
    with group[0].engine.connect() as connection:
        while not rules.begin(connection, locks):
            patience.wait(group[0], lambda: rules.holder(connection, locks))
        try:
            yield connection
        finally:
            if not connection.invalidated:
                connection.rollback()
                rules.end(connection, locks)


# ---- environments of Alembic's own command line ---------------------------------------------------------------------------


def run_offline(context: Environment, chain: Chain, **options: Any) -> None:
    """Write the SQL of revisions."""
    context.configure(
        url=chain.engine.url,
        version_table=chain.version_table(None),
        transactional_ddl=chain.database.migrating.transactional,
        literal_binds=True,
        dialect_opts={"paramstyle": "named"},
        **options,
    )
    with context.begin_transaction():
        context.run_migrations()


def run_environment(context: Environment, chain: Chain, lock_timeout: float) -> None:
    """Do what the command line has asked for, in one transaction that holds the lock if all revisions can do with one."""
    if context.is_offline_mode():
        run_offline(context, chain)
        return
    rules = chain.database.migrating
    is_one = rules.transactional and not any(map(leaves_transaction, chain.revisions.values()))
    is_apart = rules.lock_ends_with_transaction and rules.has_autocommit_blocks and not is_one
    if is_apart:
        chain.require_two_connections()
    with locked([chain], lock_timeout) as locking, ExitStack() as stack:
        own = stack.enter_context(chain.engine.connect()) if is_apart else locking
        if not is_one:

            def note(**_: object) -> None:
                commit_rest(own)

            configure(context, chain, own, one_by_one=True, on_version_apply=note)
            with context.begin_transaction():
                context.run_migrations()
            return
        configure(context, chain, own)
        try:
            with Transaction(own, chain).guarded(), context.begin_transaction():
                context.run_migrations()
        except EndsTransaction as error:
            raise chain.unusable(f"one of them can't run: {error}", "Nothing was changed") from error
        rules.check(own)
        own.commit()
