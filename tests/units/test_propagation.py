"""What a unit of work does where another is under way, what its options do, and how units are doomed.

`PYTHONPATH=tests python -m units.test_propagation` writes the table of this module into docs/propagation-table.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import transaction as zope
from sqlalchemy import exc, text
from transaction.interfaces import NoTransaction

from app_db import DatabaseContainer, Propagation, transactional
from app_db.errors import AlreadyInUnitOfWork, InvalidUse, NoUnitOfWork, UnitOfWorkDoomed, UnitOfWorkTimeout
from harness.items import Databases, opened
from harness.paths import ROOT

DOCUMENT = ROOT / "docs" / "propagation-table.md"


class Boom(Exception):
    pass


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


@pytest.fixture(params=["sqlite", "postgresql", "sqlite, zope's manager"])
def two_blocks(request: pytest.FixtureRequest) -> Iterator[tuple[Databases, str]]:
    """Databases, and the connection the inner block writes to: SQLite has one writer at a time, so there it is another one."""
    kind, _, manager = request.param.partition(",")
    given: dict[str, Any] = {}
    if manager:
        given = {"manager": zope.ThreadTransactionManager()}
        given["manager"].explicit = True  # or asking for a session would begin a transaction
    if kind == "postgresql":
        with opened({"writer": request.getfixturevalue("postgres_url")}, **given) as databases:
            yield databases, "writer"
    else:
        new = request.getfixturevalue("new_sqlite_url")
        with opened({"writer": new(), "other": new()}, **given) as databases:
            yield databases, "other"


@pytest.mark.parametrize(("row", "ending"), CASES)
def test_the_table(two_blocks: tuple[Databases, str], row: Row, ending: str) -> None:
    databases, connection = two_blocks
    transaction = databases.container.transaction
    has_unit = row.under_way or row.propagation in ("required", "requires_new", "nested")
    has_unit = has_unit and row.propagation != "not_supported"

    def inner_block() -> None:
        with transaction(propagation=row.propagation):
            if has_unit:
                databases.add("inner", connection)
            else:
                with pytest.raises(NoUnitOfWork):
                    databases.session(connection)
                with pytest.raises(NoTransaction):
                    databases.container.unit()
            if ending != "succeeds":
                raise Boom

    def outer_block() -> None:
        if row.under_way:
            databases.add("outer")
        if ending != "is_swallowed":
            inner_block()
            return
        with pytest.raises((Boom, AlreadyInUnitOfWork, NoUnitOfWork)):
            inner_block()

    error: type[Exception] | None = None
    try:
        if row.under_way:
            with transaction():
                outer_block()
        else:
            outer_block()
    except (Boom, UnitOfWorkDoomed, AlreadyInUnitOfWork, NoUnitOfWork) as caught:
        error = type(caught)
    rows = {*databases.items(), *databases.items(connection)}
    assert Outcome(frozenset(rows), error) == getattr(row, ending)
    assert databases.checked_out() == 0


@pytest.fixture(params=[None, zope.manager], ids=["the context's manager", "zope's manager"])
def manager(request: pytest.FixtureRequest) -> Iterator[Any]:
    yield request.param
    zope.abort()


def test_a_unit_of_its_own_survives_the_outer_ones_failure(postgres_url: str, manager: Any) -> None:
    with opened({"writer": postgres_url}, manager=manager) as databases:
        transaction = databases.container.transaction
        with pytest.raises(Boom), transaction():
            databases.add("outer")
            session, pid = databases.session(), databases.backend_id()
            with transaction(propagation="requires_new"):
                databases.add("inner")
                assert databases.session() is not session
                assert databases.backend_id() != pid
                with transaction(propagation="requires_new"):
                    databases.add("innermost")
            assert databases.items() == ["inner", "innermost"]
            assert databases.session() is session
            databases.add("outer again")
            raise Boom
        assert databases.items() == ["inner", "innermost"]


def test_a_block_without_a_unit_lets_the_outer_one_go_on_afterwards(postgres_url: str, manager: Any) -> None:
    with opened({"writer": postgres_url}, manager=manager) as databases:
        transaction = databases.container.transaction
        with transaction():
            databases.add("outer")
            session = databases.session()
            with transaction(propagation="not_supported"):
                with transaction():
                    databases.add("a unit of its own")
                assert databases.items() == ["a unit of its own"]
            assert databases.session() is session
            databases.add("outer again")
        assert databases.items() == ["a unit of its own", "outer", "outer again"]


def test_the_outer_unit_waits_while_an_inner_one_fails_to_commit(postgres_url: str, manager: Any) -> None:
    with opened({"writer": postgres_url}, manager=manager) as databases:
        databases.put("taken")
        databases.rival("ALTER TABLE item ADD COLUMN other TEXT REFERENCES item DEFERRABLE INITIALLY DEFERRED")
        transaction = databases.container.transaction
        with transaction():
            databases.add("outer")
            with pytest.raises(exc.IntegrityError), transaction(propagation="requires_new"):
                databases.session().execute(text("INSERT INTO item (name, amount, other) VALUES ('inner', 0, 'nowhere')"))
            databases.add("outer again")
        assert databases.items() == ["outer", "outer again", "taken"]


# ---- options that contradict ------------------------------------------------------------------------------------------


@pytest.fixture
def databases(sqlite_url: str) -> Iterator[Databases]:
    with opened({"writer": sqlite_url}) as databases:
        yield databases


@pytest.fixture
def container(databases: Databases) -> DatabaseContainer:
    return databases.container


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


def test_a_with_block_cannot_have_attempts(databases: Databases, container: DatabaseContainer) -> None:
    ran = []
    with pytest.raises(InvalidUse, match=r"run\(function\)"), container.transaction(attempts=2):
        ran.append(1)
    assert ran == []
    with pytest.raises(NoUnitOfWork):
        container.unit()


def test_one_transaction_object_serves_one_block_at_a_time(databases: Databases, container: DatabaseContainer) -> None:
    transaction = container.transaction()
    with transaction:
        databases.add("first")
        with pytest.raises(InvalidUse, match="in use"), transaction:
            pytest.fail("entered twice")
        databases.add("second")
    assert databases.items() == ["first", "second"]


# ---- isolation --------------------------------------------------------------------------------------------------------

LEVEL = {"postgres_url": "SHOW transaction_isolation", "mariadb_url": "SELECT @@tx_isolation"}
ONE_CONNECTION = {"pool": {"size": 1, "max_overflow": 0}}


@pytest.fixture(params=LEVEL)
def levels(request: pytest.FixtureRequest) -> Iterator[tuple[Databases, Callable[[], str]]]:
    with opened({"writer": request.getfixturevalue(request.param)}, each=ONE_CONNECTION) as databases:

        def level() -> str:
            shown: str = databases.session().scalar(text(LEVEL[request.param]))
            return shown.upper().replace("-", " ")

        yield databases, level


@pytest.mark.parametrize("asked", ["serializable", "SERIALIZABLE", "repeatable read", "READ_COMMITTED"])
def test_the_isolation_reaches_the_server_and_does_not_stay(levels: tuple[Databases, Callable[[], str]], asked: str) -> None:
    databases, level = levels
    transaction = databases.container.transaction
    with transaction():
        usual, connection = level(), databases.backend_id()
    with transaction(isolation=asked):
        assert level() == asked.upper().replace("_", " ")
        assert databases.backend_id() == connection
        databases.add("a")
    with transaction():
        assert (level(), databases.backend_id()) == (usual, connection)
    with pytest.raises(Boom), transaction(isolation=asked):
        level()
        raise Boom
    with transaction():
        assert (level(), databases.backend_id()) == (usual, connection)


def test_an_inner_unit_cannot_have_another_isolation(levels: tuple[Databases, Callable[[], str]]) -> None:
    databases, level = levels
    transaction = databases.container.transaction
    with transaction(isolation="serializable"):
        with transaction(isolation="SERIALIZABLE"):
            assert level() == "SERIALIZABLE"
        with pytest.raises(InvalidUse, match=r"READ COMMITTED.*SERIALIZABLE"), transaction(isolation="read committed"):
            pytest.fail("entered")
        databases.add("a")  # the refusal dooms nothing
    with transaction():
        with (
            pytest.raises(InvalidUse, match="the default isolation"),
            transaction(isolation="serializable", propagation="nested"),
        ):
            pytest.fail("entered")
        databases.add("b")
    assert databases.items() == ["a", "b"]


# ---- timeout ----------------------------------------------------------------------------------------------------------

LONG = {
    "sqlite": "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n WHERE x < 30000000) SELECT count(*) FROM n",
    "postgresql": "SELECT pg_sleep(3)",
    "mysql": "SELECT SLEEP(3)",
}
LONGER_THAN_THE_TIMEOUT = {
    "sqlite": "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n WHERE x < 6000000) SELECT count(*) FROM n",
    "postgresql": "SELECT pg_sleep(0.6)",
    "mysql": "SELECT SLEEP(0.6)",
}


@pytest.fixture
def limited(database_url: str) -> Iterator[Databases]:
    with opened({"writer": database_url}, each=ONE_CONNECTION) as databases:
        yield databases


def dialect_of(databases: Databases) -> str:
    return databases.outside().dialect.name


def test_a_statement_is_stopped_when_the_units_time_is_over(limited: Databases) -> None:
    began = time.monotonic()
    with pytest.raises(UnitOfWorkTimeout) as stopped, limited.container.transaction(timeout=0.3):
        limited.add("a")
        limited.session().execute(text(LONG[dialect_of(limited)]))
    assert 0.3 <= time.monotonic() - began < 2.5
    assert stopped.value.timeout == 0.3
    assert isinstance(stopped.value, TimeoutError)
    assert limited.items() == []


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


def test_no_commit_is_sent_when_the_time_is_over(limited: Databases) -> None:
    with pytest.raises(UnitOfWorkTimeout), limited.container.transaction(timeout=0.2):
        limited.add("a")
        time.sleep(0.25)
    assert limited.items() == []


def test_a_unit_without_a_database_may_take_its_time(databases: Databases) -> None:
    with databases.container.transaction(timeout=0.01):
        time.sleep(0.02)


def test_an_inner_timeout_ends_with_its_block(limited: Databases) -> None:
    transaction = limited.container.transaction
    with transaction():
        limited.add("a")
        with transaction(timeout=0.2):
            limited.add("b")
        time.sleep(0.25)
        limited.add("c")
    assert limited.items() == ["a", "b", "c"]


def test_an_inner_timeout_in_which_the_session_began_ends_with_its_block(limited: Databases) -> None:
    transaction = limited.container.transaction
    with transaction():
        with transaction(timeout=0.3):
            limited.add("a")
        limited.session().execute(text(LONGER_THAN_THE_TIMEOUT[dialect_of(limited)]))
        limited.add("b")
    assert limited.items() == ["a", "b"]


def test_an_inner_timeout_stops_a_statement_of_a_session_that_began_before(limited: Databases) -> None:
    transaction = limited.container.transaction
    began = time.monotonic()
    with pytest.raises(UnitOfWorkTimeout), transaction():
        limited.add("a")
        with transaction(timeout=0.3):
            limited.session().execute(text(LONG[dialect_of(limited)]))
    assert time.monotonic() - began < 2.5
    assert limited.items() == []


def test_an_inner_timeout_cannot_give_more_time_than_there_is(limited: Databases) -> None:
    transaction = limited.container.transaction
    with pytest.raises(UnitOfWorkTimeout) as stopped, transaction(timeout=0.2), transaction(timeout=60):
        limited.add("a")
        time.sleep(0.25)
        limited.add("b")
    assert stopped.value.timeout == 0.2
    assert limited.items() == []


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


def test_an_error_of_a_kind_in_commit_on_commits_and_goes_on(databases: Databases, container: DatabaseContainer) -> None:
    for kinds, name in ((Gentle, "one kind"), ((Gentle,), "a tuple"), ([KeyError, Boom], "a list with its base")):
        with pytest.raises(Gentle), container.transaction(commit_on=kinds):
            databases.add(name)
            raise Gentle
    assert databases.items() == ["a list with its base", "a tuple", "one kind"]


def test_an_error_of_another_kind_aborts(databases: Databases, container: DatabaseContainer) -> None:
    with pytest.raises(Boom), container.transaction(commit_on=Gentle):
        databases.add("a")
        raise Boom
    assert databases.items() == []


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


def test_a_doomed_unit_says_so_when_it_ends(databases: Databases, container: DatabaseContainer) -> None:
    with pytest.raises(UnitOfWorkDoomed, match="the stock is empty"), container.transaction() as unit:
        databases.add("a")
        assert not unit.is_doomed
        unit.doom("the stock is empty")
        assert unit.is_doomed
        databases.add("b")  # it may go on to the end
    assert databases.items() == []


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
