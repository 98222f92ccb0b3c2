"""How units of an isolated test share a connection to PostgreSQL."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, cast

from app_db._compat.psycopg import libpq_of
from app_db._databases.database import Rows, Say, SharingRules, new_mark
from app_db._databases.statements import bare_texts
from app_db.errors import CannotIsolate

if TYPE_CHECKING:
    from sqlalchemy.engine.interfaces import DBAPIConnection
    from sqlalchemy.pool import PoolProxiedConnection


class PostgreSQLSharing(SharingRules):
    """How units of an isolated test share a connection to PostgreSQL."""

    syntax = "postgresql"
    fails_as_a_whole = True
    _prepares = re.compile(r"PREPARE\s+TRANSACTION\b", re.IGNORECASE)

    def refuse(self, name: str, statement: str) -> None:
        super().refuse(name, statement)
        if any(map(self._prepares.match, bare_texts(statement, self.syntax))):
            raise CannotIsolate(
                name, "PREPARE TRANSACTION", "Leave it to the unit of work, or take the test out of the isolation"
            )

    def around(self, mark: str, read_only: bool) -> tuple[list[str], list[str], list[str]]:
        back = [f"ROLLBACK TO SAVEPOINT {mark}", f"RELEASE SAVEPOINT {mark}"]
        if read_only:  # this ends with the savepoint
            return [f"SAVEPOINT {mark}", "SET LOCAL transaction_read_only = on"], back, back
        return [f"SAVEPOINT {mark}"], back[1:], back

    def fail(self, say: Say) -> None:
        with suppress(Exception):
            say("SELECT 1/0")

    def check_deferred(self, say: Say) -> None:
        mark = new_mark()  # undone afterwards: later units say themselves when their constraints are checked
        checks = [
            f"SAVEPOINT {mark}",
            "SET CONSTRAINTS ALL IMMEDIATE",
            f"ROLLBACK TO SAVEPOINT {mark}",
            f"RELEASE SAVEPOINT {mark}",
        ]
        say(*checks)

    def execute(self, dbapi_connection: DBAPIConnection | PoolProxiedConnection, *statements: str) -> Rows:
        sends_several = statements and libpq_of(dbapi_connection) is not None  # psycopg sends them in one go
        return super().execute(dbapi_connection, *(("; ".join(statements),) if sends_several else statements))

    def as_sent(self, statement: str) -> str:
        """Return the statement with locks of the session in place of those of the transaction, which nothing can give back."""
        return statement if "advisory_xact" not in statement else _XACT_LOCK.sub(r"\1advisory_lock", statement)

    def given_back(self, statement: str, parameters: object, say: Say) -> Mapping[str, str]:
        if _MAY_SET.search(statement) is None:
            return {}
        back = {name: _setting(name, value) for name, value in _values(_names_set(statement, parameters), say)}
        if _SET_CONSTRAINTS.search(statement):
            back["constraints"] = _CONSTRAINTS_AS_DEFINED
        if _XACT_LOCK.search(statement):
            back["locks"] = _UNLOCK_OTHERS.format(kept=", ".join(f"'{lock}'" for (lock,) in say(_LOCKS)) or "''")
        return back


# ---- what is given back when a transaction ends --------------------------------------------------------------------------

_XACT_LOCK = re.compile(r"\b(pg_(?:try_)?)advisory_xact_lock", re.IGNORECASE)
_SET_LOCAL = re.compile(r"\bSET\s+LOCAL\s+(?:TIME\s+(?P<zone>ZONE)|\"?(?P<name>[\w.]+)\"?)", re.IGNORECASE)
_OTHER_NAMES = {"schema": "search_path", "names": "client_encoding"}
_COMMENT = re.compile(r"/\*.*?\*/|--[^\n]*", re.DOTALL)
_SET_CONSTRAINTS = re.compile(r"\bSET\s+CONSTRAINTS\b", re.IGNORECASE)
_SET_CONFIG = re.compile(r"\bset_config\s*\(", re.IGNORECASE)
_MAY_SET = re.compile(r"\bSET\b[^;]*?\b(?:LOCAL|CONSTRAINTS)\b|\bset_config\b|advisory_xact_lock", re.IGNORECASE)
_LITERAL = re.compile(r"'([^']*)'")
_SETTING_NAME = re.compile(r"[A-Za-z_]\w*(?:\.\w+)*")
_IS_LOCAL = re.compile(r",\s*(?:is_local\s*(?:=>|:=)\s*)?(?:true|'t(?:rue)?')\s*(?:::\s*bool(?:ean)?\s*)?\)", re.IGNORECASE)

_LOCKS = """
SELECT concat_ws(':', classid, objid, objsubid, mode) FROM pg_catalog.pg_locks
WHERE locktype = 'advisory' AND granted AND pid = pg_backend_pid()
"""

_UNLOCK_OTHERS = """
DO $app_db$
DECLARE
    held record;
    usual text := current_setting('client_min_messages');
