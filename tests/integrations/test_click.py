"""A command is a unit of work: what it wrote is committed if it returns, or exits with 0."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import click
import pytest
import typer
from click.testing import CliRunner
from typer.testing import CliRunner as TyperRunner

from app_db.errors import InvalidUse
from app_db.integrations.click import in_unit
from app_db.integrations.typer import in_unit as in_unit_of_typer
from harness.applications import Application, Boom, Item, running


@pytest.fixture
def app(new_sqlite_url: Callable[[], str]) -> Iterator[Application]:
    with running(writer=new_sqlite_url()) as app:
        yield app


ENDINGS: dict[str, tuple[Callable[[], object], int, bool]] = {
    "returns": (lambda: None, 0, True),
    "sys.exit()": (sys.exit, 0, True),
    "sys.exit(0)": (lambda: sys.exit(0), 0, True),
    "sys.exit(3)": (lambda: sys.exit(3), 3, False),
    "sys.exit(text)": (lambda: sys.exit("no"), 1, False),
    "ctx.exit(0)": (lambda: click.get_current_context().exit(0), 0, True),
    "ctx.exit(4)": (lambda: click.get_current_context().exit(4), 4, False),
    "abort": (lambda: click.get_current_context().abort(), 1, False),
    "usage": (lambda: click.get_current_context().fail("no"), 2, False),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_code_of_a_click_command_decides(ending: str, app: Application) -> None:
    end, code, is_kept = ENDINGS[ending]

    @click.command()
    @click.argument("name")
    @in_unit(app.container)
    def add(name: str) -> None:
        app.container.writer_session().add(Item(name=name))
        end()

    assert CliRunner().invoke(add, ["item"]).exit_code == code
    assert app.names() == (["item"] if is_kept else [])


@pytest.mark.parametrize(("code", "is_kept"), [(None, True), (0, True), (5, False)])
def test_the_code_of_a_typer_command_decides(code: int | None, is_kept: bool, app: Application) -> None:
    shop = typer.Typer()

    @shop.command()
    @in_unit_of_typer(app.container)
    def add(name: str, amount: int = 1) -> None:
        for number in range(amount):
            app.container.writer_session().add(Item(name=f"{name} {number}"))
        if code is not None:
            raise typer.Exit(code)

    assert TyperRunner().invoke(shop, ["item", "--amount", "2"]).exit_code == (code or 0)
    assert app.names() == (["item 0", "item 1"] if is_kept else [])


def test_an_exception_aborts_and_options_count(app: Application) -> None:
    tried: list[int] = []

    @in_unit(app.container, commit_on=(Boom,))
    def add(name: str) -> None:
        tried.append(1)
        app.container.writer_session().add(Item(name=name))
        raise Boom if name == "kept" else KeyError

    for name, error in (("kept", Boom), ("lost", KeyError)):
        with pytest.raises(error):
            add(name)
    assert (app.names(), len(tried)) == (["kept"], 2)


def test_options_are_those_of_transaction_and_are_looked_at_before_a_command_runs(app: Application) -> None:
    @click.command()
    @in_unit(app.container, commit_on=Boom)
    def fails() -> None:
        app.session().add(Item(name="kept"))
        raise Boom

    assert isinstance(CliRunner().invoke(fails).exception, Boom)
    assert app.names() == ["kept"]
    with pytest.raises(InvalidUse, match=r"no option 'atempts'\. Did you mean 'attempts'"):
        in_unit(app.container, atempts=3)


def test_a_coroutine_function_is_refused(app: Application) -> None:
    async def command() -> None: ...

    with pytest.raises(InvalidUse, match=r"is a coroutine function\. Write a plain function, and call asyncio\.run\(\) in it"):
        in_unit(app.container)(command)
