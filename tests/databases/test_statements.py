"""What a statement does is read off its text, and what the text leaves open counts as a write.

An effect that is too low is a lost guarantee: a database that was written would not count in an atomic commit. One that is
too high costs a refusal somebody can understand. So wherever these tables say "reads", the text must leave no doubt.
"""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from sqlalchemy import CTE, Dialect, and_, case, column, delete, distinct, exists, func, insert, literal, select, update
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.orm import aliased
from sqlalchemy.sql import ClauseElement

from app_db._databases.statements import Effect, effect_of, transaction_verb
from harness.applications import Item

READS = [
    "SELECT 1",
    "select name from items",
    "  \n\tSELECT name FROM items WHERE id IN (1, 2)",
    "SELECT count(*) FROM items",
    "SELECT COUNT (*) FROM items",
    "SELECT max(id), min(id), coalesce(sum(price), 0) FROM items GROUP BY name HAVING count(*) > 1",
    "SELECT a.id FROM items AS a JOIN items AS b ON (a.id = b.id) WHERE EXISTS (SELECT 1 FROM items)",
    "SELECT row_number() OVER (PARTITION BY name ORDER BY id) FROM items",
    "(SELECT 1) UNION ALL (SELECT 2)",
    "WITH found AS (SELECT id FROM items) SELECT * FROM found",
    "VALUES (1), (2)",
    "TABLE items",
    "EXPLAIN SELECT name FROM items",
    "SHOW search_path",
    "SET LOCAL statement_timeout = 1000",
    "SET TRANSACTION READ ONLY",
    "PRAGMA table_info(items)",
    "SAVEPOINT sa_savepoint_1",
    "RELEASE SAVEPOINT sa_savepoint_1",
    "ROLLBACK TO SAVEPOINT sa_savepoint_1",
    "SELECT 1;",
    "SELECT 1 ; \n",
    # Keywords in literals and comments do nothing.
    "SELECT 'INSERT INTO items'",
    "SELECT 'it''s an UPDATE items SET name'",
    "SELECT name FROM items WHERE name = 'add_item(1)'",
    "SELECT name FROM items -- for update",
    "-- insert into items\nSELECT name FROM items",
    "/* delete from items; it's old */ SELECT name FROM items",
    "/* over\nseveral lines */ -- and another\n  SELECT 1",
    # Names that contain a keyword are not the keyword.
    "SELECT inserted, updated_at, deleted FROM items_to_update",
]

LOCKS = [
    "SELECT name FROM items FOR UPDATE",
    "SELECT name FROM items WHERE id = 1 for update skip locked",
    "SELECT name FROM items FOR UPDATE OF items NOWAIT",
    "SELECT name FROM items FOR NO KEY UPDATE",
    "SELECT name FROM items FOR SHARE",
    "SELECT name FROM items FOR KEY SHARE",
    "SELECT name FROM items LOCK IN SHARE MODE",
    "SELECT name FROM items\n FOR\n UPDATE",
]

MAY_WRITE = [
    "COPY items FROM STDIN",
    "COPY items TO STDOUT",  # refused on a read-only connection if it were a write
    # A function nobody vouches for, however its name is written.
    "SELECT add_item('a')",
    "SELECT add_item ('a')",
    "SELECT shop.add_item('a')",
    'SELECT "add item"(1)',
    'SELECT "add-1"(1)',
    "SELECT `add_item`('a')",
    "SELECT `shop`.`add item` ('a')",
    "SELECT [add_item]('a')",
    "SELECT hinzufügen_ä('a')",
    "SELECT nextval('items_id_seq')",
    "SELECT * FROM add_items()",
    "SELECT name FROM items WHERE add_item(name) = 1",
    "SELECT count(add_item(name)) FROM items",
    "SELECT add_item(name) FROM items FOR UPDATE",
    "SET @added = add_item('a')",
    "VALUES (add_item('a'))",
    # A write inside a query.
    "WITH new AS (INSERT INTO items (name) VALUES ('a') RETURNING id) SELECT id FROM new",
    "WITH old AS (DELETE FROM items RETURNING id) SELECT id FROM old",
    "WITH old AS (DELETE FROM ONLY items RETURNING id) SELECT id FROM old",
    "WITH changed AS (UPDATE items SET name = 'a' RETURNING id) SELECT id FROM changed",
    "WITH changed AS (UPDATE items AS i SET name = 'a' RETURNING i.id) SELECT id FROM changed",
    "WITH changed AS (UPDATE items i SET name = 'a' RETURNING i.id) SELECT id FROM changed",
    "WITH changed AS (UPDATE ONLY items SET name = 'a' RETURNING id) SELECT id FROM changed",
    "WITH merged AS (MERGE INTO items USING x ON TRUE WHEN MATCHED THEN DO NOTHING RETURNING 1) SELECT 1 FROM merged",
    "WITH source AS (SELECT 'a' AS name) INSERT INTO items (name) SELECT name FROM source",
    "WITH source AS (SELECT 1) UPDATE items SET name = 'b'",
    "WITH source AS (SELECT 1) DELETE FROM items",
    "EXPLAIN ANALYZE INSERT INTO items (name) VALUES ('a')",
    "SELECT name INTO copied FROM items",
    "SELECT name FROM items INTO OUTFILE '/tmp/x'",
    # Several statements in one.
    "SELECT 1; INSERT INTO items (name) VALUES ('a')",
    "SELECT 1; TRUNCATE items",
    "SELECT 1; DROP TABLE items",
    "SET LOCAL lock_timeout = 1; DELETE FROM items",
    "SHOW search_path; SELECT add_item('a')",
    # Statements that run others.
    "CALL add_item('a')",
    "DO $$ BEGIN INSERT INTO items (name) VALUES ('a'); END $$",
    "EXECUTE add_item('a')",
    "LOCK TABLE items",
    # No statement, and nonsense.
    "",
    " ",
    ";",
    "-- nothing but a comment",
    "'",
    "42",
    "élan",
]

