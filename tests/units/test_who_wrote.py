"""Where a strict unit has several databases, each is asked whether the unit wrote to it: a statement's text may hide a write."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from dependency_injector import providers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import TextClause, create_engine, event, select, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from app_db import DatabaseSettings, container_of
from app_db._units.coordinator import several_writable
from app_db.errors import InvalidUse, NotAtomic, SessionIsManaged
from harness.applications import Application, Item, running
from harness.hidden_writes import DEFINITIONS_ON_POSTGRESQL as DEFINITIONS
from harness.hidden_writes import HIDDEN_ON_POSTGRESQL as HIDDEN
from harness.hidden_writes import KINDS, OF_NO_ROW, POSTGRESQL_SCHEMA
from harness.hidden_writes import LOOKING_ON_POSTGRESQL as LOOKING
from harness.servers import MariaDBServer, PostgresServer

NewUrl = Callable[[], str]


@contextmanager
def without_variables() -> Iterator[None]:
    """Hide the variables that say which servers the tests use, which a fixture of a module would see."""
    with pytest.MonkeyPatch.context() as patched:
        for variable in [name for name in os.environ if name.startswith("APP_DB_")]:
            patched.delenv(variable)
        yield


@pytest.fixture(scope="module")
def apps(postgres: PostgresServer) -> Iterator[Application]:
    with (
        without_variables(),
        postgres.lend_database() as writer,
        postgres.lend_database() as warehouse,
        running(writer=postgres.url(writer), warehouse=postgres.url(warehouse)) as app,
    ):
        for name in app.connections:
            with app.engine(name).begin() as connection:
                connection.exec_driver_sql(POSTGRESQL_SCHEMA)
            app.put("seed", on=name)
        yield app


def touched(app: Application, name: str) -> int:
    with app.engine(name).connect() as connection:
        return int(connection.exec_driver_sql("SELECT count(*) FROM touched").scalar_one())


@pytest.mark.parametrize("kind", HIDDEN)
def test_a_write_that_the_text_hides_is_refused_with_another(kind: str, apps: Application) -> None:
    app, before = apps, touched(apps, "writer")
    with pytest.raises(NotAtomic) as caught, app.unit():
        app.session("writer").execute(text(HIDDEN[kind]))
        app.add("refused", "warehouse")
    assert caught.value.connections == ("warehouse", "writer")
    assert touched(app, "writer") == before
    assert "refused" not in app.names("warehouse")


@pytest.mark.parametrize("kind", HIDDEN)
def test_a_write_that_the_text_hides_is_committed_where_it_is_the_only_one(kind: str, apps: Application) -> None:
    app, before = apps, touched(apps, "writer")
    with app.unit():
        app.session("writer").execute(text(HIDDEN[kind]))
        app.session("warehouse").execute(text("SELECT name FROM items FOR UPDATE"))
    assert touched(app, "writer") > before or kind == "notify"
    app.container.writer_engine().dispose()  # the held cursor stays open on its connection


def test_a_cursor_of_the_driver_is_seen(apps: Application) -> None:
    app, before = apps, touched(apps, "writer")
    with pytest.raises(NotAtomic), app.unit():
        cursor: Any = app.session("writer").connection().connection.cursor()
        cursor.execute("INSERT INTO touched (name) VALUES ('raw')")
        app.add("refused", "warehouse")
    with pytest.raises(NotAtomic), app.unit():
        driver: Any = app.session("writer").connection().connection.driver_connection
        with driver.cursor().copy("COPY touched (name) FROM STDIN") as copy:
            copy.write_row(["copied"])
        app.add("refused", "warehouse")
    assert touched(app, "writer") == before


@pytest.mark.parametrize("kind", LOOKING)
def test_what_only_looks_or_locks_is_no_write(kind: str, apps: Application) -> None:
    app = apps
    with app.unit():
        app.session("writer").execute(text(LOOKING[kind]))
        app.add(f"kept {kind}", "warehouse")
    assert f"kept {kind}" in app.names("warehouse")


@pytest.mark.parametrize("statement", OF_NO_ROW)
@pytest.mark.parametrize("kind", KINDS)
def test_a_write_that_finds_no_row_is_no_write(kind: str, statement: str, request: pytest.FixtureRequest) -> None:
    new: NewUrl = request.getfixturevalue(f"new_{kind.replace('postgresql', 'postgres')}_url")
    with running(writer=new(), warehouse=new()) as app:
        for name in app.connections:
            app.run("CREATE TABLE touched (name varchar(20))", on=name)
        with app.unit():
            app.session("writer").execute(text(statement))
            app.add("kept", "warehouse")
        with pytest.raises(NotAtomic), app.unit():
            app.session("writer").execute(text(statement))
            app.session("writer").execute(text("INSERT INTO touched VALUES ('refused')"))
            app.add("refused", "warehouse")
        with pytest.raises(NotAtomic), app.unit():
            app.run("INSERT INTO touched VALUES ('absent')", on="writer")
            app.session("writer").execute(text(statement))
            app.add("refused", "warehouse")
        assert (app.names("writer"), app.names("warehouse")) == ([], ["kept"])


def lock_a_row(session: Session) -> None:
    session.execute(text("SELECT name FROM items FOR UPDATE"))


def undo_a_write(session: Session) -> None:
    savepoint = session.begin_nested()
    session.execute(text("INSERT INTO touched (name) VALUES ('undone')"))
    savepoint.rollback()


def sent_by_a_function(session: Session, definition: str) -> None:
    session.execute(text("SELECT define(:definition)"), {"definition": definition})


def sent_by_a_cursor(session: Session, definition: str) -> None:
    session.connection().connection.cursor().execute(definition)


@pytest.mark.parametrize("before", [lock_a_row, undo_a_write])
@pytest.mark.parametrize("send", [sent_by_a_function, sent_by_a_cursor])
@pytest.mark.parametrize("kind", DEFINITIONS)
def test_a_definition_counts_after_a_row_lock_or_an_undone_savepoint(
    kind: str, send: Callable[[Session, str], None], before: Callable[[Session], None], apps: Application
) -> None:
    definition = DEFINITIONS[kind].format(number=1)
    with pytest.raises(NotAtomic), apps.unit():
        before(apps.session("writer"))
        send(apps.session("writer"), definition)
        apps.add("refused", "warehouse")
    assert "refused" not in apps.names("warehouse")
    with apps.unit():
        savepoint = apps.session("writer").begin_nested()
        send(apps.session("writer"), definition)
        savepoint.rollback()
        before(apps.session("writer"))
        apps.session("warehouse").execute(text("INSERT INTO touched (name) VALUES ('kept')"))


def test_a_row_lock_is_no_write_right_after_a_definition_by_the_same_connection(apps: Application) -> None:
    with apps.unit():
        sent_by_a_function(apps.session("writer"), "GRANT SELECT ON touched TO pg_monitor")
    with apps.unit():
        lock_a_row(apps.session("writer"))
        apps.add("kept after a definition", "warehouse")
    assert "kept after a definition" in apps.names("warehouse")


@pytest.mark.parametrize("setting", ["track_counts = off", "ROLE pg_read_all_settings"])
def test_where_the_server_does_not_tell_of_definitions_they_count(setting: str, apps: Application) -> None:
    """Without counters, each row lock counts. Without the right to read a system catalog, an undone change of it does."""
    with pytest.raises(NotAtomic), apps.unit():
        session = apps.session("writer")
        lock_a_row(session)
        savepoint = session.begin_nested()
        session.execute(text("SELECT define('CREATE ROLE made_and_undone')"))
        savepoint.rollback()
        session.execute(text(f"SET LOCAL {setting}"))
        apps.add("refused", "warehouse")
    assert "refused" not in apps.names("warehouse")


def test_what_a_savepoint_has_undone_is_no_write(new_database_url: NewUrl) -> None:
    with running(writer=new_database_url(), warehouse=new_database_url()) as app:
        with app.unit() as unit:
            app.session("writer").scalars(select(Item)).all()
            savepoint = unit.savepoint()
            app.add("undone", "writer")
            app.session("writer").flush()
            savepoint.rollback()
            app.add("a", "warehouse")
        with app.unit():
            session = app.session("writer")
            with pytest.raises(KeyError), session.begin_nested():
                session.add(Item(name="undone"))
                session.flush()
                raise KeyError
            app.add("b", "warehouse")
        assert (app.names("writer"), app.names("warehouse")) == ([], ["a", "b"])
        with pytest.raises(NotAtomic), app.unit() as unit:
            app.add("before", "writer")
            app.session("writer").flush()
            savepoint = unit.savepoint()
            app.add("undone", "writer")
            app.session("writer").flush()
            savepoint.rollback()
            app.add("c", "warehouse")
        assert (app.names("writer"), app.names("warehouse")) == ([], ["a", "b"])


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TABLE made (id int)",
        "PRAGMA user_version = 7",
        "PRAGMA application_id = 7",
        "INSERT INTO items (name) VALUES ('raw')",
    ],
)
def test_sqlite_tells_what_a_cursor_of_the_driver_has_changed(statement: str, new_sqlite_url: NewUrl) -> None:
    with running(writer=new_sqlite_url(), warehouse=new_sqlite_url()) as app:
        with pytest.raises(NotAtomic), app.unit():
            app.session("writer").connection().connection.cursor().execute(statement)
            app.add("refused", "warehouse")
        with app.unit():
            app.session("writer").connection().connection.cursor().execute("SELECT name FROM items")
            app.add("kept", "warehouse")
        assert (app.names("writer"), app.names("warehouse")) == ([], ["kept"])


INSERT_RAW = "INSERT INTO items (name) VALUES ('raw')"


@pytest.mark.parametrize("undone", [text(INSERT_RAW), None], ids=["statement", "driver"])
def test_a_write_by_the_driver_after_a_savepoint_was_rolled_back_counts(
    undone: TextClause | None, new_sqlite_url: NewUrl
) -> None:
    """Nothing tells app_db of the driver's cursor, so it is the next statement of the session that could be too late."""
    with running(writer=new_sqlite_url(), warehouse=new_sqlite_url()) as app:

        def write() -> None:
            app.session("writer").connection().connection.cursor().execute(INSERT_RAW)

        def undo() -> None:
            savepoint = app.session("writer").begin_nested()
            write() if undone is None else app.session("writer").execute(undone)
            savepoint.rollback()

        with pytest.raises(NotAtomic), app.unit():
            undo()
            write()
            app.add("refused", "warehouse")
        with app.unit():
            undo()
            app.add("kept", "warehouse")
        assert (app.names("writer"), app.names("warehouse")) == ([], ["kept"])


