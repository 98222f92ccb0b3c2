"""What a statement does to the data, as far as its text shows.

Durability does not depend on it, because writable sessions always commit. It decides which branches take part in an atomic
commit, and which statements a read-only session refuses before they are sent. If the text does not tell, the answer is
`MAY_WRITE`, which is safe for both.
"""

from __future__ import annotations

import re
from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple

from app_db._databases.readings import Syntax, readings


class Effect(IntEnum):
    """What a statement does to the data. The effect of a branch is the highest of its statements."""

    READS = 0
    LOCKS = 1
    MAY_WRITE = 2
    WRITES = 3


_QUOTED_NAME = re.compile(r'"\w*"')
_SEVERAL = re.compile(r";\s*[^\s;]")
_DOUBTFUL = re.compile(r";\s*[^\s;]|\\")
_FIRST_WORD = re.compile(r"[\s(]*([A-Za-z]+)\b")
_CALL = re.compile(r"((?:\.\s*)?[\w$.\]]+)\s*\(")
_FOR = re.compile(r"\bFOR\b", re.IGNORECASE)
_SET_STATEMENT = re.compile(r"\s*SET\s+STATEMENT\b", re.IGNORECASE)  # MariaDB's, FOR any statement

_CONTROL = frozenset(
    {"BEGIN", "START", "COMMIT", "ROLLBACK", "SAVEPOINT", "RELEASE", "SHOW", "DESCRIBE", "DESC", "USE", "PRAGMA"}
)
_QUERY = frozenset({"SELECT", "WITH", "VALUES", "TABLE", "EXPLAIN", "SET"})
_WRITE = frozenset(
    """
    INSERT UPDATE DELETE MERGE REPLACE UPSERT TRUNCATE LOAD CREATE ALTER DROP RENAME GRANT REVOKE COMMENT
    REINDEX VACUUM CLUSTER REFRESH IMPORT
    """.split()
)
_WRITE_INSIDE_A_QUERY = re.compile(r"\b(?:UPDATE|DELETE\s+FROM|INTO)\b", re.IGNORECASE)
_LOCK_CLAUSE = re.compile(r"\bFOR\s+(?:NO\s+KEY\s+)?(?:UPDATE|SHARE|KEY\s+SHARE)\b|\bLOCK\s+IN\s+SHARE\s+MODE\b", re.IGNORECASE)

# Words before a parenthesis that are no functions, and functions that are known not to write.
_HARMLESS = frozenset(
    """
    ALL AND ANY AS BETWEEN BY CASE DISTINCT ELSE EXCEPT EXISTS FILTER FROM GROUP HAVING IN INTERSECT IS JOIN
    LATERAL LIKE LIMIT MATERIALIZED NOT OFFSET ON OR ORDER OVER PARTITION RECURSIVE SELECT SOME THEN UNION
    USING VALUES WHEN WHERE WINDOW WITH WITHIN
    ABS ARRAY ARRAY_AGG AVG CAST CEIL CEILING CHAR CHAR_LENGTH COALESCE CONCAT CONCAT_WS CONNECTION_ID COUNT
    CUME_DIST CURRENT_DATE CURRENT_TIME CURRENT_TIMESTAMP DATE DATETIME DATE_PART DATE_TRUNC DAY DECIMAL
    DENSE_RANK EXP EXTRACT FIRST_VALUE FLOOR GENERATE_SERIES GREATEST GROUPING GROUP_CONCAT IFNULL IIF INITCAP
    JSONB_AGG JSON_AGG JSON_ARRAY JSON_EXTRACT JSON_OBJECT JULIANDAY LAG LAST_VALUE LEAD LEAST LEFT LENGTH LN
    LOG LOWER LPAD LTRIM MAX MD5 MIN MOD MONTH NOW NTH_VALUE NTILE NULLIF NUMERIC OCTET_LENGTH PERCENT_RANK
    PG_BACKEND_PID PG_SLEEP POSITION POW POWER RANDOM RANK REGEXP_REPLACE REPLACE RIGHT ROUND ROW ROWS
    ROW_NUMBER RPAD RTRIM SIGN SLEEP SQRT STDDEV STRFTIME STRING_AGG SUBSTR SUBSTRING SUM TIME TIMESTAMP
    TO_CHAR TO_DATE TO_TIMESTAMP TRIM TRUNC TYPEOF UNNEST UPPER VARCHAR VARIANCE VERSION YEAR
    """.split()
)


