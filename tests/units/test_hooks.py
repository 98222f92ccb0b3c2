"""Functions that run before a unit commits, and after it has committed or aborted."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import transaction as zope
from sqlalchemy import event, exc, text
from sqlalchemy.orm import Session

from app_db import DatabaseContainer, UnitOfWork
from app_db.errors import HookFailed, InvalidUse, NoUnitOfWork, UnitOfWorkDoomed
from harness.applications import Boom
from harness.coroutines import Either
from harness.items import Databases, Item, opened
from harness.versions import RESET_LOSES_PLACES


def boom(*_: object) -> None:
    raise Boom


# ---- when, in which order, with what ------------------------------------------------------------------------------------


def test_hooks_run_in_the_order_of_their_registration(container: DatabaseContainer, ran: list[Any]) -> None:
    with container.transaction() as unit:
        for number in (1, 2, 3):
            unit.on_commit(ran.append, f"commit {number}")
            unit.before_commit(ran.append, f"before {number}")
            unit.on_abort(ran.append, f"abort {number}")
        assert ran == []
    assert ran == ["before 1", "before 2", "before 3", "commit 1", "commit 2", "commit 3"]


def test_when_a_unit_aborts_only_its_abort_hooks_run(container: DatabaseContainer, ran: list[Any]) -> None:
    with pytest.raises(Boom), container.transaction() as unit:
        for number in (1, 2):
            unit.on_commit(ran.append, f"commit {number}")
            unit.before_commit(ran.append, f"before {number}")
            unit.on_abort(ran.append, f"abort {number}")
        raise Boom
    assert ran == ["abort 1", "abort 2"]


def test_arguments_are_passed_on(container: DatabaseContainer, ran: list[Any]) -> None:
    def hook(*args: int, **kwargs: int) -> None:
        ran.append((args, kwargs))

    with container.transaction() as unit:
        unit.before_commit(hook, 1, two=2)
        unit.on_commit(hook, 3)
    with pytest.raises(Boom), container.transaction() as unit:
        unit.on_abort(hook, four=4)
        raise Boom
    assert ran == [((1,), {"two": 2}), ((3,), {}), ((), {"four": 4})]


def test_a_hook_of_one_unit_does_not_run_in_the_next(container: DatabaseContainer, ran: list[Any]) -> None:
    with container.transaction() as unit:
        unit.on_commit(ran.append, 1)
        unit.on_abort(ran.append, "abort")
    with container.transaction():
        pass
    with pytest.raises(Boom), container.transaction():
        raise Boom
    assert ran == [1]


def test_hooks_of_joined_blocks_run_when_the_outermost_unit_ends(databases: Databases, ran: list[Any]) -> None:
    transaction = databases.container.transaction
    with transaction():
        with transaction() as unit:
            unit.on_commit(lambda: ran.append(databases.items()))
            databases.add("inner")
        assert ran == []
        databases.add("outer")
    assert ran == [["inner", "outer"]]


def test_the_unit_can_be_had_from_the_container(container: DatabaseContainer, ran: list[Any]) -> None:
    with container.transaction():
        container.unit().on_commit(ran.append, 1)
    assert ran == [1]


def test_a_block_without_a_unit_has_no_hooks(container: DatabaseContainer) -> None:
    with container.transaction(propagation="supports") as unit:
        for register in (unit.before_commit, unit.on_commit, unit.on_abort):
            with pytest.raises(NoUnitOfWork, match="has no unit of work"):
                register(boom)


# ---- before_commit ------------------------------------------------------------------------------------------------------


def test_what_a_hook_writes_before_the_commit_is_committed_with_the_rest(databases: Databases) -> None:
    with databases.container.transaction() as unit:
        session = databases.session()
        unit.before_commit(lambda: session.add(Item(name="pending in the hook")))
        unit.before_commit(databases.add, "flushed in the hook")
        unit.before_commit(lambda: databases.put if databases.items() == [] else boom())
        databases.add("body")
    assert databases.items() == ["body", "flushed in the hook", "pending in the hook"]


async def test_a_hook_before_the_commit_works_in_the_unit(either: Either) -> None:
    async def write_more() -> None:
        await either.write("from the hook")
        async with either.block():
            await either.write("in a part of it")
        async with either.block(propagation="nested"):
            await either.write("in a savepoint")

    async with either.block() as unit:
        unit.before_commit(either.hook(write_more))
        await either.write("a")
    async with either.block() as unit:
        unit.before_commit(either.hook(either.write), "the only one")
    assert either.items() == ["a", "from the hook", "in a part of it", "in a savepoint", "the only one"]


async def test_a_hook_that_fails_before_the_commit_aborts_everything(either: Either, ran: list[Any]) -> None:
    async def fail() -> None:
        await either.write("c")
        raise Boom

    with pytest.raises(Boom):
        async with either.block() as unit:
            await either.write("a")
            unit.before_commit(either.hook(either.write), "b")
            unit.before_commit(either.hook(fail))
            unit.before_commit(ran.append, "not reached")
            unit.on_commit(ran.append, "not committed")
            unit.on_abort(ran.append, "aborted")
    assert ran == ["aborted"]
    assert either.items() == []
    assert either.checked_out() == 0


def test_a_joined_block_that_fails_in_a_hook_dooms_the_unit(databases: Databases) -> None:
    def hook() -> None:
        with pytest.raises(Boom), databases.container.transaction():
            raise Boom

    with pytest.raises(UnitOfWorkDoomed), databases.container.transaction() as unit:
        databases.add("a")
        unit.before_commit(hook)
    assert databases.items() == []


# ---- on_commit ----------------------------------------------------------------------------------------------------------


def test_after_the_commit_rows_are_there_and_the_connection_is_back(databases: Databases, ran: list[Any]) -> None:
    with databases.container.transaction() as unit:
        databases.add("a")
        unit.on_commit(lambda: ran.append((databases.items(), databases.checked_out())))
    assert ran == [(["a"], 0)]


def test_in_a_hook_after_the_end_there_is_no_unit(databases: Databases, ran: list[Any]) -> None:
    def look() -> None:
        with pytest.raises(NoUnitOfWork):
            databases.session()
        with pytest.raises(NoUnitOfWork):
            databases.container.unit()
        ran.append("looked")

    with databases.container.transaction() as unit:
        databases.add("a")
        unit.on_commit(look)
    with pytest.raises(Boom), databases.container.transaction() as unit:
        databases.add("b")
        unit.on_abort(look)
        raise Boom
    assert ran == ["looked", "looked"]


async def test_a_hook_may_begin_a_unit_of_its_own(either: Either) -> None:
    async def own(name: str) -> None:
        with pytest.raises(NoUnitOfWork):
            either.container.unit()
        async with either.block():
            await either.write(name)

    def blocking(name: str) -> None:
        with either.container.transaction():
            either.add(name)

    async with either.block() as unit:
        await either.write("a")
        unit.on_commit(either.hook(own), "after the commit")
        unit.on_commit(blocking, "blocking")
    with pytest.raises(Boom):
        async with either.block() as unit:
            await either.write("b")
            unit.on_abort(either.hook(own), "after the abort")
            raise Boom
    with pytest.raises(NoUnitOfWork):
        either.container.unit()
    assert either.items() == ["a", "after the abort", "after the commit", "blocking"]


def test_a_unit_of_a_hook_has_hooks_of_its_own(databases: Databases, ran: list[Any]) -> None:
    def again(depth: int) -> None:
        with databases.container.transaction() as unit:
            databases.add(f"depth {depth}")
            if depth < 3:
                unit.on_commit(again, depth + 1)
            unit.on_commit(ran.append, depth)

    again(1)
    assert ran == [3, 2, 1]
    assert databases.items() == ["depth 1", "depth 2", "depth 3"]


async def test_a_hook_that_fails_after_the_commit_is_reported_and_the_others_run(
    either: Either, ran: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    async def fail() -> None:
        await either.pause(0)
        raise Boom

    caplog.set_level(logging.ERROR, "app_db")
    with pytest.raises(HookFailed) as failed:
        async with either.block() as unit:
            await either.write("a")
            unit.on_commit(ran.append, 1)
            unit.on_commit(either.hook(fail))
            unit.on_commit(ran.append, 2)
            unit.on_commit(int, "no number")
            unit.on_commit(ran.append, 3)
    assert ran == [1, 2, 3]
    assert [type(error) for error in failed.value.errors] == [Boom, ValueError]
    assert failed.value.__cause__ is failed.value.errors[0]
    assert "was committed" in str(failed.value)
    assert len(caplog.records) == 2
    assert either.items() == ["a"]
    async with either.block():
        await either.write("b")
    assert either.items() == ["a", "b"]


def test_a_unit_of_a_hook_that_fails_does_not_change_what_was_committed(databases: Databases) -> None:
    def fail() -> None:
        with databases.container.transaction():
            databases.add("b")
            raise Boom

    with pytest.raises(HookFailed) as failed, databases.container.transaction() as unit:
        databases.add("a")
        unit.on_commit(fail)
    assert [type(error) for error in failed.value.errors] == [Boom]
    assert databases.items() == ["a"]


def test_a_session_kept_for_a_hook_is_refused_there(databases: Databases) -> None:
    """A session used in a hook of zope's after the commit would take a connection that nobody returns."""
    with pytest.raises(HookFailed) as failed, databases.container.transaction() as unit:
        databases.add("a")
        unit.on_commit(databases.session().execute, text("SELECT 1"))
    assert "ended" in str(failed.value.errors[0])
    assert databases.checked_out() == 0


