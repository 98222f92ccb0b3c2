"""Units of work of one thread: app_db beside bare SQLAlchemy and beside zope.sqlalchemy by hand."""

from __future__ import annotations

from collections.abc import Mapping

from contestants import BARE, CONTESTANTS, OURS, can_do, checked_units, contestants
from databases import Databases, Place
from measuring import Batch, Effort, Measured, functions_called, measure, repeated
from tables import duration, heading, line
from workloads import MEASURED

ROUNDS = 150


def run(databases: Databases, effort: Effort) -> None:
    """Print a table for each place."""
    for place in (databases.sqlite_memory("pysqlite"), databases.sqlite_file("pysqlite")):
        with place as given:
            _compare(given, effort)
    for place in (databases.postgres_socket("psycopg"), databases.postgres_proxy("psycopg")):
        with place as given:
            _compare(given, effort)
    with databases.mariadb("pymysql") as mariadb:
        if mariadb is not None:
            _compare(mariadb, effort)


def _compare(place: Place, effort: Effort) -> None:
    with contestants(place) as taking_part:
        heading_of_units(place.title)
        for workload in MEASURED:
            batches = {
                name: repeated(checked_units(name, unit_of, workload, effort))
                for name, unit_of in taking_part.items()
                if can_do(name, workload, place)
            }
            report_units(workload.title, batches, measure(batches, effort, rounds=ROUNDS))


def heading_of_units(title: str) -> None:
    """Print the head of a table of units."""
    heading(title, "unit of work", *CONTESTANTS, "functions called")


def report_units(title: str, batches: Mapping[str, Batch], measured: Mapping[str, Measured]) -> None:
    """Print a line: what bare takes, the others' ratios to it, and the functions of app_db that one
    unit of ours calls.
    """
    called = [functions_called(lambda batch=batches[name]: batch(1)) for name in OURS]  # type: ignore[misc]
    ratios = [str(measured.get(name, "cannot")) for name in CONTESTANTS if name != BARE]
    line([title, duration(measured[BARE].seconds), *ratios, " and ".join(map(str, called))])
