"""polyfactory and factory_boy make rows, in sessions of their own and in those of units of work."""

from __future__ import annotations

import asyncio
from copy import copy
from typing import Any

import factory
import pytest
from factory.alchemy import SQLAlchemyModelFactory
from polyfactory.factories.sqlalchemy_factory import SQLAlchemyFactory, SQLAlchemyPersistenceMethod
from sqlalchemy import ForeignKey, String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship, scoped_session, sessionmaker
from sqlalchemy.orm.exc import DetachedInstanceError

from app_db.errors import SessionIsManaged
from harness.shops import NewShop


class Base(DeclarativeBase):
    """The tables of this page."""


class Author(Base):
    __tablename__ = "authors"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(80), unique=True)
    books: Mapped[list[Book]] = relationship(back_populates="author")


class Book(Base):
    __tablename__ = "books"

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(String(80))
    author_id: Mapped[int] = mapped_column(ForeignKey("authors.id"))
    author: Mapped[Author] = relationship(back_populates="books")


# ---- polyfactory -----------------------------------------------------------------------------------------------------


def books_by(**options: Any) -> type[SQLAlchemyFactory[Book]]:
    """A factory of books, each with an author of its own."""

    class AuthorFactory(SQLAlchemyFactory[Author]):
        __set_primary_key__ = False
        __set_relationships__ = False

    class BookFactory(SQLAlchemyFactory[Book]):
        __set_primary_key__ = False
        __set_foreign_keys__ = False
        author = AuthorFactory

    for option, value in options.items():
        setattr(BookFactory, f"__{option}__", value)
    return BookFactory


def keeping(maker: Any) -> Any:
    """A sessionmaker of the factories' own, whose objects keep their values after commit."""
    maker = copy(maker)
    maker.configure(expire_on_commit=False)
    return maker


def test_polyfactory_creates_by_the_sessionmaker(new_shop: NewShop) -> None:
    shop = new_shop(Base.metadata)
    books = books_by(session=keeping(shop.container.writer_sessionmaker()))
    with shop.test():
        book = books.create_sync(title="a")
        assert book.author_id == book.author.id == 1
        assert [made.title for made in books.create_batch_sync(2, title="b")] == ["b", "b"]
        assert shop.read(Book.title) == ["a", "b", "b"]
        assert len(shop.read(Author.name)) == 3


@pytest.mark.parametrize("whose", ["sqlalchemy's", "ours"])
def test_an_expiring_sessionmaker_leaves_polyfactory_without_values(whose: str, new_shop: NewShop) -> None:
    """The fact guarded: `create_sync` commits and closes the session, and does not refresh as `create_async` does."""
    shop = new_shop(Base.metadata)
    maker = shop.container.writer_sessionmaker() if whose == "ours" else sessionmaker(shop.engine())
    book = books_by(session=maker).create_sync()
    with pytest.raises(DetachedInstanceError):
        assert book.title


def test_polyfactory_creates_in_a_unit(new_shop: NewShop) -> None:
    shop = new_shop(Base.metadata)
    books = books_by(session=shop.container.writer_session, persistence_method=SQLAlchemyPersistenceMethod.FLUSH)

    def in_a_unit(title: str) -> Book:
        with shop.container.transaction():
            book = books.create_sync(title=title)
            assert book in shop.session()
            assert book.author_id == book.author.id
            books.create_batch_sync(2, title=title)
            if title == "rolled back":
                raise ValueError(title)
        return book

    with shop.test():
        assert in_a_unit("a").title == "a"
        with pytest.raises(ValueError, match="rolled back"):
            in_a_unit("rolled back")
        assert shop.read(Book.title) == ["a", "a", "a"]


def test_polyfactory_creates_in_coroutines(new_shop: NewShop) -> None:
    shop = new_shop(Base.metadata)
    by_maker = books_by(async_session=shop.container.writer_async_sessionmaker())
    in_unit = books_by(async_session=shop.container.writer_async_session, persistence_method=SQLAlchemyPersistenceMethod.FLUSH)

    async def use() -> None:
        assert (await by_maker.create_async(title="maker")).title == "maker"
        async with shop.container.transaction():
            book = await in_unit.create_async(title="unit")
            assert book in shop.container.writer_async_session()
        with pytest.raises(ValueError, match="mine"):
            async with shop.container.transaction():
                await in_unit.create_batch_async(2)
                raise ValueError("mine")
        await shop.container.shutdown_resources()

    with shop.test():
        asyncio.run(use())
        assert shop.read(Book.title) == ["maker", "unit"]


