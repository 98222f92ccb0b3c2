"""What is read-only is refused by app_db before it is sent where the text tells, and by the database wherever it doesn't: with
one and the same error. And reading only is cheap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Engine, event, func, insert, make_url, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from app_db._databases.statements import Effect
from app_db.errors import InvalidUse, ReadOnlyViolation
from harness.applications import Application, Item, running
from harness.servers import PostgresServer

NewUrl = Callable[[], str]


def add_and_flush(session: Session) -> None:
    session.add(Item(name="refused"))
    session.flush()


STATEMENTS: dict[str, Callable[[Session], object]] = {
    "ORM insert": lambda session: session.execute(insert(Item), [{"name": "refused"}]),
    "Core insert": lambda session: session.execute(insert(Item.metadata.tables["items"]).values(name="refused")),
    "text": lambda session: session.execute(text("INSERT INTO items (name) VALUES ('refused')")),
    "text update": lambda session: session.execute(text("UPDATE items SET name = 'refused'")),
    "connection": lambda session: session.connection().execute(text("DELETE FROM items")),
    "query update": lambda session: session.query(Item).update({"name": "refused"}),
    "bulk_save_objects": lambda session: session.bulk_save_objects([Item(name="refused")]),
}
WRITES: dict[str, Callable[[Session], object]] = {"ORM add": add_and_flush, **STATEMENTS}


def reader_of(url: str) -> dict[str, Any]:
    return {"writer": url, "reader": {"mirror": "writer", "read_only": True, "pool": {"size": 1, "max_overflow": 0}}}


def statements_received(session: Session, kind: str) -> int:
    """How many INSERTs, UPDATEs or DELETEs the database got by this session's connection, as it says itself."""
    return int(session.execute(text(f"SHOW SESSION STATUS LIKE 'Com_{kind}'")).one()[1])


class Received:
    """What a database received from an engine, by its own account."""

    def __init__(self, engine: Engine) -> None:
        self.statements: list[str] = []
        event.listen(engine, "connect", self._trace)

    def _trace(self, dbapi_connection: Any, record: Any) -> None:
        dbapi_connection.set_trace_callback(self.statements.append)

    def writes(self) -> list[str]:
        return [statement for statement in self.statements if statement.startswith(("INSERT", "UPDATE", "DELETE"))]


@pytest.fixture(params=WRITES.values(), ids=[name.replace(" ", "_") for name in WRITES])
def write(request: pytest.FixtureRequest) -> Callable[[Session], object]:
    chosen: Callable[[Session], object] = request.param
    return chosen


# ---- refused before it is sent -------------------------------------------------------------------------------------------


def check_refusal(app: Application, write: Callable[[Session], object]) -> None:
    app.run("INSERT INTO items (name) VALUES ('seed')")
    with pytest.raises(ReadOnlyViolation) as caught, app.unit():
        assert app.session("reader").scalars(select(Item.name)).all() == ["seed"]
        write(app.session("reader"))
    assert caught.value.connection == "reader"
    assert caught.value.what == ("Flushing changed objects" if write is add_and_flush else "The statement")
    assert "'reader'" in str(caught.value)
    assert app.names() == ["seed"]


def test_sqlite_a_write_on_a_read_only_connection_is_never_sent(write: Callable[[Session], object], sqlite_url: str) -> None:
    with running(**reader_of(sqlite_url)) as app:
        received = Received(app.engine("reader"))
        check_refusal(app, write)
        assert received.statements, "the reads were"
        assert received.writes() == []


def test_postgresql_a_write_on_a_read_only_connection_is_never_sent(
    write: Callable[[Session], object], postgres_url: str, postgres: PostgresServer
) -> None:
    logging_all = make_url(postgres_url).update_query_dict({"options": "-c log_statement=all"}).render_as_string(False)
    connections = reader_of(logging_all)
    with running(**connections) as app:
        app.run("SELECT 'beginning'")
        check_refusal(app, write)
    lines = postgres.log_lines()
    since = max(number for number, line in enumerate(lines) if "SELECT 'beginning'" in line)
    sent = [line for line in lines[since:] if "statement:" in line or "execute" in line]
    assert any("SELECT items.name" in line for line in sent), "the reads were"
    assert [line for line in sent if "'refused'" in line or "UPDATE" in line or "DELETE" in line] == []