@pytest.fixture(scope="module")
def mariadb_apps(mariadb: MariaDBServer) -> Iterator[Application]:
    with (
        without_variables(),
        mariadb.lend_database() as writer,
        mariadb.lend_database() as warehouse,
        running(writer=mariadb.url(writer), warehouse=mariadb.url(warehouse)) as app,
    ):
        for name in app.connections:
            app.run(*KINDS["mariadb"].schema, on=name)
            app.put("seed", on=name)
        yield app


@pytest.mark.parametrize("kind", KINDS["mariadb"].hidden)
def test_a_write_that_the_text_hides_is_refused_on_mariadb(kind: str, mariadb_apps: Application) -> None:
    app, before = mariadb_apps, touched(mariadb_apps, "writer")
    for read_first in (False, True):
        with pytest.raises(NotAtomic), app.unit():
            if read_first:
                app.session("writer").scalars(select(Item)).all()
            KINDS["mariadb"].hidden[kind](app.session("writer"))
            app.add("refused", "warehouse")
    assert touched(app, "writer") == before
    assert "refused" not in app.names("warehouse")


@pytest.mark.parametrize("kind", KINDS["mariadb"].looking)
def test_what_only_looks_or_locks_is_no_write_on_mariadb(kind: str, mariadb_apps: Application) -> None:
    app = mariadb_apps
    with app.unit():
        KINDS["mariadb"].looking[kind](app.session("writer"))
        app.add(f"kept {kind}", "warehouse")
    assert f"kept {kind}" in app.names("warehouse")