# ---- on_abort -----------------------------------------------------------------------------------------------------------


def test_after_the_abort_rows_are_gone_and_the_connection_is_back(databases: Databases, ran: list[Any]) -> None:
    with pytest.raises(Boom), databases.container.transaction() as unit:
        databases.add("a")
        unit.on_abort(lambda: ran.append((databases.items(), databases.checked_out())))
        raise Boom
    assert ran == [([], 0)]


def test_abort_hooks_run_when_the_commit_fails(postgres_url: str, ran: list[Any]) -> None:
    """Zope's own abort hooks don't: a failed commit only calls its after-commit hooks, with False."""
    with opened({"writer": postgres_url}) as databases:
        databases.rival("ALTER TABLE item ADD COLUMN other TEXT REFERENCES item DEFERRABLE INITIALLY DEFERRED")
        with pytest.raises(exc.IntegrityError), databases.container.transaction() as unit:
            unit.on_commit(ran.append, "committed")
            unit.on_abort(lambda: ran.append((databases.items(), databases.checked_out())))
            databases.session().execute(text("INSERT INTO item (name, amount, other) VALUES ('a', 0, 'nowhere')"))
        assert ran == [([], 0)]


def test_abort_hooks_run_when_the_flush_fails(databases: Databases, ran: list[Any]) -> None:
    databases.put("a")
    with pytest.raises(exc.IntegrityError), databases.container.transaction() as unit:
        unit.on_abort(ran.append, "aborted")
        databases.session().add(Item(name="a"))
    assert ran == ["aborted"]


