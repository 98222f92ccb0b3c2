"""A small application for tests of what units of work do to databases, and a way to look that app_db has no part in.

    with running(writer=url, warehouse=another_url, atomicity="best_effort") as app:
        with app.unit():
            app.session("writer").add(Item(name="a"))
        assert app.names("writer") == ["a"]

Each connection has the table `items`, and tests look at it through plain engines of their own. When the block ends, no
connection may be in use any more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, cast

from sqlalchemy import Engine, NullPool, String, create_engine, event, text
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from app_db import DatabaseContainer, DatabaseSettings, Transaction, container_of

Settings = str | Mapping[str, Any]
"""What a connection is made from: a URL, or its settings."""

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


class Base(DeclarativeBase):
    """The models of the tests' application."""


class Item(Base):
    __tablename__ = "items"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(50), unique=True)


class Application:
    """A container with the connections it was given, and plain engines beside it."""

    def __init__(self, connections: Mapping[str, Settings], atomicity: Literal["strict", "best_effort"]) -> None:
        given = {name: {"url": what} if isinstance(what, str) else dict(what) for name, what in connections.items()}
        settings = DatabaseSettings(connections=given, atomicity=atomicity, _env_file=None)
        self.connections = tuple(given)
        self.container: DatabaseContainer = container_of(*given)(settings=settings)
        self._plain = {name: create_engine(settings.connection(name).sqlalchemy_url(), poolclass=NullPool) for name in given}
        for name, own in given.items():
            if "mirror" not in own:
                Base.metadata.create_all(self._plain[name])

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
        self.session(connection).add(Item(name=name))
        self.session(connection).flush()

    def override_engine(self, name: str, engine: Engine) -> None:
        """Have the application use another engine than the one app_db makes."""
        getattr(self.container, f"{name}_engine").override(engine)

    # ---- what others see

    def plain_engine(self, name: str = "writer") -> Engine:
        """An engine on the same database that app_db knows nothing of."""
        return self._plain[name]

    def names(self, name: str = "writer") -> list[str]:
        """The names of the items that have been committed, sorted."""
        with self._plain[name].connect() as connection:
            return sorted(connection.execute(text("SELECT name FROM items")).scalars())

    def run(self, *statements: str, on: str = "writer") -> None:
        """Run statements beside the application, each committed at once."""
        for statement in statements:
            with self._plain[on].begin() as connection:
                connection.exec_driver_sql(statement)

    def checked_out(self) -> dict[str, int]:
        """How many connections of each pool are in use."""
        pools: dict[str, Any] = {name: self.engine(name).pool for name in self.connections}
        return {name: pool.checkedout() for name, pool in pools.items() if pool.checkedout()}

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


@contextmanager
def running(atomicity: Literal["strict", "best_effort"] = "strict", **connections: Settings) -> Iterator[Application]:
    """An application on these databases for the length of the block. At its end nothing may be in use any more."""
    app = Application(connections, atomicity)
    try:
        yield app
        assert app.checked_out() == {}
    finally:
        app.container.shutdown_resources()
        for name in app.connections:
            app.engine(name).dispose()  # an engine of the test's own, perhaps
        app.container.shutdown_resources()


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
