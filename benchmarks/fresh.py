"""Databases of a test's own: what a copy costs, beside an isolated test."""

from __future__ import annotations

from contextlib import AbstractContextManager

from sqlalchemy import insert

from app_db.testing import fresh_databases, isolated, kept_templates
from contestants import add_first_row, shop
from databases import Databases, Place
from measuring import Effort, measure, repeated
from schema import Row
from tables import duration, heading, line

ROUNDS = 40
ROWS = 1000
"""Rows in the database that is copied."""

ISOLATED = "`isolated`"
COPY = "`fresh_databases` of a template"
DIRECT = "without a template"


def run(databases: Databases, effort: Effort) -> None:
    """Print the table."""
    heading(f"A test that commits a row to a database with {ROWS} rows", "database", ISOLATED, f"{COPY} to that", COPY, DIRECT)
    for place in (
        databases.sqlite_file("pysqlite"),
        databases.postgres_socket("psycopg"),
        databases.mariadb("pymysql"),
    ):
        with place as given:
            if given is not None:
                _compare(given, effort)


def _compare(place: Place, effort: Effort) -> None:
    container = shop(place.new())
    add_first_row(container.writer_engine())
    with container.writer_engine().begin() as connection:
        connection.execute(insert(Row), [{"text": "written"} for _ in range(ROWS)])

    def in_block(block: AbstractContextManager[object]) -> None:
        with block, container.transaction():
            container.writer_session().add(Row(text="written"))

    batches = {
        ISOLATED: repeated(lambda: in_block(isolated(container))),
        DIRECT: repeated(lambda: in_block(fresh_databases(container))),
    }
    direct = measure(batches, effort, rounds=ROUNDS, units=1)
    with kept_templates(container):
        batches = {ISOLATED: batches[ISOLATED], COPY: batches[DIRECT]}
        batches[COPY](1)  # makes the template
        by_template = measure(batches, effort, rounds=ROUNDS, units=1)
    seconds = [by_template[COPY].seconds, direct[DIRECT].seconds]
    line([place.title, duration(by_template[ISOLATED].seconds), str(by_template[COPY]), *map(duration, seconds)])
    container.shutdown_resources()
