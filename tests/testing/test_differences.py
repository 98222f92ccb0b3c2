"""What differs in an isolated test from what happens outside of tests, and what is the same because it is given back.

`PYTHONPATH=tests python -m testing.test_differences` writes the tables of this module into docs/isolated-tests.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import psycopg
import pytest
from sqlalchemy import CursorResult, Engine, create_engine, event, func, literal, select, text, true
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from app_db.testing import isolated
from harness.applications import Application, Boom, Item, running
from harness.paths import ROOT

DOCUMENT = ROOT / "docs" / "isolated-tests.md"


@dataclass(frozen=True)
class Behaviour:
    """Something that code does in units of work, what it sees outside of tests and in an isolated one, and why."""

    title: str
    observe: Callable[[Application], str]
    outside: str
    inside: str
    reason: str = ""
    database: str = "PostgreSQL"

    @property
    def id(self) -> str:
        return self.observe.__name__


def said(app: Application, *statements: str) -> object:
    """What the last statement of a unit returns."""
    with app.unit():
        *first, last = statements
        for statement in first:
            app.session().execute(text(statement))
        result = app.session().execute(text(last))
        return None if isinstance(result, CursorResult) and not result.returns_rows else result.scalar()


@contextmanager
def another_connection(app: Application) -> Iterator[psycopg.Connection]:
    """A connection that app_db does not know, as another process has one."""
    url = app.container.settings().connection("writer").sqlalchemy_url()
    with psycopg.connect(
        host=url.host, port=url.port, user=url.username, password=url.password, dbname=url.database, autocommit=True
    ) as connection:
        yield connection


# ---- what is given back ------------------------------------------------------------------------------------------------------


ENGINES: dict[int, Engine] = {}
"""The application's own engines, which its listeners were registered on before any test."""


def listeners(app: Application) -> str:
    calls = []
    engine = ENGINES[id(app)]
    heard = {name: lambda connection, name=name: calls.append(name) for name in ("begin", "commit", "rollback")}
    for name, listener in heard.items():
        event.listen(engine, name, listener)
    said(app, "SELECT 1")
    with suppress(Boom), app.unit():
        app.session().execute(text("SELECT 1"))
        raise Boom
    for name, listener in heard.items():
        event.remove(engine, name, listener)
    return ", ".join(calls)


def set_local(app: Application) -> str:
    said(app, "SET LOCAL lock_timeout = '7s'", "SET LOCAL TIME ZONE 'Asia/Tokyo'", "SET /* */ LOCAL SCHEMA 'pg_catalog'")
    return f"{said(app, 'SHOW lock_timeout')}, {said(app, 'SHOW TimeZone')}, {said(app, 'SHOW search_path')}"


TENANT = "SELECT current_setting('app.tenant', true)"


def set_config(app: Application) -> str:
    with app.unit():
        app.session().execute(select(func.set_config("app.tenant", "7", true()), literal(False)))
        app.session().execute(
            text("SELECT set_config('lock_timeout', '9s', true), set_config(:name, 'false', true)"), {"name": "jit"}
        )
    return f"{said(app, 'SHOW lock_timeout')}, {said(app, 'SHOW jit')}, {said(app, TENANT)!r}"


PARTS = (
    "CREATE TABLE IF NOT EXISTS parts (id integer PRIMARY KEY, of integer, "
    "CONSTRAINT a_part_of FOREIGN KEY (of) REFERENCES parts DEFERRABLE)"
)


def set_constraints(app: Application) -> str:
    said(app, "SET CONSTRAINTS ALL DEFERRED", "INSERT INTO parts VALUES (1, 2)", "INSERT INTO parts VALUES (2, 2)")
    try:
        said(app, "INSERT INTO parts VALUES (3, 4)", "INSERT INTO parts VALUES (4, 4)")
    except DBAPIError:
        return "immediate"
    return "deferred"


