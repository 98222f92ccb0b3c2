"""A small application for tests of what units of work do to databases, and a way to look that app_db has no part in.

    with running(writer=url, warehouse=another_url, atomicity="best_effort") as app:
        with app.unit():
            app.session("writer").add(Item(name="a"))
        assert app.names("writer") == ["a"]

Each connection has the table `items`, and tests look at it through plain engines of their own. When the block ends, no
connection may be in use any more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Self, cast

from dependency_injector import providers
from sqlalchemy import Engine, NullPool, QueuePool, String, Table, create_engine, event, insert, text
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from app_db import DatabaseContainer, DatabaseSettings, Transaction, container_of
from app_db.settings._urls import for_threads

Settings = str | Mapping[str, Any]
"""What a connection is made from: a URL, or its settings."""

Atomicity = Literal["strict", "best_effort"]

WRITING_FUNCTION = {
    "postgresql": """
        CREATE FUNCTION add_item(name text) RETURNS integer LANGUAGE plpgsql AS
        $$ BEGIN INSERT INTO items (name) VALUES (name); RETURN 1; END $$
        """,
    "mysql": """
        CREATE FUNCTION add_item(name VARCHAR(50)) RETURNS INTEGER MODIFIES SQL DATA
        BEGIN INSERT INTO items (name) VALUES (name); RETURN 1; END
        """,
}
"""By dialect: a function that writes, called as `SELECT add_item('a')`."""

DEFER_UNIQUENESS = (
    "ALTER TABLE items DROP CONSTRAINT items_name_key",
    "ALTER TABLE items ADD CONSTRAINT one_of_each UNIQUE (name) DEFERRABLE INITIALLY DEFERRED",
    "INSERT INTO items (name) VALUES ('taken')",
)
"""On PostgreSQL: makes the COMMIT of a unit fail that adds another item "taken"."""

DEFERRED_COLLISION = (
    """
    CREATE FUNCTION collide() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN RAISE EXCEPTION 'collided' USING errcode = '40001'; END $$
    """,
    """
    CREATE CONSTRAINT TRIGGER collides AFTER INSERT ON items DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION collide()
    """,
)
"""On PostgreSQL: makes each COMMIT that has added an item fail as a serialization failure."""


class Boom(Exception):
    """An error of the application's own."""


class Base(DeclarativeBase):
    """The models of the tests' application."""


class Item(Base):
    __tablename__ = "items"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(50), unique=True)