def test_a_coroutine_is_told_by_mariadb(mariadb_apps: Application) -> None:
    urls = {name: mariadb_apps.engine(name).url.set(drivername="mysql+asyncmy") for name in mariadb_apps.connections}
    shown = {name: url.render_as_string(hide_password=False) for name, url in urls.items()}
    before = touched(mariadb_apps, "writer")

    async def main(app: Application) -> None:
        with pytest.raises(NotAtomic):
            async with app.unit():
                await app.container.writer_async_session().execute(text("SELECT seen FROM looking"))
                await app.container.warehouse_async_session().execute(text("INSERT INTO touched (name) VALUES ('refused')"))
        async with app.unit():
            await app.container.writer_async_session().execute(text("SELECT harmless(1)"))
            await app.container.warehouse_async_session().execute(text("DELETE FROM touched WHERE name = 'absent'"))
        await app.container.shutdown_resources()

    with running(writer=shown["writer"], warehouse=shown["warehouse"]) as app:
        asyncio.run(main(app))
    assert touched(mariadb_apps, "writer") == before


@pytest.mark.parametrize(
    ("others", "asked"),
    [
        ({}, 0),
        ({"reader": {"read_only": True}, "journal": {"transactional": False}}, 0),
        ({"warehouse": {}}, 1),
    ],
    ids=["alone", "the others take no part", "two writers"],
)
def test_mariadb_is_asked_only_where_the_container_writes_to_several(
    others: dict[str, dict[str, Any]], asked: int, mariadb_apps: Application
) -> None:
    url = mariadb_apps.engine("writer").url.render_as_string(hide_password=False)
    sent = list[str]()
    with Application({"writer": url, **{name: {"url": url, **own} for name, own in others.items()}}) as app:
        event.listen(app.engine("writer"), "before_cursor_execute", lambda *given: sent.append(given[2]))
        with app.unit():
            app.session("writer").scalars(select(Item)).all()
    assert sum(statement.startswith("SHOW SESSION STATUS") for statement in sent) == asked