BEGIN
    PERFORM set_config('client_min_messages', 'error', true);  -- the last one of each lock warns that there is none
    FOR held IN
        SELECT classid::bigint AS first, objid::bigint AS second, objsubid, mode FROM pg_catalog.pg_locks
        WHERE locktype = 'advisory' AND granted AND pid = pg_backend_pid()
        AND concat_ws(':', classid, objid, objsubid, mode) NOT IN ({kept})
    LOOP
        WHILE CASE
            WHEN held.objsubid = 1 AND held.mode = 'ExclusiveLock' THEN pg_advisory_unlock(held.first << 32 | held.second)
            WHEN held.objsubid = 1 THEN pg_advisory_unlock_shared(held.first << 32 | held.second)
            WHEN held.mode = 'ExclusiveLock' THEN pg_advisory_unlock(
                (held.first::bit(32))::integer, (held.second::bit(32))::integer)
            ELSE pg_advisory_unlock_shared((held.first::bit(32))::integer, (held.second::bit(32))::integer)
        END LOOP
        END LOOP;
    END LOOP;
    PERFORM set_config('client_min_messages', usual, true);
END
$app_db$
"""

_CONSTRAINTS_AS_DEFINED = """
DO $app_db$
DECLARE
    deferred text := (
        SELECT string_agg(DISTINCT quote_ident(schema.nspname) || '.' || quote_ident(found.conname), ', ')
        FROM pg_catalog.pg_constraint AS found JOIN pg_catalog.pg_namespace AS schema ON schema.oid = found.connamespace
        WHERE found.condeferred
    );
BEGIN
    SET CONSTRAINTS ALL IMMEDIATE;
    IF deferred IS NOT NULL THEN
        EXECUTE 'SET CONSTRAINTS ' || deferred || ' DEFERRED';
    END IF;
END
$app_db$
"""


def _names_set(statement: str, parameters: object) -> Iterator[str]:
    """Yield the names of settings that a statement may set for the length of the transaction."""
    for found in _SET_LOCAL.finditer(_COMMENT.sub(" ", statement)):
        yield "TimeZone" if found["zone"] else _OTHER_NAMES.get(found["name"].lower(), found["name"])
    if _SET_CONFIG.search(statement) is None:
        return
    given = list(parameters.values()) if isinstance(parameters, Mapping) else list(cast("Iterable[object]", parameters or ()))
    if not (_IS_LOCAL.search(statement) or True in [each for each in given if isinstance(each, bool)]):
        return  # it is set for the session
    for text in [*_LITERAL.findall(statement), *(each for each in given if isinstance(each, str))]:
        if _SETTING_NAME.fullmatch(text):
            yield text


def _values(names: Iterable[str], say: Say) -> Iterator[tuple[str, str]]:
    """Yield the settings of these names with their values. Others are no settings, but a setting of an extension may be new."""
    for name in dict.fromkeys(names):
        ((value,),) = say(f"SELECT current_setting('{name}', true)")
        if value is not None or "." in name:
            yield name, str(value or "")


def _setting(name: str, value: str) -> str:
    quoted = value.replace("'", "''")
    return f"SELECT set_config('{name}', '{quoted}', true)"
