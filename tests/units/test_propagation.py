"""What a unit of work does where another is under way, what its options do, and how units are doomed.

`PYTHONPATH=tests python -m units.test_propagation` writes the table of this module into docs/propagation-table.md.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import transaction as zope
from sqlalchemy import exc, text
from transaction.interfaces import NoTransaction

from app_db import DatabaseContainer, Propagation, transactional
from app_db.errors import AlreadyInUnitOfWork, InvalidUse, NoUnitOfWork, UnitOfWorkDoomed, UnitOfWorkTimeout
from harness.applications import Boom
from harness.choosing import mostly
from harness.coroutines import DRIVERS, Either, opened_either, url_for
from harness.items import LONG, Databases, opened
from harness.paths import ROOT

DOCUMENT = ROOT / "docs" / "propagation-table.md"


# ---- the table --------------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """The rows that are there afterwards, of the outer and of the inner block, and the error that the outer one raised."""

    rows: frozenset[str]
    error: type[Exception] | None = None

    def __str__(self) -> str:
        rows = {frozenset(): "nothing", BOTH: "both"}.get(self.rows) or f"the {min(self.rows)} row"
        if self.error is None:
            return rows
        return f"{rows}; the error goes on" if self.error is Boom else f"{rows}; `{self.error.__name__}`"


NEITHER: frozenset[str] = frozenset()
OUTER = frozenset({"outer"})
INNER = frozenset({"inner"})
BOTH = OUTER | INNER

nothing = Outcome(NEITHER)
outer = Outcome(OUTER)
inner = Outcome(INNER)
both = Outcome(BOTH)
raised = Outcome(NEITHER, Boom)
doomed = Outcome(NEITHER, UnitOfWorkDoomed)
in_unit = Outcome(NEITHER, AlreadyInUnitOfWork)
no_unit = Outcome(NEITHER, NoUnitOfWork)


class Row(NamedTuple):
    propagation: str
    under_way: bool
    succeeds: Outcome
    fails: Outcome
    is_swallowed: Outcome


TABLE = (
    #    propagation    a unit is under way
    #                          inner succeeds, inner fails, its error is swallowed
    Row("required", True, both, raised, doomed),
    Row("required", False, inner, raised, nothing),
    Row("requires_new", True, both, raised, outer),
    Row("requires_new", False, inner, raised, nothing),
    Row("nested", True, both, raised, outer),
    Row("nested", False, inner, raised, nothing),
    Row("mandatory", True, both, raised, doomed),
    Row("mandatory", False, no_unit, no_unit, nothing),
    Row("supports", True, both, raised, doomed),
    Row("supports", False, nothing, raised, nothing),
    Row("not_supported", True, outer, raised, outer),
    Row("not_supported", False, nothing, raised, nothing),
    Row("never", True, in_unit, in_unit, outer),
    Row("never", False, nothing, raised, nothing),
)

ENDINGS = ("succeeds", "fails", "is_swallowed")
CASES = [
    pytest.param(row, ending, id=f"{row.propagation}-{'in a unit' if row.under_way else 'alone'}-{ending}")
    for row in TABLE
    for ending in ENDINGS
]


def document() -> str:
    lines = [
        "---",
        "orphan: true",
        "---",
        "",
        "# What is there afterwards",
        "",
        "Inside an outer block, or in none, stands an inner one with the propagation of the first column. Both write a row, the",
        "inner one only where it has a unit of work to write in. The cells say which rows are committed when all is over.",
        "",
        "| `propagation=` | a unit is under way | the inner block succeeds | it fails | it fails, and the error is swallowed |",
        "|---|---|---|---|---|",
    ]
    for row in TABLE:
        under_way = "yes" if row.under_way else "no"
        lines.append(f"| `{row.propagation}` | {under_way} | {row.succeeds} | {row.fails} | {row.is_swallowed} |")
    return "\n".join([*lines, ""])


def test_the_documented_table_is_the_one_that_is_tested() -> None:
    assert DOCUMENT.read_text() == document(), "run `PYTHONPATH=tests python -m units.test_propagation`"


def test_the_table_has_every_propagation() -> None:
    assert {row.propagation for row in TABLE} == {propagation.value for propagation in Propagation}
    assert len(TABLE) == 2 * len(Propagation)


LEFT_TO_ALL = [pytest.param(kind, marks=pytest.mark.exhaustive) for kind in ("postgresql", "psycopg", "aiosqlite")]


@pytest.fixture(params=["sqlite", "sqlite, zope's manager", "asyncpg", *LEFT_TO_ALL])
def two_blocks(request: pytest.FixtureRequest) -> Iterator[Either]:
    """Databases, with another one that the inner block writes to where it is SQLite, which has one writer at a time."""
    kind, _, manager = request.param.partition(",")
    given: dict[str, Any] = {}
    if manager:
        given = {"manager": zope.ThreadTransactionManager()}
        given["manager"].explicit = True  # or asking for a session would begin a transaction
    if "sqlite" in kind:
        new = request.getfixturevalue("new_sqlite_url")
        with opened_either({"writer": new(), "other": new()}, kind, **given) as databases:
            yield databases
    else:
        with opened_either({"writer": request.getfixturevalue("postgres_url")}, kind, **given) as databases:
            yield databases


@pytest.mark.parametrize(("row", "ending"), CASES)
async def test_the_table(two_blocks: Either, row: Row, ending: str) -> None:
    databases, connection = two_blocks, two_blocks.connections[-1]
    has_unit = row.under_way or row.propagation in ("required", "requires_new", "nested")
    has_unit = has_unit and row.propagation != "not_supported"

    async def inner_block() -> None:
        async with databases.block(propagation=row.propagation):
            if has_unit:
                await databases.write("inner", connection)
            else:
                with pytest.raises(NoUnitOfWork):
                    databases.unit_session(connection)
                with pytest.raises(NoTransaction):
                    databases.container.unit()
            if ending != "succeeds":
                raise Boom

    async def outer_block() -> None:
        if row.under_way:
            await databases.write("outer")
        if ending != "is_swallowed":
            await inner_block()
            return
        with pytest.raises((Boom, AlreadyInUnitOfWork, NoUnitOfWork)):
            await inner_block()

    error: type[Exception] | None = None
    try:
        if row.under_way:
            async with databases.block():
                await outer_block()
        else:
            await outer_block()
    except (Boom, UnitOfWorkDoomed, AlreadyInUnitOfWork, NoUnitOfWork) as caught:
        error = type(caught)
    with pytest.raises(NoUnitOfWork):
        databases.container.unit()
    rows = {*databases.items(), *databases.items(connection)}
    assert Outcome(frozenset(rows), error) == getattr(row, ending)
    assert databases.checked_out() == 0


@pytest.fixture(params=["the context's manager", "zope's manager", *mostly(["asyncpg", "psycopg"], exhaustive="psycopg")])
def on_postgres(request: pytest.FixtureRequest, postgres_url: str) -> Iterator[Either]:
    manager = zope.manager if request.param == "zope's manager" else None
    with opened_either({"writer": postgres_url}, request.param, manager=manager) as databases:
        yield databases
    zope.abort()


def assert_no_unit(databases: Either) -> None:
    if databases.container.transaction_manager() is not zope.manager:  # which begins one for whoever asks
        with pytest.raises(NoUnitOfWork):
            databases.container.unit()


async def test_a_unit_of_its_own_survives_the_outer_ones_failure(on_postgres: Either) -> None:
    with pytest.raises(Boom):
        async with on_postgres.block():
            await on_postgres.write("outer")
            session, pid = on_postgres.unit_session(), await on_postgres.awaited_backend_id()
            async with on_postgres.block(propagation="requires_new"):
                await on_postgres.write("inner")
                assert on_postgres.unit_session() is not session
                assert await on_postgres.awaited_backend_id() != pid
                async with on_postgres.block(propagation=Propagation.REQUIRES_NEW):
                    await on_postgres.write("innermost")
                with pytest.raises(Boom):
                    async with on_postgres.block(propagation="requires_new"):
                        await on_postgres.write("never")
                        raise Boom
                await on_postgres.write("inner again")
            assert on_postgres.items() == ["inner", "inner again", "innermost"]
            assert on_postgres.unit_session() is session
            await on_postgres.write("outer again")
            raise Boom
    assert_no_unit(on_postgres)
    assert on_postgres.items() == ["inner", "inner again", "innermost"]


async def test_a_block_without_a_unit_lets_the_outer_one_go_on_afterwards(on_postgres: Either) -> None:
    async with on_postgres.block():
        await on_postgres.write("outer")
        session = on_postgres.unit_session()
        async with on_postgres.block(propagation="not_supported"):
            async with on_postgres.block():
                await on_postgres.write("a unit of its own")
            assert_no_unit(on_postgres)
            assert on_postgres.items() == ["a unit of its own"]
        assert on_postgres.unit_session() is session
        await on_postgres.write("outer again")
    assert on_postgres.items() == ["a unit of its own", "outer", "outer again"]


async def test_the_outer_unit_waits_while_an_inner_one_fails_to_commit(on_postgres: Either) -> None:
    on_postgres.put("taken")
    on_postgres.rival("ALTER TABLE item ADD COLUMN other TEXT REFERENCES item DEFERRABLE INITIALLY DEFERRED")
    async with on_postgres.block():
        await on_postgres.write("outer")
        with pytest.raises(exc.IntegrityError):
            async with on_postgres.block(propagation="requires_new"):
                await on_postgres.say("INSERT INTO item (name, amount, other) VALUES ('inner', 0, 'nowhere')")
        await on_postgres.write("outer again")
    assert on_postgres.items() == ["outer", "outer again", "taken"]


# ---- options that contradict ------------------------------------------------------------------------------------------


BAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"attempts": 0}, "attempts=0"),
    ({"attempts": -1}, "attempts=-1"),
    ({"timeout": 0}, "timeout=0"),
    ({"timeout": -1.5}, "timeout=-1.5"),
    ({"backoff": -1}, "backoff=-1"),
    ({"propagation": "require"}, "'require'"),
    ({"propagation": "mandatory", "attempts": 2}, "'mandatory'"),
    ({"propagation": "supports", "attempts": 2}, "'supports'"),
    ({"propagation": "not_supported", "attempts": 2}, "'not_supported'"),
    ({"propagation": "never", "attempts": 2}, "'never'"),
]


@pytest.mark.parametrize(("options", "names"), BAD_OPTIONS)
def test_options_that_have_no_meaning_are_refused_where_they_are_given(
    options: dict[str, Any], names: str, container: DatabaseContainer
) -> None:
    with pytest.raises(InvalidUse) as of_method:
        container.transaction(**options)
    with pytest.raises(InvalidUse) as of_decorator:
        transactional(**options)
    assert names in str(of_method.value)
    assert str(of_method.value) == str(of_decorator.value)


def test_an_unknown_propagation_is_answered_with_the_known_ones(container: DatabaseContainer) -> None:
    with pytest.raises(InvalidUse, match=", ".join(Propagation)):
        container.transaction(propagation="new")


async def test_a_with_block_cannot_have_attempts(either: Either) -> None:
    with pytest.raises(InvalidUse, match=r"run\(function\)"):
        async with either.block(attempts=2):
            pytest.fail("entered")
    with pytest.raises(NoUnitOfWork):
        either.container.unit()


async def test_one_transaction_object_serves_one_block_at_a_time(either: Either) -> None:
    transaction = either.unit()
    async with either.entered(transaction):
        await either.write("first")
        with pytest.raises(InvalidUse, match="in use"):
            async with either.entered(transaction):
                pytest.fail("entered twice")
        await either.write("second")
    assert either.items() == ["first", "second"]


# ---- isolation --------------------------------------------------------------------------------------------------------

LEVEL = {"postgresql": "SHOW transaction_isolation", "mysql": "SELECT @@tx_isolation"}
USUAL = {"postgresql": "READ COMMITTED", "mysql": "REPEATABLE READ"}
ONE_CONNECTION = {"pool": {"size": 1, "max_overflow": 0}}


@pytest.fixture(params=["postgresql", "mariadb", *mostly(["asyncpg", "psycopg"], exhaustive="psycopg")])
def isolating(request: pytest.FixtureRequest) -> Iterator[Either]:
    with opened_either({"writer": url_for(request.param, request)}, request.param, each=ONE_CONNECTION) as databases:
        yield databases


async def level(databases: Either) -> str:
    return str(await databases.say(LEVEL[dialect_of(databases)])).upper().replace("-", " ")


@pytest.mark.parametrize("asked", ["serializable", "SERIALIZABLE", "repeatable read", "REPEATABLE READ", "READ_COMMITTED"])
async def test_the_isolation_reaches_the_server_and_does_not_stay(isolating: Either, asked: str) -> None:
    async with isolating.block():
        usual, connection = await level(isolating), await isolating.awaited_backend_id()
        assert usual == USUAL[dialect_of(isolating)]
    async with isolating.block(isolation=asked):
        assert await level(isolating) == asked.upper().replace("_", " ")
        assert await isolating.awaited_backend_id() == connection
        await isolating.write("a")
    async with isolating.block():
        assert (await level(isolating), await isolating.awaited_backend_id()) == (usual, connection)
    with pytest.raises(Boom):
        async with isolating.block(isolation=asked):
            await level(isolating)
            raise Boom
    async with isolating.block():
        assert (await level(isolating), await isolating.awaited_backend_id()) == (usual, connection)


async def test_an_inner_unit_cannot_have_another_isolation(isolating: Either) -> None:
    async with isolating.block(isolation="serializable"):
        async with isolating.block(isolation="SERIALIZABLE"):
            assert await level(isolating) == "SERIALIZABLE"
        with pytest.raises(InvalidUse, match=r"READ COMMITTED.*SERIALIZABLE"):
            async with isolating.block(isolation="read committed"):
                pytest.fail("entered")
        await isolating.write("a")  # the refusal dooms nothing
    async with isolating.block():
        with pytest.raises(InvalidUse, match="the default isolation"):
            async with isolating.block(isolation="serializable", propagation="nested"):
                pytest.fail("entered")
        await isolating.write("b")
    assert isolating.items() == ["a", "b"]


# ---- timeout ----------------------------------------------------------------------------------------------------------

LONGER_THAN_THE_TIMEOUT = {
    "sqlite": "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n WHERE x < 6000000) SELECT count(*) FROM n",
    "postgresql": "SELECT pg_sleep(0.6)",
    "mysql": "SELECT SLEEP(0.6)",
}


@pytest.fixture
def limited(database_url: str) -> Iterator[Databases]:
    with opened({"writer": database_url}, each=ONE_CONNECTION) as databases:
        yield databases


@pytest.fixture(params=["sqlite", "postgresql", "mariadb", *mostly(DRIVERS, exhaustive="psycopg")])
def either_limited(request: pytest.FixtureRequest) -> Iterator[Either]:
    with opened_either({"writer": url_for(request.param, request)}, request.param, each=ONE_CONNECTION) as databases:
        yield databases


def dialect_of(databases: Databases) -> str:
    return databases.outside().dialect.name


async def test_a_statement_is_stopped_when_the_units_time_is_over(either_limited: Either) -> None:
    began = time.monotonic()
    with pytest.raises(UnitOfWorkTimeout) as stopped:
        async with either_limited.block(timeout=0.3):
            await either_limited.write("a")
            await either_limited.say(LONG[dialect_of(either_limited)])
    assert 0.3 <= time.monotonic() - began < 2.8
    assert stopped.value.timeout == 0.3
    assert isinstance(stopped.value, TimeoutError)
    async with either_limited.block():
        await either_limited.write("c")
    assert either_limited.items() == ["c"]


@pytest.mark.representative("postgresql")
def test_after_a_timeout_the_connection_is_usable_and_has_no_limit(limited: Databases) -> None:
    transaction = limited.container.transaction
    with transaction():
        connection = limited.backend_id()
    with pytest.raises(UnitOfWorkTimeout), transaction(timeout=0.3):
        limited.session().execute(text(LONG[dialect_of(limited)]))
    with transaction():
        limited.session().execute(text(LONGER_THAN_THE_TIMEOUT[dialect_of(limited)]))
        limited.add("a")
        assert limited.backend_id() == connection
    assert limited.items() == ["a"]


@pytest.mark.representative("postgresql")
def test_after_a_unit_that_kept_its_time_the_connection_has_no_limit(limited: Databases) -> None:
    transaction = limited.container.transaction
    with transaction(timeout=0.3):
        limited.add("a")
    with transaction():
        limited.session().execute(text(LONGER_THAN_THE_TIMEOUT[dialect_of(limited)]))
    assert limited.items() == ["a"]


def test_no_statement_is_sent_when_the_time_is_over(limited: Databases) -> None:
    with pytest.raises(UnitOfWorkTimeout), limited.container.transaction(timeout=0.2):
        limited.add("a")
        time.sleep(0.25)
        limited.add("b")
    assert limited.items() == []


async def test_no_commit_is_sent_when_the_time_is_over(either_limited: Either) -> None:
    with pytest.raises(UnitOfWorkTimeout):
        async with either_limited.block(timeout=0.2):
            await either_limited.write("a")
            await either_limited.pause(0.25)
    assert either_limited.items() == []


def test_a_unit_without_a_database_may_take_its_time(databases: Databases) -> None:
    with databases.container.transaction(timeout=0.01):
        time.sleep(0.02)


async def test_an_inner_timeout_ends_with_its_block(either_limited: Either) -> None:
    async with either_limited.block():
        await either_limited.write("a")
        async with either_limited.block(timeout=0.2):
            await either_limited.write("b")
        await either_limited.pause(0.25)
        await either_limited.write("c")
    assert either_limited.items() == ["a", "b", "c"]


@pytest.mark.representative("postgresql")
def test_an_inner_timeout_in_which_the_session_began_ends_with_its_block(limited: Databases) -> None:
    transaction = limited.container.transaction
    with transaction():
        with transaction(timeout=0.3):
            limited.add("a")
        limited.session().execute(text(LONGER_THAN_THE_TIMEOUT[dialect_of(limited)]))
        limited.add("b")
    assert limited.items() == ["a", "b"]


@pytest.mark.parametrize("propagation", ["required", pytest.param("nested", marks=pytest.mark.exhaustive)])
async def test_an_inner_timeout_stops_a_statement_of_a_session_that_began_before(
    either_limited: Either, propagation: str
) -> None:
    began = time.monotonic()
    with pytest.raises(UnitOfWorkTimeout):
        async with either_limited.block():
            await either_limited.write("a")
            async with either_limited.block(timeout=0.3, propagation=propagation):
                await either_limited.say(LONG[dialect_of(either_limited)])
    assert time.monotonic() - began < 2.5
    assert either_limited.items() == []


def test_an_inner_timeout_cannot_give_more_time_than_there_is(limited: Databases) -> None:
    transaction = limited.container.transaction
    with pytest.raises(UnitOfWorkTimeout) as stopped, transaction(timeout=0.2), transaction(timeout=60):
        limited.add("a")
        time.sleep(0.25)
        limited.add("b")
    assert stopped.value.timeout == 0.2
    assert limited.items() == []


@pytest.mark.representative("postgresql")
def test_the_outer_timeout_goes_on_after_a_tighter_inner_one(limited: Databases) -> None:
    transaction = limited.container.transaction
    with pytest.raises(UnitOfWorkTimeout) as stopped, transaction(timeout=0.5):
        limited.add("a")
        with transaction(timeout=0.2):
            limited.add("b")
        time.sleep(0.25)
        limited.add("c")
        limited.session().execute(text(LONG[dialect_of(limited)]))
    assert stopped.value.timeout == 0.5
    assert limited.items() == []


def test_a_units_timeout_holds_on_a_connection_with_a_longer_statement_timeout(database_url: str) -> None:
    with opened({"writer": database_url}, each={"statement_timeout": 60}) as databases:
        began = time.monotonic()
        with pytest.raises(UnitOfWorkTimeout), databases.container.transaction(timeout=0.3):
            databases.session().execute(text(LONG[dialect_of(databases)]))
        assert time.monotonic() - began < 2.5


def test_a_units_timeout_does_not_lift_a_connections_shorter_statement_timeout(database_url: str) -> None:
    with opened({"writer": database_url}, each={"statement_timeout": 0.3}) as databases:
        began = time.monotonic()
        with pytest.raises(exc.OperationalError), databases.container.transaction(timeout=60):
            databases.session().execute(text(LONG[dialect_of(databases)]))
        assert time.monotonic() - began < 2.5


# ---- commit_on --------------------------------------------------------------------------------------------------------


class Gentle(Boom):
    pass


async def test_an_error_of_a_kind_in_commit_on_commits_and_goes_on(either: Either) -> None:
    for kinds, name in ((Gentle, "one kind"), ((Gentle,), "a tuple"), ([KeyError, Boom], "a list with its base")):
        with pytest.raises(Gentle):
            async with either.block(commit_on=kinds):
                await either.write(name)
                raise Gentle
    assert either.items() == ["a list with its base", "a tuple", "one kind"]


@pytest.mark.parametrize("error", [Boom, ZeroDivisionError])
async def test_an_error_of_another_kind_aborts(either: Either, error: type[Exception]) -> None:
    with pytest.raises(error):
        async with either.block(commit_on=Gentle):
            await either.write("a")
            raise error
    assert either.items() == []


def test_an_inner_error_of_a_kind_in_commit_on_dooms_nothing(databases: Databases, container: DatabaseContainer) -> None:
    with container.transaction():
        databases.add("outer")
        with pytest.raises(Gentle), container.transaction(commit_on=Gentle):
            databases.add("inner")
            raise Gentle
    assert databases.items() == ["inner", "outer"]


def test_a_nested_error_of_a_kind_in_commit_on_undoes_nothing(databases: Databases, container: DatabaseContainer) -> None:
    with container.transaction(), pytest.raises(Gentle), container.transaction(commit_on=Gentle, propagation="nested"):
        databases.add("inner")
        raise Gentle
    assert databases.items() == ["inner"]


def test_an_error_in_commit_on_whose_commit_fails_is_the_context_of_the_commits_error(
    databases: Databases, container: DatabaseContainer
) -> None:
    databases.put("a")
    with pytest.raises(exc.IntegrityError) as failed, container.transaction(commit_on=Gentle) as unit:
        unit.before_commit(databases.add, "a")
        raise Gentle
    chain: list[BaseException | None] = [failed.value]
    while chain[-1] is not None:
        chain.append(chain[-1].__context__)
    assert any(isinstance(error, Gentle) for error in chain)
    assert databases.checked_out() == 0


# ---- doomed units -----------------------------------------------------------------------------------------------------


async def test_a_doomed_unit_says_so_when_it_ends(either: Either) -> None:
    with pytest.raises(UnitOfWorkDoomed, match="the stock is empty"):
        async with either.block() as unit:
            await either.write("a")
            assert not unit.is_doomed
            unit.doom("the stock is empty")
            assert unit.is_doomed
            await either.write("b")  # it may go on to the end
    assert either.items() == []


def test_a_doomed_unit_that_raises_raises_its_own_error(databases: Databases, container: DatabaseContainer) -> None:
    with pytest.raises(Boom), container.transaction() as unit:
        unit.doom()
        raise Boom
    assert databases.items() == []


def test_the_error_of_a_joined_block_is_the_cause_of_the_doom(databases: Databases, container: DatabaseContainer) -> None:
    boom, second = Boom("the first"), Boom("the second")
    with pytest.raises(UnitOfWorkDoomed, match="Boom: the first") as doomed, container.transaction():
        for error in (boom, second):
            with pytest.raises(Boom), container.transaction():
                raise error
        databases.add("a")
    assert doomed.value.__cause__ is boom
    assert databases.items() == []


def test_dooming_zopes_transaction_dooms_the_unit(databases: Databases, container: DatabaseContainer) -> None:
    with pytest.raises(UnitOfWorkDoomed, match="zope"), container.transaction() as unit:
        databases.add("a")
        unit.transaction.doom()
    assert databases.items() == []


def test_a_hook_that_dooms_before_the_commit_is_heard(databases: Databases, container: DatabaseContainer) -> None:
    """Zope itself has looked at the doom before its hooks run, and would commit."""
    with pytest.raises(UnitOfWorkDoomed, match="too late in the evening"), container.transaction() as unit:
        databases.add("a")
        unit.before_commit(unit.doom, "too late in the evening")
    assert databases.items() == []
    assert databases.checked_out() == 0


def test_after_a_doomed_unit_the_next_one_commits(databases: Databases, container: DatabaseContainer) -> None:
    with pytest.raises(UnitOfWorkDoomed), container.transaction() as unit:
        unit.doom()
    with container.transaction():
        databases.add("a")
    assert databases.items() == ["a"]


def test_a_unit_of_its_own_in_a_doomed_one_commits(postgres_url: str) -> None:
    with opened({"writer": postgres_url}) as databases:
        with pytest.raises(UnitOfWorkDoomed), databases.container.transaction() as unit:
            databases.add("outer")
            unit.doom()
            with databases.container.transaction(propagation="requires_new"):
                databases.add("inner")
        assert databases.items() == ["inner"]


if __name__ == "__main__":
    DOCUMENT.write_text(document())
