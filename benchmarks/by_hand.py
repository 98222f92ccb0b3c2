"""zope.sqlalchemy, transaction and dependency-injector wired by hand, as somebody writes it who
knows all three.

There is a unit for threads and one for coroutines. In the latter the thread's transaction is that
of whichever task runs, so it is right only as long as one task at a time has a unit, as it is here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import transaction
from dependency_injector import containers, providers
from dependency_injector.wiring import inject
from sqlalchemy import Engine, create_engine
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_scoped_session, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.util.concurrency import greenlet_spawn
from zope.sqlalchemy import register

from workloads import ALL, Workload, asking, asking_async


def _scoped(engine: Engine) -> scoped_session[Session]:
    scoped = scoped_session(sessionmaker(engine))
    register(scoped)
    return scoped


class AsyncSessionsCore(Session):
    """The class of the sessions underneath AsyncSessions. `register` takes no AsyncSession."""


register(AsyncSessionsCore)


def _async_scoped(engine: AsyncEngine) -> async_scoped_session[AsyncSession]:
    maker = async_sessionmaker(engine, sync_session_class=AsyncSessionsCore)
    return async_scoped_session(maker, scopefunc=asyncio.current_task)


def _current(scoped: Callable[[], Any]) -> Any:
    return scoped()


class Container(containers.DeclarativeContainer):
    """An engine, and two sessions on it, so that a workload with two of them has two."""

    config = providers.Configuration()
    engine = providers.ThreadSafeSingleton(create_engine, config.url, pool_size=config.pool_size)
    writer_scoped = providers.ThreadSafeSingleton(_scoped, engine)
    reader_scoped = providers.ThreadSafeSingleton(_scoped, engine)
    writer_session = providers.Callable(_current, writer_scoped)
    reader_session = providers.Callable(_current, reader_scoped)


class AsyncContainer(containers.DeclarativeContainer):
    """The same for coroutines."""

    config = providers.Configuration()
    engine = providers.ThreadSafeSingleton(create_async_engine, config.url)
    writer_scoped = providers.ThreadSafeSingleton(_async_scoped, engine)
    reader_scoped = providers.ThreadSafeSingleton(_async_scoped, engine)
    writer_session = providers.Callable(_current, writer_scoped)
    reader_session = providers.Callable(_current, reader_scoped)


def units(container: Container) -> Callable[[Workload], Callable[[], Any]]:
    """Give units: a function with injected sessions, called in a transaction of this thread's
    manager.
    """
    functions = {workload: asking(inject, Container, workload, __name__) for workload in ALL}
    container.wire(modules=[__name__])

    def unit_of(workload: Workload) -> Callable[[], Any]:
        injected = functions[workload]

        def unit() -> Any:
            with transaction.manager:
                return injected()

        return unit

    return unit_of


def async_units(container: AsyncContainer) -> Callable[[Workload], Callable[[], Awaitable[Any]]]:
    """Give units of coroutines. The manager ends transactions in a greenlet, where the drivers can
    be awaited.
    """
    functions = {workload: asking_async(inject, AsyncContainer, workload, __name__) for workload in ALL}
    container.wire(modules=[__name__])

    def unit_of(workload: Workload) -> Callable[[], Awaitable[Any]]:
        injected = functions[workload]
        used = [getattr(container, f"{name}_scoped")() for name in workload.uses]

        async def unit() -> Any:
            transaction.begin()
            try:
                result = await injected()
                await greenlet_spawn(transaction.commit)
            except BaseException:
                await greenlet_spawn(transaction.abort)
                raise
            finally:
                for scoped in used:
                    await scoped.remove()
            return result

        return unit

    return unit_of
