"""Statements that write although their text does not say so, and statements that change nothing, on each database.

`KINDS` has for each database its tables, functions and views, and both sorts of statements as functions of a session. Nothing
here knows of app_db.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

from sqlalchemy import text
from sqlalchemy.orm import Session

Step = Callable[[Session], object]

# ---- PostgreSQL -----------------------------------------------------------------------------------------------------

POSTGRESQL_SCHEMA = """
CREATE TABLE touched (id serial PRIMARY KEY, name text);
CREATE FUNCTION touch(items) RETURNS text LANGUAGE plpgsql AS $$
    BEGIN INSERT INTO touched (name) VALUES ($1.name); RETURN $1.name; END $$;
CREATE FUNCTION lower(items) RETURNS text LANGUAGE sql AS $$ INSERT INTO touched (name) VALUES ($1.name) RETURNING name $$;
CREATE FUNCTION touch_both(integer, integer) RETURNS boolean LANGUAGE plpgsql AS $$
    BEGIN INSERT INTO touched (name) VALUES ('operator'); RETURN true; END $$;
CREATE OPERATOR === (LEFTARG = integer, RIGHTARG = integer, FUNCTION = touch_both);
CREATE VIEW looking AS SELECT touch_both(1, 2) AS seen;
CREATE FUNCTION harmless(integer) RETURNS integer LANGUAGE sql AS $$ SELECT $1 + 1 $$;
CREATE PROCEDURE touching() LANGUAGE plpgsql AS $$ BEGIN INSERT INTO touched (name) VALUES ('procedure'); END $$;
CREATE TYPE mood AS ENUM ('sad');
CREATE SCHEMA dropped;
CREATE FUNCTION define(definition text) RETURNS integer LANGUAGE plpgsql AS $$ BEGIN EXECUTE definition; RETURN 1; END $$;
"""

HIDDEN_ON_POSTGRESQL = {
    "functional notation": "SELECT i.touch FROM items i",
    "named like a harmless one": "SELECT lower(i) FROM items i",
    "operator": "SELECT 1 === 2",
    "view": "SELECT seen FROM looking",
    "explain": "EXPLAIN ANALYZE SELECT seen FROM looking",
    "procedure": "CALL touching()",
    "block": "DO $$ BEGIN INSERT INTO touched (name) VALUES ('block'); END $$",
    "after a lock": "SELECT i.touch FROM items i WHERE name IN (SELECT name FROM items FOR UPDATE)",
    "notify": "SELECT pg_notify('a', 'b')",
    "held cursor": "DECLARE held CURSOR WITH HOLD FOR SELECT seen FROM looking",
}
"""Statements that write, or have an effect at COMMIT, although none of the words that write stands in most of them."""

LOOKING_ON_POSTGRESQL = {
    "rows": "SELECT name FROM items",
    "lock": "SELECT name FROM items FOR UPDATE",
    "lock a key": "SELECT name FROM items FOR NO KEY UPDATE",
    "share": "SELECT name FROM items FOR SHARE",
    "harmless function": "SELECT harmless(1)",
    "settings": "SELECT current_setting('search_path')",
    "local setting": "SET LOCAL work_mem = '4MB'",
    "advisory lock": "SELECT pg_advisory_xact_lock(1)",
    "block": "DO $$ BEGIN PERFORM 1; END $$",
    "explain": "EXPLAIN SELECT seen FROM looking",
}
"""Statements that change nothing."""

DEFINITIONS_ON_POSTGRESQL = {
    "schema": "CREATE SCHEMA made_{number}",
    "function": "CREATE FUNCTION made_{number}() RETURNS integer LANGUAGE sql AS 'SELECT 1'",
    "domain": "CREATE DOMAIN made_{number} AS integer",
    "cast": "CREATE CAST (mood AS integer) WITH INOUT",
    "publication": "CREATE PUBLICATION made_{number}",
    "renamed value": "ALTER TYPE mood RENAME VALUE 'sad' TO 'glad'",
    "grant on a table": "GRANT SELECT ON items TO pg_monitor",
    "grant on a schema": "GRANT USAGE ON SCHEMA public TO pg_monitor",
    "default privileges": "ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO pg_monitor",
    "large object": "SELECT lo_create(0)",
    "drop a schema": "DROP SCHEMA dropped",
    "drop a function": "DROP FUNCTION harmless(integer)",
    "sequence": "CREATE SEQUENCE made_{number}",
}
"""Statements that change system catalogs, and release their locks on tables at once."""

_DEFERRED_ON_POSTGRESQL = """
CREATE TABLE queued (id serial PRIMARY KEY);
CREATE FUNCTION touch_late() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN INSERT INTO touched (name) VALUES ('deferred'); RETURN NULL; END $$;
CREATE CONSTRAINT TRIGGER late AFTER INSERT ON queued DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION touch_late();
CREATE FUNCTION enqueue() RETURNS integer LANGUAGE plpgsql AS $$ BEGIN INSERT INTO queued DEFAULT VALUES; RETURN 1; END $$;
CREATE VIEW queueing AS SELECT enqueue() AS seen;
"""

# ---- MariaDB --------------------------------------------------------------------------------------------------------

MARIADB_SCHEMA = (
    "CREATE TABLE touched (id INTEGER AUTO_INCREMENT PRIMARY KEY, name VARCHAR(50))",
    """CREATE FUNCTION touch(name VARCHAR(50)) RETURNS INTEGER MODIFIES SQL DATA
       BEGIN INSERT INTO touched (name) VALUES (name); RETURN 1; END""",
    """CREATE FUNCTION `lower`(name VARCHAR(50)) RETURNS INTEGER MODIFIES SQL DATA
       BEGIN INSERT INTO touched (name) VALUES (name); RETURN 1; END""",
    "CREATE FUNCTION harmless(number INTEGER) RETURNS INTEGER DETERMINISTIC BEGIN RETURN number + 1; END",
    "CREATE PROCEDURE touching() BEGIN INSERT INTO touched (name) VALUES ('procedure'); END",
    "CREATE TABLE numbers (id INTEGER PRIMARY KEY, amount INTEGER)",
    "INSERT INTO numbers VALUES (1, 1), (2, 1)",
    "CREATE VIEW looking AS SELECT touch('view') AS seen",
    "CREATE VIEW all_items AS SELECT name FROM items",
)

HIDDEN_ON_MARIADB = {
    "view": "SELECT seen FROM looking",
    "view in a view": "SELECT COUNT(*) FROM (SELECT seen FROM looking UNION ALL SELECT 2) AS both_of_them",
    "condition": "SELECT name FROM items WHERE EXISTS (SELECT 1 FROM looking WHERE seen = 1)",
    "function": "SELECT touch('function')",
    "function of a schema": "SELECT {database} . `touch`('quoted')",
    "named like a harmless one": "SELECT {database} . lower ('lower')",
    "set statement insert": "SET STATEMENT max_statement_time = 9 FOR INSERT INTO touched (name) VALUES ('set')",
    "set statement update": "SET STATEMENT max_statement_time = 9 FOR UPDATE numbers SET amount = amount + 1",
    "set statement delete": "SET STATEMENT max_statement_time = 9 FOR DELETE n FROM numbers AS n WHERE n.id = 2",
    "set statement replace": "SET STATEMENT max_statement_time = 9 FOR REPLACE touched SET name = 'replaced'",
    "set variable": "SET @seen = (SELECT seen FROM looking)",
    "procedure": "CALL touching()",
    "do": "DO touch('do')",
    "immediate": "EXECUTE IMMEDIATE 'INSERT INTO touched (name) VALUES (''immediate'')'",
    "executed comment": "/*!INSERT INTO touched (name) VALUES ('comment') */",
    "analyze": "ANALYZE SELECT seen FROM looking",
    "explained rows": "ANALYZE FORMAT=JSON SELECT seen FROM looking",
}

LOOKING_ON_MARIADB = {
    "rows": "SELECT name FROM items",
    "lock": "SELECT name FROM items FOR UPDATE",
    "share": "SELECT name FROM items LOCK IN SHARE MODE",
    "grouped": "SELECT name, COUNT(*) FROM items GROUP BY name ORDER BY 2",
    "view": "SELECT name FROM all_items",
    "settings": "SELECT @@session.sql_mode",
    "variable": "SET @seen = 1",
    "explain": "EXPLAIN SELECT name FROM items",
    "tables": "SELECT COUNT(*) FROM information_schema.tables WHERE table_schema = DATABASE()",
    "harmless function": "SELECT harmless(1)",
}

# ---- SQLite ---------------------------------------------------------------------------------------------------------

SQLITE_SCHEMA = (
    "CREATE TABLE touched (id INTEGER PRIMARY KEY, name TEXT)",
    "CREATE VIEW looking AS SELECT add_item(hex(randomblob(12))) AS seen",
)
"""`add_item` is a function that each connection defines: `Application.define_writing_function`."""

HIDDEN_ON_SQLITE = {
    "view": "SELECT seen FROM looking",
    "function": "SELECT add_item(hex(randomblob(12)))",
    "condition": "SELECT name FROM items WHERE name = 'seed' AND (SELECT seen FROM looking) > 0",
    "with": "WITH named(name) AS (SELECT 'with') INSERT INTO touched (name) SELECT name FROM named",
    "user version": "PRAGMA user_version = {number}",
    "application id": "PRAGMA application_id = {number}",
    "table": "CREATE TABLE made_{number} (id INTEGER)",
}

LOOKING_ON_SQLITE = {
    "rows": "SELECT name FROM items",
    "grouped": "SELECT name, count(*) FROM items GROUP BY name ORDER BY 2",
    "settings": "PRAGMA foreign_keys",
    "version": "PRAGMA user_version",
    "tables": "SELECT name FROM sqlite_master",
    "explain": "EXPLAIN QUERY PLAN SELECT seen FROM looking",
}

# ---- all of them ----------------------------------------------------------------------------------------------------

OF_NO_ROW = ("UPDATE touched SET name = 'x' WHERE name = 'absent'", "DELETE FROM touched WHERE name = 'absent'")
"""Writes that find no row to write to."""

INSERT = "INSERT INTO touched (name) VALUES ('said')"

_UNCERTAIN = (
    "CREATE TABLE parents (id INTEGER PRIMARY KEY)",
    "CREATE TABLE children (parent INTEGER REFERENCES parents (id) DEFERRABLE INITIALLY DEFERRED)",
)

FAIL_AT_COMMIT = "INSERT INTO children (parent) VALUES (1)"
"""Makes COMMIT fail on PostgreSQL and SQLite. MariaDB has no deferred constraint."""

COUNTED = "SELECT (SELECT count(*) FROM touched), (SELECT count(*) FROM items)"


_DEFINED = (
    "SELECT (SELECT count(*) FROM pg_namespace WHERE nspname LIKE 'made%%'), (SELECT count(*) FROM pg_proc), "
    "(SELECT count(*) FROM pg_type WHERE typname LIKE 'made%%'), (SELECT count(*) FROM pg_largeobject_metadata)"
)

_TABLES = "SELECT count(*) FROM sqlite_master WHERE tbl_name NOT LIKE 'app_db%'"  # the table of decisions is app_db's own


@dataclass(frozen=True)
class Kind:
    """A database, and what a unit may do there."""

    schema: tuple[str, ...]
    hidden: Mapping[str, Step]
    """Writes that the text of the statement does not show, or that are not sent as a statement of the session."""
    looking: Mapping[str, Step]
    """Steps that change nothing."""
    state: tuple[str, ...]
    """Queries whose rows differ after any of the writes."""
    fails_at_commit: bool
    """Whether `FAIL_AT_COMMIT` works."""
    invisible: frozenset[str] = frozenset()
    """Hidden writes after which the state is the same, at the second time at the latest, or that stay on the connection."""


_numbers = count(1)


def _sent(statement: str) -> Step:
    def step(session: Session) -> object:
        if "{" not in statement:
            return session.execute(text(statement))
        database = session.connection().engine.url.database
        return session.execute(text(statement.format(number=next(_numbers), database=database)))

    return step


def _defined(definition: str) -> Step:
    """Return a step that executes a definition of PostgreSQL's in a function."""

    def step(session: Session) -> object:
        return session.execute(text("SELECT define(:definition)"), {"definition": definition.format(number=next(_numbers))})

    return step