def test_abort_hooks_run_when_the_unit_was_doomed(databases: Databases, ran: list[Any]) -> None:
    with pytest.raises(UnitOfWorkDoomed), databases.container.transaction() as unit:
        unit.on_abort(ran.append, "aborted")
        unit.doom()
    assert ran == ["aborted"]


def test_a_hook_that_fails_after_an_abort_does_not_hide_why_it_aborted(
    databases: Databases, ran: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, "app_db"), pytest.raises(Boom), databases.container.transaction() as unit:
        unit.on_abort(int, "no number")
        unit.on_abort(ran.append, "the next one")
        raise Boom
    assert ran == ["the next one"]
    assert "no number" in caplog.text


# ---- hooks that register hooks ------------------------------------------------------------------------------------------


def test_hooks_may_register_hooks(databases: Databases, ran: list[Any]) -> None:
    with databases.container.transaction() as unit:

        def first() -> None:
            ran.append("first")
            unit.before_commit(second)
            unit.on_commit(ran.append, "after the commit")

        def second() -> None:
            ran.append("second")
            databases.add("in the second")

        unit.before_commit(first)
        unit.before_commit(ran.append, "registered before")
    assert ran == ["first", "registered before", "second", "after the commit"]
    assert databases.items() == ["in the second"]


def test_a_before_commit_hook_may_register_the_units_first_of_another_kind(databases: Databases, ran: list[Any]) -> None:
    with pytest.raises(Boom), databases.container.transaction() as unit:
        unit.before_commit(lambda: unit.on_abort(ran.append, "aborted"))
        unit.before_commit(boom)
    assert ran == ["aborted"]


