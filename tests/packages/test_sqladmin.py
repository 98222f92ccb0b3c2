"""sqladmin writes through a copy of the connection's sessionmaker, and units of work see it."""

from __future__ import annotations

import asyncio
from copy import copy
from typing import Any

import httpx
import pytest
from sqladmin import Admin, ModelView
from sqlalchemy import String, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from starlette.applications import Starlette

from app_db.testing import isolated
from harness import applications
from harness.applications import running
from harness.shops import NewShop, Shop


class Base(DeclarativeBase):
    """The tables of this page."""


class Item(Base):
    __tablename__ = "items"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(50), unique=True)


class ItemAdmin(ModelView, model=Item):
    column_list = (Item.id, Item.name)


class OtherAdmin(ModelView, model=applications.Item):
    column_list = (applications.Item.id, applications.Item.name)


def admin_of(maker: Any) -> Starlette:
    application = Starlette()
    Admin(application, session_maker=maker).add_view(ItemAdmin)
    return application


async def use_forms(application: Starlette, shop: Shop) -> None:
    """Create, list, edit and delete items as a browser does. A unit of work reads after each step."""

    async def items() -> list[str]:
        return await asyncio.to_thread(shop.read, Item.name)

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=application), base_url="http://shop") as browser:
        for name in ("a", "b"):
            assert (await browser.post("/admin/item/create", data={"name": name, "save": "Save"})).status_code == 302
        assert await items() == ["a", "b"]
        assert "/admin/item/details/2" in (await browser.get("/admin/item/list")).text
        assert (await browser.post("/admin/item/edit/1", data={"name": "c", "save": "Save"})).status_code == 302
        assert await items() == ["b", "c"]
        assert (await browser.delete("/admin/item/delete?pks=2")).status_code == 200
        assert await items() == ["c"]
        assert (await browser.post("/admin/item/create", data={"name": "c", "save": "Save"})).status_code == 400
        assert await items() == ["c"]


@pytest.mark.parametrize("kind", ["sessionmaker", "async_sessionmaker"])
def test_its_forms_create_edit_and_delete(kind: str, new_shop: NewShop) -> None:
    shop = new_shop(Base.metadata)
    application = admin_of(copy(getattr(shop.container, f"writer_{kind}")()))

    async def use() -> None:
        await use_forms(application, shop)
        await shop.container.shutdown_resources()

    with shop.test():
        asyncio.run(use())


@pytest.mark.parametrize("of_its_own", [True, False])
def test_units_keep_autoflush_if_sqladmin_gets_a_copy(of_its_own: bool, new_shop: NewShop) -> None:
    """The fact guarded: sqladmin configures the sessionmaker that it is given with `autoflush=False`, which counts in units."""
    shop = new_shop(Base.metadata)
    makers = [shop.container.writer_sessionmaker(), shop.container.writer_async_sessionmaker()]
    for maker in makers:
        admin_of(copy(maker) if of_its_own else maker)

    async def found() -> int:
        async with shop.container.transaction():
            session = shop.container.writer_async_session()
            session.add(Item(name="async"))
            number = len((await session.scalars(select(Item))).all())
        await shop.container.shutdown_resources()
        return number

    with shop.container.transaction():
        shop.session().add(Item(name="sync"))
        assert len(shop.session().scalars(select(Item)).all()) == of_its_own
    assert asyncio.run(found()) == 1 + of_its_own


def test_the_admin_of_a_reader_shows_and_does_not_write(postgres_url: str) -> None:
    with running(writer=postgres_url, reader={"mirror": "writer", "read_only": True}) as app:
        app.put("a")
        application = Starlette()
        Admin(application, session_maker=copy(app.container.reader_sessionmaker())).add_view(OtherAdmin)

        async def use() -> None:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app=application), base_url="http://shop") as browser:
                assert "/admin/item/details/1" in (await browser.get("/admin/item/list")).text
                refused = await browser.post("/admin/item/create", data={"name": "b", "save": "Save"})
                assert (refused.status_code, "read-only" in refused.text) == (400, True)

        asyncio.run(use())
        assert app.names() == ["a"]


def test_an_engine_that_was_taken_before_an_isolated_test_is_not_isolated(sqlite_url: str) -> None:
    """Why sqladmin gets the sessionmaker: that uses the engine which the connection has, and `Admin(app, engine)` keeps one."""
    with running(writer=sqlite_url) as app:
        application = Starlette()
        Admin(application, app.engine()).add_view(OtherAdmin)

        async def use() -> None:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app=application), base_url="http://shop") as browser:
                assert (await browser.post("/admin/item/create", data={"name": "a", "save": "Save"})).status_code == 302

        with isolated(app.container):
            asyncio.run(use())
        assert app.names() == ["a"]
