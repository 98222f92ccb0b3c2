"""A unit of work that a framework begins is named after the function of the application, and no line of the framework.

Frameworks have to find the types of functions that are local here. So annotations are no strings.
"""

from collections.abc import Callable, Iterator
from typing import Annotated, Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from app_db import Container, DatabaseSettings
from harness.requiring import need_working
from harness.webs import client, serving


@pytest.fixture
def container(new_sqlite_url: Callable[[], str]) -> Iterator[Container]:
    container = Container(settings=DatabaseSettings(_env_file=None, connections={"writer": {"url": new_sqlite_url()}}))
    yield container
    container.shutdown_resources()


def beginning(container: Container, session: Session | None = None) -> str:
    """The name of the function that the unit is named after."""
    (session or container.writer.session()).execute(text("SELECT 1"))
    [holder] = container.pools()["writer"].holders
    assert holder.begun_at is not None
    file, _, function = holder.begun_at.rpartition(" in ")
    return f"{file.rpartition('/')[2].partition(':')[0]} {function.rpartition('.')[2]}"


async def awaited_beginning(container: Container, session: AsyncSession | None = None) -> str:
    found: str = await (session or container.writer.async_session()).run_sync(lambda session: beginning(container, session))
    return found


HERE = "test_names_of_units.py place_order"


def answers(app: Any, *paths: str) -> list[str]:
    with serving(app) as address, client(address) as one:
        return [one.get(path).text.strip('"') for path in paths]


def test_fastapi(container: Container) -> None:
    from fastapi import FastAPI

    from app_db.integrations.fastapi import UnitOfWorkMiddleware, lifespan, provided

    app, inner = FastAPI(lifespan=lifespan(container)), FastAPI()
    app.add_middleware(UnitOfWorkMiddleware, container=container)
    app.mount("/inner", inner)

    @app.get("/")
    @inner.get("/")
    async def place_order(session: Annotated[AsyncSession, provided(container.writer.async_session)]) -> str:
        return await awaited_beginning(container, session)

    assert answers(app, "/", "/inner/") == [HERE, HERE]


def test_a_class_that_answers_is_no_function(container: Container) -> None:
    from starlette.applications import Starlette
    from starlette.endpoints import HTTPEndpoint
    from starlette.requests import Request
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route

    from app_db.integrations.starlette import UnitOfWorkMiddleware, lifespan

    class Orders(HTTPEndpoint):
        async def get(self, request: Request) -> PlainTextResponse:
            return PlainTextResponse(await awaited_beginning(container))

    app = Starlette(routes=[Route("/", Orders)], lifespan=lifespan(container))
    app.add_middleware(UnitOfWorkMiddleware, container=container)
    assert answers(app, "/") == ["test_names_of_units.py awaited_beginning"], "the line that asked for the session"


def test_litestar(container: Container) -> None:
    need_working("litestar")
    from litestar import Litestar, get
    from litestar.di import NamedDependency

    from app_db.integrations.litestar import AppDbPlugin

    @get("/")
    async def place_order(writer_async_session: NamedDependency[AsyncSession]) -> str:
        return await awaited_beginning(container, writer_async_session)

    assert answers(Litestar([place_order], plugins=[AppDbPlugin(container)]), "/") == [HERE]


async def test_taskiq(container: Container) -> None:
    from taskiq import InMemoryBroker

    from app_db.integrations.taskiq import UnitOfWorkMiddleware

    broker = InMemoryBroker(await_inplace=True).with_middlewares(UnitOfWorkMiddleware(container))

    @broker.task
    async def place_order() -> str:
        return await awaited_beginning(container)

    assert (await (await place_order.kiq()).wait_result(timeout=20)).return_value == HERE
    await container.shutdown_resources()


def test_celery(container: Container) -> None:
    from celery import Celery

    from app_db.integrations.celery import install

    app = Celery("shop")
    install(app, container)

    def place_order() -> str:
        return beginning(container)

    assert app.task(place_order).apply().get() == HERE


def test_click(container: Container) -> None:
    from app_db.integrations.click import in_unit

    @in_unit(container)
    def place_order() -> str:
        return beginning(container)

    assert place_order() == HERE
