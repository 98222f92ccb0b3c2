"""Units of work through the session that finds its database, beside the writer's session and beside
bare SQLAlchemy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dependency_injector.wiring import Provide
from sqlalchemy import String, create_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from app_db import DatabaseSettings, metadata_of, transactional
from databases import Databases, Place
from measuring import WARM_UP, Batch, Effort, measure, repeated
from schema import Shop
from tables import duration, heading, limited, line

ROUNDS = 100
LIMIT = 1.10
"""What the session that finds its database may cost beside the writer's session, in a block."""

BARE = "bare"
WRITER = "writer's session, block"
ROUTED = "finds its database, block"
DECORATED = "finds its database, `@transactional`"


class Base(DeclarativeBase):
    """Models that know their connection."""

    metadata = metadata_of("writer")


class Routed(Base):
    """Something to read and write."""

    __tablename__ = "routed"
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column(String(40))


def run(databases: Databases, effort: Effort) -> None:
    """Print the table."""
    beside = "finds its database beside the writer's session, in blocks"
    heading("The session that finds its database", "unit of work", BARE, WRITER, ROUTED, DECORATED, beside)
    for place in (databases.sqlite_file("pysqlite"), databases.postgres_socket("psycopg")):
        with place as given, _ways(given) as ways:
            for title, work in (("SELECT by key", _select), ("INSERT", _insert)):
                _compare(f"{given.title}: {title}", {name: way(work) for name, way in ways.items()}, effort)


def _select(session: Session) -> None:
    session.get_one(Routed, 1)


def _insert(session: Session) -> None:
    session.add(Routed(text="written"))


Way = Callable[[Callable[[Session], None]], Callable[[], None]]


@contextmanager
def _ways(place: Place) -> Iterator[dict[str, Way]]:
    url = place.new()
    engine = create_engine(url)
    container = Shop(settings=DatabaseSettings(_env_file=None, connections={"writer": {"url": place.new()}}))
    for used in (engine, container.writer_engine()):
        Base.metadata.create_all(used)
        with Session(used) as session, session.begin():
            session.add(Routed(text="first"))
    maker = sessionmaker(engine)

    def bare(work: Callable[[Session], None]) -> Callable[[], None]:
        def unit() -> None:
            with maker.begin() as session:
                work(session)

        return unit

    def block(session_of: Callable[[], Session]) -> Way:
        def way(work: Callable[[Session], None]) -> Callable[[], None]:
            def unit() -> None:
                with container.transaction():
                    work(session_of())

            return unit

        return way

    def decorated(work: Callable[[Session], None]) -> Callable[[], None]:
        @transactional
        def unit(session: Session = Provide[Shop.session]) -> None:
            work(session)

        container.wire(modules=[__name__])
        return unit

    yield {BARE: bare, WRITER: block(container.writer_session), ROUTED: block(container.session), DECORATED: decorated}
    container.unwire()
    container.shutdown_resources()
    engine.dispose()


def _compare(title: str, units: dict[str, Callable[[], None]], effort: Effort) -> None:
    batches: dict[str, Batch] = {name: repeated(unit) for name, unit in units.items()}
    for batch in batches.values():
        batch(1 if effort.quick else WARM_UP)
    measured = measure(batches, effort, rounds=ROUNDS)
    others = [str(measured[name]) for name in (WRITER, ROUTED, DECORATED)]
    beside = measure({name: batches[name] for name in (WRITER, ROUTED)}, effort, rounds=ROUNDS)[ROUTED]
    line([title, duration(measured[BARE].seconds), *others, limited(beside, LIMIT)])
