"""A model knows the name of its connection, and whatever is made of models can be asked for it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from dependency_injector import containers, providers
from sqlalchemy import (
    Column,
    ForeignKey,
    Integer,
    MetaData,
    Sequence,
    Table,
    column,
    delete,
    exists,
    func,
    insert,
    inspect,
    join,
    lambda_stmt,
    literal_column,
    select,
    table,
    text,
    union,
    union_all,
    update,
)
from sqlalchemy.ext.associationproxy import association_proxy
from sqlalchemy.orm import (
    Bundle,
    DeclarativeBase,
    Mapped,
    MappedAsDataclass,
    Query,
    aliased,
    column_property,
    mapped_column,
    registry,
    relationship,
    synonym,
)
from sqlalchemy.schema import CreateIndex, CreateTable, Index

from app_db import Connection, DatabaseContainer, DatabaseSettings, connection_of, container_of, metadata_of, orm_base
from app_db.errors import InvalidUse, NoUnitOfWork, SpansDatabases, UnknownModel
from app_db.models import CONNECTION
from harness.paths import run_python


class ShopBase(DeclarativeBase):
    metadata = metadata_of("shop")


class WarehouseBase(DeclarativeBase):
    metadata = metadata_of("warehouse")


class Order(ShopBase):
    __tablename__ = "m_orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    sku: Mapped[str]
    lines: Mapped[list[Line]] = relationship(back_populates="order")
    twice: Mapped[int] = column_property(literal_column("2"))


class Line(ShopBase):
    __tablename__ = "m_lines"

    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int] = mapped_column(ForeignKey("m_orders.id"))
    order: Mapped[Order] = relationship(back_populates="lines")


class UrgentOrder(Order):
    __tablename__ = "m_urgent_orders"

    id: Mapped[int] = mapped_column(ForeignKey("m_orders.id"), primary_key=True)


class Sale(WarehouseBase):
    __tablename__ = "m_sales"

    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int]


class OrderLine(ShopBase):  # mapped to a join
    __table__ = orders_and_lines = join(Order.__table__, Line.__table__)

    id = column_property(orders_and_lines.c.m_orders_id, orders_and_lines.c.m_lines_order_id)
    line_id = orders_and_lines.c.m_lines_id


class Sku(ShopBase):  # mapped to a subquery
    __table__ = select(Order.sku, func.count().label("orders")).group_by(Order.sku).subquery()
    __mapper_args__ = {"primary_key": [__table__.c.sku]}  # noqa: RUF012


class Foreign(ShopBase):  # its base says one connection, and its table another
    __table__ = Table("m_foreign", metadata_of("warehouse"), Column("id", Integer, primary_key=True))


stranger = Table("strangers", MetaData(), Column("id", Integer, primary_key=True))
orders = metadata_of("shop").tables["m_orders"]
cte = select(Order.id).where(Order.sku == "a").cte("c", recursive=True)
recursive = cte.union_all(select(cte.c.id + 1).where(cte.c.id < 3))
number = Sequence("m_numbers", metadata=metadata_of("shop"))


# ---- bases and metadata -----------------------------------------------------------------------------------------------


def test_bases_of_one_name_share_the_metadata_of_that_name() -> None:
    first, second = orm_base("shared"), orm_base("shared")
    assert first is not second
    assert first.metadata is second.metadata is metadata_of("shared")
    assert metadata_of("shared") is not metadata_of("other")
    assert metadata_of("shared").info[CONNECTION] == "shared"
    assert CONNECTION == "app_db_connection", "applications write it into a MetaData of their own"


def test_the_name_is_the_writers_unless_it_is_given() -> None:
    assert orm_base().metadata is metadata_of() is metadata_of("writer")


def test_a_base_of_the_applications_own_takes_the_metadata() -> None:
    class Own(DeclarativeBase):
        metadata = metadata_of("own_base")

    class Thing(Own):
        __tablename__ = "things"
        id: Mapped[int] = mapped_column(primary_key=True)

    assert connection_of(Thing) == "own_base"


def test_a_metadata_of_the_applications_own_says_its_connection_itself() -> None:
    own = MetaData(info={"app_db_connection": "shop"})
    assert connection_of(Table("own", own, Column("id", Integer))) == "shop"
    assert connection_of(own) == "shop"


@pytest.mark.parametrize("name", ["", "Shop", "1shop", "my__shop", "_shop", "class", "shöp", "a b", None, 3])
@pytest.mark.parametrize("make", [metadata_of, orm_base])
def test_a_name_that_no_connection_can_have_is_refused(make: Callable[[Any], object], name: Any) -> None:
    with pytest.raises(InvalidUse, match="lower-case Python identifier without '__'") as caught:
        make(name)
    assert repr(name) in str(caught.value)


def test_a_base_can_be_used_as_it_is_or_derived_from() -> None:
    base: Any = orm_base("derived")

    class Direct(base):  # type: ignore[misc]
        __tablename__ = "direct"
        id: Mapped[int] = mapped_column(primary_key=True)

    class Stamped:
        stamp: Mapped[int]

    class Middle(Stamped, base):  # type: ignore[misc]
        """Has only a docstring, and a method."""

        def shout(self) -> str:
            return "!"

    class Far(Middle):
        __tablename__ = "far"
        id: Mapped[int] = mapped_column(primary_key=True)

    class Farther(Far):  # single-table inheritance declares nothing, and is a model
        pass

    assert set(metadata_of("derived").tables) == {"direct", "far"}
    assert Far.metadata.tables["far"].c.keys() == ["id", "stamp"]
    assert connection_of(Direct) == connection_of(Far) == connection_of(Farther) == "derived"
    assert Far().shout() == "!"


def test_a_model_that_forgot_its_table_is_still_told_so() -> None:
    base: Any = orm_base("forgotten")
    with pytest.raises(Exception, match="__tablename__"):

        class Forgotten(base):  # type: ignore[misc]
            id: Mapped[int] = mapped_column(primary_key=True)


DECLARED: dict[str, Callable[[], object]] = {
    "a column": lambda: Column(Integer, primary_key=True),
    "a mapped column": lambda: mapped_column(Integer, primary_key=True),
    "a column property": lambda: column_property(Column(Integer)),
    "a relationship": lambda: relationship("Other"),
    "a synonym": lambda: synonym("other"),
    "an association proxy": lambda: association_proxy("other", "id"),
}


@pytest.mark.parametrize("declared", DECLARED)
def test_a_model_without_annotations_that_forgot_its_table_is_told_so_too(declared: str) -> None:
    with pytest.raises(Exception, match="__tablename__"):
        type("Forgotten", (orm_base("forgotten"),), {"attribute": DECLARED[declared]()})


def test_dataclass_models_work() -> None:
    base: Any = orm_base("dataclasses")

    class DataBase(MappedAsDataclass, base):  # type: ignore[misc]
        pass

    class Point(DataBase):
        __tablename__ = "points"
        id: Mapped[int] = mapped_column(primary_key=True, init=False)
        x: Mapped[int]
        y: Mapped[int] = mapped_column(default=0)

    assert repr(Point(x=3)).endswith("Point(id=None, x=3, y=0)")
    assert connection_of(Point(x=3)) == "dataclasses"


def test_imperative_models_work() -> None:
    class Plain:
        pass

    registry().map_imperatively(Plain, Table("plain", metadata_of("imperative"), Column("id", Integer, primary_key=True)))
    assert connection_of(Plain) == connection_of(Plain()) == "imperative"


def test_all_bases_of_a_name_have_one_naming_convention() -> None:
    convention = {"pk": "pk_%(table_name)s", "ix": "ix_%(table_name)s_%(column_0_name)s"}
    base = orm_base("conventional", naming_convention=convention)
    assert orm_base("conventional", naming_convention=dict(convention)).metadata is base.metadata
    assert orm_base("conventional").metadata.naming_convention == convention
    table = Table("t", metadata_of("conventional"), Column("id", Integer, primary_key=True))
    assert table.primary_key.name == "pk_t"
    with pytest.raises(InvalidUse, match="Two different naming conventions were given for the tables of 'conventional'"):
        metadata_of("conventional", naming_convention={"pk": "other"})
    metadata_of("conventional", naming_convention=convention)  # tables or not, it is the one that holds


def test_a_naming_convention_that_comes_too_late_is_refused() -> None:
    Table("t", metadata_of("late"), Column("id", Integer, primary_key=True))
    with pytest.raises(InvalidUse, match="after some of them had been declared without it"):
        orm_base("late", naming_convention={"pk": "pk_%(table_name)s"})


def test_models_need_neither_settings_nor_an_engine() -> None:
    """In a process of its own, whose settings could not even be read."""
    program = """