_VERB = r"""(?:(?P<commit>COMMIT\b|END\b(?!\s+(?:IF|CASE|LOOP|WHILE|REPEAT|FOR)\b))|(?P<prepare>PREPARE\s+TRANSACTION\b)
    |(?P<rollback>(?:ROLLBACK|ABORT)\b(?!\s+(?:(?:WORK|TRANSACTION)\s+)?TO\b))
    |(?P<begin>START\s+TRANSACTION\b|BEGIN\b(?=\s*(?:;|\Z|(?:WORK|TRANSACTION|ISOLATION|READ|DEFERRED|IMMEDIATE|EXCLUSIVE)\b
    |(?:NOT\s+)?DEFERRABLE\b))))"""
_FIRST_VERB = re.compile(_VERB, re.IGNORECASE | re.VERBOSE)
_LATER_VERB = re.compile(r";[\s;]*" + _VERB, re.IGNORECASE | re.VERBOSE)
_BEFORE_BODY = re.compile(
    r"""\A(?:CREATE\s+(?:OR\s+REPLACE\s+)?(?:DEFINER\s*=\s*\S+\s+)?(?:TEMP(?:ORARY)?\s+|CONSTRAINT\s+|AGGREGATE\s+)*
    (?:TRIGGER|PROCEDURE|FUNCTION|EVENT|PACKAGE)\b[^;]*?|)\b(?=BEGIN\b)""",
    re.IGNORECASE | re.VERBOSE,
)
_BODY_EDGE = re.compile(r"\b(?:(?P<begin>BEGIN|CASE)|END(?!\s+(?:IF|LOOP|WHILE|REPEAT|FOR)\b)(?:\s+CASE)?)\b", re.IGNORECASE)


def _without_body(bare: str) -> str:
    """Return a reading without the body of the routine or block that it begins with, from BEGIN to the END of that BEGIN."""
    start = _BEFORE_BODY.match(bare)
    if start is None:
        return bare
    is_open = 0
    for edge in _BODY_EDGE.finditer(bare, start.end()):
        is_open += 1 if edge["begin"] else -1
        if is_open == 0:
            return f"{bare[: start.end()]} {bare[edge.end() :]}"
    return bare


@lru_cache(maxsize=2048)
def bare_texts(statement: str, syntax: Syntax) -> tuple[str, ...]:
    """Return the readings of a text from its first word on, and what MariaDB's `SET STATEMENT … FOR` executes."""
    found = [read.strip(" \t\r\n;(") for read in readings(statement, syntax)]
    if syntax in ("mysql", "any"):
        found += [
            read[clause.end() :].lstrip(" \t\r\n(")
            for read in found
            if _SET_STATEMENT.match(read)
            for clause in _FOR.finditer(read)
        ]
    return tuple(found)


def without_names(bare: str) -> str:
    """Return a reading with `quoted_name` for each quoted name, so that no name in quotes looks like a word of SQL."""
    return _QUOTED_NAME.sub(" quoted_name", bare)


@lru_cache(maxsize=2048)
def transaction_verb(statement: str, syntax: Syntax = "any") -> str | None:
    """Return `commit`, `rollback`, `prepare` or `begin` if a statement of the text does that to the whole transaction."""
    for bare in bare_texts(statement, syntax):
        found = _FIRST_VERB.match(bare)
        if found is None and ";" in bare:
            found = _LATER_VERB.search(_without_body(without_names(bare)))
        if found is not None:
            return found.lastgroup
    return None


class SavepointVerb(NamedTuple):
    """A statement that takes a savepoint, releases it, or rolls back to it. Databases read names without case."""

    verb: str
    name: str


_SAVEPOINT = re.compile(
    r"""(?:SAVEPOINT\s+(?P<take>\S+)|RELEASE\s+(?:SAVEPOINT\s+)?(?P<release>\S+)
    |ROLLBACK\s+(?:(?:WORK|TRANSACTION)\s+)?TO\s+(?:SAVEPOINT\s+)?(?P<undo>\S+))\s*;?\s*\Z""",
    re.IGNORECASE | re.VERBOSE,
)


@lru_cache(maxsize=2048)
def savepoint_verb(statement: str, syntax: Syntax = "any") -> SavepointVerb | None:
    """Return which savepoint a statement takes, releases or rolls back to."""
    for bare in bare_texts(statement, syntax):
        found = _SAVEPOINT.match(bare)
        if found is not None and found.lastgroup is not None:
            return SavepointVerb(found.lastgroup, found[found.lastgroup].strip('";').lower())
    return None


_CALLS_CODE = re.compile(r"(?:CALL|EXECUTE|BEGIN|SET\s+STATEMENT|IF|CASE|FOR|LOOP|REPEAT|WHILE)\b", re.IGNORECASE)