def test_mariadb_a_write_on_a_read_only_connection_is_never_sent(write: Callable[[Session], object], mariadb_url: str) -> None:
    with running(**reader_of(mariadb_url)) as app:
        check_refusal(app, write)
        with app.unit():  # on the same connection: the pool has one
            counts = [statements_received(app.session("reader"), kind) for kind in ("insert", "update", "delete")]
            assert counts == [0, 0, 0]
            assert statements_received(app.session("reader"), "select") > 0, "the reads were"


def test_nothing_is_refused_for_an_object_that_was_only_read(database_url: str) -> None:
    with running(**reader_of(database_url)) as app:
        app.run("INSERT INTO items (name) VALUES ('seed')")
        with app.unit():
            item = app.session("reader").scalars(select(Item)).one()
            item.name = item.name  # not a change
            app.session("reader").flush()


def test_changes_that_nobody_flushed_are_refused_by_the_commit(database_url: str) -> None:
    with running(**reader_of(database_url)) as app:
        app.run("INSERT INTO items (name) VALUES ('seed')")
        with pytest.raises(ReadOnlyViolation), app.unit():
            app.session("reader").scalars(select(Item)).one().name = "refused"
        with pytest.raises(ReadOnlyViolation), app.unit():
            app.session("reader").add(Item(name="refused"))
        with pytest.raises(ReadOnlyViolation), app.unit():
            app.session("reader").delete(app.session("reader").scalars(select(Item)).one())
        assert app.names() == ["seed"]


