"""Code as applications write it. The type checkers must accept every line, without ignores, and know these types."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Annotated, Literal, assert_type
from unittest import IsolatedAsyncioTestCase

from dependency_injector import containers, providers, wiring
from dependency_injector.wiring import inject
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict
from sqlalchemy import MetaData, String, Table, insert, select
from sqlalchemy.engine import Engine
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_scoped_session, async_sessionmaker
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    MappedAsDataclass,
    Session,
    mapped_column,
    relationship,
    scoped_session,
    sessionmaker,
)

from app_db import (
    AppDbError,
    Connection,
    ConnectionSettings,
    Container,
    ContextTransactionManager,
    DatabaseContainer,
    DatabaseSettings,
    PoolSettings,
    Propagation,
    Provide,
    Reflected,
    RoutingSession,
    SessionSettings,
    Transaction,
    UnitOfWork,
    connection_of,
    container_of,
    errors,
    metadata_of,
    orm_base,
    retryable,
    transactional,
)
from app_db.health import Health
from app_db.integrations.health import asgi_health, wsgi_health
from app_db.testing import (
    CapturedHook,
    CapturedHooks,
    IsolatedTestCase,
    Isolation,
    Runner,
    captured_hooks,
    fresh_databases,
    is_overridden,
    isolated,
    kept_templates,
    made_databases,
    made_tables,
    overridden,
    running_under,
    sqlite,
    worker_databases,
)


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"

    sku: Mapped[str] = mapped_column(String(20), primary_key=True)
    amount: Mapped[int] = mapped_column(default=1)


# ---- containers ----------------------------------------------------------------------------------------------------------


class Shop(DatabaseContainer):
    writer = Connection()
    reader = Connection()
    audit_log = Connection()


class DeclaredNames(DatabaseContainer):
    writer = Connection()
    writer_session: providers.Provider[Session]


class OtherSettings(Shop):
    settings = providers.ThreadSafeSingleton(DatabaseSettings, application="other")


class FixedSettings(Shop):
    settings = providers.Object(DatabaseSettings(connections={"writer": ConnectionSettings(url="sqlite://")}))


class OtherManager(Shop):
    transaction_manager = providers.ThreadSafeSingleton(ContextTransactionManager)


class SelfWired(Shop):
    wiring_config = containers.WiringConfiguration(modules=[__name__])


class Application(containers.DeclarativeContainer):
    config = providers.Configuration()
    db = providers.Container(Shop)


# ---- settings ------------------------------------------------------------------------------------------------------------


class ApplicationSettings(BaseSettings):
    model_config = SettingsConfigDict(hide_input_in_errors=True)

    db: DatabaseSettings = Field(default_factory=DatabaseSettings)


def settings() -> DatabaseSettings:
    return DatabaseSettings(
        application="shop",
        atomicity="best_effort",
        connections={
            "writer": ConnectionSettings(
                url="postgresql+psycopg://shop@db/shop",
                pool=PoolSettings(size=10, alive_window=5, class_="queue"),
                session=SessionSettings(expire_on_commit=False),
                isolation_level="SERIALIZABLE",
                statement_timeout=2.5,
            ),
            "reader": ConnectionSettings(mirror="writer", read_only=True),
            "audit_log": ConnectionSettings(driver="sqlite", database="audit.db", transactional=False, password="none"),
        },
    )


def read_settings(settings: DatabaseSettings) -> None:
    assert_type(settings.application, str)
    assert_type(settings.connections, dict[str, ConnectionSettings])
    assert_type(settings.connection("writer"), ConnectionSettings)
    assert_type(settings.connection("writer").pool.size, int)
    assert_type(settings.connection("writer").masked_url, str)
    assert_type(settings.connection("writer").read_only, bool)
    for origin in settings.origins():
        assert_type(origin.variable, str)


# ---- what a container gives ----------------------------------------------------------------------------------------------


def use_paths(container: Shop) -> None:
    assert_type(container.writer.engine(), Engine)
    assert_type(container.writer.session(), Session)
    assert_type(container.writer.sessionmaker(), sessionmaker[Session])
    assert_type(container.writer.scoped_session(), scoped_session[Session])
    assert_type(container.audit_log.session().get(Order, "A-1"), Order | None)


def use_the_session_that_finds_its_database(container: Shop) -> None:
    assert_type(container.session(), RoutingSession)
    assert_type(container.session().get(Order, "A-1"), Order | None)
    session: Session = container.session()
    with container.session().using("reader"):
        assert_type(session.scalars(select(Order)).one(), Order)


async def use_the_async_session_that_finds_its_database(container: Shop) -> None:
    session: AsyncSession = container.async_session()
    with container.async_session().using("reader"):
        assert_type((await session.scalars(select(Order))).one(), Order)


@transactional
def count_orders(session: Session = Provide[Container.session]) -> int:
    return session.query(Order).count()


@transactional
async def count_orders_awaited(session: AsyncSession = Provide[Container.async_session]) -> int:
    return len((await session.scalars(select(Order))).all())


def use_flat_names(container: Shop) -> None:
    session: Session = container.writer_session()
    engine: Engine = container.writer_engine()
    maker: sessionmaker[Session] = container.audit_log_sessionmaker()
    scoped: scoped_session[Session] = container.reader_scoped_session()
    session.add(Order(sku=str((engine, maker, scoped))))


def use_declared_names(container: DeclaredNames) -> int:
    assert_type(container.writer_session(), Session)
    return container.writer_session().query(Order).count()


def return_without_any(container: Shop) -> int:
    return container.writer.session().query(Order).count()


def use_markers() -> None:
    assert_type(Provide[Shop.writer.session], Session)
    assert_type(Provide[Shop.writer.async_session], AsyncSession)
    assert_type(Provide[Shop.writer.engine], Engine)
    assert_type(Provide[Shop.session], RoutingSession)
    assert_type(Provide[Shop.settings], DatabaseSettings)
    assert_type(Provide[DeclaredNames.writer_session], Session)
    assert_type(Provide[Application.db.container.writer.session], Session)


@transactional
def annotated(
    session: Annotated[Session, Provide[Shop.writer.session]],
    name: str = Provide[Shop.settings.provided.application],
    limit: int = Provide["config.limit", wiring.as_int()],
    other: Session = wiring.Provide[Shop.writer_session],
    shop: Shop = Provide[Shop],
) -> int:
    return session.query(Order).count() + limit


def use_providers(container: Shop) -> None:
    assert_type(container.settings(), DatabaseSettings)
    assert_type(container.transaction(), Transaction)
    assert_type(container.unit(), UnitOfWork)
    container.transaction_manager().begin()


def use_idioms(engine: Engine) -> None:
    container = Shop(settings=settings())
    container.wire(modules=[__name__])
    with container.writer.session.override(providers.Object(Session())):
        pass
    with container.writer_session.override(providers.Object(Session())):
        pass
    with container.override_providers(writer_engine=providers.Object(engine)):
        pass
    container.writer.engine.reset_override()
    container.writer.engine.reset()
    container.reset_singletons()
    container.init_resources()
    container.shutdown_resources()
    container.unwire()
    container_of("north", "south")(settings=settings()).transaction()
    Container().writer.session()
    Application().wire(packages=["shop"])


# ---- units of work -------------------------------------------------------------------------------------------------------


def block(container: Shop) -> list[str]:
    with container.transaction() as unit:
        assert_type(unit, UnitOfWork)
        unit.on_commit(print, "committed", sep="")
        unit.on_abort(lambda: None)
        unit.before_commit(block, container)
        savepoint = unit.savepoint()
        savepoint.rollback()
        if unit.is_doomed:
            unit.doom("a reason")
        session = container.writer.session()
        session.execute(insert(Order).values(sku="A-1"))
        with container.transaction(propagation="nested"):
            session.add(Order(sku="A-2"))
        with container.transaction(Propagation.REQUIRES_NEW, read_only=True, isolation="SERIALIZABLE", timeout=3):
            pass
        return list(session.scalars(select(Order.sku)))


def run(container: Shop) -> None:
    assert_type(container.transaction(attempts=3, backoff=0.1).run(block, container), list[str])
    assert_type(container.transaction().run(lambda: 1), int)


def returns_before_the_end_of_a_block(container: Shop) -> int:
    with container.transaction():
        return 1


def goes_on_after_a_block(container: Shop) -> int:
    with container.transaction():
        number = 1
    return number + 1


# ---- the decorator -------------------------------------------------------------------------------------------------------


@transactional
def place_order(sku: str, amount: int = 1, session: Session = Provide[Shop.writer_session]) -> Order:
    order = Order(sku=sku, amount=amount)
    session.add(order)
    return order


@transactional()
def with_parentheses(session: Session = Provide[Shop.writer.session]) -> int:
    return session.query(Order).count()


@transactional(
    propagation=Propagation.NESTED,
    isolation="serializable",
    timeout=5,
    attempts=3,
    backoff=0.01,
    commit_on=(LookupError, ValueError),
)
def with_all_options(*skus: str, session: Session = Provide["writer_session"]) -> None:
    session.add_all(Order(sku=sku) for sku in skus)


@transactional(propagation="requires_new", read_only=True, commit_on=LookupError, container="db")
def in_an_application(session: Session = Provide["db.reader.session"], unit: UnitOfWork = Provide["db.unit"]) -> list[Order]:
    unit.on_commit(print)
    return list(session.scalars(select(Order)))


@inject
def injected(session: Session = Provide[Application.db.writer_session]) -> bool:
    return session.is_active


class Service:
    @transactional
    def method(self, sku: str, session: Session = Provide[Shop.writer_session]) -> Order | None:
        return session.get(Order, sku)

    @staticmethod
    @transactional
    def static(sku: str, session: Session = Provide[Shop.writer_session]) -> bool:
        return session.get(Order, sku) is not None

    @classmethod
    @transactional(attempts=2)
    def of_class(cls, session: Session = Provide[Shop.writer_session]) -> str:
        return f"{cls.__name__} {session.is_active}"


def call_decorated(session: Session) -> None:
    assert_type(place_order("A-1"), Order)
    assert_type(place_order("A-1", amount=2, session=session), Order)
    assert_type(with_parentheses(), int)
    with_all_options("A-1", "A-2")
    assert_type(in_an_application(), list[Order])
    assert_type(injected(), bool)
    assert_type(Service().method("A-1"), Order | None)
    assert_type(Service.static("A-1"), bool)
    assert_type(Service.of_class(), str)


# ---- coroutines ----------------------------------------------------------------------------------------------------------


def async_providers(container: Shop) -> None:
    assert_type(container.writer.async_session(), AsyncSession)
    assert_type(container.writer.async_scoped_session(), async_scoped_session[AsyncSession])
    assert_type(container.writer.async_sessionmaker(), async_sessionmaker[AsyncSession])
    session: AsyncSession = container.writer_async_session()
    engine: AsyncEngine = container.writer_async_engine()
    maker: async_sessionmaker[AsyncSession] = container.audit_log_async_sessionmaker()
    scoped: async_scoped_session[AsyncSession] = container.reader_async_scoped_session()
    session.add(Order(sku=str((engine, maker, scoped))))
    container.writer.async_engine.reset()


async def async_block(container: Shop, *skus: str) -> list[str]:
    async with container.transaction(timeout=3) as unit:
        assert_type(unit, UnitOfWork)
        unit.on_commit(hook, "committed")
        unit.adopt()
        session = container.writer.async_session()
        await session.execute(insert(Order).values(sku="A-1"))
        async with container.transaction(propagation="nested"):
            session.add_all(Order(sku=sku) for sku in skus)
        return list(await session.scalars(select(Order.sku)))


async def hook(what: str) -> None:
    print(what)


async def goes_on_after_an_async_block(container: Shop) -> int:
    async with container.transaction():
        number = 1
    return number + 1


@transactional
async def place_order_async(sku: str, amount: int = 1, session: AsyncSession = Provide[Shop.writer_async_session]) -> Order:
    order = Order(sku=sku, amount=amount)
    session.add(order)
    await session.flush()
    return order


@transactional(propagation="requires_new", attempts=2)
async def count_async(session: AsyncSession = Provide["writer_async_session"]) -> int:
    return len((await session.scalars(select(Order))).all())


@inject
async def injected_async(session: AsyncSession = Provide[Application.db.writer_async_session]) -> bool:
    return session.is_active


class AsyncService:
    @transactional
    async def method(self, sku: str, session: AsyncSession = Provide[Shop.writer.async_session]) -> Order | None:
        return await session.get(Order, sku)


async def call_async(container: Shop, session: AsyncSession) -> None:
    assert_type(await place_order_async("A-1"), Order)
    assert_type(await place_order_async("A-1", amount=2, session=session), Order)
    assert_type(await count_async(), int)
    assert_type(await injected_async(), bool)
    assert_type(await AsyncService().method("A-1"), Order | None)
    assert_type(await container.transaction(attempts=3).run(async_block, container, "A-2"), list[str])
    assert_type(container.shutdown_resources(), Awaitable[None])
    await container.shutdown_resources()


# ---- models --------------------------------------------------------------------------------------------------------------


class WarehouseBase(DeclarativeBase):
    metadata = metadata_of("warehouse", naming_convention={"pk": "pk_%(table_name)s"})


class Sale(WarehouseBase):
    __tablename__ = "sales"

    id: Mapped[int] = mapped_column(primary_key=True)
    sku: Mapped[str | None]


class PointBase(MappedAsDataclass, DeclarativeBase):
    metadata = metadata_of("points")


class Point(PointBase):
    __tablename__ = "points"

    id: Mapped[int] = mapped_column(primary_key=True, init=False)
    x: Mapped[int]
    y: Mapped[int] = mapped_column(default=0)


class LegacyBase(Reflected, DeclarativeBase):
    metadata = metadata_of("legacy")


class Customer(LegacyBase):
    __tablename__ = "customers"

    full_name: Mapped[str] = mapped_column("name")
    invoices: Mapped[list[Invoice]] = relationship(back_populates="customer")


class Invoice(LegacyBase):
    __tablename__ = "invoices"

    customer: Mapped[Customer] = relationship(back_populates="invoices")


def use_models(container: Shop) -> None:
    assert_type(metadata_of("warehouse"), MetaData)
    assert_type(orm_base("shop").metadata, MetaData)
    assert_type(orm_base("shop", naming_convention={"ix": "ix_%(column_0_label)s"}, reflected=True), type[DeclarativeBase])
    assert_type(connection_of(Sale), str)
    assert_type(connection_of(select(Sale).where(Sale.id == 1)), str)
    assert_type(container.session_of(Sale), Session)
    assert_type(container.session_of(Point(x=1, y=2)).get(Sale, 1), Sale | None)
    assert_type(container.async_session_of(Sale), AsyncSession)


def use_reflected_models(container: Shop) -> None:
    container.reflect()
    container.reflect("legacy")
    customer = Customer(full_name="Ann", born=None)
    assert_type(customer.full_name, str)
    assert_type(customer.invoices, list[Invoice])
    print(customer.born, select(Customer.born).where(Customer.born < 3))
    tables = container.reflect_schema("legacy", schema="old")
    assert_type(tables.customers, Table)
    assert_type(tables["customers"], Table)
    assert_type(list(tables), list[str])


def fill(container: Shop) -> None:
    container.create_all()
    container.create_all("warehouse", "legacy")
    container.drop_all()
    assert_type(container.bootstrap(), bool)
    assert_type(container.bootstrap(with_parentheses, on="writer", step="seeds"), bool)


async def fill_async(container: Shop) -> None:
    assert_type(await container.async_bootstrap(count_async, on="writer"), bool)


# ---- health ------------------------------------------------------------------------------------------------------------


def ask_for_health(container: Shop) -> None:
    assert_type(container.health(), Health)
    assert_type(container.health(timeout=1).connections["writer"].status, Literal["up", "degraded", "down"])
    assert_type(container.health().as_json(), dict[str, object])
    print(asgi_health(container), wsgi_health(container, timeout=1))


async def ask_for_health_async(container: Shop) -> None:
    assert_type(await container.async_health(timeout=1.5), Health)
    assert_type(await asyncio.create_task(container.async_health()), Health)


# ---- testing -------------------------------------------------------------------------------------------------------------


def switch(container: Shop) -> None:
    with overridden(container, settings()) as given:
        assert_type(given, DatabaseSettings)
    with overridden(container, {"writer": "sqlite://"}), sqlite(container) as throw_away, worker_databases(container, "gw0"):
        assert_type(throw_away, DatabaseSettings)
    with (
        kept_templates(container),
        fresh_databases(container) as copies,
        made_tables(container) as names,
        made_databases(container),
    ):
        assert_type(copies, DatabaseSettings)
        assert_type(names, frozenset[str])
    with running_under(Runner(create=True, tell=print)):
        assert_type(is_overridden(container), bool)
    with captured_hooks(container) as hooks:
        assert_type(hooks, CapturedHooks)
        hooks.run()
    assert hooks == [CapturedHook(print, "committed", sep="")]
    with isolated(container, ["writer"], patience=1) as isolation, isolation.session("writer") as session:
        assert_type(isolation, Isolation)
        assert_type(session, Session)


async def switch_async(container: Shop) -> None:
    async with overridden(container, settings()) as given, sqlite(container):
        assert_type(given, DatabaseSettings)
    with captured_hooks(container) as hooks:
        await hooks.run_awaited()
    async with isolated(container) as isolation, isolation.async_session("writer") as session:
        assert_type(session, AsyncSession)


class TestShop(IsolatedTestCase):
    container = Shop()
    connections = ("writer",)

    def test_it(self) -> None:
        assert_type(self.isolation, Isolation)


class TestShopAsync(IsolatedTestCase, IsolatedAsyncioTestCase):
    container = Shop()

    async def test_it(self) -> None:
        assert_type(self.isolation.names, Sequence[str])


# ---- session classes of one's own -----------------------------------------------------------------------------------------


class ShopSession(Session):
    def orders(self) -> int:
        return 1


class AsyncShopSession(AsyncSession):
    pass


class ShopWithClasses(DatabaseContainer):
    writer = Connection(session_class=ShopSession, async_session_class=AsyncShopSession)
    reader = Connection()


@transactional
def count_own_orders(session: ShopSession = Provide[ShopWithClasses.writer.session]) -> int:
    return session.orders()


def use_own_classes(container: ShopWithClasses) -> None:
    assert_type(container.writer.session(), ShopSession)
    assert_type(container.writer.async_session(), AsyncShopSession)
    assert_type(container.writer.sessionmaker(), sessionmaker[ShopSession])
    assert_type(container.reader.session(), Session)
    assert_type(container.connection("reader").session(), Session)


# ---- errors --------------------------------------------------------------------------------------------------------------


def handle(container: Shop) -> bool:
    try:
        with container.transaction():
            pass
    except errors.NotAtomic as error:
        assert_type(error.connections, tuple[str, ...])
    except errors.SettingsError as error:
        assert_type(error.problems, tuple[errors.Problem, ...])
    except (errors.NoUnitOfWork, errors.SessionIsManaged, AppDbError):
        return True
    except Exception as error:
        return retryable(error)
    return False