def test_whether_a_container_writes_to_several_follows_its_settings_and_its_providers(new_sqlite_url: NewUrl) -> None:
    def with_warehouse(**own: Any) -> DatabaseSettings:
        connections = {"writer": {"url": new_sqlite_url()}, "warehouse": {"url": new_sqlite_url(), **own}}
        return DatabaseSettings(_env_file=None, connections=connections)

    container = container_of("writer", "warehouse")(settings=with_warehouse(read_only=True))
    is_so = several_writable(container)
    assert (is_so(), is_so()) == (False, False)
    with container.settings.override(providers.Object(with_warehouse())):
        assert (is_so(), is_so()) == (True, True)
    assert not is_so()
    container.set_provider("audit_sessionmaker", providers.Object(None))
    assert is_so(), "a connection without settings has an engine of the application's own, which can write"


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
def test_a_write_of_a_coroutine_that_the_text_hides_is_refused_with_another(driver: str, apps: Application) -> None:
    urls = {name: apps.engine(name).url.set(drivername=f"postgresql+{driver}") for name in apps.connections}
    shown = {name: url.render_as_string(hide_password=False) for name, url in urls.items()}
    before = touched(apps, "writer")

    async def main(app: Application) -> None:
        with pytest.raises(NotAtomic):
            async with app.unit():
                await app.container.writer_async_session().execute(text(HIDDEN["view"]))
                await app.container.warehouse_async_session().execute(text("INSERT INTO touched (name) VALUES ('refused')"))
        async with app.unit():
            await app.container.writer_async_session().execute(text(LOOKING["lock"]))
            await app.container.warehouse_async_session().execute(text("DELETE FROM touched WHERE name = 'nobody'"))
        await app.container.shutdown_resources()

    with running(writer=shown["writer"], warehouse=shown["warehouse"]) as app:
        asyncio.run(main(app))
    assert touched(apps, "writer") == before


# ---- what it costs -----------------------------------------------------------------------------------------------------


