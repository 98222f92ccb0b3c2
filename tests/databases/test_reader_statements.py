"""Whatever is sent on a read-only connection, or in a read-only unit: nothing is written, and the pooled connection is as it was.

Each statement is sent in a unit, which then tries to write by a raw cursor, which no check of texts sees. Afterwards the database
is compared with what it was, and so are the settings of the pooled connection.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import make_url, text
from sqlalchemy.exc import DBAPIError

from app_db.errors import AppDbError, ReadOnlyViolation
from harness.applications import Application, running

NewUrl = Callable[[], str]

INSERT = "INSERT INTO items (name) VALUES ('written')"

WRITE_BESIDE = f"COMMIT; BEGIN READ WRITE; {INSERT}; COMMIT"
"""Written in a transaction of its own, if the statements of a text are not seen."""

POSTGRESQL = [
    INSERT,
    "SELECT writes()",
    "SELECT i.touched FROM (SELECT 1) AS one, writes() AS i(touched)",
    f"WITH new AS ({INSERT} RETURNING name) SELECT name FROM new",
    f"EXPLAIN ANALYZE {INSERT}",
    f"DO $$ BEGIN {INSERT}; END $$",
    f"DO $$ BEGIN SET transaction_read_only = off; {INSERT}; END $$",
    f"DO $$ BEGIN COMMIT; SET default_transaction_read_only = off; COMMIT; {INSERT}; END $$",
    "CALL lifts()",
    "SET default_transaction_read_only = off",
    "SET SESSION CHARACTERISTICS AS TRANSACTION READ WRITE",
    "SET/**/SESSION CHARACTERISTICS AS TRANSACTION READ/**/WRITE",
    "SET TRANSACTION READ/* */WRITE",
    'SET "default_transaction_read_only" = off',
    "SET LOCAL transaction_read_only = off",
    "RESET default_transaction_read_only",
    "RESET ALL",
    "DISCARD ALL",
    "SELECT set_config('default_transaction_read_only', 'off', false)",
    "SELECT set_config('default_' || 'transaction_read_only', 'off', false)",
    "SELECT set_config(E'default_transaction_read\\137only', 'off', false)",
    "SELECT pg_catalog.\"set_config\"('default_transaction_read_only', 'off', false)",
    "SELECT lifts_it()",
    f"SET default_transaction_read_only = off; {INSERT}",
    f"SELECT 1; {INSERT}",
    f"SELECT 1; SET transaction_read_only = off; {INSERT}",
    f"SELECT 1; COMMIT; SET default_transaction_read_only = off; {INSERT}",
    f"BEGIN READ WRITE; {INSERT}; COMMIT",
    f"START TRANSACTION READ WRITE; {INSERT}; COMMIT",
    f"COMMIT; BEGIN READ WRITE; {INSERT}; COMMIT",
    f"-- a comment\nSET default_transaction_read_only = off;\n{INSERT}",
    f"/* a /* nested */ comment */ {INSERT}",
    f"PREPARE writing AS {INSERT}",
    "EXECUTE writing",
    "COPY items (name) FROM PROGRAM 'echo written'",
    "CREATE TABLE written (id int)",
    "TRUNCATE items",
    "ALTER ROLE CURRENT_USER SET default_transaction_read_only = off",
    "LOCK TABLE items IN EXCLUSIVE MODE",
    "REFRESH MATERIALIZED VIEW nothing",
    "COMMENT ON TABLE items IS 'written'",
    "VACUUM items",
    "SELECT pg_catalog.set_config ('default_transaction_read_only', 'off', false)",
    "SELECT U&\"set\\005fconfig\"('default_transaction_read_only', 'off', false)",
    "SELECT lifts_it() FROM generate_series(1, 3)",
    "SELECT lifts_it(), writes()",
    "SELECT name FROM lifting",
    "SELECT o.lifts FROM (SELECT 1 AS a) AS o, lifts_it() AS o2(lifts)",
    "WITH lifted AS MATERIALIZED (SELECT lifts_it()) SELECT writes() FROM lifted",
    "SELECT lifts_it() UNION ALL SELECT writes()",
    "VALUES (lifts_it())",
    "EXPLAIN ANALYZE SELECT lifts_it()",
    "SELECT ends_it()",
    "SELECT seizes_role()",
    "EXPLAIN ANALYZE CREATE TABLE written AS SELECT 1 AS id",
    "EXPLAIN (ANALYZE, COSTS OFF) CREATE TABLE written AS SELECT 1 AS id",
    "EXPLAIN (ANALYZE) SELECT 1 AS id INTO written",
    "EXPLAIN/**/ANALYZE/**/CREATE/**/TABLE written AS SELECT 1 AS id",
    "EXPLAIN ANALYZE CREATE MATERIALIZED VIEW written AS SELECT 1 AS id",
    "EXPLAIN ANALYZE DECLARE kept CURSOR WITH HOLD FOR SELECT 1",
    "EXPLAIN ANALYZE EXECUTE writing",
    "SELECT 1 AS id INTO written",
    "SELECT 1 AS id INTO TEMP written",
    "CREATE TEMP TABLE written (id int)",
    "SELECT nextval('items_id_seq')",
    "SELECT setval('items_id_seq', 100)",
    "SELECT lo_create(0)",
    "SELECT lo_from_bytea(0, 'written')",
    "SELECT pg_advisory_lock(1)",
    "SELECT pg_try_advisory_lock_shared(1)",
    'SELECT "pg_advisory_lock" (1)',
    "SELECT pg_notify('written', '')",
    "NOTIFY written",
    "LISTEN written",
    "DECLARE kept CURSOR WITH HOLD FOR SELECT 1",
    "COPY (SELECT 1) TO PROGRAM 'true'",
    "COPY (SELECT 1) TO PROGRAM $$true$$",
    "COPY items FROM STDIN",
    "SELECT name FROM items FOR UPDATE",
    "SET search_path = pg_catalog",
    "SET LOCAL search_path = pg_catalog",
    "SET ROLE NONE",
    "SET SESSION AUTHORIZATION DEFAULT",
    "SET TIME ZONE 'Europe/Berlin'",
    "SET work_mem = '2MB'",
    "SET statement_timeout = 1",
    "SELECT set_config('work_mem', '2MB', false)",
    "DEALLOCATE ALL",
    "ANALYZE items",
    "CLUSTER",
    "REINDEX TABLE items",
    "CHECKPOINT",
    "LOAD 'plpgsql'",
    "GRANT SELECT ON items TO PUBLIC",
    "IMPORT FOREIGN SCHEMA a FROM SERVER b INTO c",
    "MERGE INTO items USING (SELECT 1) AS one ON false WHEN NOT MATCHED THEN INSERT (name) VALUES ('written')",
    "SECURITY LABEL ON TABLE items IS 'written'",
    "PREPARE TRANSACTION 'written'",
    "SELECT pg_create_restore_point('written')",
    "SELECT pg_create_physical_replication_slot('written')",
    "SELECT pg_logical_emit_message(false, 'written', '')",
    # The beginning of a comment in a literal or in a name hides nothing.
    f"SELECT '--'; {WRITE_BESIDE}",
    f"SELECT '/*'; {WRITE_BESIDE}; SELECT '*/'",
    f'SELECT 1 AS "--"; {WRITE_BESIDE}',
    f'SELECT 1 AS "a/*"; {WRITE_BESIDE} -- */',
    f"SELECT $$/*$$; {WRITE_BESIDE}; SELECT $$*/$$",
    f"SELECT $a$--$a$; {WRITE_BESIDE}",
    f"SELECT E'\\'--'; {WRITE_BESIDE}",
    f"SELECT E'a'\n'\\'--'; {WRITE_BESIDE}",
    f"SELECT 1\n# 2; {WRITE_BESIDE}",
    f"SELECT 1 AS a$$; {WRITE_BESIDE}; SELECT 1 AS b$$",
    f"SELECT 1 AS a$1$; {WRITE_BESIDE}; SELECT 1 AS b$1$",
    f"SELECT 1 AS ä$a$; {WRITE_BESIDE}; SELECT 1 AS b$a$",
    f"SELECT 'a\\'; {WRITE_BESIDE}; SELECT 'b\\'",
    "SELECT '--', pg_advisory_lock(8)",
    "SELECT '/*', pg_advisory_lock(8), '*/'",
    "SELECT '--', pg_notify('written', '')",
    "SELECT '--', set_config('search_path', 'pg_catalog', false)",
    "SELECT '--', set_config('default_transaction_read_only', 'off', false)",
    "SELECT 1 AS a$$, pg_advisory_lock(8) AS b$$",
    "SELECT 1 # pg_advisory_lock_shared(8)::text::int",
    'SELECT U&"pg\\005fadvisory\\005flock"(9)',
    "SELECT u&\"pg!005fadvisory!005flock\"(9) UESCAPE '!'",
    "SELECT /* /* */ ' */ 1, pg_advisory_lock(8) -- '",
]

MARIADB = [
    INSERT,
    "SELECT writes()",
    "CALL writing()",
    "CALL lifts()",
    "SET SESSION TRANSACTION READ WRITE",
    "SET/**/SESSION TRANSACTION READ/**/WRITE",
    "SET TRANSACTION READ WRITE",
    "SET SESSION tx_read_only = 0",
    "SET @@session.tx_read_only = 0",
    "SET @@tx_read_only := 0",
    "SET @a = 1, SESSION tx_read_only = 0",
    "SET STATEMENT tx_read_only = 0 FOR INSERT INTO items (name) VALUES ('written')",
    f"SET STATEMENT max_statement_time = 1 FOR {INSERT}",
    "/*!SET SESSION TRANSACTION READ WRITE*/",
    "/*M! SET SESSION tx_read_only = 0 */",
    f"/*!50000 {INSERT} */",
    f"# a comment\n{INSERT}",
    f"-- a comment\n{INSERT}",
    f'EXECUTE IMMEDIATE "{INSERT}"',
    "EXECUTE IMMEDIATE 'SET SESSION TRANSACTION READ WRITE'",
    "PREPARE lifting FROM 'SET SESSION TRANSACTION READ WRITE'",
    "EXECUTE lifting",
    f"BEGIN NOT ATOMIC SET SESSION TRANSACTION READ WRITE; COMMIT; {INSERT}; COMMIT; END",
    "START TRANSACTION READ WRITE",
    "BEGIN",
    "COMMIT",
    "DO writes()",
    "HANDLER items OPEN",
    "REPLACE INTO items (name) VALUES ('written')",
    "LOAD DATA INFILE '/etc/hostname' INTO TABLE items (name)",
    "CREATE TABLE written (id int)",
    "TRUNCATE TABLE items",
    "LOCK TABLES items WRITE",
    "ANALYZE TABLE items",
    "OPTIMIZE TABLE items",
    "SELECT name INTO @x FROM items",
    "SET autocommit = 1",
    "SELECT lifts_it()",
    "SELECT lifts_it() UNION ALL SELECT writes()",
    "SELECT lifts_by_variable()",
    "SELECT name FROM lifting",
    "SELECT 1 FROM (SELECT lifts_it() AS lifted) AS one",
    "VALUES (lifts_it())",
    "ANALYZE SELECT lifts_it()",
    "SELECT `lifts_it`()",
    "SELECT /*!50000 lifts_it */ ()",
    "SELECT 1 INTO OUTFILE '{file}'",
    "SELECT 1 INTO/**/OUTFILE '{file}'",
    "SELECT 1 INTO DUMPFILE '{file}'",
    "WITH one AS (SELECT 1) SELECT * FROM one INTO OUTFILE '{file}'",
    "SELECT GET_LOCK('written', 0)",
    "SELECT get_lock ('written', 0)",
    "SELECT `get_lock`('written', 0)",
    "SELECT NEXTVAL(numbers)",
    "SELECT SETVAL(numbers, 100)",
    "SELECT NEXT VALUE FOR numbers",
    "EXPLAIN INSERT INTO items (name) VALUES ('written')",
    "ANALYZE FORMAT=JSON INSERT INTO items (name) VALUES ('written')",
    "ANALYZE UPDATE items SET name = 'written'",
    "INSERT INTO unsafe (name) VALUES ('written')",
    "CREATE TEMPORARY TABLE written (id int)",
    "SELECT name FROM items FOR UPDATE",
    "SET SESSION sql_mode = ''",
    "SET NAMES latin1",
    "SET foreign_key_checks = 0",
    "SET SESSION TRANSACTION ISOLATION LEVEL SERIALIZABLE",
    "SET completion_type = 'CHAIN'",
    "SET ROLE NONE",
    "SET PASSWORD = PASSWORD('written')",
    "SET GLOBAL max_connections = 300",
    "USE mysql",
    "FLUSH TABLES WITH READ LOCK",
    "FLUSH TABLES items WITH READ LOCK",
    "FLUSH TABLES items FOR EXPORT",
    "UNLOCK TABLES",
    "XA START 'written'",
    "INSTALL SONAME 'written'",
    "KILL QUERY 1",
    "RENAME TABLE items TO written",
    "SAVEPOINT one; INSERT INTO items (name) VALUES ('written')",
    "BACKUP STAGE START",
    "CHECK TABLE items",
    "CACHE INDEX items IN other",
    "DEALLOCATE PREPARE lifting",
    "RESET QUERY CACHE",
    "SIGNAL SQLSTATE '45000'",
    "PURGE BINARY LOGS BEFORE NOW()",
    # The beginning of a comment in a literal or in a name hides nothing, nor do two hyphens without a space.
    "SELECT 1--GET_LOCK('written', 0)",
    "SELECT 1 --1 INTO OUTFILE '{file}'",
    "SELECT '/*', GET_LOCK('written', 0), '*/'",
    "SELECT '-- ', GET_LOCK('written', 0)",
    "SELECT '#', GET_LOCK('written', 0)",
    'SELECT "#", GET_LOCK("written", 0)',
    "SELECT 1 AS `#`, GET_LOCK('written', 0)",
    "SELECT 1 AS `-- `, GET_LOCK('written', 0)",
    "SELECT '\\'#', GET_LOCK('written', 0)",
    "SELECT '\\'/*', GET_LOCK('written', 0), '*/'",
    'SELECT "\\"#", GET_LOCK("written", 0)',
    "SELECT '/*!', GET_LOCK('written', 0), '*/'",
    "SELECT /*! GET_LOCK */ ('written', 0)",
    "SELECT 1 /*!, '*/', GET_LOCK('written', 0) */",
    "SELECT 1 /*!999999 ' */, GET_LOCK('written', 0) -- '",
    "SELECT 1 /*!999999 ' *//*M!100100 , GET_LOCK('written', 0) */ -- '",
    "SELECT 1 */*'*/ GET_LOCK('written', 0) -- '",
    "SELECT /* /* */ GET_LOCK('written', 0) -- */",
    "SET @a = GET_LOCK('written', 0)",
    "SET @a = '-- ', autocommit = 0",
    "SET @a = '#', SESSION tx_read_only = 0",
    "SET @a = 'x', SESSION sql_mode = ''",
    "SET @a = 'x', GLOBAL max_connections = 300",
    "SET @a = CONCAT('x', ','), NAMES latin1",
    "SET LOCAL sql_mode = ''",
]

SQLITE = [
    INSERT,
    f"/* c */ {INSERT}",
    f"-- c\n{INSERT}",
    f"EXPLAIN {INSERT}",
    "PRAGMA query_only = OFF",
    "PRAGMA query_only(0)",
    "PRAGMA/**/query_only/**/=/**/OFF",
    'pragma "query_only" = 0',
    "PRAGMA main.query_only = 0",
    "PRAGMA user_version = 7",
    "PRAGMA application_id = 7",
    "PRAGMA journal_mode = DELETE",
    "PRAGMA foreign_keys = OFF",
    "CREATE TABLE written (id int)",
    "CREATE TEMP TABLE written (id int)",
    "REPLACE INTO items (name) VALUES ('written')",
    f"WITH one AS (SELECT 1) {INSERT}",
    "COMMIT",
    "END -- it",
    "ROLLBACK",
    "BEGIN IMMEDIATE",
    "DELETE FROM items",
    "DROP TABLE items",
    "REINDEX",
    "VACUUM",
    "ATTACH DATABASE ':memory:' AS other",
    "PRAGMA foreign_keys(0)",
    "PRAGMA user_version(7)",
    "PRAGMA main.user_version(7)",
    "PRAGMA application_id(7)",
    "PRAGMA busy_timeout(1)",
    "PRAGMA busy_timeout = 1",
    "PRAGMA journal_mode(DELETE)",
    "PRAGMA main.journal_mode = TRUNCATE",
    "PRAGMA locking_mode(EXCLUSIVE)",
    "PRAGMA locking_mode = EXCLUSIVE",
    "PRAGMA writable_schema(1)",
    "PRAGMA ignore_check_constraints(1)",
    "PRAGMA recursive_triggers = 1",
    "PRAGMA read_uncommitted(1)",
    "PRAGMA cache_size(7)",
    "PRAGMA synchronous(0)",
    "PRAGMA defer_foreign_keys = 1",
    "PRAGMA secure_delete(1)",
    "PRAGMA auto_vacuum(1)",
    "PRAGMA incremental_vacuum",
    "PRAGMA optimize",
    "PRAGMA wal_checkpoint",
    "PRAGMA wal_checkpoint(TRUNCATE)",
    "PRAGMA temp_store(2)",
    "PRAGMA schema_version = 700",
    "PRAGMA trusted_schema(0)",
    "PRAGMA query_only\n=\n0",
    "-- a comment\nPRAGMA query_only(off)",
    "PRAGMA [query_only] = 0",
    "PRAGMA `query_only` = 0",
    "VACUUM INTO '{file}'",
    "VACUUM main INTO '{file}'",
    "/**/VACUUM/**/INTO '{file}'",
    "ATTACH '{file}' AS other",
    "ATTACH DATABASE '{file}' AS other",
    "/**/ATTACH '{file}' AS other",
    "DETACH main",
    "SELECT load_extension('written')",
    "ANALYZE",
    "ANALYZE items",
    "ALTER TABLE items RENAME TO written",
    "CREATE TRIGGER written AFTER INSERT ON items BEGIN DELETE FROM items; END",
    "CREATE VIRTUAL TABLE written USING fts5(name)",
    "CREATE TEMP VIEW written AS SELECT 1",
    "SAVEPOINT one",
    "RELEASE one",
    "EXPLAIN QUERY PLAN DELETE FROM items",
    "INSERT OR REPLACE INTO items (id, name) VALUES (1, 'written')",
    "UPDATE items SET name = 'written' RETURNING name",
    "WITH one(name) AS (VALUES ('written')) INSERT INTO items (name) SELECT name FROM one RETURNING name",
    "WITH one AS (SELECT 1) DELETE FROM items",
    "WITH RECURSIVE one AS (SELECT 1) UPDATE items SET name = 'written'",
    "PRAGMA 'query_only' = 0",
    "PRAGMA main.'query_only' = 0",
    'PRAGMA "main" . query_only = 0',
    "SELECT '--', load_extension('written')",
    "SELECT '/*', load_extension('written'), '*/'",
    "SELECT 1 AS \"--\", load_extension('written')",
    "SELECT 1 AS [--], load_extension('written')",
    "SELECT 1 AS `/*`, load_extension('written') -- */",
]


def disguises(statement: str, *, database: str) -> list[str]:
    """The same statement, written so that a check of its text may not recognise it."""
    first, _, others = statement.partition(" ")
    spellings = [
        statement.swapcase() if "'" not in statement else f"{first.lower()} {others}",
        f"{first.title()}\n\t{others}",
        f"/* a comment */{statement}",
        f"{first}/* ; ' */{others}" if database != "sqlite" else f"{first}/**/{others}",
        f"-- a comment; 'and a quote\n{statement}",
        f"\n\t ;{statement}" if database == "postgresql" else f"\n\t {statement} ;",
        f"{statement}; SELECT 1",
        f"SELECT 1; {statement}",
        f"SELECT ';', '--'; {statement}",
    ]
    if database == "postgresql":
        spellings += [f"/* /* nested */ */ {statement}", f"SELECT $a$'$a$; {statement}", f"SELECT E'\\'; {statement} -- '"]
    elif database == "mariadb":
        spellings += [
            f"/*!{statement}*/",
            f"/*M!100000 {statement} */",
            f"#\n{statement}",
            f"(({statement}",
            f"/*!999999 x*/{statement}",
        ]
    return spellings


HARD = {
    "postgresql": [
        INSERT,
        "SET default_transaction_read_only = off",
        "SET SESSION CHARACTERISTICS AS TRANSACTION READ WRITE",
        f"DO $$ BEGIN SET transaction_read_only = off; {INSERT}; END $$",
        "CALL lifts()",
        "SELECT lifts_it()",
    ],
    "mariadb": [
        INSERT,
        "SET SESSION TRANSACTION READ WRITE",
        "SET tx_read_only = 0",
        "CALL lifts()",
        "SELECT lifts_it()",
        "EXECUTE IMMEDIATE 'SET SESSION tx_read_only = 0'",
    ],
    "sqlite": [INSERT, "PRAGMA query_only = 0", "PRAGMA query_only(0)", "PRAGMA user_version = 7", "ATTACH '{file}' AS other"],
}

PREPARED = {
    "postgresql": [
        f"CREATE FUNCTION writes() RETURNS text LANGUAGE plpgsql AS $$ BEGIN {INSERT}; RETURN 'written'; END $$",
        (
            "CREATE FUNCTION lifts_it() RETURNS text LANGUAGE sql AS "
            "$$ SELECT set_config('default_transaction_read_only', 'off', false) $$"
        ),
        "CREATE VIEW lifting AS SELECT lifts_it() AS name",
        (
            "CREATE FUNCTION ends_it() RETURNS text LANGUAGE plpgsql AS "
            "$$ BEGIN SET transaction_read_only = off; RETURN ''; END $$"
        ),
        (
            "CREATE FUNCTION seizes_role() RETURNS text LANGUAGE plpgsql AS "
            "$$ BEGIN SET SESSION CHARACTERISTICS AS TRANSACTION READ WRITE; RETURN ''; END $$"
        ),
        (
            "CREATE PROCEDURE lifts() LANGUAGE plpgsql AS $$ BEGIN COMMIT; SET default_transaction_read_only = off; COMMIT; "
            f"{INSERT}; COMMIT; END $$"
        ),
    ],
    "mariadb": [
        f"CREATE FUNCTION writes() RETURNS text BEGIN {INSERT}; RETURN 'written'; END",
        "CREATE FUNCTION lifts_it() RETURNS int BEGIN SET SESSION TRANSACTION READ WRITE; RETURN 1; END",
        "CREATE FUNCTION lifts_by_variable() RETURNS int BEGIN SET SESSION tx_read_only = 0; RETURN 1; END",
        "CREATE VIEW lifting AS SELECT lifts_it() AS name FROM items",
        f"CREATE PROCEDURE writing() BEGIN {INSERT}; COMMIT; END",
        f"CREATE PROCEDURE lifts() BEGIN COMMIT; SET SESSION TRANSACTION READ WRITE; {INSERT}; COMMIT; END",
        "CREATE TABLE unsafe (name VARCHAR(50)) ENGINE = MyISAM",
        "CREATE SEQUENCE numbers",
    ],
    "sqlite": [],
}
STATEMENTS = {
    database: list(
        dict.fromkeys([*plain, *(spelling for hard in HARD[database] for spelling in disguises(hard, database=database))])
    )
    for database, plain in {"postgresql": POSTGRESQL, "mariadb": MARIADB, "sqlite": SQLITE}.items()
}
FACTORIES = {"postgresql": "new_postgres_url", "mariadb": "new_mariadb_url", "sqlite": "new_sqlite_url"}

PRAGMAS = """
    query_only foreign_keys busy_timeout journal_mode locking_mode synchronous cache_size temp_store writable_schema
    ignore_check_constraints recursive_triggers read_uncommitted secure_delete trusted_schema defer_foreign_keys
    """.split()
CHANGING = set(
    "timestamp last_insert_id identity insert_id rand_seed1 rand_seed2 warning_count error_count pseudo_thread_id".split()
)
"""Variables of a MariaDB session that change by themselves."""

SETTINGS = {
    "postgresql": [
        "SELECT name, setting FROM pg_catalog.pg_settings WHERE name !~ '^plpgsql'",  # which come with the first use of plpgsql
        "SELECT pg_catalog.pg_listening_channels()",
        "SELECT name FROM pg_catalog.pg_cursors WHERE is_holdable",
        "SELECT name FROM pg_catalog.pg_prepared_statements WHERE name !~ '^_pg3_|^__asyncpg'",
        "SELECT objid FROM pg_catalog.pg_locks WHERE locktype = 'advisory' AND pid = pg_catalog.pg_backend_pid()",
        "SELECT current_user, session_user, current_catalog",
    ],
    "mariadb": ["SHOW SESSION VARIABLES", "SELECT DATABASE(), CURRENT_ROLE(), IS_USED_LOCK('written'), @@in_transaction"],
    "sqlite": [*(f"PRAGMA {name}" for name in PRAGMAS), "PRAGMA database_list"],
}
"""What tells how a pooled connection is."""

CONTENTS = {
    "postgresql": [
        "SELECT relname, relacl::text FROM pg_class WHERE relnamespace <> 'information_schema'::regnamespace",
        "SELECT oid FROM pg_largeobject_metadata",
        "SELECT last_value, is_called FROM items_id_seq",
        "SELECT slot_name FROM pg_replication_slots",
    ],
    "mariadb": [
        "SHOW TABLES",
        "SELECT next_not_cached_value FROM numbers",
        "SELECT name FROM unsafe",
        "SELECT @@max_connections",
    ],
    "sqlite": ["SELECT * FROM sqlite_master", "PRAGMA user_version", "PRAGMA application_id", "PRAGMA journal_mode"],
}
"""What tells what is in the database besides the rows."""


class Prepared:
    """A database with a seed, and an application that has one pooled connection for each of writer and reader."""

    def __init__(self, database: str, app: Application, directory: Path) -> None:
        self.database = database
        self.app = app
        self.file = directory / "written.file"
        self.statements = [statement.replace("{file}", str(self.file)) for statement in STATEMENTS[database]]

    def contents(self) -> list[object]:
        """What is in the database, as another connection sees it."""
        with self.app.plain_engine().connect() as connection:
            found = [connection.exec_driver_sql(query).all() for query in CONTENTS[self.database]]
            names = connection.exec_driver_sql("SELECT name FROM items").scalars().all()
        return [list(names), self.file.exists(), *map(sorted, found)]

    def settings(self, name: str) -> dict[object, object]:
        """How the pooled connection is that the next unit gets."""
        raw = self.app.engine(name).raw_connection()
        cursor = raw.cursor()
        found: dict[object, object] = {}
        for query in SETTINGS[self.database]:
            cursor.execute(query)
            rows = cursor.fetchall()
            found |= {row[0]: row[1] for row in rows if row[0] not in CHANGING} if len(rows) > 100 else {query: rows}
        cursor.close()
        raw.close()
        return found

    def send(self, name: str, statement: str, *, read_only: bool) -> None:
        """Send a statement and two writes in one unit, and the writes in the next one, too."""
        with suppress(Exception), self.app.unit(read_only=read_only):
            with suppress(AppDbError, DBAPIError):
                self.app.session(name).connection().exec_driver_sql(statement)
            self.write_unseen(name)
        with suppress(Exception), self.app.unit(read_only=read_only):
            self.write_unseen(name)

    def write_unseen(self, name: str) -> None:
        """Write in ways that no check of texts sees, so that only the database can refuse it."""
        connection = self.app.session(name).connection()
        with suppress(Exception):
            connection.connection.cursor().execute(INSERT)
        with suppress(Exception):
            connection.exec_driver_sql("SELECT writes() AS harmless" if self.database != "sqlite" else "SELECT 1")


def on_one_connection(url: str) -> dict[str, Any]:
    """A writer and a reader whose pools have one connection each."""
    pool = {"pool": {"size": 1, "max_overflow": 0}}
    return {"writer": {"url": url, **pool}, "reader": {"url": url, "read_only": True, **pool}}


@pytest.fixture(params=FACTORIES)
def prepared(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Prepared]:
    url = request.getfixturevalue(FACTORIES[request.param])()
    with running(**on_one_connection(url)) as app:
        app.put("seed")
        app.run(*PREPARED[request.param])
        with app.unit():
            app.session().execute(text("SELECT 1"))  # the writer's connection switches SQLite to WAL
        yield Prepared(request.param, app, tmp_path)


def test_there_are_enough_statements() -> None:
    assert sum(map(len, STATEMENTS.values())) >= 300


def changed(before: dict[object, object], after: dict[object, object]) -> dict[object, object]:
    return {key: (before.get(key), after.get(key)) for key in {*before, *after} if before.get(key) != after.get(key)}


@pytest.mark.parametrize("way", ["read-only connection", pytest.param("read-only unit", marks=pytest.mark.exhaustive)])
def test_nothing_is_written_and_the_pooled_connection_is_as_it_was(way: str, prepared: Prepared) -> None:
    app, unit_only = prepared.app, way == "read-only unit"
    name = "writer" if unit_only else "reader"
    contents, settings = prepared.contents(), prepared.settings(name)
    problems: list[tuple[str, object]] = []
    for statement in prepared.statements:
        prepared.send(name, statement, read_only=unit_only)
        if (found := prepared.contents()) != contents:
            problems.append((statement, [new for new, old in zip(found, contents, strict=True) if new != old]))
            contents = found
        if difference := changed(settings, prepared.settings(name)):
            problems.append((statement, difference))
            app.engine(name).dispose()
    assert not problems, "\n".join(map(str, problems))
    if not unit_only:
        with pytest.raises(Exception, match=r"(?i)read.?only"), app.unit():  # the driver's own error
            app.session("reader").connection().connection.cursor().execute(INSERT)
    with app.unit():
        app.session("writer").execute(text(INSERT))
    with pytest.raises(KeyError), app.unit():
        app.session("writer").execute(text("INSERT INTO items (name) VALUES ('undone')"))
        raise KeyError
    assert app.names() == ["seed", "written"]


LIFTING = {
    "postgresql": "SET default_transaction_read_only = off",
    "mariadb": "SET SESSION TRANSACTION READ WRITE",
    "sqlite": "PRAGMA query_only = OFF",
}


def test_what_a_raw_cursor_lifts_is_protected_again_in_the_next_unit(prepared: Prepared) -> None:
    app, settings = prepared.app, prepared.settings("reader")
    for writes_first in (False, True):
        with suppress(Exception), app.unit():
            connection = app.session("reader").connection()
            if writes_first:
                connection.execute(text("SELECT name FROM items"))
            connection.connection.cursor().execute(LIFTING[prepared.database])
        with pytest.raises(Exception, match=r"(?i)read.?only"), app.unit():
            app.session("reader").connection().connection.cursor().execute(INSERT)
        assert prepared.settings("reader") == settings
    assert app.names() == ["seed"]


def test_postgresql_a_statement_that_lifted_the_protection_is_named(new_postgres_url: NewUrl) -> None:
    with running(**on_one_connection(new_postgres_url())) as app:
        app.run(*PREPARED["postgresql"])
        with pytest.raises(ReadOnlyViolation, match=r"A statement that lifted the protection .* 'reader'"), app.unit():
            app.session("reader").execute(text("SELECT lifts_it()"))
        with app.unit():
            assert app.session("reader").scalar(text("SHOW default_transaction_read_only")) == "on"


READS = {
    "postgresql": [
        "SELECT count(*) FROM items WHERE name LIKE '%; DELETE%'",
        "WITH one AS (SELECT 1) SELECT * FROM one",
        "EXPLAIN (ANALYZE, BUFFERS) SELECT name FROM items",
        "EXPLAIN ANALYZE VERBOSE SELECT name FROM items",
        "SELECT pg_advisory_xact_lock(1)",
        "SET LOCAL work_mem = '2MB'",
        "SHOW search_path",
        "SELECT name AS into_outfile FROM items",
        "SELECT 'pg_notify('",
        "SELECT 'set_config'",
        "SELECT 'WITH HOLD'",
        r"SELECT 'C:\dir; x y'",
        "SELECT 'x; y', $$; z '$$, 1 AS \"a; b\"",
        "SELECT E'\\'; COMMIT; SELECT \\''",
        "SELECT name /* ; /* ' */ x; y */ FROM items -- it's; so",
    ],
    "mariadb": [
        "SELECT name INTO @x FROM items",
        "SET @x = 1",
        "SET SESSION max_statement_time = 10",
        "ANALYZE FORMAT=JSON SELECT name FROM items",
        "SHOW TABLES",
        "DESCRIBE items",
        "SELECT /*! STRAIGHT_JOIN */ name FROM items",
        "SELECT 'GET_LOCK(', \"INTO OUTFILE\"",
        "SELECT name /* ; ' x */ FROM items # it's; so",
        "SELECT name FROM items -- it's; GET_LOCK('a', 0)",
        "SET @x = 'a, SESSION sql_mode = b', @y = CONCAT(@x, ',')",
        "SET @sql_mode = 1",
        "SET TRANSACTION READ ONLY",
    ],
    "sqlite": [
        "PRAGMA table_info(items)",
        "PRAGMA main.index_list('items')",
        "PRAGMA foreign_keys",
        "EXPLAIN QUERY PLAN SELECT 1",
        "SELECT 'load_extension('",
        r"SELECT 'C:\dir; x y', 1 AS [a; b]",
        "SELECT name /* ; ' /* x */ FROM items -- it's; so",
    ],
}


def test_a_reader_may_send_what_only_reads(prepared: Prepared) -> None:
    for statement in READS[prepared.database]:
        with prepared.app.unit():
            prepared.app.session("reader").connection().exec_driver_sql(statement.replace("%", "%%"))


@pytest.mark.parametrize("way", ["read-only connection", "read-only unit"])
def test_sqlite_refuses_a_raw_cursor_that_lifts_the_protection(way: str, new_sqlite_url: NewUrl) -> None:
    unit_only = way == "read-only unit"
    with running(**on_one_connection(new_sqlite_url())) as app:
        app.put("seed")
        for number, statement in enumerate((LIFTING["sqlite"], "pragma main.query_only(0)", 'PRAGMA/**/"query_only"=false')):
            with pytest.raises(sqlite3.DatabaseError, match="not authorized"), app.unit(read_only=unit_only):
                app.session("writer" if unit_only else "reader").connection().connection.cursor().execute(statement)
            with app.unit():
                app.add(f"added {number}")  # on the same connection, on which app_db itself has lifted it
        assert app.names() == ["added 0", "added 1", "added 2", "seed"]


async def send_async(app: Application, statement: str) -> None:
    """Send a statement and a write by a raw cursor in one unit, and the write in the next one, too."""
    for sent in (statement, "SELECT 1"):
        with suppress(Exception):
            async with app.unit():
                connection = await app.container.reader_async_session().connection()
                with suppress(AppDbError, DBAPIError):
                    await connection.exec_driver_sql(sent)
                with suppress(Exception):
                    await connection.run_sync(lambda sync: sync.connection.cursor().execute(INSERT))


@pytest.mark.parametrize(
    "driver", ["psycopg", *(pytest.param(other, marks=pytest.mark.exhaustive) for other in ("asyncpg", "asyncmy", "aiosqlite"))]
)
def test_a_coroutines_reader_writes_nothing(driver: str, request: pytest.FixtureRequest) -> None:
    database = {"psycopg": "postgresql", "asyncpg": "postgresql", "asyncmy": "mariadb"}.get(driver, "sqlite")
    plain = make_url(request.getfixturevalue(FACTORIES[database])())
    url = plain.set(drivername=f"{plain.get_backend_name()}+{driver}").render_as_string(False)
    with running(**on_one_connection(url)) as app:
        app.put("seed")
        app.run(*PREPARED[database])

        async def main() -> None:
            try:
                for statement in STATEMENTS[database]:
                    if "{file}" not in statement:
                        await send_async(app, statement)
                        assert app.names() == ["seed"], statement
            finally:
                await app.container.shutdown_resources()

        asyncio.run(main())
