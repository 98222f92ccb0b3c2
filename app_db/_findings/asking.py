"""Asks the databases at the same time, each for a limited time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Thread
from typing import TypeVar

from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError, ProgrammingError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from app_db._compat.clocks import monotonic
from app_db._databases.database import Database, ReadOnlyTerms
from app_db._databases.inspection import Failure, Inspection, Server
from app_db._databases.registry import database_of
from app_db._databases.telling import described, secrets_of
from app_db._databases.time_limits import TimeLimit, limit_of_checkout
from app_db._findings import matters
from app_db._findings.finding import Finding, place_of, place_of_database
from app_db.container import DatabaseContainer
from app_db.errors import SettingsError, UnitOfWorkTimeout
from app_db.settings import ConnectionSettings, DatabaseSettings

R = TypeVar("R")

_LEEWAY = 1.0
"""Seconds that a thread has to end after its time limit, before it is left alone."""


@dataclass
class Asked:
    """A connection that is asked, and what is known of it."""

    name: str
    container: DatabaseContainer
    settings: DatabaseSettings
    now: Callable[[], float]
    patience: float
    connection: Connection = field(init=False)
    server: Server | None = None
    """What the server says about itself; None if it was not reached."""
    differing: set[str] = field(default_factory=set[str])
    """The elements of tables that something was found about, as the lines of `app-db migrate --check` begin."""

    @property
    def own(self) -> ConnectionSettings:
        return self.settings.connection(self.name)

    @property
    def database(self) -> Database:
        return database_of(self.own.sqlalchemy_url().get_backend_name())

    @property
    def inspection(self) -> Inspection:
        return self.database.inspection()

    def place(self, *path: str) -> str:
        """Return the variable of a setting of the connection."""
        return place_of(self.settings, "connections", self.name, *path)

    def described(self, error: Exception) -> str:
        """Return an error in one line, without secrets."""
        return described(error, secrets_of(self.own))

    def place_of_database(self) -> str:
        return place_of_database(self.settings, self.name)


Question = Callable[[Asked], Iterator[Finding]]
"""Asks one thing, and yields what is wrong."""


# ---- at the same time -----------------------------------------------------------------------------------------------------


def at_once(jobs: Mapping[str, Callable[[], R]], patience: float) -> dict[str, R | None]:
    """Return the results of all jobs, each run in a thread of its own. None for one that took too long.

    The connections that a job takes from the pools are cut off after `patience` seconds.
    """
    futures = {name: Future[R]() for name in jobs}
    for name, job in jobs.items():
        Thread(target=_run, args=(job, patience, futures[name]), name=f"app_db-check-{name}", daemon=True).start()
    wait(futures.values(), patience + _LEEWAY)
    return {name: future.result() if future.done() else None for name, future in futures.items()}


def _run(job: Callable[[], R], patience: float, future: Future[R]) -> None:
    limit = TimeLimit(lambda: True)
    limit.set(patience, monotonic() + patience)
    limit_of_checkout.set(limit)
    try:
        future.set_result(job())
    except BaseException as error:  # noqa: BLE001  # raised in the thread that waits
        future.set_exception(error)


# ---- one connection -------------------------------------------------------------------------------------------------------


def answers(asked: Asked, questions: Sequence[Question]) -> list[Finding]:
    """Return what is wrong with a connection. A question that fails is a finding, and the next one is asked."""
    overtime = monotonic() + asked.patience
    try:
        engine = asked.container.core.decision_logs().engine(asked.name)
        reading = asked.database.engine_for_unit(engine, asked.own, ReadOnlyTerms())
        with reading.connect() as connection:
            asked.connection = connection
            return [finding for question in questions for finding in _answer(question, asked)]
    except SettingsError as error:
        return [*refusals(asked.name, error, pooler=asked.own.variable("pooler"))]
    except Exception as error:  # noqa: BLE001  # whatever the driver or a password provider raises
        is_late = monotonic() > overtime or isinstance(error, UnitOfWorkTimeout | PoolTimeoutError)
        return [silence(asked) if is_late else _failure(asked, error)]


def _answer(question: Question, asked: Asked) -> list[Finding]:
    try:
        found = list(question(asked))
    except Exception as error:
        if asked.connection.invalidated or asked.connection.closed:
            raise
        with suppress(DBAPIError):
            asked.connection.rollback()
        what = question.__name__.replace("_", " ").strip()
        return [
            matters.UNASKED.found(
                asked.name,
                f"The database can't be asked about {what}: {asked.described(error)}.",
                asked.place_of_database(),
                "See whether the user may ask that. What is not asked may still be wrong.",
            )
        ]
    return found


def silence(asked: Asked) -> Finding:
    """Return the finding for a database that did not answer in time."""
    return matters.SILENT.found(
        asked.name,
        f"The database gave no connection, or no answer, within {asked.patience:g} s.",
        asked.place_of_database(),
        "See whether the server is overloaded or stands still, whether a firewall drops what is sent to it, and whether the "
        "pool is full.",
    )


def refusals(name: str | None, error: SettingsError, *, pooler: str = "") -> Iterator[Finding]:
    """Yield the problems of settings. The one that names the variable `pooler` is that a pooler answers."""
    for problem in error.problems:
        matter = matters.POOLER_NOT_NAMED if problem.variable == pooler else matters.SETTINGS
        what, _, remedy = problem.message.partition(". ")
        yield matter.found(name, f"{problem.variable} {what.rstrip('.')}.", problem.variable, remedy or "Correct the value.")


def _failure(asked: Asked, error: Exception) -> Finding:
    if isinstance(error, ProgrammingError) or not isinstance(error, DBAPIError | OSError):
        given = [field for field in ("password_provider", "connect_args") if getattr(asked.own, field)]
        return matters.SETTINGS.found(
            asked.name,
            f"No connection can be made, because of an error that is not the server's: {asked.described(error)}.",
            ", ".join([asked.place_of_database(), *map(asked.place, given)]),
            "Connect by the engine of the connection in Python, to see the traceback.",
        )
    failure = asked.inspection.failure(getattr(error, "orig", None) or error)
    where = asked.place_of_database()
    if failure is Failure.LOGIN:
        remedy = f"Correct the user or the password: in {where}, or in PASSWORD or PASSWORD_PROVIDER of the connection."
        return matters.LOGIN.found(
            asked.name, f"The server refuses the user or the password: {asked.described(error)}.", where, remedy
        )
    if failure is Failure.DATABASE:
        remedy = "Correct the name of the database, create it, or let the user connect to it."
        return matters.NO_DATABASE.found(asked.name, f"The database can't be used: {asked.described(error)}.", where, remedy)
    remedy = "See whether the server runs, and whether host and port are right."
    return matters.UNREACHABLE.found(asked.name, f"The server can't be reached: {asked.described(error)}.", where, remedy)