AMBIGUOUS = [
    # Databases disagree on where these literals and comments end, and what follows them may be hidden or not.
    r"SELECT 'it\'s', add_item('a')",
    r"SELECT 'a\'' , add_item('a')",
    r"SELECT E'it\'s', add_item('a') || 'b'",
    "SELECT \"it's\", add_item('a')",
    "SELECT `it's`, add_item('a')",
    "SELECT \"it's\" FROM items; DELETE FROM items WHERE name = 'a'",
    "SELECT 1--1, add_item('a')",
    'SELECT "a -- b", add_item(1)',
    'SELECT "a /* b", add_item(1) -- */',
    "SELECT 1 # it's\n, add_item('a')",
    "# show\nINSERT INTO items (name) VALUES ('a')",
    "SELECT $$it's$$, add_item('a')",
    "SELECT $x$it's$x$, add_item('a')",
    "SELECT 1 /*! , add_item('a') */",
    "SELECT 1 /*M!100100 , add_item('a') */",
    "/*!50000 INSERT INTO items (name) VALUES ('a') */",
    "SELECT 1 /* a /* b */ '*/ , add_item('a')",
]

WRITES = [
    "INSERT INTO items (name) VALUES ('a')",
    "insert or ignore into items (name) values ('a')",
    "  \n UPDATE items SET name = 'b'",
    "DELETE FROM items",
    "MERGE INTO items USING x ON TRUE WHEN MATCHED THEN DELETE",
    "REPLACE INTO items (name) VALUES ('a')",
    "TRUNCATE items",
    "CREATE TABLE t (id INTEGER)",
    "ALTER TABLE items ADD COLUMN x INTEGER",
    "DROP TABLE items",
    "GRANT SELECT ON items TO somebody",
    "REFRESH MATERIALIZED VIEW v",
    "-- a comment\nINSERT INTO items (name) VALUES ('a')",
    "/* a comment */ UPDATE items SET name = 'b'",
    "INSERT INTO items (name) VALUES ('a') RETURNING id",
]


@pytest.mark.parametrize("statement", READS)
def test_a_statement_that_certainly_reads_only_is_known_to(statement: str) -> None:
    assert effect_of(statement) is Effect.READS


@pytest.mark.parametrize("statement", LOCKS)
def test_a_locking_select_locks_and_does_not_write(statement: str) -> None:
    assert effect_of(statement) is Effect.LOCKS


@pytest.mark.parametrize("statement", MAY_WRITE)
def test_a_statement_whose_text_can_not_tell_may_write(statement: str) -> None:
    assert effect_of(statement) is Effect.MAY_WRITE


@pytest.mark.parametrize("statement", AMBIGUOUS)
def test_text_that_databases_read_in_different_ways_hides_no_write(statement: str) -> None:
    assert effect_of(statement) >= Effect.MAY_WRITE


@pytest.mark.parametrize("statement", WRITES)
def test_a_statement_that_begins_with_a_write_writes(statement: str) -> None:
    assert effect_of(statement) is Effect.WRITES


# ---- what SQLAlchemy makes ---------------------------------------------------------------------------------------------

DIALECTS: dict[str, type[Dialect]] = {"postgresql": postgresql.dialect, "mysql": mysql.dialect, "sqlite": sqlite.dialect}
other = aliased(Item)
found: CTE = select(Item.id).where(Item.name.like("a%")).cte("found")


@pytest.fixture(params=DIALECTS)
def dialect(request: pytest.FixtureRequest) -> Dialect:
    return DIALECTS[request.param]()


