"""What it costs to know who holds each connection, and to warn of what takes long, beside app_db without either."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

from app_db._databases.holders import HolderLog
from app_db._sessions import sessions
from app_db._units import own_unit
from contestants import checked_units, decorated
from databases import Databases, Place
from measuring import Batch, Effort, measure, repeated
from tables import duration, heading, limited, line
from workloads import INSERT, SELECT

ROUNDS = 600
LIMIT = 1.01
NOTED, WARNED, STACKS = "noted", "`SLOW_STATEMENT`, `HELD_WARNING`", "`POOL__STACKS`"
SETTINGS: dict[str, dict[str, object]] = {
    "not noted": {},
    NOTED: {},
    WARNED: {"slow_statement": 60, "held_warning": 60},
    STACKS: {"pool": {"stacks": True}},
}


def run(databases: Databases, effort: Effort) -> None:
    """Print a table of units of decorated functions with injected sessions."""
    heading("Who holds the connection", "unit of work", *SETTINGS)
    for place in (databases.postgres_socket("psycopg"), databases.sqlite_file("pysqlite")):
        with place as given:
            _compare(given, effort)


def _compare(place: Place, effort: Effort) -> None:
    with ExitStack() as stack:
        units = {name: stack.enter_context(decorated(place.new(), settings=given)) for name, given in SETTINGS.items()}
        for workload in (SELECT, INSERT):
            batches = {name: repeated(checked_units(name, of, workload, effort)) for name, of in units.items()}
            batches["not noted"] = _without(batches["not noted"])
            measured = measure(batches, effort, rounds=ROUNDS)
            costs = [limited(measured[NOTED], LIMIT), str(measured[WARNED]), str(measured[STACKS])]
            line([f"{workload.title}, {place.title}", duration(measured["not noted"].seconds), *costs])


def _without(batch: Batch) -> Batch:
    def in_ignorance(units: int) -> float:
        with _noting_nothing():
            return batch(units)

    return in_ignorance


@contextmanager
def _noting_nothing() -> Iterator[None]:
    with (
        patch.object(HolderLog, "note", lambda *_: None),
        patch.object(HolderLog, "forget", lambda *_: None),
        patch.object(sessions, "_line_above", lambda: None),
        patch.object(own_unit, "_line_above", lambda: None),
    ):
        yield