# ---- refused by the database ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("statement", STATEMENTS.values(), ids=[name.replace(" ", "_") for name in STATEMENTS])
def test_the_database_refuses_what_app_db_lets_pass_with_the_same_error(
    statement: Callable[[Session], object], database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(**reader_of(database_url)) as app:
        app.run("INSERT INTO items (name) VALUES ('seed')")
        monkeypatch.setattr("app_db._units.branch_statements.effect_of", lambda statement, syntax: Effect.READS)
        monkeypatch.setattr("app_db._units.branch_statements.refused_to_readers", lambda statement, syntax: None)
        with pytest.raises(ReadOnlyViolation) as caught, app.unit():
            app.session("reader").scalars(select(Item.name)).all()
            statement(app.session("reader"))
        assert caught.value.connection == "reader"
        assert caught.value.__cause__ is not None, "what the driver said is kept"
        assert app.names() == ["seed"]


@pytest.mark.parametrize("kind", ["postgresql", "mariadb"])
def test_the_database_refuses_a_function_that_writes(kind: str, request: pytest.FixtureRequest) -> None:
    url = request.getfixturevalue({"postgresql": "postgres_url"}.get(kind, f"{kind}_url"))
    with running(**reader_of(url)) as app:
        app.define_writing_function()
        with pytest.raises(ReadOnlyViolation), app.unit():
            app.session("reader").scalar(select(func.add_item("refused")))
        with app.unit():
            assert app.session("writer").scalar(select(func.add_item("a"))) == 1
        assert app.names() == ["a"]


@pytest.mark.parametrize(
    "statement",
    [
        "WITH new AS (INSERT INTO items (name) VALUES ('refused') RETURNING id) SELECT id FROM new",
        "WITH changed AS (UPDATE items AS i SET name = 'refused' RETURNING i.id) SELECT id FROM changed",
        "DO $$ BEGIN INSERT INTO items (name) VALUES ('refused'); END $$",
        "SELECT name INTO copied FROM items",
        "SELECT nextval('items_id_seq')",
        "SELECT 1; INSERT INTO items (name) VALUES ('refused')",
    ],
)
def test_postgresql_refuses_every_disguise_of_a_write(statement: str, postgres_url: str) -> None:
    with running(**reader_of(postgres_url)) as app:
        app.run("INSERT INTO items (name) VALUES ('seed')")
        with pytest.raises(ReadOnlyViolation), app.unit():
            app.session("reader").execute(text(statement))
        assert app.names() == ["seed"]


def test_sqlite_refuses_a_write_that_begins_as_a_query(sqlite_url: str) -> None:
    with running(**reader_of(sqlite_url)) as app:
        with pytest.raises(ReadOnlyViolation), app.unit():
            app.session("reader").execute(
                text("WITH new AS (SELECT 'refused' AS name) INSERT INTO items (name) SELECT name FROM new")
            )
        assert app.names() == []


# ---- a unit that is read-only, on a connection that is not --------------------------------------------------------------


def one_connection(url: str) -> dict[str, Any]:
    return {"url": url, "pool": {"size": 1, "max_overflow": 0}}


def test_a_read_only_unit_refuses_writes_on_a_writable_connection(write: Callable[[Session], object], database_url: str) -> None:
    with running(writer=one_connection(database_url)) as app:
        app.run("INSERT INTO items (name) VALUES ('seed')")
        with pytest.raises(ReadOnlyViolation) as caught, app.unit(read_only=True):
            assert app.session().scalars(select(Item.name)).all() == ["seed"]
            write(app.session())
        assert caught.value.whole_unit
        assert "read_only=True" in str(caught.value)
        assert app.names() == ["seed"]


def test_the_database_enforces_a_read_only_unit_and_the_connection_is_writable_again_afterwards(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(writer=one_connection(database_url)) as app:
        app.run("INSERT INTO items (name) VALUES ('seed')")
        with monkeypatch.context() as patch:
            patch.setattr("app_db._units.branch_statements.effect_of", lambda statement, syntax: Effect.READS)
            patch.setattr("app_db._units.branch_statements.refused_to_readers", lambda statement, syntax: None)
            for _ in range(2):
                with pytest.raises(ReadOnlyViolation) as caught, app.unit(read_only=True):
                    app.session().execute(text("UPDATE items SET name = 'refused'"))
                assert caught.value.__cause__ is not None, "refused by the database"
        with app.unit():  # the pool has one connection
            app.add("a")
        with app.unit(read_only=True):
            assert sorted(app.session().scalars(select(Item.name))) == ["a", "seed"]
        with app.unit():
            app.add("b")
        assert app.names() == ["a", "b", "seed"]


@pytest.mark.parametrize(
    ("kind", "question", "read_only", "writable"),
    [
        ("sqlite", "PRAGMA query_only", 1, 0),
        ("postgresql", "SHOW transaction_read_only", "on", "off"),
    ],
)
def test_the_database_itself_says_that_the_unit_is_read_only(
    kind: str, question: str, read_only: object, writable: object, request: pytest.FixtureRequest
) -> None:
    url = request.getfixturevalue({"postgresql": "postgres_url"}.get(kind, f"{kind}_url"))
    with running(writer=one_connection(url)) as app:
        for _ in range(2):
            with app.unit(read_only=True):
                assert app.session().scalar(text(question)) == read_only
            with app.unit():
                assert app.session().scalar(text(question)) == writable


def test_a_read_only_unit_inside_another_does_not_outlast_itself(database_url: str) -> None:
    with running(writer={"url": database_url, "pool": {"size": 2}}) as app:
        with app.unit():
            app.add("a")
            with app.unit("requires_new", read_only=True):
                assert app.session().scalars(select(Item.name)).all() == []
            app.add("b")
        assert app.names() == ["a", "b"]


@pytest.mark.parametrize("isolation", [None, "SERIALIZABLE"])
def test_a_read_only_unit_stays_so_with_any_isolation(
    isolation: str | None, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(writer=one_connection(database_url)) as app:
        monkeypatch.setattr("app_db._units.branch_statements.effect_of", lambda statement, syntax: Effect.READS)
        monkeypatch.setattr("app_db._units.branch_statements.refused_to_readers", lambda statement, syntax: None)
        with pytest.raises(ReadOnlyViolation), app.unit(read_only=True, isolation=isolation):
            app.session().execute(text("INSERT INTO items (name) VALUES ('refused')"))
        with app.unit(isolation=isolation):
            app.session().execute(text("INSERT INTO items (name) VALUES ('a')"))
        assert app.names() == ["a"]


# ---- what a read costs, and what it sees -------------------------------------------------------------------------------


def statements_in(lines: list[str]) -> list[str]:
    return [line.partition(": ")[2] for line in (line.partition("LOG:  ")[2] for line in lines) if line]


def test_postgresql_a_read_is_one_round_trip(new_postgres: Callable[..., PostgresServer]) -> None:
    server = new_postgres(settings={"log_statement": "all"})
    server.create_database("shop")
    with running(**reader_of(server.url("shop"))) as app:
        with app.unit():
            app.session("reader").scalar(text("SELECT 'warm'"))
        before = len(server.log_lines())
        with app.unit():
            assert app.session("reader").scalar(text("SELECT 'hot'")) == "hot"
        with app.unit():
            assert app.session("reader").scalars(select(Item.name)).all() == []
            assert app.session("reader").scalar(text("SELECT 'again'")) == "again"
        sent = statements_in(server.log_lines()[before:])
        # A statement's further lines have no prefix by which they could be told.
        assert [statement.strip() for statement in sent] == ["SELECT 'hot'", "SELECT items.name", "SELECT 'again'"]


def test_postgresql_a_reader_can_be_read_in_portions(postgres_url: str) -> None:
    """The fact guarded: a server-side cursor, which `yield_per` asks for, can't be had in autocommit."""
    with running(**reader_of(postgres_url)) as app:
        app.run("INSERT INTO items (name) VALUES ('a'), ('b'), ('c')")
        with app.unit():
            names = app.session("reader").scalars(select(Item.name).order_by(Item.name).execution_options(yield_per=2))
            assert [list(portion) for portion in names.partitions()] == [["a", "b"], ["c"]]


def test_postgresql_the_log_shows_what_a_writable_connection_costs(new_postgres: Callable[..., PostgresServer]) -> None:
    # Without this, the test before this one would pass as well with a log that is silent about BEGIN and COMMIT.
    server = new_postgres(settings={"log_statement": "all"})
    server.create_database("shop")
    with running(**reader_of(server.url("shop"))) as app:
        with app.unit():
            app.session().scalar(text("SELECT 'warm'"))
        before = len(server.log_lines())
        with app.unit():
            app.session().scalar(text("SELECT 'hot'"))
        assert [statement.split()[0] for statement in statements_in(server.log_lines()[before:])] == ["BEGIN", "SELECT", "COMMIT"]


def names_seen(app: Application) -> list[str]:
    return sorted(app.session("reader").scalars(select(Item.name)))


def test_a_reader_sees_one_state_of_the_data_when_it_asks_for_repeatable_reads(request: pytest.FixtureRequest) -> None:
    for kind in ("postgres", "mariadb"):
        with running(**reader_of(request.getfixturevalue(f"{kind}_url"))) as app:
            with app.unit(isolation="REPEATABLE READ"):
                assert names_seen(app) == []
                app.run("INSERT INTO items (name) VALUES ('a')")
                assert names_seen(app) == []
            with app.unit():
                assert names_seen(app) == ["a"]


def test_sqlite_a_reader_sees_one_state_of_the_data_anyway(sqlite_url: str) -> None:
    with running(**reader_of(sqlite_url)) as app:
        with app.unit():
            app.add("first")  # the writer's connection is what makes the file one that can be read while it is written
        with app.unit():
            assert names_seen(app) == ["first"]
            app.run("INSERT INTO items (name) VALUES ('a')")
            assert names_seen(app) == ["first"]
        with app.unit():
            assert names_seen(app) == ["a", "first"]


def test_postgresql_a_reader_sees_the_latest_state_when_it_asks_for_nothing(postgres_url: str) -> None:
    with running(**reader_of(postgres_url)) as app, app.unit():
        assert names_seen(app) == []
        app.run("INSERT INTO items (name) VALUES ('a')")
        assert names_seen(app) == ["a"]


def test_a_reader_with_repeatable_reads_is_read_only_too_and_back_to_its_own_ways_afterwards(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app_db._units.branch_statements.effect_of", lambda statement, syntax: Effect.READS)
    monkeypatch.setattr("app_db._units.branch_statements.refused_to_readers", lambda statement, syntax: None)
    with running(**reader_of(postgres_url)) as app:
        with pytest.raises(ReadOnlyViolation), app.unit(isolation="REPEATABLE READ"):
            app.session("reader").execute(text("INSERT INTO items (name) VALUES ('refused')"))
        with app.unit():  # the pool has one connection, which is in autocommit again
            assert names_seen(app) == []
            app.run("INSERT INTO items (name) VALUES ('a')")
            assert names_seen(app) == ["a"]
        with pytest.raises(ReadOnlyViolation), app.unit():
            app.session("reader").execute(text("INSERT INTO items (name) VALUES ('refused')"))
        assert app.names() == ["a"]


def test_a_read_only_session_leaves_no_transaction_open(postgres: PostgresServer, postgres_url: str) -> None:
    with running(**reader_of(postgres_url)) as app:
        with app.unit():
            names_seen(app)
        with app.unit(isolation="SERIALIZABLE"):
            names_seen(app)
        assert postgres.open_transactions(str(make_url(postgres_url).database)) == []


LIFTING = {
    "sqlite": ["PRAGMA query_only = OFF", "PRAGMA query_only(0)"],
    "postgresql": [
        "SET TRANSACTION READ WRITE",
        "SET SESSION CHARACTERISTICS AS TRANSACTION READ WRITE",
        "SET default_transaction_read_only = off",
        "SELECT set_config('default_transaction_read_only', 'off', false)",
        "RESET default_transaction_read_only",
        "RESET ALL",
        "DISCARD ALL",
        "SET TRANSACTION READ WRITE; INSERT INTO items (name) VALUES ('a')",
    ],
    "mysql": ["SET SESSION TRANSACTION READ WRITE", "SET transaction_read_only = 0", "SET TRANSACTION READ WRITE"],
}


@pytest.mark.parametrize("unit_only", [False, True], ids=["read-only connection", "read-only unit"])
def test_the_protection_is_not_lifted_by_a_statement(database_url: str, unit_only: bool) -> None:
    with running(writer=database_url, reader={"mirror": "writer", "read_only": True}) as app:
        for statement in LIFTING[app.plain_engine().dialect.name.replace("mariadb", "mysql")]:
            with pytest.raises(ReadOnlyViolation, match="Lifting the protection was refused"), app.unit(read_only=unit_only):
                app.session("writer" if unit_only else "reader").execute(text(statement))
        assert app.names() == []


def test_a_reader_in_autocommit_says_that_it_has_no_savepoints(postgres_url: str) -> None:
    with running(**reader_of(postgres_url)) as app:
        with app.unit():
            with pytest.raises(InvalidUse, match="'reader' session reads in autocommit"):
                app.session("reader").begin_nested()
            assert app.session("reader").scalars(select(Item)).all() == []
        with app.unit(isolation="REPEATABLE READ"), app.session("reader").begin_nested():
            assert app.session("reader").scalars(select(Item)).all() == []


# ---- execution options ------------------------------------------------------------------------------------------------------


HIDDEN = "CREATE FUNCTION write_hidden() RETURNS integer LANGUAGE sql AS $$ INSERT INTO items (name) VALUES ('x') RETURNING 1 $$"
WRITE_HIDDEN = text("SELECT write_hidden()")


@pytest.mark.parametrize("options", [{"timeout": 30}, {"isolation": "SERIALIZABLE"}])
def test_an_execution_option_makes_no_later_unit_writable(options: dict[str, Any], new_postgres_url: Callable[[], str]) -> None:
    url = new_postgres_url()
    one = {"pool": {"size": 1, "max_overflow": 0}}
    with running(writer={"url": url, **one}, reader={"url": url, "read_only": True, **one}) as app:
        app.run(HIDDEN, on="writer")
        with app.unit():
            app.session("reader").connection(execution_options={"postgresql_readonly": True}).exec_driver_sql("SELECT 1")
        with pytest.raises(ReadOnlyViolation), app.unit(**options):
            app.session("reader").execute(WRITE_HIDDEN)
        assert app.names("writer") == []


def test_a_read_only_unit_leaves_a_servers_default_as_it_was(new_postgres_url: Callable[[], str]) -> None:
    url = new_postgres_url()
    guarded = {"url": f"{url}?options=-c%20default_transaction_read_only%3Don", "pool": {"size": 1, "max_overflow": 0}}
    with running(writer=url, guarded=guarded) as app:
        with app.unit(read_only=True):
            app.session("guarded").execute(text("SELECT 1"))
        with pytest.raises(DBAPIError, match="read-only transaction"), app.unit():
            app.session("guarded").execute(text("INSERT INTO items (name) VALUES ('x')"))
        assert app.names("guarded") == []


@pytest.mark.parametrize("whole", [True, False], ids=["read-only unit", "reader"])
def test_an_execution_option_that_would_lift_the_protection_is_refused(whole: bool, new_postgres_url: Callable[[], str]) -> None:
    url = new_postgres_url()
    lifting = {"postgresql_readonly": False}
    with running(writer=url, reader={"url": url, "read_only": True}) as app, app.unit(read_only=whole):
        session = app.session("writer" if whole else "reader")
        with pytest.raises(ReadOnlyViolation, match="postgresql_readonly=False"):
            session.connection(execution_options=lifting)


def test_the_isolation_of_a_read_only_unit_is_given_to_the_unit(new_database_url: Callable[[], str]) -> None:
    with running(writer=new_database_url()) as app:
        with app.unit(read_only=True), pytest.raises(InvalidUse, match="Give it to the unit"):
            app.session().connection(execution_options={"isolation_level": "SERIALIZABLE"})
        with app.unit(read_only=True, isolation="SERIALIZABLE"), pytest.raises(ReadOnlyViolation):
            app.session().execute(text("INSERT INTO items (name) VALUES ('x')"))
        assert app.names() == []
