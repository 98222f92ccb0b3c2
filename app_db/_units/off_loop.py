"""Branches with a blocking driver in units that coroutines end: they wait for the database in a thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import cache, partial
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from sqlalchemy.util.concurrency import await_only, in_greenlet

from app_db._compat.os import after_fork_in_child
from app_db._units.branches import Branch

if TYPE_CHECKING:
    from sqlalchemy.orm import SessionTransaction

    from app_db._units.interfaces import Rehearsal

P = ParamSpec("P")
R = TypeVar("R")


class BranchOffLoop(Branch):
    """A branch with a blocking driver in a unit that a coroutine ends. It waits for the database in a thread."""

    def flush(self) -> None:
        off_loop(super().flush)

    def flush_for_good(self) -> None:
        off_loop(super().flush_for_good)

    def has_lost_transaction(self) -> bool:
        return off_loop(super().has_lost_transaction)

    def ask_whether_it_wrote(self, *, also_if_certain: bool = False) -> None:
        off_loop(super().ask_whether_it_wrote, also_if_certain=also_if_certain)

    def check_commit(self, rehearsal: Rehearsal) -> None:
        off_loop(super().check_commit, rehearsal)

    def commit(self) -> None:
        off_loop(super().commit)

    def roll_back(self) -> None:
        off_loop(super().roll_back)

    def savepoint(self) -> SessionTransaction:
        return off_loop(super().savepoint)

    def roll_back_to(self, savepoint: SessionTransaction) -> None:
        off_loop(super().roll_back_to, savepoint)

    def release(self, savepoint: SessionTransaction) -> None:
        off_loop(super().release, savepoint)

    def apply_time_limit(self) -> None:
        off_loop(super().apply_time_limit)

    def settle_elsewhere(self, *, commit: bool) -> bool:
        return off_loop(super().settle_elsewhere, commit=commit)


def off_loop(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call a blocking function and return its result. Run it in a thread if it would block an event loop."""
    if not in_greenlet():
        return function(*args, **kwargs)
    work = partial(copy_context().run, partial(function, *args, **kwargs))
    return await_only(asyncio.get_running_loop().run_in_executor(own_threads(), work))


@cache
def own_threads() -> ThreadPoolExecutor:
    """Return a thread pool. The loop's own may be full of threads that wait for this unit to end."""
    return ThreadPoolExecutor(1000, "app_db")


after_fork_in_child(own_threads.cache_clear)