def _raw(statement: str) -> Step:
    def step(session: Session) -> object:
        cursor: Any = session.connection().connection.cursor()
        cursor.execute(statement)
        return cursor.close()

    return step


def _raw_many(session: Session) -> None:
    cursor: Any = session.connection().connection.cursor()
    mark = "?" if session.connection().dialect.name == "sqlite" else "%s"
    cursor.executemany(f"INSERT INTO touched (name) VALUES ({mark})", [("one",), ("two",)])
    cursor.close()


def _copied(session: Session) -> None:
    driver: Any = session.connection().connection.driver_connection
    with driver.cursor().copy("COPY touched (name) FROM STDIN") as copy:
        copy.write_row(["copied"])


def undo(step: Step) -> Step:
    """Return a step that takes another one in a savepoint, and rolls back to that."""

    def undone(session: Session) -> None:
        savepoint = session.begin_nested()
        step(session)
        savepoint.rollback()

    return undone


def _steps(statements: Mapping[str, str], **others: Step) -> dict[str, Step]:
    return {name: _sent(statement) for name, statement in statements.items()} | others


def _undone() -> dict[str, Step]:
    view = _sent("SELECT seen FROM looking")
    return {
        "undone": undo(_sent(INSERT)),
        "undone twice": undo(undo(_sent(INSERT))),
        "undone view": undo(view),
        "undone driver": undo(_raw(INSERT)),
    }