def advisory_locks(app: Application) -> str:
    said(app, "SELECT pg_advisory_xact_lock(7)", "SELECT pg_advisory_xact_lock(7)", "SELECT pg_try_advisory_xact_lock(-1, 2)")
    with suppress(Boom), app.unit():
        app.session().execute(text("SELECT pg_advisory_xact_lock_shared(8)"))
        raise Boom
    with app.unit(), another_connection(app) as other:
        app.session().execute(text("SELECT pg_advisory_xact_lock(9)"))
        taken = other.execute("SELECT pg_try_advisory_lock(7), pg_try_advisory_lock(-1, 2), pg_try_advisory_lock(8)").fetchone()
        held = other.execute("SELECT pg_try_advisory_lock(9)").fetchone()
    return "free after the unit" if taken == (True, True, True) and held == (False,) else f"{taken}, {held}"


def time_limits(app: Application) -> str:
    with app.unit(timeout=30):
        app.session().execute(text("SELECT 1"))
    return str(said(app, "SHOW statement_timeout"))


def foreign_keys_of_sqlite(app: Application) -> str:
    said(app, "PRAGMA defer_foreign_keys = ON", "INSERT INTO parts VALUES (1, 2)", "INSERT INTO parts VALUES (2, 2)")
    try:
        said(app, "INSERT INTO parts VALUES (3, 4)", "INSERT INTO parts VALUES (4, 4)")
    except DBAPIError:
        return "immediate"
    return "deferred"


def foreign_keys_of_sqlite_at_commit(app: Application) -> str:
    try:
        said(app, "PRAGMA defer_foreign_keys = ON", "INSERT INTO parts VALUES (1, 2)")
    except Exception as error:
        return str(error).partition(" ")[0] and "refused"
    return "committed"


def read_only_in_sql(app: Application) -> str:
    try:
        said(app, "SET TRANSACTION READ ONLY", "INSERT INTO watched VALUES (1)")
    except DBAPIError:
        said(app, "UPDATE watched SET id = id")
        return "a write raises, and not in the next unit"
    return "a write is done"


def sequences(app: Application) -> str:
    def added() -> int:
        with app.unit():
            app.session().add(item := Item(name="a"))
            app.session().flush()
            return item.id

    engine = app.plain_engine()
    with isolated(app.container):
        first = added()
    with isolated(app.container):
        second = added()
    engine.dispose()
    return "the same id in each test" if first == second else "go on"


SAME = "the same"
ENDS = "ends with the unit"
NUMBERS = "a rollback gives no numbers back, so ids differ from test to test"

GIVEN_BACK = (
    Behaviour(
        "`begin`, `commit` and `rollback` listeners of an engine",
        listeners,
        "begin, commit, begin, rollback",
        SAME,
        "are called once for each unit",
    ),
    Behaviour("`SET LOCAL`", set_local, '0, UTC, "$user", public', SAME, ENDS),
    Behaviour("`set_config(name, value, true)`", set_config, "0, on, ''", SAME, ENDS),
    Behaviour("`SET CONSTRAINTS`", set_constraints, "immediate", SAME, ENDS),
    Behaviour(
        "`pg_advisory_xact_lock` and similar functions",
        advisory_locks,
        "free after the unit",
        SAME,
        "the lock is free after the unit",
    ),
    Behaviour("`SET TRANSACTION READ ONLY`", read_only_in_sql, "a write raises, and not in the next unit", SAME, ENDS),
    Behaviour("the `timeout` of a unit", time_limits, "0", SAME, ENDS),
    Behaviour("`PRAGMA defer_foreign_keys`", foreign_keys_of_sqlite, "immediate", SAME, ENDS, database="SQLite"),
    Behaviour(
        "foreign keys after that pragma",
        foreign_keys_of_sqlite_at_commit,
        "refused",
        SAME,
        "are checked when the unit commits",
        database="SQLite",
    ),
    Behaviour("sequences", sequences, "go on", SAME, NUMBERS),
    Behaviour("`AUTO_INCREMENT`", sequences, "go on", SAME, NUMBERS, database="MariaDB"),
)

# ---- what differs ------------------------------------------------------------------------------------------------------------


