"""What a statement does to the data, read off its text.

Nothing is made durable by this: writable sessions always commit. It decides who takes part in an atomic commit, and
which statements a read-only session refuses before they are sent. Where the text alone can't tell, the answer is the
one that is safe for the caller: `MAY_WRITE`.
"""

from __future__ import annotations

import re
from enum import IntEnum
from functools import lru_cache


class Effect(IntEnum):
    """What a branch, or one statement of it, does to the data; a branch has the highest of its statements'."""

    READS = 0
    LOCKS = 1
    MAY_WRITE = 2
    WRITES = 3


_COMMENT_OR_LITERAL = re.compile(r"--[^\n]*|/\*.*?\*/|'(?:[^']|'')*'", re.DOTALL)
_WORD = re.compile(r"[A-Za-z_][A-Za-z_0-9$]*")
_CALL = re.compile(r"([A-Za-z_][A-Za-z_0-9$.\"]*)\s*\(")

_CONTROL = frozenset({"BEGIN", "START", "COMMIT", "ROLLBACK", "SAVEPOINT", "RELEASE", "SET", "SHOW", "DESCRIBE", "DESC", "USE", "PRAGMA"})
_QUERY = frozenset({"SELECT", "WITH", "VALUES", "TABLE", "EXPLAIN"})
_WRITE = frozenset({"INSERT", "UPDATE", "DELETE", "MERGE", "REPLACE", "UPSERT", "TRUNCATE", "COPY", "LOAD", "CREATE", "ALTER", "DROP",
                    "RENAME", "GRANT", "REVOKE", "COMMENT", "REINDEX", "VACUUM", "CLUSTER", "REFRESH", "IMPORT"})  # fmt: skip
_WRITE_INSIDE_A_QUERY = re.compile(r"\b(?:INSERT\s+INTO|UPDATE\s+\S+\s+SET|DELETE\s+FROM|MERGE\s+INTO|INTO)\b", re.IGNORECASE)
_LOCK_CLAUSE = re.compile(r"\bFOR\s+(?:NO\s+KEY\s+)?(?:UPDATE|SHARE|KEY\s+SHARE)\b|\bLOCK\s+IN\s+SHARE\s+MODE\b", re.IGNORECASE)

# A name before a parenthesis that is no function, or a function known to leave the data alone.
_HARMLESS = frozenset(
    "ALL AND ANY AS BETWEEN BY CASE DISTINCT ELSE EXCEPT EXISTS FILTER FROM GROUP HAVING IN INTERSECT IS JOIN LATERAL LIKE "
    "LIMIT MATERIALIZED NOT OFFSET ON OR ORDER OVER PARTITION RECURSIVE SELECT SOME THEN UNION USING VALUES WHEN WHERE WINDOW WITH WITHIN "
    "ABS ARRAY ARRAY_AGG AVG CAST CEIL CEILING CHAR CHAR_LENGTH COALESCE CONCAT CONCAT_WS COUNT CUME_DIST CURRENT_DATE CURRENT_TIME "
    "CURRENT_TIMESTAMP DATE DATE_PART DATE_TRUNC DATETIME DECIMAL DENSE_RANK EXP EXTRACT FIRST_VALUE FLOOR GENERATE_SERIES GREATEST "
    "GROUPING GROUP_CONCAT IFNULL IIF INITCAP JSON_AGG JSON_ARRAY JSON_EXTRACT JSON_OBJECT JSONB_AGG JULIANDAY LAG LAST_VALUE LEAD LEAST "
    "LEFT LENGTH LN LOG LOWER LPAD LTRIM MAX MD5 MIN MOD NOW NTH_VALUE NTILE NULLIF NUMERIC OCTET_LENGTH PERCENT_RANK POSITION POW "
    "POWER RANDOM RANK REGEXP_REPLACE REPLACE RIGHT ROUND ROW ROW_NUMBER ROWS RPAD RTRIM SIGN SQRT STDDEV STRFTIME STRING_AGG SUBSTR "
    "SUBSTRING SUM TIME TIMESTAMP TO_CHAR TO_DATE TO_TIMESTAMP TRIM TRUNC TYPEOF UNNEST UPPER VARCHAR VARIANCE VERSION YEAR MONTH DAY "
    "PG_BACKEND_PID CONNECTION_ID PG_SLEEP SLEEP".split()
)


@lru_cache(maxsize=2048)
def effect_of(statement: str) -> Effect:
    """Return what `statement` does. A query that calls a function nobody vouches for may write."""
    text = _COMMENT_OR_LITERAL.sub(" ", statement)
    first = _WORD.search(text)
    keyword = first.group().upper() if first else ""
    if keyword in _WRITE:
        return Effect.WRITES
    if keyword in _CONTROL:
        return Effect.READS
    if keyword not in _QUERY:
        return Effect.MAY_WRITE
    return _effect_of_query(text)


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
