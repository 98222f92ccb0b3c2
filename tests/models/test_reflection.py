"""Models without columns are filled from the live database, once; whole schemas are read into a namespace."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import pytest
from sqlalchemy import Engine, Integer, NullPool, Table, create_engine, event, insert, inspect, select, text
from sqlalchemy.exc import ArgumentError, NoSuchTableError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, aliased, mapped_column, relationship

from app_db import DatabaseContainer, DatabaseSettings, Reflected, connection_of, container_of, metadata_of, orm_base
from app_db.errors import AppDbError, CannotReflect, NotReflected, UnknownConnection, UnknownTable
from harness.paths import run_python

TABLES = 60

_numbers = count(1)


def new_name() -> str:
    """A connection that no other test has models for: models are the process's."""
    return f"reflected{next(_numbers)}"


def execute(url: str, *statements: str) -> None:
    engine = create_engine(url, poolclass=NullPool)
    with engine.begin() as connection:
        for statement in statements:
            connection.execute(text(statement))
    engine.dispose()


def many_tables() -> Iterator[str]:
    """A database that somebody else made: sixty tables, each of which refers to the one before it."""
    for number in range(TABLES):
        reference = f", FOREIGN KEY (before_id) REFERENCES legacy_{number - 1} (id)" if number else ""
        yield (
            f"CREATE TABLE legacy_{number} (id INTEGER PRIMARY KEY, name VARCHAR(50) NOT NULL, amount NUMERIC(10, 2), "
            f"made_at TIMESTAMP NULL, before_id INTEGER{reference})"
        )


CUSTOMERS = "CREATE TABLE customers (id INTEGER PRIMARY KEY, name VARCHAR(50), born DATE)"
NAMED = "CREATE VIEW named AS SELECT * FROM customers"
INVOICES = (
    "CREATE TABLE invoices (id INTEGER PRIMARY KEY, customer_id INTEGER, total INTEGER, "
    "FOREIGN KEY (customer_id) REFERENCES customers (id))"
)


@contextmanager
def container_for(name: str, url: str, **common: Any) -> Iterator[DatabaseContainer]:
    container = container_of(name)(settings=DatabaseSettings(connections={name: {"url": url}}, **common))
    try:
        yield container
        assert getattr(container, f"{name}_engine")().pool.checkedout() == 0
    finally:
        container.shutdown_resources()


def model(base: Any, table: str, **attributes: Any) -> Any:
    """Make a model of which nothing is said but its table."""
    return type(base)(table.title().replace("_", ""), (base,), {"__tablename__": table, "__module__": __name__, **attributes})


def engine_of(container: DatabaseContainer, name: str) -> Engine:
    engine: Engine = getattr(container, f"{name}_engine")()
    return engine


