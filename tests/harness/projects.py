"""Projects with tests of their own, which another pytest runs with the plugin from the wheel."""

from __future__ import annotations

import os
from pathlib import Path
from textwrap import dedent

import pytest
from sqlalchemy import create_engine, inspect, text
from sqlalchemy.dialects import mysql as _mysql  # noqa: F401  # here: pytester forgets what is imported during a test,
from sqlalchemy.dialects import postgresql as _postgresql  # noqa: F401  # and SQLAlchemy warns when it is imported again
from sqlalchemy.pool import NullPool

from harness.requiring import need

SHOP = """
    from app_db import Connection, DatabaseContainer, orm_base, transactional
    from dependency_injector.wiring import Provide
    from sqlalchemy import func, select
    from sqlalchemy.ext.asyncio import AsyncSession
    from sqlalchemy.orm import Mapped, Session, mapped_column

    Base = orm_base("writer")
    Facts = orm_base("warehouse")

    class Order(Base):
        __tablename__ = "orders"
        id: Mapped[int] = mapped_column(primary_key=True)

    class Sale(Facts):
        __tablename__ = "sales"
        id: Mapped[int] = mapped_column(primary_key=True)

    class Container(DatabaseContainer):
        writer = Connection()
        reader = Connection()
        warehouse = Connection()

    container = Container()

    @transactional
    def place_order(session: Session = Provide[Container.writer_session], facts: Session = Provide[Container.warehouse_session]):
        session.add(Order())
        facts.add(Sale())

    @transactional
    async def place_order_async(session: AsyncSession = Provide[Container.writer_async_session]):
        session.add(Order())

    @transactional
    def orders(session: Session = Provide[Container.reader_session]):
        return session.scalar(ORDERS)

    ORDERS = select(func.count()).select_from(Order)
    SALES = select(func.count()).select_from(Sale)
    container.wire(modules=[__name__])
"""

CONFTEST = """
    import pytest, shop

    @pytest.fixture(scope="session")
    def app_db_container():
        return shop.container
"""

HELD_OFF = ("asyncio", "randomly", "pytest_cov", "hypothesispytest", "xdist", "timeout", "pytest_postgresql")
"""Plugins that a project uses only if it asks for them."""


class Project:
    """A project that tests its shop, in two SQLite databases unless it is said otherwise."""

    def __init__(self, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, installed: Path) -> None:
        self._pytester = pytester
        self._environment = monkeypatch
        self.path = pytester.path
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(installed), str(self.path)]))
        for variable in ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER", "PYTEST_DISABLE_PLUGIN_AUTOLOAD", "CI", "BUILD_NUMBER"):
            monkeypatch.delenv(variable, raising=False)
        self.set("WRITER__URL", "sqlite:///shop.db")
        self.set("WAREHOUSE__URL", "sqlite:///facts.db")
        self.environ("APP_DB_ATOMICITY", "best_effort")
        self.file("shop.py", SHOP)
        self.file("conftest.py", CONFTEST)

    def file(self, name: str, source: str) -> None:
        (self.path / name).write_text(dedent(source))

    def environ(self, variable: str, value: str) -> None:
        self._environment.setenv(variable, value)

    def set(self, setting: str, value: str) -> None:
        self.environ(f"APP_DB_CONNECTIONS__{setting}", value)

    def run(self, *arguments: str, plugins: tuple[str, ...] = ()) -> pytest.RunResult:
        packages = {"asyncio": "pytest_asyncio", "randomly": "pytest_randomly", "hypothesispytest": "hypothesis"}
        need(*(packages.get(name, name) for name in plugins))
        off = [argument for name in HELD_OFF if name not in plugins for argument in ("-p", f"no:{name}")]
        return self._pytester.runpytest_subprocess(*off, "-p", "no:cacheprovider", *arguments, timeout=100)

    def rows(self, database: str = "shop", table: str = "orders") -> int:
        """The number of rows that are committed."""
        engine = create_engine(f"sqlite:///{self.path / database}.db", poolclass=NullPool)
        with engine.connect() as connection:
            return int(connection.scalar(text(f"SELECT count(*) FROM {table}")) or 0)

    def tables(self, database: str = "shop") -> list[str]:
        """The tables that there are."""
        engine = create_engine(f"sqlite:///{self.path / database}.db", poolclass=NullPool)
        return inspect(engine).get_table_names()

    def noted(self, file: str) -> list[str]:
        """The lines that tests have written to a file."""
        return (self.path / file).read_text().splitlines()

    def make_tables(self) -> None:
        """Make the tables before the tests do, so that they are there afterwards."""
        for database, table in (("shop", "orders"), ("facts", "sales")):
            engine = create_engine(f"sqlite:///{self.path / database}.db", poolclass=NullPool)
            with engine.begin() as connection:
                connection.execute(text(f"CREATE TABLE {table} (id INTEGER NOT NULL PRIMARY KEY)"))