def test_the_question_costs_a_unit_with_one_branch_nothing_and_others_two_statements_each(apps: Application) -> None:
    app, sent = apps, list[str]()

    def note(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if "txid_current_if_assigned" in statement:
            sent.append(connection.engine.url.database)

    for name in app.connections:
        event.listen(app.engine(name), "before_cursor_execute", note)
    try:
        with app.unit():
            app.session("writer").scalars(select(Item)).all()
            app.session("writer").execute(text("SELECT harmless(1)"))
        assert sent == []
        with app.unit():
            app.session("writer").scalars(select(Item)).all()
            app.add("d", "warehouse")
        writer = app.engine("writer").url.database
        assert sent == [writer] * 2, "before any data manager votes, and after all have; an INSERT says by itself that it writes"
    finally:
        for name in app.connections:
            event.remove(app.engine(name), "before_cursor_execute", note)


# ---- one session, one engine; one text, one transaction ----------------------------------------------------------------


def test_a_second_engine_in_a_session_is_refused_before_it_is_used(new_sqlite_url: NewUrl) -> None:
    with running(writer=new_sqlite_url(), warehouse=new_sqlite_url()) as app:
        other = app.engine("warehouse")
        uses: dict[str, Callable[[Session], Any]] = {
            "execute": lambda session: session.execute(
                text("INSERT INTO items (name) VALUES ('a')"), bind_arguments={"bind": other}
            ),
            "connection": lambda session: session.connection(bind_arguments={"bind": other}),
            "scalars": lambda session: session.scalars(select(Item), bind_arguments={"bind": other}),
        }
        for kind, use in uses.items():
            with app.unit():
                app.add(f"{kind}", "writer")
                with pytest.raises(InvalidUse, match="'writer' session was given another engine"):
                    use(app.session("writer"))
        with pytest.raises(InvalidUse, match="another engine"), app.unit():
            app.session("writer").bind_mapper(Item, other)
            app.add("refused", "writer")
        assert (app.names("writer"), app.names("warehouse")) == (["connection", "execute", "scalars"], [])


@pytest.mark.parametrize(
    ("statement", "verb"),
    [
        ("INSERT INTO items (name) VALUES ('a'); COMMIT", "commit"),
        ("INSERT INTO items (name) VALUES ('a'); ROLLBACK; BEGIN", "rollback"),
        ("SELECT 1; -- and then\n/* here */ END", "commit"),
        ("SELECT 'a\\' ; COMMIT; SELECT '", "commit"),
        ("SELECT $$ ; $$; commit", "commit"),
        ("END -- it", "commit"),
        ("END /* it */", "commit"),
        ("END AND CHAIN", "commit"),
        ("END; SELECT 1", "commit"),
        ("CREATE TABLE event (id int); INSERT INTO event VALUES (1); COMMIT", "commit"),
        ("CREATE FUNCTION body() RETURNS int LANGUAGE sql AS $$ SELECT 1 $$; COMMIT", "commit"),
        ("CREATE FUNCTION body() RETURNS int LANGUAGE sql AS 'SELECT 1'; COMMIT; BEGIN; SELECT 1; END", "commit"),
        ("CREATE FUNCTION b() RETURNS int BEGIN ATOMIC SELECT CASE WHEN true THEN 1 END; END; COMMIT; SELECT 1; END", "commit"),
        ("PREPARE TRANSACTION 'x'", "prepare"),
        ("SELECT 1; BEGIN; COMMIT; END", "begin"),
    ],
)
def test_a_text_that_ends_the_transaction_is_refused_before_it_is_sent(statement: str, verb: str, apps: Application) -> None:
    before = apps.names("writer")
    with apps.unit(), pytest.raises(SessionIsManaged, match=f"has a {verb.upper()} in it"):
        apps.session("writer").connection().exec_driver_sql(statement)
    assert apps.names("writer") == before


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT '; COMMIT'",
        "SELECT 1; SELECT 2",
        "SELECT 1; ROLLBACK TO SAVEPOINT a",
        "CREATE FUNCTION body() RETURNS integer LANGUAGE plpgsql AS $$ BEGIN RETURN 1; END; $$",
        "DO $$ BEGIN PERFORM 1; END; $$",
        "CREATE FUNCTION body() RETURNS int BEGIN ATOMIC SELECT 1; SELECT CASE WHEN true THEN 1 END; END; SELECT 1",
        "SELECT 'C:\\dir; end of line'",
        "/* c */ SELECT 1",
    ],
)
def test_a_text_that_does_not_end_the_transaction_is_sent(statement: str, apps: Application) -> None:
    with pytest.raises(KeyError), apps.unit():
        apps.session("writer").connection().exec_driver_sql("SAVEPOINT a")
        apps.session("writer").connection().exec_driver_sql(statement)
        raise KeyError


def test_a_sessions_own_engine_that_was_replaced_is_refused(new_sqlite_url: NewUrl) -> None:
    with running(writer=new_sqlite_url(), warehouse=new_sqlite_url()) as app:
        with pytest.raises(InvalidUse, match="another engine"), app.unit():
            session = app.session("writer")
            session.execute(text("INSERT INTO items (name) VALUES ('a')"))
            session.bind = app.container.warehouse_engine()
            session.execute(text("INSERT INTO items (name) VALUES ('b')"))
        assert (app.names("writer"), app.names("warehouse")) == ([], [])


