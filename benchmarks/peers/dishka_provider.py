"""dishka's provider of sessions, for Starlette and FastAPI.

https://dishka.readthedocs.io/en/stable/provider/provide.html shows generators, to which the error is sent. It shows no
commit: this one commits where the documentation has its clean-up, if there was no error.
"""

from collections.abc import AsyncIterable, Iterable

from dishka import Provider, Scope, make_async_container, provide
from shared import URL
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker


# wiring begins
class Database(Provider):
    @provide(scope=Scope.APP)
    def maker(self) -> async_sessionmaker[AsyncSession]:
        return async_sessionmaker(create_async_engine(URL), expire_on_commit=False)

    @provide(scope=Scope.REQUEST)
    async def session(self, maker: async_sessionmaker[AsyncSession]) -> AsyncIterable[AsyncSession]:
        async with maker() as session:
            error = yield session
            if error is None:
                await session.commit()

    # wiring ends

    @provide(scope=Scope.APP)
    def sync_maker(self) -> sessionmaker[Session]:
        return sessionmaker(create_engine(URL), expire_on_commit=False)

    @provide(scope=Scope.REQUEST)
    def sync_session(self, maker: sessionmaker[Session]) -> Iterable[Session]:
        with maker() as session:
            error = yield session
            if error is None:
                session.commit()


# wiring begins
container = make_async_container(Database())
# wiring ends