def now(app: Application) -> str:
    first, second = said(app, "SELECT now()"), said(app, "SELECT now()")
    return "goes on" if first != second else "stands still"


def transaction_ids(app: Application) -> str:
    first, second = said(app, "SELECT pg_current_xact_id()::text"), said(app, "SELECT pg_current_xact_id()::text")
    return "one for each unit" if first != second else "one for the test"


def on_commit_drop(app: Application) -> str:
    said(app, "CREATE TEMPORARY TABLE passing (id integer) ON COMMIT DROP")
    return "gone after the unit" if said(app, "SELECT to_regclass('passing')::text") is None else "there until the test ends"


def notify(app: Application) -> str:
    with another_connection(app) as other:
        other.execute("LISTEN news")
        said(app, "NOTIFY news, 'a'")
        heard = list(other.notifies(timeout=0.2, stop_after=1))
    return "delivered" if heard else "not delivered"


def other_processes(app: Application) -> str:
    with app.unit():
        app.add("a")
    with another_connection(app) as other:
        row = other.execute("SELECT count(*) FROM items").fetchone()
    return "see it" if row == (1,) else "see nothing"


def row_locks(app: Application) -> str:
    said(app, "SELECT * FROM watched FOR UPDATE")
    with another_connection(app) as other:
        row = other.execute("SELECT count(*) FROM (SELECT id FROM watched FOR UPDATE SKIP LOCKED) AS free").fetchone()
    return "free after the unit" if row == (1,) else "held until the test ends"


def read_only_in_sql_on_mariadb(app: Application) -> str:
    try:
        said(app, "SET TRANSACTION READ ONLY", "INSERT INTO watched VALUES (1)")
    except DBAPIError as error:
        said(app, "UPDATE watched SET id = id")
        return "a write raises" if error.orig is None or error.orig.args[0] != IN_PROGRESS else "MariaDB refuses it"
    return "a write is done"


def isolation_levels(app: Application) -> str:
    with app.unit(isolation="SERIALIZABLE"):
        return str(app.session().scalar(text("SHOW transaction_isolation")))


def levels_in_sql(app: Application) -> str:
    try:
        return str(said(app, "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE", "SHOW transaction_isolation"))
    except DBAPIError as error:
        return "PostgreSQL refuses it" if "ISOLATION LEVEL" in str(error.orig) else str(error)


def deferred_triggers(app: Application) -> str:
    said(app, "INSERT INTO watched VALUES (1)")
    return "kept" if said(app, "SELECT count(*) FROM noted") else "undone"


WATCHED = (
    "CREATE TABLE IF NOT EXISTS watched (id integer)",
    "CREATE TABLE IF NOT EXISTS noted (id integer)",
    """CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN INSERT INTO noted VALUES (NEW.id); RETURN NULL; END $$""",
    "INSERT INTO watched VALUES (0)",
    "CREATE CONSTRAINT TRIGGER later AFTER INSERT ON watched INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION note()",
)


MADE = {
    "PostgreSQL": (PARTS, *WATCHED),
    "MariaDB": ("CREATE TABLE IF NOT EXISTS watched (id integer)",),
    "SQLite": (PARTS.replace("DEFERRABLE", ""),),
}
"""By database: the statements that make what the units use."""


IN_PROGRESS = 1568
"""MariaDB's error: "Transaction characteristics can't be changed while a transaction is in progress"."""
ONE = "All units of the test are parts of one transaction"
LASTING = "held until the test ends"
WHEN_CHECKED = "app_db checks deferred constraints in a savepoint and rolls that back, with what their triggers wrote"

