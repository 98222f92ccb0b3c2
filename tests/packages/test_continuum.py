"""SQLAlchemy-Continuum's versions are written by units of work, in each of their databases, and rolled back with them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import sqlalchemy_continuum as continuum
from sqlalchemy import Column, ForeignKey, Integer, String, Table, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, configure_mappers, mapped_column, relationship
from sqlalchemy.orm.exc import StaleDataError

from app_db import Connection
from app_db.errors import NotAtomic
from harness.shops import NewShop, Shop


@pytest.fixture(scope="module")
def models() -> Iterator[Any]:
    """Models with versions. Continuum listens to all mappers, sessions and engines, until the tests of this page end."""
    continuum.make_versioned(user_cls=None)

    class Base(DeclarativeBase):
        """The tables of this page."""

    Table(
        "article_labels",
        Base.metadata,
        Column("article_id", ForeignKey("articles.id"), primary_key=True),
        Column("label_id", ForeignKey("labels.id"), primary_key=True),
    )

    class Label(Base):
        __tablename__ = "labels"
        __versioned__: ClassVar[dict[str, object]] = {}

        id: Mapped[int] = mapped_column(Integer, primary_key=True)
        name: Mapped[str] = mapped_column(String(80))

    class Article(Base):
        __tablename__ = "articles"
        __versioned__: ClassVar[dict[str, object]] = {}

        id: Mapped[int] = mapped_column(Integer, primary_key=True)
        name: Mapped[str] = mapped_column(String(80))
        labels: Mapped[list[Any]] = relationship(Label, secondary="article_labels")

    configure_mappers()
    yield SimpleNamespace(Article=Article, Label=Label, Version=continuum.version_class(Article), metadata=Base.metadata)
    continuum.remove_versioning()
    Base.registry.dispose()


def versions(shop: Shop, models: Any, connection: str = "writer") -> list[tuple[str, int]]:
    """The names of all versions, with what was done: 0 is an insert, 1 an update, 2 a delete."""
    version = models.Version
    with shop.container.transaction():
        rows = shop.session(connection).execute(select(version.name, version.operation_type).order_by(version.transaction_id))
        return [(name, operation) for name, operation in rows]


def nothing_is_pending() -> bool:
    manager = continuum.versioning_manager
    return not (manager.units_of_work or manager.session_connection_map)


def test_units_write_versions(models: Any, new_shop: NewShop) -> None:
    shop = new_shop(models.metadata)
    with shop.test():
        with shop.container.transaction():
            shop.session().add(models.Article(name="first", labels=[models.Label(name="new")]))
        with shop.container.transaction():
            shop.session().scalars(select(models.Article)).one().name = "second"
        with shop.container.transaction():
            article = shop.session().scalars(select(models.Article)).one()
            assert [version.name for version in article.versions] == ["first", "second"]
            assert [label.name for label in article.versions[0].labels] == ["new"]
            article.versions[0].revert()
        assert shop.read(models.Article.name) == ["first"]
        with shop.container.transaction():
            shop.session().delete(shop.session().scalars(select(models.Article)).one())
        assert versions(shop, models) == [("first", 0), ("second", 1), ("first", 1), ("first", 2)]
        assert nothing_is_pending()


def test_they_are_rolled_back_with_the_unit(models: Any, new_shop: NewShop) -> None:
    shop = new_shop(models.metadata)
    with shop.test():
        with pytest.raises(ValueError, match="mine"), shop.container.transaction():
            shop.session().add(models.Article(name="rolled back"))
            shop.session().flush()
            raise ValueError("mine")
        assert nothing_is_pending()
        with shop.container.transaction():
            shop.session().add(models.Article(name="kept"))
        assert versions(shop, models) == [("kept", 0)]
        assert nothing_is_pending()


def add_beside_a_savepoint(session: Session, models: Any, *, last: int | None) -> None:
    """Add an article, another one in a savepoint that is rolled back, and a third with the id `last`."""
    session.add(models.Article(name="kept"))
    session.flush()
    with pytest.raises(ValueError, match="mine"), session.begin_nested():
        session.add(models.Article(name="undone"))
        session.flush()
        raise ValueError("mine")
    session.add(models.Article(id=last, name="kept too"))
    session.flush()


def test_they_are_rolled_back_with_a_savepoint(models: Any, new_shop: NewShop) -> None:
    shop = new_shop(models.metadata)
    with shop.test():
        with shop.container.transaction():
            add_beside_a_savepoint(shop.session(), models, last=3)
        assert shop.read(models.Article.name) == ["kept", "kept too"]
        assert sorted(versions(shop, models)) == [("kept", 0), ("kept too", 0)]
        assert nothing_is_pending()


def test_units_of_coroutines_write_versions(models: Any, new_shop: NewShop) -> None:
    shop = new_shop(models.metadata)

    async def use() -> None:
        for name in ("a", "rolled back", "b"):
            with contextlib.suppress(ValueError):
                async with shop.container.transaction():
                    session = shop.container.writer_async_session()
                    article = await session.scalar(select(models.Article)) or models.Article()
                    article.name = name
                    session.add(article)
                    await session.flush()
                    if name == "rolled back":
                        raise ValueError(name)
        await shop.container.shutdown_resources()

    with shop.test():
        asyncio.run(use())
        assert versions(shop, models) == [("a", 0), ("b", 1)]
        assert nothing_is_pending()


def test_sessions_of_the_sessionmaker_write_versions(models: Any, new_shop: NewShop) -> None:
    shop = new_shop(models.metadata)
    with shop.test():
        with shop.container.writer_sessionmaker().begin() as session:
            session.add(models.Article(name="a"))
        with shop.container.writer_sessionmaker()() as session:
            session.add(models.Article(name="rolled back"))
            session.flush()
            session.rollback()
        assert versions(shop, models) == [("a", 0)]
        assert nothing_is_pending()


@pytest.mark.filterwarnings("ignore:transaction already deassociated from connection")  # by Continuum's session on the connection
@pytest.mark.parametrize("whose", ["sqlalchemy's", "ours"])
def test_continuum_keeps_what_a_savepoint_has_undone(models: Any, sqlite_url: str, whose: str) -> None:
    """The fact guarded: it looks for the version of the undone object, if SQLite gives that object's id to the next one."""
    shop = Shop(models.metadata, {"writer": sqlite_url}, Connection, is_isolated=False)
    if whose == "ours":
        with pytest.raises(StaleDataError), shop.container.transaction():
            add_beside_a_savepoint(shop.session(), models, last=None)
    else:
        with pytest.raises(StaleDataError), Session(shop.plain["writer"]) as session:
            add_beside_a_savepoint(session, models, last=None)
    assert shop.rows() == {}
    assert nothing_is_pending()
    shop.close()


