"""Literals, names and comments are read as the database reads them: nothing in them counts, and nothing beside them is hidden."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app_db._databases.readings import Syntax, readings
from app_db._databases.statements import Effect, effect_of, refused_to_readers, transaction_verb

SYNTAXES: tuple[Syntax, ...] = ("postgresql", "mysql", "sqlite")

# What begins and ends with what, and what must not be in it.
QUOTES: dict[Syntax, list[tuple[str, str, str]]] = {
    "postgresql": [
        ("'", "'", "'\\"),
        ("E'", "'", "'\\"),
        ("e'\\'", "'", "'\\"),
        ("E'a'\n'\\'", "'", "'\\"),
        ("E'a' -- b'\n\t'\\'", "'", "'\\"),
        ("U&'", "'", "'\\"),
        ("N'", "'", "'\\"),
        ("'it''s", "'", "'\\"),
        ("$$", "$$", "$"),
        ("$a$", "$a$", "$"),
        ("$a$ $$ '", "$a$", "$"),
        ("$ä1$", "$ä1$", "$"),
        ('"', '"', '"'),
        ('"a""', '"', '"'),
        ("--", "\n", "\n\r"),
        ("--", "\r", "\n\r"),
        ("/*", "*/", "*/"),
        ("/*/* ' */", "*/", "*/"),
        ("/*/ ", "*/", "*/"),
    ],
    "mysql": [
        ("'", "'", "'\\"),
        ("'it''s", "'", "'\\"),
        ("_utf8'", "'", "'\\"),
        ('"', '"', '"\\'),
        ('"a""', '"', '"\\'),
        ("`", "`", "`"),
        ("`a``", "`", "`"),
        ("#", "\n", "\n\0"),
        ("-- ", "\n", "\n\0"),
        ("--\t", "\n", "\n\0"),
        ("/*", "*/", "*/!"),
        ("/*/", "*/", "*/"),
        ("/* /* ", "*/", "*/"),
    ],
    "sqlite": [
        ("'", "'", "'"),
        ("'it''s\\", "'", "'"),
        ('"', '"', '"'),
        ("`", "`", "`"),
        ("[", "]", "]"),
        ("--", "\n", "\n"),
        ("/*", "*/", "*/"),
        ("/* /* ", "*/", "*/"),
    ],
}
CASES = [(syntax, *quote) for syntax, quotes in QUOTES.items() for quote in quotes]
PIECES = [
    *"'\"`;#-/*$[](),!\\\n\r",
    "--",
    "-- ",
    "/*",
    "*/",
    "/*!",
    "$$",
    "$a$",
    "E'",
    "; COMMIT",
    "COMMIT;",
    "pg_notify(",
    "GET_LOCK(",
    "set_config(",
    "WITH HOLD",
    "INTO OUTFILE",
    "INSERT",
    "a",
    "ä",
    "1",
    " ",
]
texts = st.lists(st.sampled_from(PIECES), max_size=8).map("".join)


@given(case=st.sampled_from(CASES), content=texts)
def test_nothing_in_quotes_or_comments_counts_and_nothing_beside_them_is_hidden(
    case: tuple[Syntax, str, str, str], content: str
) -> None:
    syntax, begin, end, forbidden = case
    content = "".join(letter for letter in content if letter not in forbidden)
    before, after = f"SELECT 1, {begin}{content}{end} ", "FROM items"
    for reading in readings(before + after, syntax):
        middle = reading.removeprefix("SELECT 1, ").removesuffix(after).strip()
        assert (
            middle.removeprefix("N").removeprefix("_utf8") == "''"
            or middle.strip('"').replace("_", "").isalnum()
            or not middle.strip('"_')
        )
    assert transaction_verb(before + after, syntax) is None
    assert refused_to_readers(before + after, syntax) is None
    assert effect_of(before + after, syntax) is Effect.READS
    assert transaction_verb(f"{before}{after}; COMMIT", syntax) == "commit"
    assert refused_to_readers(f"{before}{after}; SELECT 1", syntax) is not None
    assert effect_of(f"{before}, unknown(1) {after}", syntax) is Effect.MAY_WRITE


@given(statement=texts)
def test_an_unknown_database_may_read_a_text_as_any_of_those_that_are_known(statement: str) -> None:
    statement = f"SELECT 1 {statement}"
    for syntax in SYNTAXES:
        assert set(readings(statement, syntax)) <= set(readings(statement, "any"))


MIXED = [
    "     d  e",  # MariaDB 10.0, and MySQL 5.7
    "   b     d  e",  # MariaDB 10.1, and a MySQL 5.7 that reads five digits
    "  a    b     d  e",  # a later MariaDB
    "    c    d  e",  # MySQL 8.0
    "   b    c    d  e",  # a MySQL 8.0 that reads five digits
]


@pytest.mark.parametrize(
    ("syntax", "statement", "expected"),
    [
        # A name may contain $, and E belongs to a literal only where a name does not end with it.
        ("postgresql", "SELECT a$$, b$$", ["SELECT a$$, b$$"]),
        ("postgresql", "SELECT a$1$, b$1$", ["SELECT a$1$, b$1$"]),
        ("postgresql", "SELECT $1$$;$$", ["SELECT $1''"]),
        ("postgresql", "SELECT 1$$;$$, 1.5e3$$;$$", ["SELECT 1'', 1.5e3''"]),
        ("postgresql", r"SELECT typE'\' ; '", [r"SELECT typE'' ; ''", "SELECT typE''"]),
        ("postgresql", r"SELECT E'\' ; '", ["SELECT ''"]),
        # standard_conforming_strings may be off.
        ("postgresql", r"SELECT 'a\b'", ["SELECT ''"]),
        ("postgresql", r"SELECT '\'; x '", ["SELECT ''; x ''", "SELECT ''"]),
        ("postgresql", "SELECT 1 # 2", ["SELECT 1 # 2"]),
        ("postgresql", "SELECT 1 /* a /* b */ c */ d", ["SELECT 1   d"]),
        ("postgresql", 'SELECT U&"a;"', ['SELECT U&"a_59_"']),
        ("postgresql", "SELECT a[1], b", ["SELECT a[1], b"]),
        # sql_mode may be NO_BACKSLASH_ESCAPES or ANSI_QUOTES.
        ("mysql", r"SELECT '\'; x '", ["SELECT ''", "SELECT ''; x ''"]),
        ("mysql", 'SELECT "a"', ["SELECT ''", 'SELECT "a"']),
        ("mysql", "SELECT 1--1", ["SELECT 1--1"]),
        ("mysql", "SELECT 1--- 1", ["SELECT 1- "]),
        ("mysql", "SELECT 1 -- 1", ["SELECT 1  "]),
        ("mysql", "SELECT 1 --", ["SELECT 1  "]),
        ("mysql", "SELECT 1 /* a /* b */ c", ["SELECT 1   c"]),
        ("mysql", "SELECT 1*/*'*/2", ["SELECT 1* 2"]),
        # Comments with a version are executed by servers of that version.
        ("mysql", "SELECT /*! a */ b", ["SELECT   a   b"]),
        ("mysql", "SELECT /*!50000 a */ b", ["SELECT   a   b"]),
        ("mysql", "SELECT /*!80000 a */ b", ["SELECT   a   b", "SELECT   b"]),
        ("mysql", "SELECT /*M! a */ b", ["SELECT   a   b", "SELECT   b"]),
        ("mysql", "SELECT /*M!100100 '*/' */ b", ["SELECT   ''   b", "SELECT  ''"]),
        ("mysql", "/*M! COMMIT */", ["  COMMIT  "]),
        ("mysql", "/*M!999999 a *//*!100100 b *//*!80000 c *//*!40000 d */e", MIXED),
        ("sqlite", "SELECT $$;$$, #", ["SELECT $$;$$, #"]),
        ("sqlite", "SELECT [a;b], `c`", ['SELECT "a_59_b", "c"']),
        ("sqlite", "PRAGMA 'query_only' = 1", ['PRAGMA "query_only" = 1']),
        ("sqlite", "SELECT 1 /* a /* b */ c", ["SELECT 1   c"]),
    ],
)
def test_what_a_text_is_read_as(syntax: Syntax, statement: str, expected: list[str]) -> None:
    assert sorted(readings(statement, syntax)) == sorted(expected)


@pytest.mark.parametrize(
    "piece", ["'", "''", "\\'", '"', "/*", "*/", "--", "--\n", "E'\n'", "$a", "$$ ", "a$", "1", "1e", ".", "`", "[", "(", "/*!"]
)
@pytest.mark.parametrize("begin", ["SELECT ", "E'a' ", "E'a'\n", "/*!", "SET ("])
def test_a_long_text_is_read_soon(piece: str, begin: str) -> None:
    started = time.monotonic()
    readings(begin + piece * 20_000, "any")
    assert time.monotonic() - started < 5