def test_the_error_shows_no_secret_of_the_other_engine(new_sqlite_url: NewUrl) -> None:
    with running(writer=new_sqlite_url()) as app:
        other = create_engine("postgresql+psycopg://u:s3cr3t@h/d?password=s3cr3t&sslpassword=s3cr3t")
        with pytest.raises(InvalidUse) as caught, app.unit():
            app.session("writer").connection(bind_arguments={"bind": other})
        assert "s3cr3t" not in str(caught.value)


SAVEPOINTS = {
    "another case": ["SAVEPOINT a", INSERT := "INSERT INTO items (name) VALUES ('kept')", "SAVEPOINT A", "ROLLBACK TO a"],
    "quoted": ["SAVEPOINT a", INSERT, 'SAVEPOINT "a"', 'ROLLBACK TO "a"'],
    "the same twice": ["SAVEPOINT a", INSERT, "SAVEPOINT a", "ROLLBACK TO SAVEPOINT a"],
    "released": ["SAVEPOINT a", "RELEASE SAVEPOINT a", INSERT, "ROLLBACK TO a"],
}


@pytest.mark.parametrize("kind", SAVEPOINTS)
def test_a_write_counts_unless_it_was_really_undone(kind: str, new_sqlite_url: NewUrl) -> None:
    with running(writer=new_sqlite_url(), warehouse=new_sqlite_url()) as app:
        with pytest.raises(NotAtomic), app.unit():
            for statement in SAVEPOINTS[kind]:
                with suppress(OperationalError):  # there is no such savepoint any more
                    app.session("writer").execute(text(statement))
            app.add("refused", "warehouse")
        assert (app.names("writer"), app.names("warehouse")) == ([], [])


def test_what_a_listener_writes_at_the_last_moment_counts(new_sqlite_url: NewUrl) -> None:
    with running(writer=new_sqlite_url(), warehouse=new_sqlite_url()) as app:

        def write(session: Session) -> None:
            cursor = session.connection().connection.cursor()
            cursor.execute("INSERT INTO items (name) VALUES ('late')")

        with pytest.raises(NotAtomic), app.unit():
            app.session("writer").scalars(select(Item)).all()
            event.listen(app.session("writer"), "before_commit", write)
            app.add("refused", "warehouse")
        assert (app.names("writer"), app.names("warehouse")) == ([], [])


# ---- many of them ------------------------------------------------------------------------------------------------------

EXAMPLES = int(os.environ.get("WHO_WROTE_EXAMPLES", "60"))

steps = st.lists(st.sampled_from([*LOOKING, "undone"]), min_size=1, max_size=4)


def take(app: Application, name: str, step: str) -> None:
    session = app.session(name)
    if step == "undone":
        session.begin_nested()
        session.execute(text("INSERT INTO touched (name) VALUES ('undone')"))
        session.get_nested_transaction().rollback()  # type: ignore[union-attr]
    else:
        session.execute(text(LOOKING[step]))


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(elsewhere=steps, here=steps, last=st.booleans())
def test_a_unit_that_wrote_to_one_database_is_never_refused(
    apps: Application, elsewhere: list[str], here: list[str], last: bool
) -> None:
    with apps.unit():
        for step in elsewhere if last else ():
            take(apps, "warehouse", step)
        for step in here:
            take(apps, "writer", step)
        apps.session("writer").execute(text("INSERT INTO touched (name) VALUES ('kept')"))
        for step in () if last else elsewhere:
            take(apps, "warehouse", step)


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(before=steps, after=steps, hidden=st.sampled_from(list(HIDDEN)), hidden_first=st.booleans())
def test_no_generated_unit_commits_in_one_database_only(
    apps: Application, before: list[str], after: list[str], hidden: str, hidden_first: bool
) -> None:
    counts = touched(apps, "writer"), touched(apps, "warehouse")

    def hide() -> None:
        for step in before:
            take(apps, "writer", step)
        apps.session("writer").execute(text(HIDDEN[hidden]))
        for step in after:
            take(apps, "writer", step)

    with pytest.raises(NotAtomic), apps.unit():
        if hidden_first:
            hide()
        apps.session("warehouse").execute(text("INSERT INTO touched (name) VALUES ('also')"))
        if not hidden_first:
            hide()
    assert (touched(apps, "writer"), touched(apps, "warehouse")) == counts
