"""Isolated tests: app_db beside SQLAlchemy's own recipe, a session that joins an outer transaction
with savepoints.
"""

from __future__ import annotations

from sqlalchemy.orm import Session

from app_db.testing import isolated
from contestants import add_first_row, shop
from databases import Databases, Place
from measuring import WARM_UP, Effort, measure, repeated
from schema import Row
from tables import duration, heading, line

ROUNDS = 150
LIMIT = 0.002
"""Seconds more than the recipe that an isolated test may take."""

RECIPE = "SQLAlchemy's recipe"
OURS = "`isolated`"


def run(databases: Databases, effort: Effort) -> None:
    """Print the table."""
    heading("An isolated test that commits a row", "database", RECIPE, OURS, "more")
    for place in (databases.sqlite_file("pysqlite"), databases.postgres_socket("psycopg")):
        with place as given:
            _compare(given, effort)


def _compare(place: Place, effort: Effort) -> None:
    container = shop(place.new())
    engine = container.writer_engine()
    add_first_row(engine)

    def recipe() -> None:
        with engine.connect() as connection, connection.begin() as outer:
            with Session(bind=connection, join_transaction_mode="create_savepoint") as session:
                session.add(Row(text="written"))
                session.commit()
            outer.rollback()

    def ours() -> None:
        with isolated(container), container.transaction():
            container.writer_session().add(Row(text="written"))

    batches = {RECIPE: repeated(recipe), OURS: repeated(ours)}
    for batch in batches.values():
        batch(1 if effort.quick else WARM_UP)
    measured = measure(batches, effort, rounds=ROUNDS)
    more = measured[OURS].seconds - measured[RECIPE].seconds
    limit = f"{more * 1000:.2f} ms of at most {LIMIT * 1000:.0f} ms{' **!**' if more > LIMIT else ''}"
    line([place.title, duration(measured[RECIPE].seconds), str(measured[OURS]), limit])
    container.shutdown_resources()