import os
os.environ["APP_DB_CONNECTIONS__SHOP__URL"] = "nonsense"
from app_db import metadata_of, orm_base
Base = orm_base("shop")
class Order(Base):
    __table__ = __import__("sqlalchemy").Table("o", Base.metadata, __import__("sqlalchemy").Column("i", primary_key=True))
"""
    run_python("-c", program)


# ---- which connection -------------------------------------------------------------------------------------------------

BELONG_TO_SHOP: dict[str, Callable[[], Any]] = {
    "model": lambda: Order,
    "instance": lambda: Order(id=1),
    "joined inheritance": lambda: UrgentOrder,
    "mapper": lambda: Order.__mapper__,
    "model of a join": lambda: OrderLine,
    "instance of a model of a join": OrderLine,
    "model of a subquery": lambda: Sku,
    "attribute of a model of a subquery": lambda: inspect(Sku).attrs.orders.class_attribute,
    "select of a model of a subquery": lambda: select(Sku),
    "table": lambda: orders,
    "metadata": lambda: metadata_of("shop"),
    "base": lambda: ShopBase,
    "attribute": lambda: Order.sku,
    "relationship": lambda: Order.lines,
    "column property": lambda: Order.twice,
    "column": lambda: orders.c.id,
    "labelled column": lambda: orders.c.id.label("x"),
    "expression": lambda: func.max(orders.c.id) + 1,
    "comparison": lambda: Order.id == 3,
    "bundle": lambda: Bundle("b", Order.id, Order.sku),
    "aliased model": lambda: aliased(Order),
    "attribute of an aliased model": lambda: aliased(Order).sku,
    "model aliased to a subquery": lambda: aliased(Order, select(Order).subquery()),
    "table alias": lambda: orders.alias("o"),
    "column of a table alias": lambda: orders.alias("o").c.id,
    "subquery": lambda: select(Order).subquery(),
    "column of a subquery": lambda: select(Order.id).subquery().c.id,
    "cte": lambda: select(Order).cte(),
    "recursive cte": lambda: select(recursive),
    "lateral": lambda: select(Order).lateral(),
    "table sample": lambda: orders.tablesample(1),
    "join": lambda: orders.join(Line.__table__),
    "sequence": lambda: number,
    "next value": lambda: select(number.next_value()),
    "select": lambda: select(Order),
    "select of columns": lambda: select(Order.id, orders.c.sku),
    "select of a label": lambda: select(orders.c.id.label("x")),
    "count": lambda: select(func.count()).select_from(Order),
    "join in a select": lambda: select(Order).join(Order.lines),
    "exists": lambda: select(exists().where(Order.id == 1)),
    "only in the where": lambda: select(text("1")).where(Order.id == 1),
    "relationship exists": lambda: select(Order).where(Order.lines.any()),
    "scalar subquery": lambda: select(select(Order.id).scalar_subquery()),
    "correlated": lambda: select(Order).where(exists().where(Line.order_id == Order.id)),
    "order by a function": lambda: select(Order).order_by(func.random()).limit(3),
    "for update": lambda: select(Order).with_for_update(of=Order),
    "union": lambda: union(select(Order.id), select(Line.id)),
    "union of a cte": lambda: union_all(select(cte.c.id), select(text("2"))),
    "insert": lambda: insert(Order),
    "insert with values": lambda: insert(orders).values([{"id": 1}, {"id": 2}]),
    "insert from select": lambda: insert(Order).from_select(["id"], select(Line.id)),
    "insert returning": lambda: insert(Order).returning(Order.id),
    "update": lambda: update(Order).values(sku="a").where(Order.id == 1),
    "delete": lambda: delete(orders),
    "delete using": lambda: delete(Order).where(Order.id == Line.order_id),
    "from statement": lambda: select(Order).from_statement(text("SELECT * FROM m_orders")),
    "text with columns": lambda: text("SELECT id FROM m_orders").columns(Order.id),
    "lambda statement": lambda: lambda_stmt(lambda: select(Order)) + (lambda s: s.where(Order.id == 1)),
    "lambda criteria": lambda: select(Order.id).where(lambda: Order.sku == "a"),
    "query": lambda: Query([Order]).filter(Order.id == 1),
    "create table": lambda: CreateTable(orders),
    "create index": lambda: CreateIndex(Index(None, orders.c.sku)),
    "beside a table of nobody": lambda: select(Order).join(stranger, stranger.c.id == Order.id),
    "beside a light table": lambda: select(Order.id, table("temporary", column("x"))),
}


@pytest.mark.parametrize("make", BELONG_TO_SHOP.values(), ids=BELONG_TO_SHOP)
def test_what_is_made_of_models_belongs_to_their_connection(make: Callable[[], Any]) -> None:
    assert connection_of(make()) == "shop"


BELONG_TO_NOBODY: dict[str, Callable[[], Any]] = {
    "table": lambda: stranger,
    "statement": lambda: select(stranger),
    "text": lambda: text("SELECT 'secret'"),
    "light table": lambda: select(table("temporary", column("x"))),
    "function": lambda: select(func.now()),
    "class": lambda: dict,
    "instance": lambda: object(),
    "string": lambda: "shop",
    "nothing": lambda: None,
    "metadata": MetaData,
    "sequence": lambda: Sequence("m_free"),
}


@pytest.mark.parametrize("make", BELONG_TO_NOBODY.values(), ids=BELONG_TO_NOBODY)
def test_what_has_no_connection_is_unknown(make: Callable[[], Any]) -> None:
    with pytest.raises(UnknownModel) as caught:
        connection_of(make())
    assert {"shop", "warehouse"} <= set(caught.value.known)
    assert "secret" not in str(caught.value)


def test_a_models_table_counts_and_not_its_base() -> None:
    for subject in (Foreign, Foreign(id=1), aliased(Foreign), inspect(Foreign).attrs.id.class_attribute, select(Foreign)):
        assert connection_of(subject) == "warehouse"


def test_statements_are_told_apart_however_alike_they_are() -> None:
    """What was found out about one statement is used for others of the same form: the form holds the tables themselves."""
    same_name = Table("m_orders", metadata_of("warehouse"), Column("id", Integer, primary_key=True))
    for _ in range(2):
        assert connection_of(select(orders.c.id).where(orders.c.id == 1)) == "shop"
        assert connection_of(select(same_name.c.id).where(same_name.c.id == 2)) == "warehouse"
    metadata_of("warehouse").remove(same_name)


def test_an_unknown_model_is_named() -> None:
    class Lonely(DeclarativeBase):
        pass

    class Person(Lonely):
        __tablename__ = "people"
        id: Mapped[int] = mapped_column(primary_key=True)

    for subject in (Person, Person()):
        with pytest.raises(UnknownModel, match=r"for the model Person\. Derive") as caught:
            connection_of(subject)
        assert (caught.value.subject, caught.value.connection) == ("the model Person", None)


SPANS: dict[str, Callable[[], Any]] = {
    "join": lambda: select(Order).join(Sale, Sale.order_id == Order.id),
    "two columns": lambda: select(Order.id, Sale.id),
    "subquery": lambda: select(Order).where(Order.id.in_(select(Sale.order_id))),
    "insert from select": lambda: insert(Order).from_select(["id"], select(Sale.id)),
    "union": lambda: union(select(Order.id), select(Sale.id)),
    "update": lambda: update(Order).values(sku=select(Sale.id).scalar_subquery()),
    "cte": lambda: select(Order).join(s := select(Sale).cte(), s.c.id == Order.id),
}


@pytest.mark.parametrize("make", SPANS.values(), ids=SPANS)
def test_a_statement_about_two_databases_is_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(SpansDatabases) as caught:
        connection_of(make())
    assert set(caught.value.places) == {("m_orders", "shop"), ("m_sales", "warehouse")}
    assert all(repr(word) in str(caught.value) for word in ("m_orders", "m_sales", "shop", "warehouse"))


# ---- the session of a model -------------------------------------------------------------------------------------------


class Shop(DatabaseContainer):
    shop = Connection()
    warehouse = Connection()


@pytest.fixture
def settings(new_sqlite_url: Callable[[], str]) -> DatabaseSettings:
    return DatabaseSettings(connections={"shop": {"url": new_sqlite_url()}, "warehouse": {"url": new_sqlite_url()}})


@pytest.fixture
def container(settings: DatabaseSettings) -> Iterator[Shop]:
    container = Shop(settings=settings)
    ShopBase.metadata.create_all(container.shop_engine())
    WarehouseBase.metadata.create_all(container.warehouse_engine())
    yield container
    container.shutdown_resources()


def test_a_models_session_is_the_units_session_of_its_connection(container: Shop) -> None:
    with container.transaction():
        assert container.session_of(Order) is container.shop_session() is container.shop.session()
        assert container.session_of(Sale(id=1)) is container.warehouse_session()
        assert container.session_of(select(func.count()).select_from(Sale)) is container.warehouse_session()
        container.session_of(Order).add(Order(id=1, sku="a"))
    with container.transaction():
        assert container.session_of(Order).get_one(Order, 1).sku == "a"
    with pytest.raises(NoUnitOfWork):
        container.session_of(Order)


async def test_coroutines_have_the_session_of_a_model(container: Shop) -> None:
    pytest.importorskip("aiosqlite")
    async with container.transaction():
        assert container.async_session_of(Order) is container.shop_async_session()
        container.async_session_of(Order).add(Order(id=2, sku="b"))
    async with container.transaction():
        assert (await container.async_session_of(Order).get_one(Order, 2)).sku == "b"
    await container.shutdown_resources()


def test_session_of_survives_what_containers_survive(container: Shop, settings: DatabaseSettings) -> None:
    given = providers.Object(settings)

    class Narrower(Shop):
        settings = given

    @containers.copy(Shop)
    class Copied(Shop):
        settings = given

    class Application(containers.DeclarativeContainer):
        db = providers.Container(Shop, settings=settings)

    application: Any = Application()
    for made in (Narrower(), Copied(), application.db(), copy.deepcopy(container)):
        with made.transaction():
            session = made.session_of(Order)
            assert session is made.shop_session()
            assert session.scalars(select(Order)).all() == []
        made.shutdown_resources()
    with container.transaction():
        stand_in = object()
        with container.shop_session.override(providers.Object(stand_in)):
            assert container.session_of(Order) is stand_in
        assert container.session_of(Order) is container.shop_session()


def test_a_model_of_a_connection_that_the_container_has_not_is_named(settings: DatabaseSettings) -> None:
    container = container_of("shop", "ware_house")(settings=settings)
    with container.transaction(), pytest.raises(UnknownModel) as caught:
        container.session_of(Sale)
    assert (caught.value.connection, caught.value.known) == ("warehouse", ("shop", "ware_house"))
    assert str(caught.value).startswith(
        "The container has no connection for the model Sale, which belongs to 'warehouse'. Did you mean 'ware_house'?"
    )
    with pytest.raises(UnknownModel):
        container.session_of(text("SELECT 1"))
    with pytest.raises(InvalidUse, match="container class"):
        Shop.session_of(Order)


def test_no_connection_takes_the_name_of_a_verb() -> None:
    with pytest.raises(InvalidUse, match="can't be called 'reflect'"):
        container_of("reflect")