# ---- savepoints ---------------------------------------------------------------------------------------------------------


def register_all(unit: UnitOfWork, ran: list[Any], what: str) -> None:
    unit.before_commit(ran.append, f"before, {what}")
    unit.on_commit(ran.append, f"commit, {what}")
    unit.on_abort(ran.append, f"abort, {what}")


async def test_hooks_of_a_nested_block_that_is_undone_do_not_run(either: Either, ran: list[Any]) -> None:
    async def note(what: str) -> None:
        ran.append(what)

    async with either.block() as unit:
        register_all(unit, ran, "outside")
        with pytest.raises(Boom):
            async with either.block(propagation="nested") as inner:
                register_all(inner, ran, "undone")
                inner.on_commit(either.hook(note), "undone")
                raise Boom
        async with either.block(propagation="nested") as inner:
            register_all(inner, ran, "kept")
        register_all(unit, ran, "afterwards")
        unit.on_commit(either.hook(note), "at last")
    expected = [f"{when}, {what}" for when in ("before", "commit") for what in ("outside", "kept", "afterwards")]
    assert ran == [*expected, "at last"]


def test_the_first_hooks_of_a_unit_are_forgotten_when_their_nested_block_is_undone(databases: Databases, ran: list[Any]) -> None:
    transaction = databases.container.transaction
    with transaction() as unit:
        with pytest.raises(Boom), transaction(propagation="nested") as inner:
            register_all(inner, ran, "undone")
            raise Boom
        register_all(unit, ran, "afterwards")
    assert ran == ["before, afterwards", "commit, afterwards"]


def test_hooks_registered_after_a_savepoint_that_is_rolled_back_do_not_run(databases: Databases, ran: list[Any]) -> None:
    with databases.container.transaction() as unit:
        register_all(unit, ran, "outside")
        savepoint = unit.savepoint()
        for what in ("once", "twice"):
            register_all(unit, ran, what)
            savepoint.rollback()
        register_all(unit, ran, "afterwards")
    assert ran == [f"{when}, {what}" for when in ("before", "commit") for what in ("outside", "afterwards")]


def test_abort_hooks_of_an_undone_savepoint_do_not_run_in_an_abort(databases: Databases, ran: list[Any]) -> None:
    with pytest.raises(Boom), databases.container.transaction() as unit:
        register_all(unit, ran, "outside")
        savepoint = unit.savepoint()
        register_all(unit, ran, "undone")
        savepoint.rollback()
        raise Boom
    assert ran == ["abort, outside"]


def test_an_undone_first_hook_does_not_keep_later_abort_hooks_from_running(databases: Databases, ran: list[Any]) -> None:
    with pytest.raises(Boom), databases.container.transaction() as unit:
        savepoint = unit.savepoint()
        register_all(unit, ran, "undone")
        savepoint.rollback()
        register_all(unit, ran, "afterwards")
        raise Boom
    assert ran == ["abort, afterwards"]


# ---- zope's global manager ------------------------------------------------------------------------------------------------


@pytest.fixture
def under_zope(sqlite_url: str) -> Iterator[Databases]:
    with opened({"writer": sqlite_url}, manager=zope.manager) as databases:
        yield databases
        zope.abort()


def test_hooks_run_with_a_plain_commit_of_zopes_manager(under_zope: Databases, ran: list[Any]) -> None:
    zope.begin()
    under_zope.add("a")
    unit: UnitOfWork = under_zope.container.unit()
    unit.before_commit(under_zope.add, "b")
    unit.on_commit(lambda: ran.append((under_zope.items(), under_zope.checked_out())))
    unit.on_abort(ran.append, "aborted")
    zope.commit()
    assert ran == [(["a", "b"], 0)]


def test_hooks_run_with_a_plain_abort_of_zopes_manager(under_zope: Databases, ran: list[Any]) -> None:
    zope.begin()
    under_zope.add("a")
    unit: UnitOfWork = under_zope.container.unit()
    unit.on_commit(ran.append, "committed")
    unit.on_abort(lambda: ran.append((under_zope.items(), under_zope.checked_out())))
    zope.abort()
    assert ran == [([], 0)]