@pytest.mark.parametrize(
    "query",
    [
        select(Item),
        select(func.count()).select_from(Item),
        select(func.count(distinct(Item.name))),
        select(Item).join(other, Item.id == other.id).where(other.name.in_(["a", "b"])),
        select(Item).where(exists().where(other.id == Item.id)),
        select(Item).where(Item.id.in_(select(other.id))),
        select(case((Item.id > 1, "many"), else_="few")).order_by(Item.name).limit(3).offset(1),
        select(Item.id, func.row_number().over(partition_by=Item.name, order_by=Item.id)),
        select(Item).where(and_(Item.id.between(1, 2), Item.name.not_like("b%"))),
        select(literal("INSERT INTO items")),
        select(Item.id).union(select(other.id)),
        select(func.lower(Item.name), func.coalesce(Item.name, "x")).group_by(Item.name).having(func.count() > 1),
    ],
    ids=str,
)
def test_what_sqlalchemy_makes_of_a_query_reads(query: ClauseElement, dialect: Dialect) -> None:
    assert effect_of(str(query.compile(dialect=dialect))) is Effect.READS


@pytest.mark.parametrize(
    ("statement", "effect"),
    [
        (insert(Item), Effect.WRITES),
        (update(Item).where(Item.id == 1).values(name="b"), Effect.WRITES),
        (delete(Item), Effect.WRITES),
        (select(func.add_item("a")), Effect.MAY_WRITE),
        (select(func.shop.add_item("a")), Effect.MAY_WRITE),
        (select(column("x")).select_from(func.add_items().alias("Quoted Name")), Effect.MAY_WRITE),
    ],
    ids=str,
)
def test_what_sqlalchemy_makes_of_a_write_writes(statement: ClauseElement, effect: Effect, dialect: Dialect) -> None:
    assert effect_of(str(statement.compile(dialect=dialect))) is effect


@pytest.mark.parametrize("name", ["add item", "select", "Add", "add-item", "ä", "COUNT", "add$"])
def test_a_function_is_recognised_however_its_name_has_to_be_quoted(name: str, dialect: Dialect) -> None:
    statement = f"SELECT {dialect.identifier_preparer.quote_identifier(name)}(1)"
    assert effect_of(statement) is Effect.MAY_WRITE


# ---- properties ----------------------------------------------------------------------------------------------------------

PIECES = st.sampled_from(
    [*"'\"`();,*-#$\\[]{}\n ", "--", "/*", "*/", "$$", "SELECT", "WITH", "INSERT INTO", "UPDATE", "FOR UPDATE", "a", "ß", "add("]
)
WRITING_WORDS = ["INSERT", "UPDATE", "DELETE", "MERGE", "REPLACE", "TRUNCATE", "CREATE", "ALTER", "DROP"]


@given(st.one_of(st.text(), st.lists(PIECES).map("".join), st.lists(PIECES).map(" ".join)))
@example("\x00")
@example("'" * 10_001)
@example("/*" * 10_000)
@example("(" * 10_000)
@example("a " * 10_000)
def test_any_text_at_all_has_an_effect(statement: str) -> None:
    assert isinstance(effect_of(statement), Effect)


@given(
    before=st.lists(st.sampled_from([" ", "\n", "\t", "/* a */", "/* it's */", "-- b\n", "-- DROP\n"])).map("".join),
    word=st.sampled_from(WRITING_WORDS).flatmap(lambda word: st.sampled_from([word, word.lower(), word.title()])),
    after=st.text(),
)
def test_a_statement_that_begins_with_a_writing_word_writes_whatever_follows(before: str, word: str, after: str) -> None:
    assert effect_of(f"{before}{word} {after}") is Effect.WRITES


@given(
    name=st.from_regex(r"[^\W\d]\w{0,8}", fullmatch=True).filter(lambda name: effect_of(f"SELECT {name}(1)") is not Effect.READS),
    before=st.sampled_from(["", "'a', ", "'it''s', ", "count(*), ", "(SELECT 1), ", "/* x */ ", "-- x\n", '"name", ']),
    after=st.sampled_from(["", ", 'b'", " FROM items WHERE name = 'it''s'", " -- it's", " /* it's */ FOR UPDATE"]),
)
def test_what_stands_around_a_call_does_not_hide_it(name: str, before: str, after: str) -> None:
    assert effect_of(f"SELECT {before}{name}(1){after}") is Effect.MAY_WRITE


@pytest.mark.parametrize(
    ("statement", "verb"),
    [
        ("COMMIT", "commit"),
        (" commit work;", "commit"),
        ("/* done */ COMMIT; INSERT INTO t VALUES (1)", "commit"),
        ("END", "commit"),
        ("ROLLBACK", "rollback"),
        ("-- no\nROLLBACK AND CHAIN", "rollback"),
        ("ABORT", "rollback"),
        ("BEGIN", "begin"),
        ("START TRANSACTION READ WRITE", "begin"),
        ("ROLLBACK TO SAVEPOINT sa_savepoint_1", None),
        ("ROLLBACK WORK TO sa_savepoint_1", None),
        ("RELEASE SAVEPOINT sa_savepoint_1", None),
        ("BEGIN do_something(); END;", None),
        ("SELECT 'COMMIT'", None),
        ("COMMENT ON TABLE t IS 'a'", None),
    ],
)
def test_a_statement_that_begins_or_ends_a_transaction_is_recognised(statement: str, verb: str | None) -> None:
    assert transaction_verb(statement) == verb
