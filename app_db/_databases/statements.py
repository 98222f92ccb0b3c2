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


class Effect(IntEnum):
    """What a statement does to the data. The effect of a branch is the highest of its statements."""

    READS = 0
    LOCKS = 1
    MAY_WRITE = 2
    WRITES = 3


# Comments, literals and quoted names that end at the same place in all databases.
_QUOTED = re.compile(
    r"""(?:^[ \t]*--|--(?=[\s-]|\Z))[^\n]*|/\*(?!M?!)(?:(?!/\*).)*?\*/|'(?:[^'\\]|''|\\[^'])*'"""
    r"""|(?P<name>"(?:[^"\\]|""|\\[^"])*"|`[^`]*`)""",
    re.DOTALL | re.MULTILINE,
)
# The beginning of any other comment, literal or name, which may hide something; and a second statement.
_DOUBTFUL = re.compile(r"""['"`\\]|--|/\*|\#(?!>)|\$\w*\$|;\s*[^\s;]""")
_STRAY_QUOTE = re.compile(r"""['"`\\]|/\*|\#(?!>)|\$\w*\$""")
_FIRST_WORD = re.compile(r"[\s(]*([A-Za-z]+)\b")
_CALL = re.compile(r"([\w$.\]]+)\s*\(")

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


_CONTROLS_TRANSACTION = re.compile(
    r"""(?:--[^\n]*\n|/\*(?!M?!).*?\*/|[\s;])*
    (?:(?P<commit>COMMIT\b|END\s*(?:WORK|TRANSACTION)?\s*;?\s*\Z)
    |(?P<rollback>(?:ROLLBACK|ABORT)\b(?!\s+(?:(?:WORK|TRANSACTION)\s+)?TO\b))
    |(?P<begin>START\s+TRANSACTION\b|BEGIN\s*(?:WORK|TRANSACTION)?\s*;?\s*\Z))""",
    re.DOTALL | re.IGNORECASE | re.VERBOSE,
)


@lru_cache(maxsize=2048)
def transaction_verb(statement: str) -> str | None:
    """Return `commit`, `rollback` or `begin` if a statement does that to the whole transaction, else None."""
    found = _CONTROLS_TRANSACTION.match(statement)
    return found.lastgroup if found else None


_DOLLAR_QUOTED = re.compile(r"\$(\w*)\$.*?\$\1\$", re.DOTALL)
_LATER_CONTROL = re.compile(
    r""";(?:--[^\n]*\n|/\*(?!M?!).*?\*/|[\s;])*
    (?:(?P<commit>COMMIT|END|PREPARE\s+TRANSACTION)|(?P<rollback>(?:ROLLBACK|ABORT)(?!\s+(?:(?:WORK|TRANSACTION)\s+)?TO\b))
    |(?P<begin>BEGIN|START\s+TRANSACTION))\b""",
    re.DOTALL | re.IGNORECASE | re.VERBOSE,
)
_HAS_A_BODY = re.compile(r"\s*CREATE\b[^;]*\b(?:TRIGGER|PROCEDURE|FUNCTION|EVENT|PACKAGE)\b", re.IGNORECASE)


@lru_cache(maxsize=2048)
def later_transaction_verb(statement: str) -> str | None:
    """Return what a statement after the first one in a text does to the whole transaction: `commit`, `rollback` or `begin`.

    Where a text is quoted in a way that databases read differently, what is inside the quotes counts as well.
    """
    if ";" not in statement or _HAS_A_BODY.match(statement):
        return None
    text = _DOLLAR_QUOTED.sub(" ", statement)
    plain = _QUOTED.sub(_without_content, text)
    found = _LATER_CONTROL.search(text if "\\" in text or _STRAY_QUOTE.search(plain) else plain)
    return found.lastgroup if found else None


class SavepointVerb(NamedTuple):
    """A statement that takes a savepoint, or rolls back to one."""

    name: str
    undoes: bool


_SAVEPOINT = re.compile(
    r"""\s*(?:SAVEPOINT\s+(?P<taken>\S+)
    |ROLLBACK\s+(?:(?:WORK|TRANSACTION)\s+)?TO\s+(?:SAVEPOINT\s+)?(?P<undone>\S+))\s*;?\s*\Z""",
    re.IGNORECASE | re.VERBOSE,
)


@lru_cache(maxsize=2048)
def savepoint_verb(statement: str) -> SavepointVerb | None:
    """Return which savepoint a statement takes or rolls back to, if it does."""
    found = _SAVEPOINT.match(statement)
    return None if found is None else SavepointVerb((found["taken"] or found["undone"]).rstrip(";"), found["undone"] is not None)


_WRITES_UNNOTICED = re.compile(r"\bNOTIFY\b|\bpg_notify\b|\bWITH\s+HOLD\b|\bdblink", re.IGNORECASE)


@lru_cache(maxsize=2048)
def writes_unnoticed(statement: str) -> bool:
    """Return whether a statement has an effect that its database does not count as a write of the transaction."""
    return _WRITES_UNNOTICED.search(statement) is not None


@lru_cache(maxsize=2048)
def locks_rows(statement: str) -> bool:
    """Return whether a statement locks rows that it reads."""
    return _LOCK_CLAUSE.search(statement) is not None


_LIFTS_READ_ONLY = re.compile(
    r"""\b(?:SET|START|BEGIN)\b[^;]*(?:\bREAD\s+WRITE\b|read_only\b)
    |\bset_config\s*\(\s*'\w*read_only
    |\b(?:RESET|DISCARD)\s+ALL\b|\bRESET\s+\w*read_only\b
    |\bquery_only\b\s*[=(]""",
    re.IGNORECASE | re.VERBOSE,
)


@lru_cache(maxsize=2048)
def lifts_read_only(statement: str) -> bool:
    """Return whether `statement` would make a read-only connection or transaction writable."""
    return _LIFTS_READ_ONLY.search(statement) is not None


def is_harmless(function: str) -> bool:
    """Return whether a function of that name is known not to write."""
    return function.upper() in _HARMLESS


@lru_cache(maxsize=2048)
def effect_of(statement: str) -> Effect:
    """Return what `statement` does. A query that calls an unknown function may write."""
    text = _QUOTED.sub(_without_content, statement)
    first = _FIRST_WORD.match(text)
    keyword = first.group(1).upper() if first else ""
    if keyword in _WRITE:
        return Effect.WRITES
    if keyword not in _CONTROL | _QUERY or _DOUBTFUL.search(text):
        return Effect.MAY_WRITE
    return Effect.READS if keyword in _CONTROL else _effect_of_query(text)


def _without_content(quoted: re.Match[str]) -> str:
    return " quoted_name" if quoted["name"] else " "


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