@contextmanager
def statements_on(engine: Engine) -> Iterator[list[str]]:
    sent: list[str] = []

    def note(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        sent.append(statement)

    event.listen(engine, "before_cursor_execute", note)
    try:
        yield sent
    finally:
        event.remove(engine, "before_cursor_execute", note)


# ---- models -----------------------------------------------------------------------------------------------------------


def test_sixty_tables_that_no_model_mentions_by_column_are_reflected(database_url: str) -> None:
    execute(database_url, *many_tables())
    name = new_name()
    base = orm_base(name, reflected=True)
    models = [model(base, f"legacy_{number}") for number in range(TABLES)]
    with container_for(name, database_url) as container:
        container.reflect()
        assert all(set(inspect(each).columns.keys()) == {"id", "name", "amount", "made_at", "before_id"} for each in models)
        with container.transaction():
            session = container.session_of(models[0])
            session.add(models[0](id=1, name="first"))
            session.flush()
            session.add(models[1](id=1, name="second", before_id=1))
        with container.transaction():
            session = container.session_of(models[1])
            joined = select(models[0].name).join(models[1], models[1].before_id == models[0].id)
            assert session.scalars(joined).all() == ["first"]
            assert connection_of(joined) == name


def test_columns_that_are_declared_win_and_relationships_work(database_url: str) -> None:
    execute(database_url, CUSTOMERS, INVOICES)
    name = new_name()

    class Base(Reflected, DeclarativeBase):
        metadata = metadata_of(name)

    class Customer(Base):
        __tablename__ = "customers"
        full_name: Mapped[str] = mapped_column("name")
        invoices: Mapped[list[Invoice]] = relationship(back_populates="customer", order_by="Invoice.id")

    class Invoice(Base):
        __tablename__ = "invoices"
        customer: Mapped[Customer] = relationship(back_populates="invoices")

    with container_for(name, database_url) as container:
        container.reflect(name)
        with container.transaction():
            customer = Customer(id=1, full_name="Ann")
            customer.invoices = [Invoice(id=1, total=5), Invoice(id=2, total=7)]
            container.session_of(Customer).add(customer)
        with container.transaction():
            found = container.session_of(Invoice).get_one(Invoice, 2)
            assert (found.total, found.customer.full_name) == (7, "Ann")
            assert set(inspect(Customer).columns.keys()) == {"id", "full_name", "born"}


def test_a_schema_can_be_named(postgres_url: str) -> None:
    execute(postgres_url, "CREATE SCHEMA old", CUSTOMERS.replace("customers", "old.customers"), CUSTOMERS)
    name = new_name()
    customer = model(orm_base(name, reflected=True), "customers", __table_args__={"schema": "old"})
    with container_for(name, postgres_url) as container:
        container.reflect()
        with container.transaction():
            container.session_of(customer).add(customer(id=1, name="Ann"))
        with engine_of(container, name).connect() as connection:
            assert connection.scalar(text("SELECT name FROM old.customers")) == "Ann"


def test_a_view_can_be_a_model_that_says_what_its_key_is(database_url: str) -> None:
    execute(
        database_url,
        CUSTOMERS,
        "INSERT INTO customers (id, name) VALUES (1, 'Ann')",
        "CREATE VIEW named AS SELECT * FROM customers",
    )
    name = new_name()
    named = model(orm_base(name, reflected=True), "named", id=mapped_column(Integer, primary_key=True))
    with container_for(name, database_url) as container:
        container.reflect()
        with container.transaction():
            assert container.session_of(named).get_one(named, 1).name == "Ann"


def test_single_and_joined_inheritance_are_reflected(sqlite_url: str) -> None:
    execute(
        sqlite_url,
        "CREATE TABLE people (id INTEGER PRIMARY KEY, kind VARCHAR(9), name VARCHAR(9))",
        "CREATE TABLE bosses (id INTEGER PRIMARY KEY REFERENCES people (id), car VARCHAR(9))",
    )
    name = new_name()

    class Base(Reflected, DeclarativeBase):
        metadata = metadata_of(name)

    class Person(Base):
        __tablename__ = "people"
        kind: Mapped[str]
        __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "person"}  # noqa: RUF012

    class Guest(Person):
        __mapper_args__ = {"polymorphic_identity": "guest"}  # noqa: RUF012

    class Boss(Person):
        __tablename__ = "bosses"
        __mapper_args__ = {"polymorphic_identity": "boss"}  # noqa: RUF012

    with container_for(name, sqlite_url) as container:
        container.reflect()
        with container.transaction():
            container.session_of(Boss).add_all([Boss(id=1, name="Ann", car="blue"), Guest(id=2, name="Bob"), Person(id=3)])
        with container.transaction():
            people = container.session_of(Person).scalars(select(Person).order_by(Person.id)).all()
            assert [type(person) for person in people] == [Boss, Guest, Person]
            assert people[0].car == "blue"


def test_models_of_one_base_may_be_of_two_connections(new_sqlite_url: Callable[[], str]) -> None:
    names, urls = (new_name(), new_name()), (new_sqlite_url(), new_sqlite_url())
    execute(urls[0], CUSTOMERS)
    execute(urls[1], INVOICES)

    class Base(Reflected, DeclarativeBase):
        metadata = metadata_of(names[0])

    class OtherBase(Base):
        __abstract__ = True
        metadata = metadata_of(names[1])

    customer, invoice = model(Base, "customers"), model(OtherBase, "invoices")
    with container_for(names[0], urls[0]) as first, container_for(names[1], urls[1]) as second:
        first.reflect()
        assert customer(id=1).id == 1
        with pytest.raises(NotReflected):
            invoice()
        with pytest.raises(NoSuchTableError, match="customers"):  # what it refers to
            second.reflect()
        execute(urls[1], CUSTOMERS)
        second.reflect()
        assert invoice(total=1).total == 1


