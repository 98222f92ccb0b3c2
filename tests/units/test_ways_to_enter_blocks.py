"""A block works however its methods are called, and an interruption that lands outside of app_db's own lines is told."""

from __future__ import annotations

import dis
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager, suppress
from types import FrameType
from typing import Any
from unittest import TestCase

import pytest
import transaction as zope

from app_db.testing import isolated
from harness.applications import Application, Item, running


class Late(Exception):
    """What the signal handler raises."""


def ring(number: int, frame: object) -> None:
    raise Late


@pytest.fixture
def app(sqlite_url: str) -> Iterator[Application]:
    with running(writer=sqlite_url) as app:
        yield app


@contextmanager
def signalled_at(function: Callable[..., Any]) -> Iterator[None]:
    """Have a real signal arrive when `function` is called next."""
    before = signal.signal(signal.SIGALRM, ring)

    def called(frame: FrameType, event: str, argument: object) -> None:
        if frame.f_code is function.__code__:
            sys.setprofile(None)
            signal.raise_signal(signal.SIGALRM)

    sys.setprofile(called)
    try:
        yield
    finally:
        sys.setprofile(None)
        signal.signal(signal.SIGALRM, before)


# ---- how a block is entered ---------------------------------------------------------------------------------------------


def test_the_methods_may_be_called_as_the_language_reference_expands_a_with_statement(app: Application) -> None:
    manager = app.unit()
    enter, leave = type(manager).__enter__, type(manager).__exit__
    enter(manager)
    try:
        with app.unit():
            app.add("part")
        raise KeyError
    except KeyError:
        leave(manager, *sys.exc_info())
    assert app.names() == []


def test_a_stack_may_be_used_again_where_an_error_of_its_own_is_handled(app: Application) -> None:
    stack = ExitStack()
    stack.callback(lambda: 1 // 0)
    try:
        stack.close()
    except ZeroDivisionError:
        with suppress(KeyError), stack:
            stack.enter_context(app.unit())
            with app.unit():
                app.add("part")
            raise KeyError from None
    assert app.names() == []


def test_unittest_enters_a_block(app: Application) -> None:
    case = TestCase()
    case.enterContext(app.unit())
    with app.unit():
        app.add("part")
    case.doCleanups()
    assert app.names() == ["part"]


def test_a_block_in_a_stack_is_used_by_others_of_the_stack(app: Application) -> None:
    with ExitStack() as stack:
        stack.enter_context(app.unit())
        stack.callback(app.add, "last")
        stack.enter_context(app.unit(propagation="nested"))
        app.add("first")
    assert app.names() == ["first", "last"]


def test_a_stack_of_coroutines_holds_a_block_of_threads(app: Application) -> None:
    async def main() -> None:
        async with AsyncExitStack() as stack:
            stack.enter_context(app.unit())
            app.add("a")

    import asyncio

    asyncio.run(main())
    assert app.names() == ["a"]


# ---- what becomes of the interruption -----------------------------------------------------------------------------------


@contextmanager
def signalled_before_awaiting_exit(function: Callable[..., Any]) -> Iterator[None]:
    """Have a real signal arrive when `function`, a coroutine, has called `__aexit__` and has not begun to await the result."""
    before = signal.signal(signal.SIGALRM, ring)
    offsets = {
        instruction.offset
        for instruction in dis.get_instructions(function)
        if (instruction.opname, instruction.arg) == ("GET_AWAITABLE", 2)
    }

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        if frame.f_code is not function.__code__:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode" and frame.f_lasti in offsets:
            sys.settrace(None)
            signal.raise_signal(signal.SIGALRM)
        return trace

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(None)
        signal.signal(signal.SIGALRM, before)


async def test_a_stack_that_a_signal_keeps_from_leaving_holds_no_unit_in_the_except(app: Application) -> None:
    """The coroutine of `AsyncExitStack.__aexit__` never starts, so no frame of the stack is in the traceback."""
    unit = app.unit

    async def hold() -> None:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(unit())
            app.container.writer_session().add(Item(name="interrupted"))

    async def go_on() -> None:
        try:
            await hold()
        except Late as late:
            kept = late
            assert app.container.transaction_manager().current() is None
            async with unit():
                app.container.writer_session().add(Item(name="next"))
            del kept

    with signalled_before_awaiting_exit(hold), pytest.warns(RuntimeWarning, match="__aexit__' was never awaited"):
        await go_on()
    assert app.names() == ["next"]


def test_one_that_comes_while_a_unit_is_aborted_is_raised(app: Application) -> None:
    with pytest.raises(Late) as caught, signalled_at(zope.Transaction.abort), app.unit():
        app.add("a")
        raise KeyError
    assert isinstance(caught.value.__context__, KeyError)
    assert app.container.transaction_manager().current() is None
    assert app.checked_out() == 0
    with app.unit():
        app.add("next")
    assert app.names() == ["next"]


def test_one_that_comes_after_the_commit_is_raised_with_a_note(app: Application) -> None:
    from app_db._sessions.sessions import UnitSession

    with pytest.raises(Late) as caught, signalled_at(UnitSession.close), app.unit():
        app.add("a")
    assert "Don't repeat the unit" in caught.value.__notes__[0]
    assert app.names() == ["a"]


def test_an_isolated_test_that_is_torn_down_leaves_no_isolation(app: Application) -> None:
    isolation = isolated(app.container)
    with pytest.raises(Late), signalled_at(isolated._leave), isolation, app.unit():
        app.add("isolated")
    with app.unit():
        app.add("next")
    assert app.names() == ["next"]


@pytest.mark.parametrize("method", ["abort", "_free_manager"])
def test_under_zopes_manager_no_block_joins_what_is_left(sqlite_url: str, method: str) -> None:
    with running(writer=sqlite_url) as app:
        app.container.transaction_manager.override(zope.manager)
        app.container.reset_singletons()
        kept = None
        try:
            with signalled_at(getattr(zope.Transaction, method)), app.unit():
                app.add("a")
                raise KeyError
        except Late as error:
            kept = error
            with suppress(Exception), app.unit():
                app.add("next")
        del kept
        zope.manager.abort()
        with app.unit():
            app.add("later")
        assert app.names() in (["later"], ["later", "next"])
        app.container.transaction_manager.reset_override()