@lru_cache(maxsize=2048)
def calls_code(statement: str, syntax: Syntax = "any") -> bool:
    """Return whether a statement executes code of the server, which may end the transaction."""
    return any(map(_CALLS_CODE.match, bare_texts(statement, syntax)))


_WRITES_UNNOTICED = re.compile(r"\bNOTIFY\b|\bpg_notify\b|\bWITH\s+HOLD\b|\bdblink", re.IGNORECASE)


@lru_cache(maxsize=2048)
def writes_unnoticed(statement: str, syntax: Syntax = "any") -> bool:
    """Return whether a statement has an effect that its database does not count as a write of the transaction.

    The words count in literals too: one may be the body of a block.
    """
    return any(_WRITES_UNNOTICED.search(text) for text in (statement, *readings(statement, syntax)))


@lru_cache(maxsize=2048)
def locks_rows(statement: str, syntax: Syntax = "any") -> bool:
    """Return whether a statement locks rows that it reads."""
    return any(_LOCK_CLAUSE.search(text) for text in (statement, *readings(statement, syntax)))


_LIFTS_READ_ONLY = re.compile(r"\bREAD\s+WRITE\b|read_only\b", re.IGNORECASE)
_SETS_BY_FUNCTION = re.compile(r"\bset_config\"?\s*\(", re.IGNORECASE)

_READER_WORDS = frozenset(
    """
    SELECT WITH VALUES TABLE EXPLAIN SHOW DESCRIBE DESC FETCH MOVE CLOSE DECLARE COPY PRAGMA SAVEPOINT RELEASE ROLLBACK HELP
    UNLISTEN
    """.split()
)
"""The first words of statements that only read."""
_HARMLESS_SET = re.compile(
    r"SET\s+(?:LOCAL\s+\w+\s*=|TRANSACTION\s+READ\s+ONLY\s*\Z)",
    re.IGNORECASE,
)
_HARMLESS_ASSIGNMENT = re.compile(  # LOCAL is another word for SESSION there
    r"""@[\w.$"']|(?:(?:SESSION|LOCAL|GLOBAL)\s+)?max_(?:statement|execution)_time\s*:?=|TRANSACTION\s+READ\s+ONLY\s*\Z""",
    re.IGNORECASE,
)
_LIFTS_QUERY_ONLY = re.compile(r"PRAGMA\s.*query_only.*[=(]", re.IGNORECASE | re.DOTALL)
_ANALYZED_QUERY = re.compile(r"ANALYZE\s+(?:FORMAT\b|SELECT\b)", re.IGNORECASE)  # MariaDB's EXPLAIN ANALYZE
_HARMLESS_PRAGMA = re.compile(
    r"""PRAGMA\s+(?:"?\w+"?\s*\.\s*)?(?:
    (?!incremental_vacuum\b|optimize\b|shrink_memory\b|wal_checkpoint\b)\w+
    |(?:table_(?:x?info|list)|index_(?:x?info|list)|foreign_key_(?:list|check)|(?:integrity|quick)_check)\s*\(\s*"?\w+"?\s*\)
    )\s*;?\s*\Z""",
    re.IGNORECASE | re.VERBOSE,
)
_ALLOWED_TO_READERS = re.compile(
    r"""\b(?:pg_(?:try_)?advisory_lock(?:_shared)?|get_lock|load_extension|pg_notify|dblink_(?:exec|send_query)
    |lo_(?:creat|create|export|from_bytea|import|put|truncate|truncate64|unlink)|lowrite|pg_file_(?:rename|sync|unlink|write)
    |pg_(?:cancel|terminate)_backend|pg_reload_conf|pg_rotate_logfile|pg_switch_wal|pg_promote|pg_backup_(?:start|stop)
    |pg_create_(?:restore_point|(?:logical|physical)_replication_slot)|pg_(?:drop|copy_\w+)_replication_slot
    |pg_replication_(?:slot_advance|origin_\w+)|pg_logical_(?:emit_message|slot_get_(?:binary_)?changes)|pg_stat_reset\w*
    |pg_import_system_collations|pg_wal_replay_(?:pause|resume))"?\s*\(
    |\bU&"|\bINTO\s+(?:OUTFILE|DUMPFILE)\b|\bWITH\s+HOLD\b""",
    re.IGNORECASE | re.VERBOSE,
)
"""What databases let a read-only session do although it does more than read, or stays on the pooled connection."""
_EXPLAINED_WRITE = re.compile(  # PostgreSQL executes it, also in a read-only transaction
    r"EXPLAIN\b(?:\s*\([^)]*\)|\s+(?:ANALY[SZ]E|VERBOSE)\b)*\s*(?:CREATE|DECLARE|EXECUTE|REFRESH)\b|EXPLAIN\b.*\bINTO\b",
    re.IGNORECASE | re.DOTALL,
)
_COPY_OUT = re.compile(r"COPY\b.*\sTO\s+STDOUT\s*(?:\(|WITH\b|;|\Z)", re.IGNORECASE | re.DOTALL)