class Application:
    """A container with the connections it was given, and plain engines beside it.

    As a context manager it closes them at its end, when no connection may be in use any more.
    """

    item: type[Any] = Item
    """The model that tests write; each database has its table."""

    def __init__(
        self,
        connections: Mapping[str, Settings],
        atomicity: Atomicity = "strict",
        *,
        names: Sequence[str] = (),
        copies: Sequence[str] = (),
        manager: Any = None,
        **common: Any,
    ) -> None:
        """`names` are connections without settings; `copies` those whose databases get their tables from elsewhere."""
        given = {name: {"url": what} if isinstance(what, str) else dict(what) for name, what in connections.items()}
        self.settings = DatabaseSettings(_env_file=None, connections=given, atomicity=atomicity, **common)
        self.connections = tuple(dict.fromkeys([*given, *names]))
        own = {} if manager is None else {"transaction_manager": providers.Object(manager)}
        self.container: DatabaseContainer = container_of(*self.connections)(settings=self.settings, **own)
        urls = {name: for_threads(self.settings.connection(name).sqlalchemy_url()) for name in given}
        self._plain = {name: create_engine(url, poolclass=NullPool) for name, url in urls.items()}
        for name, own_settings in given.items():
            if "mirror" not in own_settings and name not in copies:
                self.table_on(name).metadata.create_all(self._plain[name])

    # ---- what the application does

    def unit(self, *args: Any, **options: Any) -> Transaction:
        """A unit of work, to be entered with `with` or given a function to run."""
        return self.container.transaction(*args, **options)

    def session(self, name: str = "writer") -> Session:
        """The session of the unit that is under way."""
        return cast("Session", getattr(self.container, f"{name}_session")())

    def engine(self, name: str = "writer") -> Engine:
        """The engine the application uses."""
        return cast("Engine", getattr(self.container, f"{name}_engine")())

    def add(self, name: str, connection: str = "writer") -> None:
        """Add an item in the unit that is under way, and send it."""
        session = self.session(connection)
        session.add(self.item(name=name))
        session.flush()

    def override_engine(self, name: str, engine: Engine) -> None:
        """Have the application use another engine than the one app_db makes."""
        getattr(self.container, f"{name}_engine").override(engine)

    # ---- what others see

    def table_on(self, connection: str) -> Table:
        """The table of a connection's items."""
        return cast("Table", self.item.__table__)

    def plain_engine(self, name: str = "writer") -> Engine:
        """An engine on the same database that app_db knows nothing of."""
        return self._plain[name]

    def names(self, name: str = "writer") -> list[str]:
        """The names of the items that have been committed, sorted."""
        with self._plain[name].connect() as connection:
            return sorted(connection.execute(text(f"SELECT name FROM {self.table_on(name)}")).scalars())

    def run(self, *statements: str, on: str = "writer") -> None:
        """Run statements beside the application, each committed at once."""
        for statement in statements:
            with self._plain[on].begin() as connection:
                connection.exec_driver_sql(statement)

    def put(self, *names: str, on: str = "writer") -> None:
        """Commit items beside the application."""
        with self._plain[on].begin() as connection:
            for name in names:
                connection.execute(insert(self.table_on(on)).values(name=name))

    def checked_out(self) -> int:
        """How many connections are in use."""
        return sum(checked_out([self.engine(name) for name in self.connections]))

    def leftovers(self) -> list[object]:
        """What a unit must not leave behind."""
        in_use = {name: checked_out([self.engine(name)]) for name in self.connections}
        return [(name, number) for name, (number,) in in_use.items() if number]

    # ---- its end

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            assert kind is not None or self.leftovers() == []
        finally:
            self.close()

    def close(self) -> None:
        self.container.shutdown_resources()
        for plain in self._plain.values():
            plain.dispose()

    def define_writing_function(self, name: str = "writer") -> None:
        """Make `SELECT add_item('a')` write, in a way the statement's text doesn't show."""
        dialect = self._plain[name].url.get_backend_name()
        if dialect != "sqlite":
            self.run(WRITING_FUNCTION[dialect], on=name)
            return

        @event.listens_for(self.engine(name), "connect")
        def define(dbapi_connection: Any, record: Any) -> None:
            # A function of SQLite's may use the connection that calls it.
            def add_item(item: str) -> int:
                return int(dbapi_connection.execute("INSERT INTO items (name) VALUES (?)", (item,)).rowcount)

            dbapi_connection.create_function("add_item", 1, add_item)


def checked_out(engines: Iterable[Engine]) -> list[int]:
    """How many connections are in use, of each engine."""
    return [engine.pool.checkedout() if isinstance(engine.pool, QueuePool) else 0 for engine in engines]


@contextmanager
def running(atomicity: Atomicity = "strict", **connections: Settings) -> Iterator[Application]:
    """An application on these databases for the length of the block. At its end nothing may be in use any more."""
    with Application(connections, atomicity) as app:
        try:
            yield app
            assert app.leftovers() == []
        finally:
            for name in app.connections:
                app.engine(name).dispose()  # an engine of the test's own, perhaps


@contextmanager
def read_lock(app: Application, name: str = "writer") -> Iterator[None]:
    """Give an application a plain SQLite engine in rollback-journal mode, and refuse its COMMIT for the length of the block.

    There is an item "seed", which a reader has read in a transaction that is open, so that nobody may write the file.
    """
    app.run("INSERT INTO items (name) VALUES ('seed')", on=name)
    app.override_engine(name, create_engine(app.plain_engine(name).url, connect_args={"timeout": 0}))
    with app.plain_engine(name).connect() as reader:
        reader.exec_driver_sql("BEGIN")
        assert reader.exec_driver_sql("SELECT name FROM items").scalars().all() == ["seed"]
        yield


@contextmanager
def counted(engine: Engine, what: str) -> Iterator[Callable[[], int]]:
    """Count how often an engine says `what`: "commit", "rollback", ..."""
    seen: list[object] = []

    def note(*args: object) -> None:
        seen.append(args)

    event.listen(engine, what, note)
    try:
        yield lambda: len(seen)
    finally:
        event.remove(engine, what, note)