def test_hooks_of_a_unit_under_zopes_manager_may_begin_units(under_zope: Databases) -> None:
    def write(name: str) -> None:
        with under_zope.container.transaction():
            under_zope.add(name)

    with under_zope.container.transaction() as unit:
        under_zope.add("a")
        unit.on_commit(write, "b")
    zope.begin()
    under_zope.add("c")
    under_zope.container.unit().on_commit(write, "d")
    zope.commit()
    assert under_zope.items() == ["a", "b", "c", "d"]


@pytest.mark.parametrize("fails_at", ["before_commit", "vote"])
def test_abort_hooks_run_after_a_commit_of_zopes_manager_that_failed(
    under_zope: Databases, ran: list[Any], fails_at: str
) -> None:
    unit: UnitOfWork
    zope.begin()
    under_zope.add("a")
    unit = under_zope.container.unit()
    unit.on_abort(ran.append, "aborted")
    if fails_at == "before_commit":
        unit.before_commit(boom)
    else:
        unit.before_commit(unit.doom)
    with pytest.raises((Boom, UnitOfWorkDoomed)):
        zope.commit()
    zope.abort()
    assert ran == ["aborted"]
    assert under_zope.items() == []


# ---- interruptions -------------------------------------------------------------------------------------------------------


def test_an_interruption_in_a_hook_goes_on_once_the_other_hooks_have_run(databases: Databases, ran: list[Any]) -> None:
    """The fact guarded: zope swallows whatever an after-commit hook raises."""

    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), databases.container.transaction() as unit:
        unit.on_commit(interrupted)
        unit.on_commit(ran.append, "committed")
        databases.add("a")
    with pytest.raises(KeyboardInterrupt), databases.container.transaction() as unit:
        unit.on_abort(interrupted)
        unit.on_abort(ran.append, "aborted")
        raise ValueError
    assert ran == ["committed", "aborted"]
    assert databases.items() == ["a"]


def test_an_interruption_after_commit_runs_the_hooks_of_a_commit(databases: Databases, ran: list[Any]) -> None:
    """As when a signal arrives while the connection is returned to its pool, after COMMIT was answered."""

    def interrupted(*_: object) -> None:
        event.remove(databases.container.writer_engine(), "reset", interrupted)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), databases.container.transaction() as unit:
        unit.on_commit(ran.append, "committed")
        unit.on_abort(ran.append, "aborted")
        databases.add("a")
        event.listen(databases.container.writer_engine(), "reset", interrupted)
    assert databases.items() == ["a"]
    assert ran == ["committed"]
    if RESET_LOSES_PLACES:
        databases.container.writer_engine().dispose()


# ---- hooks that a listener of the last flush registers ------------------------------------------------------------------


@pytest.mark.parametrize("there_were_hooks", [False, True])
def test_a_listener_of_the_flush_during_commit_may_register_hooks_after_it(
    there_were_hooks: bool, databases: Databases, ran: list[Any]
) -> None:
    container = databases.container

    def note(session: Session, context: object) -> None:
        container.unit().on_commit(ran.append, "commit")
        container.unit().on_abort(ran.append, "abort")

    with listening(container.writer_sessionmaker().class_, note):
        with container.transaction() as unit:
            if there_were_hooks:
                unit.on_commit(ran.append, "first")
            container.writer_session().add(Item(name="a"))
        assert ran == (["first", "commit"] if there_were_hooks else ["commit"])
        ran.clear()
        with pytest.raises(exc.IntegrityError), container.transaction():
            container.writer_session().add_all([Item(name="b"), Item(name="a")])
        assert ran == []  # the flush failed before the listener was called


@pytest.mark.parametrize("there_were_hooks", [False, True])
def test_a_before_commit_hook_that_would_come_too_late_is_refused(
    there_were_hooks: bool, databases: Databases, ran: list[Any]
) -> None:
    container = databases.container

    def note(session: Session, context: object) -> None:
        container.unit().before_commit(ran.append, "lost")

    with listening(container.writer_sessionmaker().class_, note):
        with pytest.raises(InvalidUse, match="registered while the unit commits"), container.transaction() as unit:
            if there_were_hooks:
                unit.before_commit(ran.append, "before")
            container.writer_session().add(Item(name="a"))
        assert databases.items() == []


@contextmanager
def listening(target: Any, listener: Any) -> Iterator[None]:
    event.listen(target, "after_flush", listener)
    try:
        yield
    finally:
        event.remove(target, "after_flush", listener)
