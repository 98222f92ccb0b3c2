"""FastAPI, Typer and click call decorated functions with the parameters of their callers, and app_db injects the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import click
import httpx
import pytest
import typer
from click.testing import CliRunner
from dependency_injector.wiring import Provide, inject
from fastapi import Depends, FastAPI
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from typer.testing import CliRunner as TyperRunner

from app_db import Connection, DatabaseContainer, DatabaseSettings, transactional

INSERT = text("INSERT INTO orders VALUES (:sku)")


class Shop(DatabaseContainer):
    writer = Connection()


@pytest.fixture
def container(tmp_path: Path) -> Iterator[Any]:
    settings = DatabaseSettings(_env_file=None, connections={"writer": {"url": f"sqlite:///{tmp_path}/shop.db"}})
    made: Any = Shop(settings=settings)
    with made.transaction():
        made.writer_session().execute(text("CREATE TABLE orders (sku TEXT)"))
    made.wire(modules=[__name__])
    yield made
    made.unwire()
    made.shutdown_resources()


def orders(container: Any) -> list[str]:
    with container.transaction():
        return list(container.writer_session().scalars(text("SELECT sku FROM orders ORDER BY sku")))


# ---- FastAPI ----------------------------------------------------------------------------------------------------------

api = FastAPI()


def upper(sku: str) -> str:
    return sku.upper()


@api.post("/default/{sku}")
@transactional
def by_default(sku: str, session: Session = Provide[Shop.writer.session]) -> str:
    session.execute(INSERT, {"sku": sku})
    return sku


@api.post("/annotated/{sku}")
@transactional
def by_annotation(session: Annotated[Session, Provide["writer_session"]], sku: str) -> str:
    session.execute(INSERT, {"sku": sku})
    return sku


@api.post("/depends/{sku}")
@transactional
def by_depends(sku: str, session: Session = Depends(Provide[Shop.writer.session])) -> str:
    session.execute(INSERT, {"sku": sku})
    return sku


@api.post("/both/{sku}")
@transactional
@inject
def by_both(sku: str, session: Session = Depends(Provide[Shop.writer.session])) -> str:
    session.execute(INSERT, {"sku": sku})
    return sku


@api.post("/other/{sku}")
@transactional
def with_a_dependency_of_fastapi(
    upper: Annotated[str, Depends(upper)], session: Session = Depends(Provide["writer.session"])
) -> str:
    session.execute(INSERT, {"sku": upper})
    return upper


@api.post("/async/{sku}")
@transactional
async def by_default_async(sku: str, session: AsyncSession = Provide[Shop.writer.async_session]) -> str:
    await session.execute(INSERT, {"sku": sku})
    return sku


@api.post("/async_depends/{sku}")
@transactional
async def by_depends_async(sku: str, session: Annotated[AsyncSession, Depends(Provide["writer_async_session"])]) -> str:
    await session.execute(INSERT, {"sku": sku})
    return sku


class Inserter:
    @transactional
    def insert(self, sku: str, session: Session = Provide["writer_session"]) -> str:
        session.execute(INSERT, {"sku": sku})
        return sku


api.post("/method/{sku}")(Inserter().insert)


@transactional
def count(session: Annotated[Session, Provide["writer_session"]]) -> int:
    return int(session.scalar(text("SELECT count(*) FROM orders")) or 0)


@api.get("/count")
async def by_dependency(number: Annotated[int, Depends(count)]) -> int:
    return number


@api.get("/inject")
@inject
def by_dependency_injector(settings: DatabaseSettings = Depends(Provide[Shop.settings])) -> str:
    return settings.application


PATHS = ("default", "annotated", "depends", "both", "other", "async", "async_depends", "method")


async def request(method: str, path: str) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://shop") as client:
        return await client.request(method, path)


@pytest.mark.parametrize("path", PATHS)
async def test_fastapi_calls_an_endpoint_with_the_parameters_of_the_request(container: Any, path: str) -> None:
    response = await request("POST", f"/{path}/a1")
    sku = "A1" if path == "other" else "a1"
    assert (response.status_code, response.json()) == (200, sku)
    assert orders(container) == [sku]
    assert (await request("GET", "/count")).json() == 1
    await container.shutdown_resources()


def test_fastapi_documents_no_injected_parameter() -> None:
    described = api.openapi()["paths"]
    assert {f"/{path}/{{sku}}" for path in PATHS} <= set(described)
    for path, operations in described.items():
        for operation in operations.values():
            assert [given["name"] for given in operation.get("parameters", [])] == (["sku"] if "sku" in path else []), path
            assert "requestBody" not in operation, path


async def test_fastapi_and_plain_inject_need_depends(container: Any) -> None:
    assert (await request("GET", "/inject")).json() == "app_db"

    def endpoint(session: Session = Provide["writer_session"]) -> None: ...

    endpoint.__annotations__["session"] = Session  # some releases don't find what a string names, and look no further
    with pytest.raises(Exception, match="Invalid args for response field"):
        FastAPI().get("/")(inject(endpoint))


# ---- Typer and click ------------------------------------------------------------------------------------------------

commands = typer.Typer()


@commands.command()
@transactional
def add(sku: str, copies: int = 1, session: Session = Provide[Shop.writer.session]) -> None:
    for _ in range(copies):
        session.execute(INSERT, {"sku": sku})


@commands.command()
@transactional
def add_annotated(sku: str, session: Annotated[Session, Provide["writer_session"]], copies: int = 1) -> None:
    for _ in range(copies):
        session.execute(INSERT, {"sku": sku})


@commands.command()
@transactional
def add_documented(
    sku: Annotated[str, typer.Argument(help="What is ordered.")],
    copies: Annotated[int, typer.Option()] = 1,
    session: Session = Provide["writer_session"],
) -> None:
    for _ in range(copies):
        session.execute(INSERT, {"sku": sku})


@pytest.mark.parametrize("command", ["add", "add-annotated", "add-documented"])
def test_typer_reads_the_parameters_of_a_command(container: Any, command: str) -> None:
    done = TyperRunner().invoke(commands, [command, "A-1", "--copies", "2"])
    assert done.exit_code == 0, done.output
    assert orders(container) == ["A-1", "A-1"]
    shown = TyperRunner().invoke(commands, [command, "--help"]).output
    assert "session" not in shown.lower().replace("--copies", "")


def test_typer_and_plain_inject_do_not_go_together() -> None:
    broken = typer.Typer()

    @broken.command()
    @inject
    def command(session: Session = Provide["writer_session"]) -> None: ...

    try:
        assert TyperRunner().invoke(broken, []).exit_code != 0
    except RuntimeError as error:  # from older releases
        assert "Type not yet supported" in str(error)  # noqa: PT017


@click.command()
@click.argument("sku")
@click.option("--copies", default=1)
@transactional
def clicked(sku: str, copies: int, session: Session = Provide[Shop.writer.session]) -> None:
    for _ in range(copies):
        session.execute(INSERT, {"sku": sku})


@click.command()
@click.argument("sku")
@transactional
def clicked_annotated(session: Annotated[Session, Provide["writer_session"]], sku: str) -> None:
    session.execute(INSERT, {"sku": sku})


@click.command()
@click.argument("sku")
@inject
def clicked_injected(sku: str, begin: Callable[[], Any] = Provide[Shop.transaction.provider]) -> None:
    with begin():
        Inserter().insert(sku)


@pytest.mark.parametrize("command", [clicked, clicked_annotated, clicked_injected])
def test_click_calls_a_command_with_its_parameters(container: Any, command: click.Command) -> None:
    done = CliRunner().invoke(command, ["A-1"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert orders(container) == ["A-1"]