DIFFERENT = (
    Behaviour("`now()`", now, "goes on", "stands still", f"{ONE}, and `now()` is when that began. `clock_timestamp()` goes on"),
    Behaviour("transaction ids, `xmin`", transaction_ids, "one for each unit", "one for the test", ONE),
    Behaviour(
        "temporary tables `ON COMMIT DROP`",
        on_commit_drop,
        "gone after the unit",
        "there until the test ends",
        "PostgreSQL drops them with the transaction",
    ),
    Behaviour("`NOTIFY`", notify, "delivered", "not delivered", "PostgreSQL delivers at COMMIT of the transaction"),
    Behaviour("what other connections see of a commit", other_processes, "see it", "see nothing", "It never commits"),
    Behaviour("row locks", row_locks, "free after the unit", LASTING, "They last as long as the transaction"),
    Behaviour("`isolation=` of a unit", isolation_levels, "serializable", "read committed", "A transaction has one"),
    Behaviour(
        "`SET TRANSACTION ISOLATION LEVEL` as SQL",
        levels_in_sql,
        "serializable",
        "PostgreSQL refuses it",
        "PostgreSQL allows it only before the first statement of the transaction",
    ),
    Behaviour(
        "`SET TRANSACTION READ ONLY` as SQL, on MariaDB",
        read_only_in_sql_on_mariadb,
        "a write raises",
        "MariaDB refuses it",
        "MariaDB allows it only before the transaction begins (error 1568). Use `container.transaction(read_only=True)`",
        database="MariaDB",
    ),
    Behaviour("what a deferred trigger writes", deferred_triggers, "kept", "undone", WHEN_CHECKED),
)


def document() -> str:
    """The page that these tests are about."""
    lines = [
        "# What differs in an isolated test",
        "",
        "An [isolated test](testing.md) runs all of its units of work in one transaction on one connection",
        "for each database, and rolls that back. Each unit has a savepoint. A database does some things only",
        "when a transaction ends. In an isolated test, that is the end of the test. app_db undoes what it can",
        "when a unit ends. Each line of these tables is a test.",
        "",
        "## The same as outside of tests",
        "",
        "| | database | in an isolated test, too |",
        "|---|---|---|",
        *(f"| {each.title} | {each.database} | {each.reason} |" for each in GIVEN_BACK),
        "",
        "app_db recognizes the statements in the first column by their text. It does not see a `SET LOCAL`",
        "that a function of the database executes.",
        "",
        "## Different",
        "",
        "| | outside of tests | in an isolated test | why |",
        "|---|---|---|---|",
        *(f"| {each.title} | {each.outside} | {each.inside} | {each.reason} |" for each in DIFFERENT),
        "",
        "Units of an isolated test also run one after the other, and nothing is prepared. To test what needs",
        "real transactions, give the test [databases of its own](how-to/test-databases.md):",
        "`@pytest.mark.app_db(fresh=True)`.",
        "",
    ]
    return "\n".join(lines)


def test_the_page_is_the_one_that_is_tested() -> None:
    assert DOCUMENT.read_text() == document(), "run `PYTHONPATH=tests python -m testing.test_differences`"


@pytest.fixture
def app(request: pytest.FixtureRequest) -> Iterator[Application]:
    behaviour: Behaviour = request.node.callspec.params["behaviour"]
    fixtures = {"PostgreSQL": "new_postgres_url", "MariaDB": "new_mariadb_url", "SQLite": "new_sqlite_url"}
    new = request.getfixturevalue(fixtures[behaviour.database])
    with running(writer=new()) as application:
        prepare(application, behaviour.database)
        ENGINES[id(application)] = application.engine()
        yield application
        ENGINES.clear()


def prepare(app: Application, database: str) -> None:
    """Make what the units use, before any test is isolated."""
    engine = create_engine(app.plain_engine().url, poolclass=NullPool)
    with engine.begin() as connection:
        for statement in MADE[database]:
            connection.execute(text(statement))


@pytest.mark.parametrize("behaviour", [*GIVEN_BACK, *DIFFERENT], ids=lambda each: each.id)
def test_what_a_unit_leaves_for_the_next_is_as_the_page_says(app: Application, behaviour: Behaviour) -> None:
    inside = behaviour.outside if behaviour.inside == SAME else behaviour.inside
    for _ in range(2):
        with isolated(app.container):
            assert behaviour.observe(app) == inside
    assert behaviour.observe(app) == behaviour.outside


if __name__ == "__main__":
    DOCUMENT.write_text(document())
