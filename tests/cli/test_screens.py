"""docs/command-line.md shows what the commands print in a terminal of 100 columns.

`PYTHONPATH=tests python -m cli.test_screens` writes the screens into the page.

Screens of `here()` and `of_files()` are printed on any machine. Those of `on_servers()` need a PostgreSQL
server with a standby, and MariaDB; what differs from run to run is replaced by what has the same length.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from harness.commands import in_terminal
from harness.crashing import variables
from harness.environments import forget_variables
from harness.paths import ROOT
from harness.servers import MariaDBServer, PostgresServer, PostgresStandby
from harness.stranded import stranded

PAGE = ROOT / "docs" / "command-line.md"

SHOP = """
from app_db import Connection, DatabaseContainer, orm_base
from sqlalchemy.orm import Mapped, mapped_column

class Shop(DatabaseContainer):
    writer = Connection()
    reader = Connection()
    warehouse = Connection()
    log = Connection()

class Item(orm_base("writer")):
    __tablename__ = "items"
    name: Mapped[str] = mapped_column(primary_key=True)

container = Shop()
"""

SETTINGS = {
    "APP_DB_CONTAINER": "shop:container",
    "APP_DB_APPLICATION": "shop",
    "APP_DB_CONNECTIONS__WRITER__URL": "postgresql+psycopg://shop:s3cr3t@db/shop",
    "APP_DB_CONNECTIONS__WRITER__TWO_PHASE": "true",
    "APP_DB_CONNECTIONS__READER__URL": "postgresql+psycopg://shop:s3cr3t@db2/shop",
    "APP_DB_CONNECTIONS__READER__READ_ONLY": "true",
    "APP_DB_CONNECTIONS__WAREHOUSE__URL": "mysql+pymysql://shop:s3cr3t@dw/warehouse",
    "APP_DB_CONNECTIONS__WAREHOUSE__TWO_PHASE": "true",
    "APP_DB_CONNECTIONS__LOG__URL": "sqlite:///log.db",
}

MIGRATION = """
import sqlalchemy as sa
from alembic import op

revision = "3f1c2a9d07be"
down_revision = None

def upgrade():
    op.create_table("items", sa.Column("name", sa.String(), primary_key=True))

def downgrade():
    op.drop_table("items")
"""

FILES = {
    "APP_DB_CONTAINER": "shop:container",
    **{f"APP_DB_CONNECTIONS__{name.upper()}__URL": f"sqlite:///{name}.db" for name in ("writer", "warehouse", "log")},
}
"""Settings with databases in files, which are there."""

Screens = Iterator[tuple[str, str]]
"""What was typed, and all that is on the screen then."""


def screen(line: str, environment: Mapping[str, str], typed: str = "", code: int = 0) -> tuple[str, str]:
    """Return what was typed at the prompt of the shell, and what a terminal shows."""
    shown = in_terminal(*line.split()[1:], environment=environment, typed=typed)
    assert shown.code == code, shown.text
    assert "s3cr3t" not in shown.raw
    text = shown.text.removeprefix(typed.strip().replace("\r", ""))  # it was typed before the prompt was there
    return line, text.strip("\n")


def here() -> Screens:
    """Yield the screens of what connects to nothing."""
    yield screen("app-db show", SETTINGS)
    yield screen("app-db graph", SETTINGS)
    yield screen("app-db graph --format mermaid", SETTINGS)
    yield screen("app-db shwo", SETTINGS, code=2)
    yield screen("app-db show writr", SETTINGS, code=2)


def of_files() -> Screens:
    """Yield the screens of check and migrations."""
    for name in ("writer", "warehouse", "log"):
        Path(f"{name}.db").touch()
    versions = Path("migrations", "writer", "versions")
    versions.mkdir(parents=True)
    (versions / "3f1c2a9d07be_items.py").write_text(MIGRATION)
    yield screen("app-db check", FILES, code=1)
    yield screen("app-db migrate", FILES)
    yield screen("app-db current", FILES)


def on_servers(writer: str, reader: str, warehouse: str) -> Screens:
    """Yield the screens of what asks databases."""
    urls = {"WRITER": writer, "READER": reader, "WAREHOUSE": warehouse}
    environment = {**SETTINGS, **{f"APP_DB_CONNECTIONS__{name}__URL": url for name, url in urls.items()}}
    Path("log.db").touch()
    yield screen("app-db ping", environment)
    yield screen("app-db recover", environment)
    with stranded(application="shop", writer=writer, warehouse=warehouse) as scene:
        scene.make_tables()
        unit = scene.prepare(scene.new_unit(), "writer", "warehouse")
        scene.decide(unit, "writer", "warehouse")
        for command, code in (("in-doubt", 1), ("recover", 0)):
            line, text = screen(f"app-db {command} --grace 0", environment, code=code)
            yield line, text.replace(unit, "0tHxEwzm7kfPdT2rYbq1SvC8aZ"[: len(unit)])
    yield screen("app-db shell --plain", environment, "Item.metadata.tables.keys()\nexit()\n")


def unchanging(text: str) -> str:
    """Return a screen without what differs from run to run."""
    text = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC \(\d+ s ago\)", "2026-03-01 12:00:00 UTC (3 s ago)", text)
    text = text.replace(f"{Path.cwd()}/", "")
    return re.sub(r"'app_db'", "'shop'", text)


def shape(text: str) -> str:
    """Return a screen without its numbers, which are times and versions of servers, and without widths of columns."""
    return re.sub(r"([ ─])\1+", r"\1", re.sub(r"\d+(\.\d+)+", "N", text))


def block(line: str, text: str) -> str:
    return f"```console\n$ {line}\n{text}\n```"


def on_page(line: str) -> str:
    """Return the block of a screen that is on the page."""
    found = re.search(rf"```console\n\$ {re.escape(line)}\n.*?\n```", PAGE.read_text(), re.DOTALL)
    assert found is not None, f"{line} is not on the page. Add a block for it, and write the page anew"
    return found[0]


@contextmanager
def application() -> Iterator[None]:
    """Be in the directory of an application."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "shop.py").write_text(SHOP)
        os.chdir(directory)
        try:
            yield
        finally:
            os.chdir(before)


