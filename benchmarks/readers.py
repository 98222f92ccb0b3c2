"""Units of work that only read, beside a bare session on an engine that is set up as app_db's reader:
read-only, and in autocommit on PostgreSQL.
"""

from __future__ import annotations

from contextlib import ExitStack

from contestants import BLOCK, DECORATED, SAME, blocks, checked_units, decorated, same_work
from databases import Databases, Place
from measuring import Effort, measure, repeated
from tables import duration, heading, line
from workloads import SELECT_READER, SELECTS_READER

ROUNDS = 300


def run(databases: Databases, effort: Effort) -> None:
    """Print a table of a reader's units on PostgreSQL and SQLite."""
    heading("Readers", "unit of work", SAME, BLOCK, DECORATED)
    for place in (databases.postgres_socket("psycopg"), databases.sqlite_file("pysqlite")):
        with place as given:
            _compare(given, effort)


def _compare(place: Place, effort: Effort) -> None:
    with ExitStack() as stack:
        taking_part = {
            SAME: stack.enter_context(same_work(place)),
            BLOCK: stack.enter_context(blocks(place.new())),
            DECORATED: stack.enter_context(decorated(place.new())),
        }
        for workload in (SELECT_READER, SELECTS_READER):
            batches = {name: repeated(checked_units(name, of, workload, effort)) for name, of in taking_part.items()}
            measured = measure(batches, effort, rounds=ROUNDS)
            ratios = [str(measured[name]) for name in (BLOCK, DECORATED)]
            line([f"{workload.title}, {place.title}", duration(measured[SAME].seconds), *ratios])