@pytest.mark.parametrize(
    ("given", "verb"), [("writer_session", r"session\.commit"), ("writer_scoped_session", r"session\.close|remove")]
)
def test_polyfactory_may_not_end_a_units_session(given: str, verb: str, new_shop: NewShop) -> None:
    """By default it commits the session, and it removes a `scoped_session` that it is given, also after a flush."""
    shop = new_shop(Base.metadata)
    provider = getattr(shop.container, given)
    books = books_by(session=provider if given == "writer_session" else provider())
    if given == "writer_scoped_session":
        books.__persistence_method__ = SQLAlchemyPersistenceMethod.FLUSH
    with pytest.raises(SessionIsManaged, match=verb), shop.container.transaction():
        books.create_sync()
    assert shop.rows() == {}


# ---- factory_boy -----------------------------------------------------------------------------------------------------


def factory_of_books(**options: Any) -> Any:
    declare: Any = factory  # it has no type hints
    meta = type("Meta", (), {"model": Author, "sqlalchemy_get_or_create": ("name",), **options})
    authors = type("AuthorFactory", (SQLAlchemyModelFactory,), {"Meta": meta, "name": declare.Sequence("author {}".format)})
    own = type("Meta", (), {"model": Book, **options})
    return type(
        "BookFactory",
        (SQLAlchemyModelFactory,),
        {"Meta": own, "title": declare.Sequence("title {}".format), "author": declare.SubFactory(authors)},
    )


def test_factory_boy_commits_by_a_scoped_session_of_the_sessionmaker(new_shop: NewShop) -> None:
    shop = new_shop(Base.metadata)
    sessions = scoped_session(shop.container.writer_sessionmaker())
    by_session = factory_of_books(sqlalchemy_session=sessions, sqlalchemy_session_persistence="commit")
    by_function = factory_of_books(sqlalchemy_session_factory=lambda: sessions(), sqlalchemy_session_persistence="commit")
    with shop.test():
        for books in (by_session, by_function):
            assert books(author__name="a").author.name == "a"
            books.create_batch(2)
            sessions.remove()
        assert shop.read(Book.title) == sorted([f"title {n}" for n in range(3)] * 2)
        assert shop.read(Author.name) == ["a", "author 1", "author 2"]


@pytest.mark.parametrize("option", ["sqlalchemy_session", "sqlalchemy_session_factory"])
def test_factory_boy_flushes_in_a_unit(option: str, new_shop: NewShop) -> None:
    shop = new_shop(Base.metadata)
    container = shop.container
    given = container.writer_scoped_session() if option == "sqlalchemy_session" else container.writer_session
    books = factory_of_books(**{option: given}, sqlalchemy_session_persistence="flush")

    def in_a_unit(title: str) -> None:
        with shop.container.transaction():
            book = books(title=title, author__name=title)
            assert book in shop.session()
            assert books(title=title, author__name=title).author is book.author
            if title == "rolled back":
                raise ValueError(title)

    with shop.test():
        in_a_unit("a")
        with pytest.raises(ValueError, match="rolled back"):
            in_a_unit("rolled back")
        assert (shop.read(Book.title), shop.read(Author.name)) == (["a", "a"], ["a"])


def test_factory_boy_may_not_roll_a_units_session_back(new_shop: NewShop) -> None:
    """It does so after an IntegrityError, to look once more for the object that it should get or create."""
    shop = new_shop(Base.metadata)
    meta = {"model": Author, "sqlalchemy_session": shop.container.writer_scoped_session()}
    own = type("Meta", (), {**meta, "sqlalchemy_session_persistence": "flush", "sqlalchemy_get_or_create": ("id",)})
    authors: Any = type("AuthorFactory", (SQLAlchemyModelFactory,), {"Meta": own, "name": "taken"})
    with pytest.raises(SessionIsManaged, match="rollback"), shop.container.transaction():
        authors(id=1)
        authors(id=2)
    assert shop.rows() == {}


def test_factory_boy_may_not_commit_a_units_session(new_shop: NewShop) -> None:
    shop = new_shop(Base.metadata)
    books = factory_of_books(sqlalchemy_session=shop.container.writer_scoped_session(), sqlalchemy_session_persistence="commit")
    with pytest.raises(SessionIsManaged, match="commit"), shop.container.transaction():
        books()
    assert shop.rows() == {}