KINDS: Mapping[str, Kind] = {
    "postgresql": Kind(
        schema=(POSTGRESQL_SCHEMA, _DEFERRED_ON_POSTGRESQL, *_UNCERTAIN),
        hidden=_steps(
            HIDDEN_ON_POSTGRESQL,
            **{"deferred trigger": _sent("SELECT seen FROM queueing"), "driver": _raw(INSERT), "driver copy": _copied},
            **{kind: _defined(DEFINITIONS_ON_POSTGRESQL[kind]) for kind in ("schema", "function", "domain", "large object")},
            many=_raw_many,
        ),
        looking=_steps(
            LOOKING_ON_POSTGRESQL, **_undone(), **{"undone definition": undo(_defined("CREATE SCHEMA made_{number}"))}
        ),
        state=(COUNTED, _DEFINED),
        fails_at_commit=True,
        invisible=frozenset({"notify", "held cursor"}),
    ),
    "mariadb": Kind(
        schema=MARIADB_SCHEMA,
        hidden=_steps(HIDDEN_ON_MARIADB, driver=_raw(INSERT), many=_raw_many),
        looking=_steps(LOOKING_ON_MARIADB, **_undone()),
        state=(COUNTED, "SELECT sum(amount), count(*) FROM numbers"),
        fails_at_commit=False,
        invisible=frozenset({"set statement delete"}),
    ),
    "sqlite": Kind(
        schema=(*SQLITE_SCHEMA, *_UNCERTAIN),
        hidden=_steps(
            HIDDEN_ON_SQLITE,
            **{"driver": _raw(INSERT), "driver table": _raw("CREATE TABLE IF NOT EXISTS made (id INTEGER)")},
            many=_raw_many,
        ),
        looking=_steps(LOOKING_ON_SQLITE, **_undone()),
        state=(COUNTED, "PRAGMA user_version", "PRAGMA application_id", _TABLES),
        fails_at_commit=True,
        invisible=frozenset({"driver table"}),
    ),
}
"""By the name of the database."""
