"""Ends of a unit of work that are rare, and uses of what has ended."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import transaction
from sqlalchemy import event, text
from sqlalchemy.orm import Session
from transaction.interfaces import TransientError

from app_db import DatabaseSettings, container_of, transactional
from app_db.errors import HookFailed, InvalidUse, PartialCommit, ReadOnlyViolation, TransactionLost, UnitOfWorkEnded
from harness.applications import Item, running


def test_a_handle_kept_from_an_ended_unit_is_refused(sqlite_url: str) -> None:
    with running(writer=sqlite_url) as app:
        with app.unit() as unit:
            app.add("a")
        uses: list[Callable[[], Any]] = [unit.doom, unit.savepoint, lambda: unit.on_commit(print), lambda: unit.is_doomed]
        for use in uses:
            with pytest.raises(UnitOfWorkEnded, match="handle of a unit of work"):
                use()


def test_a_session_may_be_cleaned_up_after_its_unit(sqlite_url: str) -> None:
    """`with session:` and a rollback in a finally clause are habits that harm nothing once the unit has ended."""
    with running(writer=sqlite_url) as app:
        with app.unit():
            session = app.session()
            app.add("a")
        session.rollback()
        session.close()
        session.reset()
        assert app.names() == ["a"]


def test_the_bulk_methods_work_in_a_unit(sqlite_url: str) -> None:
    with running(writer=sqlite_url) as app:
        with app.unit():
            app.session().bulk_insert_mappings(Item, [{"id": 1, "name": "a"}])
            app.session().bulk_update_mappings(Item, [{"id": 1, "name": "b"}])
        assert app.names() == ["b"]


def test_a_scoped_session_can_be_asked_and_told_which_session_it_stands_for(sqlite_url: str) -> None:
    with running(writer=sqlite_url) as app:
        container: Any = app.container
        scoped = container.writer_scoped_session()
        with app.unit():
            assert not scoped.registry.has()
            mine = container.writer_scoped_session().session_factory()
            scoped.registry.set(mine)
            assert scoped() is mine
            scoped.registry.clear()
            assert scoped() is not mine


def test_a_session_used_after_the_commit_but_before_zope_lets_go_is_refused(sqlite_url: str) -> None:
    """zope runs its own after-commit hooks while the transaction is still current; a session used there leaked a connection."""
    refused: list[str] = []
    with running(writer=sqlite_url) as app:

        def use(committed: bool) -> None:
            try:
                app.session().execute(text("SELECT 1"))
            except UnitOfWorkEnded as error:
                refused.append(str(error))

        with app.unit() as unit:
            app.add("a")
            unit.transaction.addAfterCommitHook(use)
        assert len(refused) == 1
        assert app.names() == ["a"]


def test_an_interruption_between_two_commits_says_what_was_committed(new_sqlite_url: Callable[[], str]) -> None:
    with running("best_effort", first=new_sqlite_url(), second=new_sqlite_url()) as app:

        def interrupt(connection: Any) -> None:
            if app.names("first") == ["a"]:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt) as caught, app.unit():
            app.add("a", "first")
            app.add("b", "second")
            event.listen(app.engine("second"), "commit", interrupt)
        assert caught.value.__notes__ == [str(PartialCommit(["first"], "second", []))]
        assert (app.names("first"), app.names("second")) == (["a"], [])


def test_an_autonomous_connection_that_lost_its_transaction_is_reported_when_the_unit_aborts(
    postgres_url: str, sqlite_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    with running(writer=sqlite_url, log={"url": postgres_url, "transactional": False}) as app:
        with caplog.at_level(logging.ERROR, "app_db"), pytest.raises(LookupError), app.unit():
            app.add("gone", "log")
            with pytest.raises(Exception, match="nowhere"):
                app.session("log").execute(text("SELECT * FROM nowhere"))
            raise LookupError
        (record,) = caplog.records
        assert record.getMessage() == "The connection 'log' could not be committed"
        assert record.exc_info is not None
        assert isinstance(record.exc_info[1], TransactionLost)
        assert app.names("log") == []


def test_a_block_whose_transaction_was_ended_by_zopes_manager_says_so(sqlite_url: str) -> None:
    settings = DatabaseSettings(connections={"writer": {"url": sqlite_url}}, _env_file=None)
    container = container_of("writer")(settings=settings, transaction_manager=transaction.manager)
    with pytest.raises(UnitOfWorkEnded, match="block of a unit of work"), container.transaction():
        transaction.commit()
    container.shutdown_resources()


def generator_function() -> Iterator[None]:
    yield


async def async_generator_function() -> AsyncIterator[None]:
    yield


@pytest.mark.parametrize("function", [generator_function, async_generator_function])
def test_what_would_run_after_its_unit_cannot_be_decorated(function: Callable[..., Any]) -> None:
    with pytest.raises(InvalidUse, match="a generator function"):
        transactional(function)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"read_onyl": True}, r"There is no option 'read_onyl'\. Did you mean 'read_only'\? The options are propagation, "),
        ({"zzz": True}, r"There is no option 'zzz'\. The options are propagation, "),
        ({"isolation": "perfect"}, r"There is no isolation level 'PERFECT'\. Use one of READ UNCOMMITTED, "),
    ],
)
def test_an_option_that_does_not_exist_is_named(sqlite_url: str, options: dict[str, Any], message: str) -> None:
    with running(writer=sqlite_url) as app, pytest.raises(InvalidUse, match=message):
        app.unit(**options)


async def test_a_block_left_in_another_task_raises_its_own_error_first(sqlite_url: str) -> None:
    """The unit is aborted from there, and what went wrong in the block matters more."""
    with running(writer=sqlite_url) as app:
        block = app.unit()
        block.__enter__()

        async def leave() -> None:
            error = LookupError()
            block.__exit__(LookupError, error, None)

        await asyncio.create_task(leave())
        assert app.container.transaction_manager().current() is None


def test_a_listener_that_fails_after_the_commit_does_not_make_it_undone(new_sqlite_url: Callable[[], str]) -> None:
    def fail(session: Session) -> None:
        raise LookupError("after")

    with running("best_effort", first=new_sqlite_url(), second=new_sqlite_url()) as app:
        with pytest.raises(HookFailed, match="was committed") as caught, app.unit() as unit:
            app.add("a", "first")
            app.add("b", "second")
            event.listen(app.session("first"), "after_commit", fail)
            unit.on_abort(pytest.fail, "the unit was committed")
        assert [str(error) for error in caught.value.errors] == ["after"]
        assert (app.names("first"), app.names("second")) == (["a"], ["b"])


class FailsAtTheEnd:
    """A synchronizer that fails once all is over."""

    def newTransaction(self, transaction: Any) -> None: ...
    def beforeCompletion(self, transaction: Any) -> None: ...
    def afterCompletion(self, transaction: Any) -> None:
        raise LookupError("synchronizer")


def test_a_synchronizer_that_fails_after_the_commit_does_not_run_the_hooks_of_an_abort(sqlite_url: str) -> None:
    ran: list[str] = []
    with running(writer=sqlite_url) as app:
        manager = app.container.transaction_manager()
        failing = FailsAtTheEnd()
        manager.registerSynch(failing)
        with pytest.raises(HookFailed, match="was committed"), app.unit() as unit:
            app.add("a")
            unit.on_commit(ran.append, "on_commit")
            unit.on_abort(ran.append, "on_abort")
        manager.unregisterSynch(failing)
        assert ran == ["on_commit"]
        assert app.names() == ["a"]
        with app.unit():
            app.add("b")
        assert app.names() == ["a", "b"]


def test_a_unit_that_waited_is_not_taken_up_by_the_thread_in_which_a_generator_ended(sqlite_url: str) -> None:
    with running(writer=sqlite_url) as app:

        def apart() -> Iterator[None]:
            with app.unit("requires_new"):
                yield

        with app.unit():
            generator = apart()
            next(generator)
            found: list[Any] = []

            def close() -> None:
                with contextlib.suppress(Exception):
                    next(generator, None)
                found.append(app.container.transaction_manager().current())

            thread = threading.Thread(target=close)
            thread.start()
            thread.join()
            assert found == [None]


def test_a_session_is_not_taken_out_of_its_transaction_by_autocommit(postgres_url: str) -> None:
    with running(writer=postgres_url) as app:
        with pytest.raises(InvalidUse, match="can't be in autocommit"), app.unit():
            app.session().connection(execution_options={"isolation_level": "AUTOCOMMIT"})
        assert app.names() == []


def test_an_engine_that_overrides_is_treated_as_what_it_is(postgres_url: str, sqlite_url: str) -> None:
    """The settings say PostgreSQL, and the engine is SQLite's, which knows no SHOW."""
    with running(writer=postgres_url, other=sqlite_url) as app:
        app.override_engine("writer", app.engine("other"))
        with app.unit(timeout=60):
            app.add("a")
        with pytest.raises(ReadOnlyViolation), app.unit(read_only=True):
            app.session().connection().connection.cursor()
            app.add("b")
        assert app.names("other") == ["a"]


class FailsToFinish:
    """A data manager that fails when everybody has voted, and claims that this may pass."""

    def sortKey(self) -> str:
        return "fails to finish"

    def tpc_finish(self, transaction: Any) -> None:
        raise TransientError("not now")

    def abort(self, transaction: Any) -> None: ...

    tpc_begin = commit = tpc_vote = tpc_abort = abort


def test_what_has_committed_is_not_tried_again_whoever_fails_afterwards(sqlite_url: str) -> None:
    with running(writer=sqlite_url) as app:
        runs: list[int] = []

        def work() -> None:
            runs.append(1)
            app.add("a")
            app.container.unit().transaction.join(FailsToFinish())

        with pytest.raises(TransientError) as caught:
            app.unit(attempts=3).run(work)
        assert len(runs) == 1
        assert app.names() == ["a"]
        (note,) = caught.value.__notes__
        assert note.endswith("raised this. Don't repeat the unit.")
