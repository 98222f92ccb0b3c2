"""SQLModel's models, relationships and `exec`, in units of work and by the sessionmaker."""

import asyncio
from functools import partial

import pytest
import sqlmodel
from sqlalchemy.orm import registry
from sqlmodel import Field, Relationship, SQLModel, col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app_db import Connection
from harness.shops import NewShop

CONNECTION = partial(Connection, session_class=sqlmodel.Session, async_session_class=AsyncSession)


class Base(SQLModel, registry=registry()):
    """The tables of this page."""


class Team(Base, table=True):
    id: int | None = Field(default=None, primary_key=True)
    name: str = Field(unique=True)
    heroes: list["Hero"] = Relationship(back_populates="team")


class Hero(Base, table=True):
    id: int | None = Field(default=None, primary_key=True)
    name: str
    team_id: int | None = Field(default=None, foreign_key="team.id")
    team: Team | None = Relationship(back_populates="heroes")


def test_units_have_its_sessions(new_shop: NewShop) -> None:
    shop = new_shop(Base.metadata, connection=CONNECTION)

    def hire(name: str, team: str) -> Hero:
        with shop.container.transaction():
            session = shop.session()
            assert isinstance(session, sqlmodel.Session)
            found = session.exec(select(Team).where(Team.name == team)).first() or Team(name=team)
            hero = Hero(name=name, team=found)
            session.add(hero)
            if name == "rolled back":
                session.flush()
                raise ValueError(name)
            assert session.exec(select(Hero.name).where(Hero.team == found).order_by(col(Hero.id))).all()[-1] == name
        return hero

    with shop.test():
        assert hire("a", "blue").model_dump() == {"id": 1, "name": "a", "team_id": 1}
        assert [hire("b", "blue").team_id, hire("c", "red").team_id] == [1, 2]
        with pytest.raises(ValueError, match="rolled back"):
            hire("rolled back", "green")
        with shop.container.transaction():
            session = shop.session()
            assert isinstance(session, sqlmodel.Session)
            teams = session.exec(select(Team).order_by(Team.name)).all()
            assert {team.name: [hero.name for hero in team.heroes] for team in teams} == {"blue": ["a", "b"], "red": ["c"]}


def test_units_of_coroutines_have_its_sessions(new_shop: NewShop) -> None:
    shop = new_shop(Base.metadata, connection=CONNECTION)

    async def hire(name: str) -> None:
        async with shop.container.transaction():
            session = shop.container.writer_async_session()
            assert isinstance(session, AsyncSession)
            session.add(Hero(name=name, team=Team(name=f"team of {name}")))
            assert (await session.exec(select(Hero.name).order_by(col(Hero.id)))).all()[-1] == name
            if name == "rolled back":
                raise ValueError(name)

    async def use() -> None:
        await hire("a")
        with pytest.raises(ValueError, match="rolled back"):
            await hire("rolled back")
        async with shop.container.writer_async_sessionmaker()() as session:
            assert isinstance(session, AsyncSession)
            assert (await session.exec(select(Team.name).join(Hero))).all() == ["team of a"]
            session.add(Hero(name="b"))
            await session.commit()
        await shop.container.shutdown_resources()

    with shop.test():
        asyncio.run(use())
        with shop.container.writer_sessionmaker()() as session:
            assert isinstance(session, sqlmodel.Session)
            assert session.exec(select(Hero.name).order_by(col(Hero.id))).all() == ["a", "b"]