@lru_cache(maxsize=2048)
def refused_to_readers(statement: str, syntax: Syntax = "any") -> str | None:
    """Return what a read-only session refuses about a statement, or None if the statement is left to the database.

    It refuses a statement whose first word does not only read (SET, DO, CALL, RESET, PREPARE), several statements in one text,
    the words by which a session becomes writable, what databases let a read-only session do although it is more than reading,
    and names that hide their letters: `U&"…"`.
    """
    return next(filter(None, (_refused(bare, syntax) for bare in bare_texts(statement, syntax))), None)


def _refused(bare: str, syntax: Syntax) -> str | None:
    first = _FIRST_WORD.match(bare)
    word = first.group(1).upper() if first else ""
    if (
        word in ("RESET", "DISCARD")
        or _SETS_BY_FUNCTION.search(bare)
        or (word in ("SET", "BEGIN", "START") and _LIFTS_READ_ONLY.search(_KEEPS_READ_ONLY.sub(" ", bare)))
        or (word == "PRAGMA" and _LIFTS_QUERY_ONLY.match(bare))
    ):
        return "Lifting the protection"
    reads = word in _READER_WORDS
    if word == "SET":
        reads = _is_harmless_set(bare, syntax)
    elif word == "ANALYZE":
        reads = _ANALYZED_QUERY.match(bare) is not None
    elif word == "EXPLAIN":
        reads = not _EXPLAINED_WRITE.match(without_names(bare))
    elif word == "COPY":
        reads = _COPY_OUT.match(without_names(bare)) is not None
    elif word == "PRAGMA":
        reads = _HARMLESS_PRAGMA.match(bare) is not None
    reads = reads and not _SEVERAL.search(bare) and not _ALLOWED_TO_READERS.search(bare)
    return None if reads else "A statement that may do more than read"


_KEEPS_READ_ONLY = re.compile(r"TRANSACTION\s+READ\s+ONLY", re.IGNORECASE)
_SET = re.compile(r"SET\b\s*", re.IGNORECASE)
_IN_PARENTHESES = re.compile(r"\([^()]*\)")


def assignments(bare: str) -> list[str]:
    """Return the parts of a SET statement of MariaDB or MySQL, without what is in parentheses; none for another statement."""
    found = _SET.match(bare)
    if found is None:
        return []
    outer, remaining = "", bare[found.end() :]
    while outer != remaining:
        outer, remaining = remaining, _IN_PARENTHESES.sub(" ", remaining)
    return [part.strip() for part in outer.split(",")]


def _is_harmless_set(bare: str, syntax: Syntax) -> bool:
    if syntax != "mysql" and _HARMLESS_SET.match(bare):
        return True
    return syntax != "postgresql" and all(map(_HARMLESS_ASSIGNMENT.match, assignments(bare)))


def is_harmless(function: str) -> bool:
    """Return whether a function of that name is known not to write."""
    return function.upper() in _HARMLESS


@lru_cache(maxsize=2048)
def effect_of(statement: str, syntax: Syntax = "any") -> Effect:
    """Return what `statement` does. A query that calls an unknown function may write."""
    return max(_effect(without_names(read)) for read in readings(statement, syntax))


def _effect(text: str) -> Effect:
    first = _FIRST_WORD.match(text)
    keyword = first.group(1).upper() if first else ""
    if keyword in _WRITE:
        return Effect.WRITES
    if keyword not in _CONTROL | _QUERY or _DOUBTFUL.search(text) or _SET_STATEMENT.match(text):
        return Effect.MAY_WRITE
    return Effect.READS if keyword in _CONTROL else _effect_of_query(text)


def _effect_of_query(text: str) -> Effect:
    if _LOCK_CLAUSE.search(text):
        text, effect = _LOCK_CLAUSE.sub(" ", text), Effect.LOCKS
    else:
        effect = Effect.READS
    if _WRITE_INSIDE_A_QUERY.search(text):
        return Effect.MAY_WRITE
    if any(name.upper() not in _HARMLESS for name in _CALL.findall(text)):
        return Effect.MAY_WRITE
    return effect