def test_the_page_shows_what_is_printed_without_a_server() -> None:
    with application():
        for line, text in (*here(), *of_files()):
            assert block(line, unchanging(text)) == on_page(line)


@pytest.mark.exhaustive
def test_the_page_shows_what_is_printed_of_databases(
    new_standby: Callable[[PostgresServer], PostgresStandby], new_postgres: Callable[..., PostgresServer], mariadb: MariaDBServer
) -> None:
    primary = new_postgres()
    primary.create_database("shop")
    standby = new_standby(primary)
    with application(), mariadb.lend_database() as warehouse:
        for line, text in on_servers(primary.url("shop"), standby.url("shop"), mariadb.url(warehouse)):
            told = shape if line == "app-db ping" else str
            assert told(block(line, unchanging(text))) == told(on_page(line))


def test_a_terminal_has_colours_unless_they_are_unwanted() -> None:
    with application():
        assert in_terminal("show", "writr", environment=SETTINGS).is_coloured
        assert not in_terminal("show", "writr", environment={**SETTINGS, "NO_COLOR": "1"}).is_coloured
        assert not in_terminal("show", environment={**SETTINGS, "TERM": "dumb"}).is_coloured


@pytest.mark.exhaustive
def test_what_takes_longer_than_a_second_shows_a_bar_in_a_terminal(new_postgres_url: Callable[[], str]) -> None:
    """recover waits for the grace of a fresh unit."""
    with stranded(writer=new_postgres_url()) as scene:
        scene.make_tables()
        scene.decide(scene.prepare(scene.new_unit(), "writer"), "writer")
        environment = variables(scene.given)
        shown = in_terminal("recover", "--grace", "5", environment=environment)
        again = in_terminal("recover", "--grace", "5", environment=environment)
        scene.prepare(scene.new_unit(), "writer")
        as_json = in_terminal("recover", "--grace", "5", "--json", environment=environment)
    assert (shown.code, "Settling what of" in shown.raw, "0:00:01" in shown.raw) == (0, True, True)
    assert "is in doubt: 0 of 1" in shown.raw
    assert shown.text.endswith("1 unit of " + repr(scene.settings.application) + " in doubt, 1 settled, 0 left.")
    assert "Settling" not in again.raw + as_json.raw


def write_page() -> None:
    """Write the screens into the page."""
    with pytest.MonkeyPatch.context() as patch, application(), ExitStack() as stack:
        forget_variables(patch)
        primary = PostgresServer().start()
        stack.callback(primary.close)
        primary.create_database("shop")
        standby = PostgresStandby(primary).start()
        stack.callback(standby.close)
        maria = MariaDBServer().start()
        stack.callback(maria.close)
        maria.create_database("warehouse")
        page = PAGE.read_text()
        for line, text in (*here(), *of_files(), *on_servers(primary.url("shop"), standby.url("shop"), maria.url("warehouse"))):
            old = on_page(line)
            page = page.replace(old, block(line, unchanging(text)))
        PAGE.write_text(page)


if __name__ == "__main__":
    write_page()
