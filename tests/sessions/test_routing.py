"""Each statement of the session that finds its database goes where it belongs.

Most of these tests have a "reader" that is another database than the writer's, so what is read shows where the read went.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from dependency_injector import containers, providers
from sqlalchemy import bindparam, delete, exists, func, insert, lambda_stmt, literal_column, select, text, union, update
from sqlalchemy.orm import Mapped, Session, aliased, foreign, joinedload, mapped_column, relationship, selectinload, subqueryload

from app_db import Connection, DatabaseContainer, DatabaseSettings, RoutingSession, container_of, errors
from harness.routed import Base, Fact, Item, Part, RoutedApplication, Stray, WarehouseBase, routed

Read = Callable[[RoutingSession], Any]
NewUrl = Callable[[], str]

items = Base.metadata.tables["items"]


@pytest.fixture
def app(new_sqlite_url: NewUrl) -> Iterator[RoutedApplication]:
    yield from three(new_sqlite_url)


@pytest.fixture
def everywhere(new_database_url: NewUrl) -> Iterator[RoutedApplication]:
    yield from three(new_database_url)


def three(new_url: NewUrl) -> Iterator[RoutedApplication]:
    """A writer with the item "primary", a reader with the item "replica", and a warehouse with the fact "fact"."""
    reader = {"url": new_url(), "read_only": True}
    with routed({"writer": new_url(), "reader": reader, "warehouse": new_url()}) as app:
        app.put("primary")
        app.put("replica", on="reader")
        app.put("fact", on="warehouse")
        yield app


# ---- whose statement it is --------------------------------------------------------------------------------------------


def refreshed(session: RoutingSession, model: type[Item]) -> Item:
    item = session.get_one(model, 1)
    session.refresh(item)
    return item


READS: dict[str, Read] = {
    "select of a column": lambda session: session.scalars(select(Item.name)).all(),
    "select of a model": lambda session: [item.name for item in session.scalars(select(Item))],
    "get": lambda session: [session.get_one(Item, 1).name],
    "query": lambda session: [item.name for item in session.query(Item).order_by(Item.id)],
    "select of a table": lambda session: session.scalars(select(items.c.name)).all(),
    "select by an alias": lambda session: session.scalars(select(aliased(Item).name)).all(),
    "select of a subquery": lambda session: session.scalars(select(select(Item.name).subquery().c.name)).all(),
    "select of a CTE": lambda session: session.scalars(select(select(Item.name).cte().c.name)).all(),
    "union": lambda session: session.scalars(union(select(Item.name), select(Item.name).where(Item.id == 1))).all(),
    "function that leaves the data alone": lambda session: [
        name.lower() for name in session.scalars(select(func.upper(Item.name)).where(func.length(Item.name) > 1))
    ],
    "exists": lambda session: session.scalars(select(Item.name).where(exists(select(Item.id)))).all(),
    "statement that is a function": lambda session: session.scalars(lambda_stmt(lambda: select(Item.name))).all(),
    "selectinload": lambda session: [
        item.name for item in session.scalars(select(Item).options(selectinload(Item.parts))) if item.parts == []
    ],
    "subqueryload": lambda session: [
        item.name for item in session.scalars(select(Item).options(subqueryload(Item.parts))) if item.parts == []
    ],
    "joinedload": lambda session: [
        item.name for item in session.scalars(select(Item).options(joinedload(Item.parts))).unique() if item.parts == []
    ],
    "join": lambda session: session.scalars(select(Item.name).outerjoin(Item.parts)).all(),
    "yield_per": lambda session: [item.name for item in session.scalars(select(Item).execution_options(yield_per=10))],
    "stream_results": lambda session: list(session.scalars(select(Item.name), execution_options={"stream_results": True})),
    "refresh": lambda session: [refreshed(session, Item).name],
    "merge": lambda session: [session.merge(Item(id=1), load=True).name],
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_what_only_reads_goes_to_the_reader(read: Read, app: RoutedApplication) -> None:
    with app.unit():
        assert read(app.session) == ["replica"]


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_once_the_unit_has_written_it_reads_what_the_writer_has(read: Read, app: RoutedApplication) -> None:
    with app.unit():
        app.session.execute(update(Item).values(amount=5))
        assert read(app.session) == ["primary"]


UNKNOWN: dict[str, Read] = {
    "text": lambda session: session.scalars(text("SELECT name FROM items")).all(),
    "select of text": lambda session: session.scalars(select(Item).from_statement(text("SELECT * FROM items"))).one().name,
    "text in a condition": lambda session: session.scalars(select(Item.name).where(text("1 = 1"))).all(),
    "FOR UPDATE": lambda session: session.scalars(select(Item.name).with_for_update()).all(),
    "FOR UPDATE inside": lambda session: session.scalars(select(select(Item.name).with_for_update().subquery().c.name)).all(),
    "a model without a connection": lambda session: session.scalars(select(Stray.name)).all(),
    "the session's connection": lambda session: session.connection().scalars(select(Item.name)).all(),
}


@pytest.mark.parametrize("name", ["text", "select of text", "text in a condition", "FOR UPDATE", "FOR UPDATE inside"])
def test_what_may_do_more_than_read_goes_to_the_writer(name: str, app: RoutedApplication) -> None:
    with app.unit():
        assert UNKNOWN[name](app.session) in (["primary"], "primary")


@pytest.mark.parametrize("name", ["a model without a connection", "the session's connection"])
def test_what_names_no_connection_goes_to_the_writer(name: str, app: RoutedApplication) -> None:
    with app.unit():
        assert UNKNOWN[name](app.session) == ["primary"]


@pytest.mark.parametrize(
    "column", [func.my_own(Item.name), func.shop.lower(Item.name), literal_column("my_own(name)"), func.nextval("s")], ids=str
)
def test_a_function_that_nobody_vouches_for_is_called_on_the_writer(column: Any, sqlite_url: str) -> None:
    with routed({"writer": sqlite_url}) as app, app.unit():
        app.session.get_bind(clause=select(Item.id, column))
        assert app.session.last_used == "writer"
        app.session.get_bind(clause=select(Item.id, func.lower(Item.name), literal_column("1")))
        assert app.session.last_used == "reader"


def test_rows_that_a_read_writes_are_written_by_the_writer(new_postgres_url: NewUrl) -> None:
    with routed({"writer": new_postgres_url(), "reader": {"url": new_postgres_url(), "read_only": True}}) as app:
        written = insert(Item).values(name="a", amount=0).returning(Item.name).cte()
        with app.unit():
            assert app.session.scalars(select(written.c.name)).all() == ["a"]
        assert app.names() == ["a"]


def test_models_are_read_and_written_in_their_own_databases(everywhere: RoutedApplication) -> None:
    app = everywhere
    with app.unit():
        app.session.add_all([Item(name="a"), Fact(name="b")])
        fact = app.session.scalars(select(Fact).where(Fact.name == "fact")).one()
        fact.name = "changed"
        assert app.session.scalars(select(Fact.name).order_by(Fact.name)).all() == ["b", "changed"]
        assert app.session.scalar(text("SELECT count(*) FROM facts"), bind_arguments={"mapper": Fact}) == 2
    assert app.names() == ["a", "primary"]
    assert app.names("warehouse") == ["b", "changed"]
    assert app.names("reader") == ["replica"]


def test_an_object_that_was_read_from_the_reader_is_written_by_the_writer(app: RoutedApplication) -> None:
    with app.unit():
        item = app.session.get_one(Item, 1)
        assert item.name == "replica"
        item.name = "changed"
    assert (app.names(), app.names("reader")) == (["changed"], ["replica"])


def test_a_related_object_is_loaded_where_the_object_was(app: RoutedApplication) -> None:
    app.run("INSERT INTO parts (id, name, item_id) VALUES (1, 'p', 1)")
    with app.unit():
        assert app.session.get_one(Item, 1).parts == []
    with app.unit():
        app.session.execute(update(Item).values(amount=1))
        assert [part.name for part in app.session.get_one(Item, 1).parts] == ["p"]


def test_a_join_across_databases_is_refused(app: RoutedApplication) -> None:
    with app.unit(), pytest.raises(errors.SpansDatabases, match=r"items.*facts|facts.*items"):
        app.session.execute(select(Item, Fact).join_from(Item, Fact, Item.name == Fact.name))


class WarehouseItem(WarehouseBase):
    __tablename__ = "warehouse_items"

    id: Mapped[int] = mapped_column(primary_key=True)
    item_id: Mapped[int]
    item: Mapped[Item] = relationship(Item, primaryjoin=lambda: foreign(WarehouseItem.item_id) == Item.id, viewonly=True)


class EagerItem(WarehouseBase):
    __tablename__ = "eager_items"

    id: Mapped[int] = mapped_column(primary_key=True)
    item_id: Mapped[int]
    item: Mapped[Item] = relationship(
        Item, primaryjoin=lambda: foreign(EagerItem.item_id) == Item.id, viewonly=True, lazy="joined"
    )


class Shelf(WarehouseBase):
    __tablename__ = "shelves"

    id: Mapped[int] = mapped_column(primary_key=True)
    content_id: Mapped[int]
    content: Mapped[EagerItem] = relationship(
        EagerItem, primaryjoin=lambda: foreign(Shelf.content_id) == EagerItem.id, viewonly=True, lazy="joined"
    )


def test_an_object_of_another_database_is_loaded_by_a_statement_of_its_own(app: RoutedApplication) -> None:
    with app.unit():
        app.session.add(WarehouseItem(id=1, item_id=1))
        app.session.flush()
        assert app.session.get_one(WarehouseItem, 1).item.name == "replica"
        app.session.expunge_all()
        loaded = app.session.scalars(select(WarehouseItem).options(selectinload(WarehouseItem.item))).one()
        assert loaded.item.name == "replica"


@pytest.mark.parametrize(
    "statement",
    [
        select(WarehouseItem).options(joinedload(WarehouseItem.item)),
        select(WarehouseItem).options(subqueryload(WarehouseItem.item)),
        select(WarehouseItem).join(WarehouseItem.item),
        select(EagerItem),
        lambda_stmt(lambda: select(EagerItem)),
        select(WarehouseItem).options(joinedload("*")),
        select(Shelf),
        select(Shelf).limit(1),
    ],
    ids=[
        "joinedload",
        "subqueryload",
        "join",
        "lazy=joined",
        "lazy=joined in a function",
        "joinedload of all",
        "lazy=joined by way of another",
        "lazy=joined around a subquery",
    ],
)
def test_objects_of_another_database_are_not_joined(statement: Any, app: RoutedApplication) -> None:
    with app.unit():
        app.session.add_all([WarehouseItem(id=1, item_id=1), Shelf(id=1, content_id=1)])
        app.session.flush()
        with pytest.raises(errors.SpansDatabases, match="'writer'"):
            app.session.scalars(statement).unique().all()


def test_a_relationship_that_joins_can_be_loaded_otherwise(app: RoutedApplication) -> None:
    with app.unit():
        app.session.add(EagerItem(id=1, item_id=1))
        app.session.flush()
        assert app.session.scalars(select(EagerItem).options(selectinload(EagerItem.item))).one().item.name == "replica"
        app.session.add(Shelf(id=1, content_id=1))
        app.session.flush()
        app.session.expunge_all()
        shelf = app.session.scalars(select(Shelf).options(joinedload(Shelf.content).lazyload(EagerItem.item))).one()
        assert shelf.content.item.name == "replica"


DML: dict[str, Callable[[Session], Any]] = {
    "insert of a model": lambda session: session.execute(insert(Item), [{"name": "a"}, {"name": "b"}]),
    "insert of one": lambda session: [session.execute(insert(Item).values(name=name, amount=0)) for name in "ab"],
    "insert into a table": lambda session: session.execute(insert(items), [{"name": "a"}, {"name": "b"}]),
    "bulk_save_objects": lambda session: session.bulk_save_objects([Item(name="a"), Item(name="b")]),
    "bulk_insert_mappings": lambda session: session.bulk_insert_mappings(Item.__mapper__, [{"name": "a"}, {"name": "b"}]),
    "add_all": lambda session: session.add_all([Item(name="a"), Item(name="b")]),
    "merge": lambda session: [session.merge(Item(name=name)) for name in "ab"],
    "text": lambda session: session.execute(text("INSERT INTO items (name, amount) VALUES ('a', 0), ('b', 0)")),
    "the session's connection": lambda session: session.connection().execute(insert(items), [{"name": "a"}, {"name": "b"}]),
}


@pytest.mark.parametrize("write", DML.values(), ids=DML)
def test_what_writes_goes_to_the_writer_and_is_read_there(write: Callable[[Session], Any], everywhere: RoutedApplication) -> None:
    app = everywhere
    with app.unit():
        assert app.session.scalars(select(Item.name)).all() == ["replica"]
        write(app.session)
        assert set(app.session.scalars(select(Item.name))) == {"a", "b", "primary"}
    assert (app.names(), app.names("reader")) == (["a", "b", "primary"], ["replica"])


@pytest.mark.parametrize("synchronize", ["auto", "fetch", "evaluate", False])
def test_rows_are_changed_and_deleted_by_the_writer(synchronize: Any, everywhere: RoutedApplication) -> None:
    app = everywhere
    options = {"synchronize_session": synchronize}
    with app.unit():
        app.session.get_one(Item, 1)
        app.session.execute(update(Item).where(Item.name == "primary").values(amount=7), execution_options=options)
    with app.unit():
        assert app.session.scalars(select(Item.amount).execution_options(populate_existing=True)).all() == [0]
        with app.session.using("writer"):
            assert app.session.scalars(select(Item.amount)).all() == [7]
    with app.unit():
        app.session.execute(delete(Item).where(Item.name == "primary"), execution_options=options)
    assert (app.names(), app.names("reader")) == ([], ["replica"])


def test_rows_to_change_are_looked_up_on_the_writer(everywhere: RoutedApplication) -> None:
    app = everywhere
    """Without RETURNING, SQLAlchemy reads first which rows an UPDATE is about to change."""
    with app.unit():
        with app.session.using("writer"):
            item = app.session.get_one(Item, 1)
        statement = update(Item).where(Item.name == "primary").values(amount=7)
        app.session.execute(statement, execution_options={"synchronize_session": "fetch"})
        assert item.amount == 7


def test_a_bulk_update_and_executemany_go_to_the_writer(everywhere: RoutedApplication) -> None:
    app = everywhere
    with app.unit():
        app.session.execute(update(Item), [{"id": 1, "amount": 3}])
        app.session.bulk_update_mappings(Item.__mapper__, [{"id": 1, "name": "updated"}])
        where = update(items).where(items.c.id == bindparam("which")).values(amount=bindparam("to"))
        app.session.connection().execute(where, [{"which": 1, "to": 4}])
        assert app.session.scalars(select(Item.amount)).all() == [4]
    assert (app.names(), app.names("reader")) == (["updated"], ["replica"])


def test_an_insert_returns_what_it_wrote(new_postgres_url: NewUrl) -> None:
    with routed({"writer": new_postgres_url()}) as app, app.unit():
        made = app.session.scalars(insert(Item).returning(Item), [{"name": "a"}, {"name": "b"}]).all()
        assert [item.name for item in made] == ["a", "b"]
        assert made[0] is app.session.get(Item, made[0].id)


# ---- when reads stay on the writer --------------------------------------------------------------------------------------


def test_once_the_unit_has_locked_it_reads_what_the_writer_has(new_postgres_url: NewUrl) -> None:
    with routed({"writer": new_postgres_url(), "reader": {"url": new_postgres_url(), "read_only": True}}) as app:
        app.put("primary")
        with app.unit():
            app.session.scalars(select(Item).with_for_update()).all()
            assert app.session.scalars(select(Item.name)).all() == ["primary"]


def test_what_the_writers_own_session_wrote_counts(app: RoutedApplication) -> None:
    with app.unit():
        app.container.writer_session().add(Item(name="a"))
        app.container.writer_session().flush()
        assert set(app.session.scalars(select(Item.name))) == {"a", "primary"}


def test_what_was_written_elsewhere_does_not_count(app: RoutedApplication) -> None:
    with app.unit():
        app.session.add(Fact(name="a"))
        app.session.flush()
        assert app.session.scalars(select(Item.name)).all() == ["replica"]


def test_a_read_of_text_leaves_the_reads_of_models_to_the_reader(app: RoutedApplication) -> None:
    with app.unit():
        app.session.execute(text("SELECT name FROM items"))
        assert app.session.scalars(select(Item.name)).all() == ["replica"]


def test_the_next_unit_reads_from_the_reader_again(app: RoutedApplication) -> None:
    for _ in range(2):
        with app.unit():
            assert app.session.scalars(select(Item.amount)).all() == [0]
            app.session.execute(update(Item).values(amount=1))
            assert app.session.scalars(select(Item.amount)).all() == [1]


def test_a_unit_with_an_isolation_of_its_own_reads_where_it_writes(everywhere: RoutedApplication) -> None:
    app = everywhere
    with app.unit(isolation="serializable"):
        assert app.session.scalars(select(Item.name)).all() == ["primary"]
    with app.unit(isolation="serializable", read_only=True):
        assert app.session.scalars(select(Item.name)).all() == ["replica"]


def test_a_writer_with_a_strict_isolation_is_read_where_it_is_written(new_postgres_url: NewUrl) -> None:
    writer = {"url": new_postgres_url(), "isolation_level": "REPEATABLE READ"}
    with routed({"writer": writer, "reader": {"url": new_postgres_url(), "read_only": True}}) as app:
        app.put("primary")
        with app.unit():
            assert app.session.scalars(select(Item.name)).all() == ["primary"]
        with app.unit(read_only=True):
            assert app.session.scalars(select(Item.name)).all() == []


def test_a_read_only_unit_reads_everything_from_the_reader(everywhere: RoutedApplication) -> None:
    app = everywhere
    with app.unit(read_only=True):
        assert app.session.scalars(select(Item.name)).all() == ["replica"]
        assert app.session.scalars(text("SELECT name FROM items")).all() == ["replica"]
        assert app.session.scalars(select(Fact.name)).all() == ["fact"]
        assert app.session.connection().scalars(select(Item.name)).all() == ["replica"]


def test_a_read_only_unit_writes_nothing(everywhere: RoutedApplication) -> None:
    app = everywhere
    with app.unit(read_only=True), pytest.raises(errors.ReadOnlyViolation):
        app.session.execute(insert(Fact).values(name="a"))
    with app.unit(read_only=True), pytest.raises(errors.ReadOnlyViolation):
        app.session.execute(insert(Item).values(name="a", amount=0))
    with pytest.raises(errors.ReadOnlyViolation, match="Begin it without"), app.unit(read_only=True):
        app.session.add(Item(name="a"))
        app.session.flush()


# ---- using ----------------------------------------------------------------------------------------------------------------


def test_a_block_that_uses_the_writer_reads_there(app: RoutedApplication) -> None:
    with app.unit():
        with app.session.using("writer"):
            assert app.session.scalars(select(Item.name)).all() == ["primary"]
        assert app.session.scalars(select(Item.name)).all() == ["replica"]


def test_a_block_that_uses_the_reader_sends_it_text_and_reads_after_writes(app: RoutedApplication) -> None:
    with app.unit():
        app.session.add(Item(name="a"))
        with app.session.using("reader"):
            assert app.session.scalars(text("SELECT name FROM items")).all() == ["replica"]
            assert app.session.scalars(select(Item.name)).all() == ["replica"]
            assert app.session.scalars(select(Fact.name)).all() == ["fact"]
    assert app.names() == ["a", "primary"], "what was pending went to the writer all the same"


def test_a_block_that_uses_the_reader_writes_nothing_there(everywhere: RoutedApplication) -> None:
    app = everywhere
    with app.unit(), app.session.using("reader"), pytest.raises(errors.ReadOnlyViolation, match="'reader'"):
        app.session.execute(update(Item).values(amount=1))


def test_text_goes_to_any_connection_that_a_block_uses(app: RoutedApplication) -> None:
    with app.unit():
        with app.session.using("warehouse"), app.session.using("reader"), app.session.using("warehouse"):
            app.session.execute(text("INSERT INTO facts (name) VALUES ('a')"))
            assert app.session.scalars(select(Item.name)).all() == ["replica"]
        assert app.session.scalars(text("SELECT name FROM items")).all() == ["primary"]
    assert app.names("warehouse") == ["a", "fact"]


def test_a_block_that_fails_is_left_as_well(app: RoutedApplication) -> None:
    with app.unit():
        with pytest.raises(ValueError, match="own"), app.session.using("writer"):
            raise ValueError("the application's own")
        assert app.session.scalars(select(Item.name)).all() == ["replica"]


def test_a_connection_to_use_that_is_not_there_is_refused(app: RoutedApplication) -> None:
    with app.unit(), pytest.raises(errors.InvalidUse, match=r"'reeder'.*'writer', 'reader', 'warehouse'"):
        app.session.using("reeder").__enter__()


# ---- which connection is whose reader --------------------------------------------------------------------------------------


def test_a_reader_that_nobody_configured_reads_for_the_writer(database_url: str) -> None:
    with routed({"writer": database_url}) as app:
        app.put("a")
        with app.unit():
            assert app.session.scalars(select(Item.name)).all() == ["a"]
            assert app.session.last_used == "reader"
            app.session.add(Item(name="b"))
            assert set(app.session.scalars(select(Item.name))) == {"a", "b"}


def test_a_container_without_a_reader_reads_from_the_writer(sqlite_url: str) -> None:
    with routed({"writer": sqlite_url}, names=()) as app:
        app.put("a")
        with app.unit():
            assert app.session.scalars(select(Item.name)).all() == ["a"]


def test_each_unit_reads_from_one_replica_and_all_have_their_turn(new_sqlite_url: NewUrl) -> None:
    replicas = {name: {"url": new_sqlite_url(), "read_only": True, "replica_of": "writer"} for name in ("north", "south")}
    with routed({"writer": new_sqlite_url(), **replicas}, names=()) as app:
        for name in replicas:
            app.put(name, on=name)
        seen: list[str] = []
        for _ in range(6):
            with app.unit():
                names = {app.session.scalars(select(Item.name)).one() for _ in range(3)}
                assert len(names) == 1
                seen += names
        assert seen.count("north") == seen.count("south") == 3


def test_a_warehouse_has_readers_as_well(new_sqlite_url: NewUrl) -> None:
    copy = {"url": new_sqlite_url(), "read_only": True, "replica_of": "warehouse"}
    with routed({"writer": new_sqlite_url(), "warehouse": new_sqlite_url(), "warehouse_copy": copy}) as app:
        app.put("a", on="warehouse")
        app.put("copy", on="warehouse_copy")
        with app.unit():
            assert app.session.scalars(select(Fact.name)).all() == ["copy"]
            app.session.add(Fact(name="b"))
            assert app.session.scalars(select(Fact.name).order_by(Fact.name)).all() == ["a", "b"]


@pytest.mark.parametrize("writes", ["session", "warehouse_session", "writer_session"])
def test_what_the_unit_wrote_in_a_transaction_that_is_shared_is_not_read_from_a_replica(
    writes: str, new_sqlite_url: NewUrl
) -> None:
    url = new_sqlite_url()
    copy = {"url": new_sqlite_url(), "read_only": True, "replica_of": "warehouse"}
    with routed({"writer": url, "warehouse": url, "warehouse_copy": copy}, names=()) as app:
        app.put("copy", on="warehouse_copy")
        with app.unit():
            assert app.session.scalars(select(Fact.name)).all() == ["copy"]
            getattr(app.container, writes)().execute(insert(Fact).values(name="a"))
            assert app.session.scalars(select(Fact.name)).all() == ["a"]


def test_text_goes_to_the_only_connection_that_is_no_replica(new_sqlite_url: NewUrl) -> None:
    copy = {"url": new_sqlite_url(), "read_only": True, "replica_of": "warehouse"}
    with routed({"warehouse": new_sqlite_url(), "warehouse_copy": copy}, names=()) as app, app.unit():
        assert app.session.scalar(text("SELECT 1")) == 1
        assert app.session.last_used == "warehouse"


def test_text_goes_nowhere_where_nobody_can_say_where(new_sqlite_url: NewUrl) -> None:
    with routed({"warehouse": new_sqlite_url(), "warehouse_2": new_sqlite_url()}, names=()) as app, app.unit():
        with pytest.raises(errors.InvalidUse, match=r"session\.using\(\).*'warehouse', 'warehouse_2'"):
            app.session.execute(text("SELECT 1"))
        with app.session.using("warehouse"):
            assert app.session.scalar(text("SELECT 1")) == 1


def test_a_model_of_a_connection_that_the_container_has_not_is_refused(sqlite_url: str) -> None:
    with routed({"writer": sqlite_url}) as app, app.unit(), pytest.raises(errors.UnknownConnection, match="warehouse"):
        app.session.scalars(select(Fact))


def test_containers_are_copied_subclassed_nested_and_overridden(new_sqlite_url: NewUrl) -> None:
    class Shop(DatabaseContainer):
        writer = Connection()

    class Larger(Shop):
        warehouse = Connection()

    @containers.copy(Larger)
    class Copied(Larger):
        pass

    class Around(containers.DeclarativeContainer):
        db = providers.Container(Larger)

    given: dict[str, Any] = {name: {"url": new_sqlite_url()} for name in ("writer", "warehouse")}
    settings = DatabaseSettings(_env_file=None, atomicity="best_effort", connections=given)
    around: Any = Around(db=Larger(settings=settings))
    for container in (Larger(settings=settings), Copied(settings=settings), around.db()):
        container.create_all()
        Base.metadata.create_all(container.writer_engine())
        WarehouseBase.metadata.create_all(container.warehouse_engine())
        with container.transaction():
            container.session().add_all([Item(name=type(container).__name__ + str(id(container))), Fact(name=str(id(container)))])
        with container.transaction():
            assert str(id(container)) in container.session().scalars(select(Fact.name)).all()
        with container.session.override(providers.Object("another")):
            assert container.session() == "another"
        container.shutdown_resources()


def test_a_connection_cannot_have_the_sessions_name() -> None:
    with pytest.raises(errors.InvalidUse, match="'session'"):
        container_of("writer", "session")


def test_settings_that_are_replaced_are_followed(new_sqlite_url: NewUrl) -> None:
    with routed({"writer": new_sqlite_url(), "reader": {"url": new_sqlite_url(), "read_only": True}}) as app:
        app.put("primary")
        app.put("replica", on="reader")
        given = {name: own.model_dump() | {"url": own.url} for name, own in app.container.settings().connections.items()}
        given["reader"]["replica_of"] = ""
        other = DatabaseSettings(_env_file=None, connections=given)
        with app.container.settings.override(other), app.unit():
            assert app.session.scalars(select(Item.name)).all() == ["primary"]
        with app.unit():
            assert app.session.scalars(select(Item.name)).all() == ["replica"]


def test_objects_of_one_database_refer_to_each_other(app: RoutedApplication) -> None:
    """Objects of one database refer to each other as ever."""
    with app.unit():
        app.session.add(Part(name="p", item=Item(name="a")))
    with app.unit(), app.session.using("writer"):
        assert app.session.scalars(select(Part)).one().item.name == "a"  # type: ignore[union-attr]
