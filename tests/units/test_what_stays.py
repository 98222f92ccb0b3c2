"""What a statement sets on the session would be there in later units of the pooled connection: it is refused, or ends with the
unit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import func, select, text, true
from sqlalchemy.engine import make_url

from app_db.errors import InvalidUse, SessionIsManaged
from harness.applications import Application, running

REFUSED = {
    "postgresql": {
        "SET search_path = other": "SET search_path",
        "SET search_path=other": "SET search_path",
        "set  Session search_path TO other": "set Session search_path",
        "/* a comment */ SET/**/ROLE other": "SET ROLE",
        "SET SCHEMA 'other'": "SET SCHEMA",
        "SET SESSION AUTHORIZATION DEFAULT": "SET SESSION AUTHORIZATION",
        "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY": "SET SESSION CHARACTERISTICS",
        "SET default_transaction_isolation = serializable": "SET default_transaction_isolation",
        "SET TIME ZONE 'Europe/Berlin'": "SET TIME",
        "SET statement_timeout = 1000": "SET statement_timeout",
        "SELECT 1; SET work_mem = '1MB'": "SET work_mem",
        "RESET ALL": "RESET ALL",
        "RESET search_path": "RESET search_path",
        "SELECT set_config('search_path', 'other', false)": "set_config(…, false)",
        "SELECT pg_catalog.set_config('search_path', 'other', FALSE) AS path": "set_config(…, false)",
        "SELECT set_config('search_path', 'other', 1 = 0)": "set_config(…) without the word true",
        "SELECT set_config('search_path', 'other', not true)": "set_config(…) without the word true",
        "SELECT set_config('search_path', 'other', false::bool)": "set_config(…) without the word true",
        "SELECT set_config('search_path', 'other', 'f')": "set_config(…) without the word true",
        "SELECT set_config('a.b', 'c', true), set_config('search_path', 'a', 1 > 2)": "set_config(…) without the word true",
        "SELECT set_config('search_path', lower('other, true)'), (1 > 2))": "set_config(…) without the word true",
        "SELECT set_config('a.b', set_config('a.c', 'd', (SELECT false)), true)": "set_config(…) without the word true",
        "SELECT set_config('search_path', 'other', 'off')": "set_config(…) without the word true",
        "SELECT '--', set_config('search_path', 'other', false)": "set_config(…, false)",
        "SELECT '/*'; SET work_mem = '1MB'; SELECT '*/'": "SET work_mem",
        "SELECT 1 AS a$$; SET work_mem = '1MB'; SELECT 1 AS b$$": "SET work_mem",
        'SET "search_path" = other': 'SET "search_path"',
    },
    "mariadb": {
        "SET SESSION TRANSACTION READ ONLY": "SET SESSION TRANSACTION",
        "SET SESSION TRANSACTION ISOLATION LEVEL SERIALIZABLE": "SET SESSION TRANSACTION",
        "SET tx_isolation = 'SERIALIZABLE'": "SET tx_isolation",
        "SET @@session.tx_read_only = 1": "SET @@session.tx_read_only",
        "SET completion_type = 1": "SET completion_type",
        "SET foreign_key_checks = 0": "SET foreign_key_checks",
        "SET SESSION unique_checks = 0": "SET SESSION unique_checks",
        "/* a comment */ SET sql_mode = ''": "SET sql_mode",
        "SET/**/time_zone = '+01:00'": "SET time_zone",
        "SET NAMES latin1": "SET NAMES",
        "SET ROLE NONE": "SET ROLE",
        "SET @a = 'x', SESSION sql_mode = ''": "SET SESSION sql_mode",
        "SET @a = '-- ', sql_mode = ''": "SET sql_mode",
        "SET @a = CONCAT('#', ','), @@session.time_zone = '+01:00'": "SET @@session.time_zone",
        "SET @a = '/*', foreign_key_checks = 0, @b = '*/'": "SET foreign_key_checks",
        "SET @a = 1, autocommit = 1": "SET autocommit",
        "SET @a = '-- ', autocommit = 1": "SET autocommit",
        'SET @a = "it\'s", NAMES latin1': "SET NAMES",
        "USE mysql": "USE",
        "FLUSH TABLES WITH READ LOCK": "FLUSH TABLES WITH READ LOCK",
    },
    "sqlite": {
        "PRAGMA query_only = ON": "PRAGMA query_only",
        "pragma main.query_only(1)": "PRAGMA query_only",
        "PRAGMA/**/busy_timeout=1": "PRAGMA busy_timeout",
        "PRAGMA ignore_check_constraints = 1": "PRAGMA ignore_check_constraints",
        "PRAGMA locking_mode = EXCLUSIVE": "PRAGMA locking_mode",
        "PRAGMA read_uncommitted = 1": "PRAGMA read_uncommitted",
        "PRAGMA recursive_triggers = 1": "PRAGMA recursive_triggers",
        "PRAGMA 'busy_timeout' = 1": "PRAGMA busy_timeout",
        'PRAGMA "main" . [locking_mode] = EXCLUSIVE': "PRAGMA locking_mode",
    },
}

ALLOWED = {
    "postgresql": [
        "SET LOCAL search_path = pg_catalog, public",
        "SET CONSTRAINTS ALL DEFERRED",
        "SELECT set_config('work_mem', '1MB', true)",
        "SELECT pg_catalog.set_config ( 'work_mem' , concat(lower('1'), upper(trim(' MB '))) , TRUE ) AS set_config",
        "SELECT set_config('work_mem', (SELECT setting FROM pg_settings WHERE name IN ('work_mem', 'x')), true::boolean)",
        "SELECT set_config('a.b', set_config('a.c', 'd', true), true)",
        "REVOKE EXECUTE ON FUNCTION set_config(text, text, boolean) FROM pg_monitor",
        "CREATE FUNCTION g(l bool) RETURNS text LANGUAGE sql AS $$ SELECT set_config('a.b', 'c', l) $$",
        "SHOW search_path",
        "UPDATE items SET name = name",
        "SELECT 'SET search_path; SET work_mem' AS set_config",
        "SELECT '; SET work_mem = 1'",
        r"SELECT 'a\b; SET work_mem = 1'",
        r"SELECT 'a\b; COMMIT;'",
        "SELECT E'\\'; COMMIT; SELECT \\''",
        "SELECT set_config('work_mem', '1MB', true), coalesce('a', '')",
        "CREATE FUNCTION f() RETURNS int LANGUAGE sql SET search_path = public AS $$ SELECT 1; SELECT 2 $$",
    ],
    "mariadb": [
        "SET STATEMENT sql_mode = '' FOR SELECT 1",
        "SET @sql_modes = 1",
        "SET @note = 'time_zone'",
        "SET @note = 'a, time_zone = b', @autocommit = @@autocommit",
        r"SELECT 'a\b; COMMIT;'",
        r"SELECT 'it\'s'",
        "SET SESSION lock_wait_timeout = 10",
        "SELECT @@sql_mode",
        "UPDATE items SET name = name",
    ],
    "sqlite": ["PRAGMA query_only", "PRAGMA busy_timeout", "PRAGMA user_version = 7", "PRAGMA table_info(items)"],
}


@pytest.fixture(params=REFUSED)
def given(request: pytest.FixtureRequest) -> Iterator[tuple[str, Application]]:
    url = request.getfixturevalue({"postgresql": "postgres_url"}.get(request.param, f"{request.param}_url"))
    with running(writer={"url": url, "pool": {"size": 1, "max_overflow": 0}}) as app:
        yield request.param, app


def settings(database: str, app: Application) -> Any:
    """The settings of the pooled connection that a statement of REFUSED would change."""
    with app.unit():
        session = app.session()
        if database == "sqlite":
            names = "query_only busy_timeout ignore_check_constraints locking_mode read_uncommitted recursive_triggers".split()
            return [session.scalar(text(f"PRAGMA {name}")) for name in names]
        if database == "postgresql":
            return session.execute(text("SELECT name, setting FROM pg_settings WHERE name !~ 'plpgsql'")).all()
        rows = session.execute(text("SHOW SESSION VARIABLES")).all()
        return [row for row in rows if "seed" not in row[0] and row[0] not in ("timestamp", "last_insert_id", "identity")]


def test_what_later_units_would_get_is_refused_by_name(given: tuple[str, Application]) -> None:
    database, app = given
    before = settings(database, app)
    for statement, words in REFUSED[database].items():
        with app.unit():
            with pytest.raises(InvalidUse) as caught:
                app.session().execute(text(statement))
            assert str(caught.value).startswith(f"{words} can't be executed on the connection 'writer' in a unit of work"), (
                statement
            )
            if database == "postgresql":
                assert "SET LOCAL" in str(caught.value)
    assert settings(database, app) == before
    with app.unit():
        app.add("kept")
    assert app.names() == ["kept"]


def test_what_ends_with_the_unit_or_means_nothing_to_later_units_is_executed(given: tuple[str, Application]) -> None:
    database, app = given
    for statement in ALLOWED[database]:
        with app.unit():
            app.session().connection().exec_driver_sql(statement)


async def test_a_bound_value_can_not_be_seen_so_set_config_needs_the_word_true(postgres_url: str) -> None:
    values = {"name": "default_transaction_read_only", "value": "on"}

    for driver in ("psycopg", "asyncpg"):
        url = make_url(postgres_url).set(drivername=f"postgresql+{driver}").render_as_string(hide_password=False)
        with running(writer={"url": url, "pool": {"size": 1, "max_overflow": 0}}) as app:
            for is_local in (False, True):
                for statement, given in (
                    (select(func.set_config(*values.values(), is_local)), {}),
                    (text("SELECT set_config(:name, :value, :is_local)"), {**values, "is_local": is_local}),
                ):
                    async with app.unit():
                        with pytest.raises(
                            InvalidUse, match=r"set_config\(…\) without the word true .*SET LOCAL.*sqlalchemy\.true"
                        ):
                            await app.container.writer_async_session().execute(statement, given)
            async with app.unit():
                await app.container.writer_async_session().execute(select(func.set_config(*values.values(), true())))
            async with app.unit():
                shown = await app.container.writer_async_session().scalar(text("SHOW default_transaction_read_only"))
                assert shown == "off"
            await app.container.shutdown_resources()


HIDDEN = {
    "postgresql": [
        "SELECT '--'; COMMIT",
        "SELECT '/*'; COMMIT; SELECT '*/'",
        'SELECT 1 AS "--"; COMMIT',
        "SELECT $$/*$$; COMMIT; SELECT $$*/$$",
        "SELECT 1 AS a$$; COMMIT; SELECT 1 AS b$$",
        "SELECT 1\n# 2; COMMIT",
        "SELECT E'\\'--'; COMMIT",
        "SELECT E'a' -- '\n'\\'--'; COMMIT",
        "SELECT U&'\\0027'; COMMIT; SELECT '--'",
    ],
    "mariadb": ["SELECT '#'; COMMIT", "SELECT '/*'; COMMIT; SELECT '*/'", "SELECT 1 --1; COMMIT", r"SELECT '\'#'; COMMIT"],
    "sqlite": ["SELECT '--'; COMMIT"],
}


def test_a_text_that_hides_a_commit_leaves_no_rows(given: tuple[str, Application]) -> None:
    database, app = given
    for statement in HIDDEN[database]:
        with pytest.raises(SessionIsManaged, match="COMMIT"), app.unit():
            app.add("written")
            app.session().flush()
            app.session().connection().exec_driver_sql(f"INSERT INTO items (name) VALUES ('hidden'); {statement}")
        assert app.names() == [], statement