def test_a_unit_of_two_databases_writes_versions_in_both(models: Any, new_shop: NewShop, request: pytest.FixtureRequest) -> None:
    """By two-phase commit on PostgreSQL, and one after the other on SQLite."""
    is_postgresql = request.node.callspec.params["new_url"] == "postgresql"
    shop = new_shop(models.metadata, "writer", "warehouse", two_phase=is_postgresql, atomicity="best_effort")

    def work(name: str) -> None:
        with shop.container.transaction():
            shop.session().add(models.Article(name=name))
            shop.session("warehouse").add(models.Article(name=f"{name} there"))
            if name == "rolled back":
                shop.session().flush()
                shop.session("warehouse").flush()
                raise ValueError(name)

    with shop.test():
        work("a")
        with pytest.raises(ValueError, match="rolled back"):
            work("rolled back")
        work("b")
        assert versions(shop, models) == [("a", 0), ("b", 0)]
        assert versions(shop, models, "warehouse") == [("a there", 0), ("b there", 0)]
        assert nothing_is_pending()


def test_a_unit_that_can_not_commit_leaves_no_version(models: Any, new_shop: NewShop) -> None:
    """A strict unit that wrote to two databases which can't commit together is refused before either commits."""
    shop = new_shop(models.metadata, "writer", "warehouse")
    with pytest.raises(NotAtomic), shop.container.transaction():
        shop.session().add(models.Article(name="a"))
        shop.session("warehouse").add(models.Article(name="b"))
    assert shop.rows() == {}
    assert nothing_is_pending()