def test_a_model_that_can_not_be_mapped_leaves_the_others_as_they_are(sqlite_url: str) -> None:
    execute(sqlite_url, CUSTOMERS, INVOICES)
    name = new_name()
    base = orm_base(name, reflected=True)
    customer = model(base, "customers")
    model(base, "invoices", __mapper_args__={"polymorphic_on": "nothing"})  # nonsense that only SQLAlchemy can find
    with container_for(name, sqlite_url) as container:
        with pytest.raises(ArgumentError, match="nothing"):
            container.reflect()
        container.reflect()
        with container.transaction():
            assert container.session_of(customer).scalars(select(customer.name)).all() == []


USES: dict[str, Callable[[Any], Any]] = {
    "new": lambda legacy: legacy(id=1),
    "new without arguments": lambda legacy: legacy(),
    "select": select,
    "column": lambda legacy: legacy.name,
    "alias": aliased,
    "insert": insert,
    "inspect": inspect,
    "get": lambda legacy: Session().get(legacy, 1),
    "query": lambda legacy: Session().query(legacy),
    "connection_of": connection_of,
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_model_that_was_not_reflected_says_what_to_call(use: Callable[[Any], Any]) -> None:
    name = new_name()
    legacy = model(orm_base(name, reflected=True), "legacy")
    with pytest.raises(NotReflected, match=r"container\.reflect\(\)") as caught:
        use(legacy)
    assert (caught.value.model, caught.value.connection) == ("Legacy", name)


def test_a_reflected_model_without_such_an_attribute_is_an_ordinary_class(sqlite_url: str) -> None:
    execute(sqlite_url, CUSTOMERS)
    name = new_name()
    customer = model(orm_base(name, reflected=True), "customers")
    assert not hasattr(customer, "name")
    with container_for(name, sqlite_url) as container:
        container.reflect()
    assert hasattr(customer, "name")
    with pytest.raises(AttributeError, match="no attribute 'nome'") as caught:
        _ = customer.nome
    assert not isinstance(caught.value, AppDbError)


# ---- what is wrong ----------------------------------------------------------------------------------------------------


def test_all_missing_tables_are_named_in_one_error_and_reflecting_can_be_repeated(database_url: str) -> None:
    execute(database_url, CUSTOMERS, "CREATE TABLE notes (name VARCHAR(50))")
    name = new_name()
    base = orm_base(name, reflected=True)
    customer, invoice, parcel, note = (model(base, table) for table in ("customers", "invoices", "parcels", "notes"))
    with container_for(name, database_url) as container:
        with pytest.raises(CannotReflect) as caught:
            container.reflect()
        assert [(found.model, found.table, found.connection) for found in caught.value.models] == [
            ("Invoices", "invoices", name),
            ("Notes", "notes", name),
            ("Parcels", "parcels", name),
        ]
        text_of_it = str(caught.value)
        assert f"Parcels: the table 'parcels' of {name!r} is not there." in text_of_it
        assert "Notes: the table 'notes'" in text_of_it
        assert "has no primary key; declare" in text_of_it
        with pytest.raises(NotReflected):
            customer()
        execute(
            database_url,
            INVOICES,
            CUSTOMERS.replace("customers", "parcels"),
            "DROP TABLE notes",
            CUSTOMERS.replace("customers", "notes"),
        )
        container.reflect()
        assert [each(id=1).id for each in (customer, invoice, parcel, note)] == [1, 1, 1, 1]


def test_a_key_column_that_is_declared_has_to_be_declared_as_one(sqlite_url: str) -> None:
    execute(sqlite_url, CUSTOMERS)
    name = new_name()
    model(orm_base(name, reflected=True), "customers", number=mapped_column("id", Integer))
    with container_for(name, sqlite_url) as container, pytest.raises(CannotReflect, match="has no primary key; declare"):
        container.reflect()


def test_the_problems_of_all_connections_are_told_at_once(new_sqlite_url: Callable[[], str]) -> None:
    names = [new_name(), new_name(), new_name()]
    urls = [new_sqlite_url() for _ in names]
    execute(urls[1], CUSTOMERS)
    models = [model(orm_base(name, reflected=True), "customers") for name in names]
    settings = DatabaseSettings(connections={name: {"url": url} for name, url in zip(names, urls, strict=True)})
    container = container_of(*names)(settings=settings)
    with pytest.raises(CannotReflect) as caught:
        container.reflect()
    assert sorted(found.connection for found in caught.value.models) == [names[0], names[2]]
    assert models[1](id=3).id == 3
    with pytest.raises(UnknownConnection):
        container.reflect("nobody")
    container.shutdown_resources()


def test_a_server_that_is_away_can_be_asked_again(new_sqlite_url: Callable[[], str], tmp_path: Any) -> None:
    execute(new_sqlite_url(), CUSTOMERS)
    name = new_name()
    customer = model(orm_base(name, reflected=True), "customers")
    with (
        container_for(name, f"sqlite:///{tmp_path}/no/such/directory.db") as container,
        pytest.raises(Exception, match="unable to open"),
    ):
        container.reflect()
    url = new_sqlite_url()
    execute(url, CUSTOMERS)
    with container_for(name, url) as container:
        container.reflect()
    assert customer(id=1).id == 1


# ---- once -------------------------------------------------------------------------------------------------------------


def fresh_models(url: str, tables: int = 5) -> str:
    execute(url, *list(many_tables())[:tables])
    name = new_name()
    base = orm_base(name, reflected=True)
    globals().setdefault("_kept", []).extend(model(base, f"legacy_{number}") for number in range(tables))
    return name


def test_threads_that_ask_at_once_reflect_once(new_database_url: Callable[[], str]) -> None:
    alone = fresh_models(url := new_database_url())
    with container_for(alone, url) as container, statements_on(engine_of(container, alone)) as sent_by_one:
        container.reflect()
    together = fresh_models(url := new_database_url())
    failures: list[BaseException] = []
    with container_for(together, url) as container, statements_on(engine_of(container, together)) as sent_by_many:
        barrier = threading.Barrier(16)

        def ask() -> None:
            try:
                barrier.wait(30)
                container.reflect()
            except BaseException as failure:
                failures.append(failure)

        threads = [threading.Thread(target=ask) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert failures == []
    assert len(sent_by_one) > 0
    assert len(sent_by_many) == len(sent_by_one)


def test_nothing_connects_when_there_is_nothing_to_reflect(sqlite_url: str) -> None:
    name = fresh_models(sqlite_url)
    with container_for(name, sqlite_url) as container:
        container.reflect()
    with container_for(name, "sqlite:////no/such/directory.db") as second:
        second.reflect()  # the first container's came first
    without_models = new_name()
    with container_for(without_models, "sqlite:////no/such/directory.db") as third:
        third.reflect()
        third.init_resources()


def test_models_that_are_imported_later_are_reflected_by_the_next_call(sqlite_url: str) -> None:
    execute(sqlite_url, CUSTOMERS, INVOICES)
    name = new_name()
    base = orm_base(name, reflected=True)
    with container_for(name, sqlite_url) as container:
        customer = model(base, "customers")
        container.reflect()
        invoice = model(base, "invoices")
        with pytest.raises(NotReflected):
            invoice()
        container.reflect()
        assert (customer(id=1).id, invoice(total=2).total) == (1, 2)


def test_init_resources_reflects_when_the_settings_say_so(sqlite_url: str) -> None:
    name = fresh_models(sqlite_url)
    with container_for(name, sqlite_url) as container, statements_on(engine_of(container, name)) as sent:
        container.init_resources()
        assert sent == []
    with container_for(name, sqlite_url, reflect_at_start=True) as container:
        container.init_resources()
        with container.transaction():
            legacy = inspect_model(name, "legacy_1")
            assert container.session_of(legacy).scalars(select(legacy.name)).all() == []


def inspect_model(name: str, table: str) -> Any:
    return next(each for each in globals()["_kept"] if each.__table__.name == table and each.metadata is metadata_of(name))


def test_reflecting_waits_for_no_writer(sqlite_url: str) -> None:
    """Not even for the unit of work around it, which has shut all other writers of a SQLite database out."""
    name = fresh_models(sqlite_url)
    with container_for(name, sqlite_url) as container:
        with container.transaction():
            session = getattr(container, f"{name}_session")()
            session.execute(text("INSERT INTO legacy_0 (id, name) VALUES (1, 'a')"))
            container.reflect()
        with container.transaction():
            legacy = inspect_model(name, "legacy_0")
            assert container.session_of(legacy).get_one(legacy, 1).name == "a"


def test_a_read_only_connection_reflects(database_url: str) -> None:
    name = fresh_models(database_url)
    settings = DatabaseSettings(connections={name: {"url": database_url, "read_only": True}})
    container = container_of(name)(settings=settings)
    container.reflect()
    with container.transaction():
        legacy = inspect_model(name, "legacy_2")
        assert container.session_of(legacy).scalars(select(legacy)).all() == []
    container.shutdown_resources()


@pytest.mark.parametrize("driver", ["asyncpg", "aiosqlite"])
async def test_coroutines_reflect_in_a_thread(driver: str, request: pytest.FixtureRequest) -> None:
    pytest.importorskip(driver)
    url: str = request.getfixturevalue("postgres_url" if driver == "asyncpg" else "sqlite_url")
    name = fresh_models(url)
    scheme = "postgresql+asyncpg" if driver == "asyncpg" else "sqlite+aiosqlite"
    settings = DatabaseSettings(connections={name: {"url": scheme + url[url.index("://") :]}})
    container = container_of(name)(settings=settings)
    await asyncio.to_thread(container.reflect)
    legacy = inspect_model(name, "legacy_0")
    async with container.transaction():
        container.async_session_of(legacy).add(legacy(id=1, name="a"))
    async with container.transaction():
        assert (await container.async_session_of(legacy).get_one(legacy, 1)).name == "a"
    await container.shutdown_resources()


FORKING = """
import os, signal, sys
from app_db import DatabaseSettings, container_of, orm_base
from app_db.models import _reflection

class Customer(orm_base("crm", reflected=True)):
    __tablename__ = "customers"

container = container_of("crm")(settings=DatabaseSettings(connections={"crm": {"url": sys.argv[1]}}))
with _reflection._reflecting:  # as another thread of the parent would hold it
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        container.reflect()
        print("reflected", Customer(id=1).id, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_a_forked_child_can_reflect_while_its_parent_does(sqlite_url: str) -> None:
    execute(sqlite_url, CUSTOMERS)
    assert run_python("-c", FORKING, sqlite_url).stdout == "reflected 1\n"


# ---- schemas ----------------------------------------------------------------------------------------------------------


def test_a_whole_schema_is_read_into_a_namespace(database_url: str) -> None:
    execute(database_url, CUSTOMERS, INVOICES, "CREATE TABLE loose (name VARCHAR(50))", NAMED)
    name = new_name()
    with container_for(name, database_url) as container:
        tables = container.reflect_schema(name)
        assert set(tables) == {"customers", "invoices", "loose", "named"}
        assert isinstance(tables.loose, Table)
        assert tables["customers"] is tables.customers
        assert tables.invoices.c.customer_id.references(tables.customers.c.id)
        assert {"customers", "loose"} <= set(dir(tables))
        assert repr(tables) == f"<4 tables of {name!r}>"
        with container.transaction():
            session = container.session_of(tables.loose)
            session.execute(insert(tables.loose).values(name="a"))
        with container.transaction():
            assert container.session_of(select(tables.loose)).scalars(select(tables.loose.c.name)).all() == ["a"]
        assert not metadata_of(name).tables, "what was read is nobody's to create"
        with pytest.raises(UnknownConnection):
            container.reflect_schema("nobody")


def test_a_named_schema_is_read(postgres_url: str) -> None:
    execute(postgres_url, "CREATE SCHEMA old", "CREATE TABLE old.things (id INTEGER PRIMARY KEY)", CUSTOMERS)
    name = new_name()
    with container_for(name, postgres_url) as container:
        tables = container.reflect_schema(name, schema="old")
        assert list(tables) == ["things"]
        assert tables.things.fullname == "old.things"


def test_a_table_that_the_schema_has_not_is_named(sqlite_url: str) -> None:
    execute(sqlite_url, CUSTOMERS)
    name = new_name()
    with container_for(name, sqlite_url) as container:
        tables = container.reflect_schema(name)
    with pytest.raises(UnknownTable, match=r"Did you mean 'customers'\?"):
        _ = tables.customer
    with pytest.raises(KeyError):
        _ = tables["customer"]
    assert tables.get("customer") is None
    assert not hasattr(tables, "customer")
    assert not hasattr(tables, "__wrapped__")
    assert copy.copy(tables).customers is tables.customers
