"""The shop's three databases, from nothing to three revisions each and back."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from harness.paths import ROOT, run_python

PROGRAM = """
import json, sys
from sqlalchemy import Column, Index, Integer, String
from app_db import DatabaseSettings
from app_db.migrations import check, current, downgrade, history, revision, upgrade
sys.path.insert(0, {examples!r})
from shop import models
from shop.container import Container

connections = json.loads({connections!r})
container = Container(settings=DatabaseSettings(_env_file=None, connections=connections))
tables = [models.Order.__table__, models.Movement.__table__, models.Entry.__table__]

def migrate(message):
    written = [each.connection for each in revision(container, message)]
    done = [each.connection for each in upgrade(container) if each.revisions]
    assert written == done == ["log", "warehouse", "writer"], (written, done)
    assert all(each.is_clean for each in check(container))

migrate("first tables")
for table in tables:
    table.append_column(Column("note", String(20)))
migrate("notes")
for table in tables:
    Index(f"by_note_{{table.name}}", table.c.note)
migrate("indexes")
assert [each.message for each in history(container)] == 3 * ["first tables", "notes", "indexes"]
downgrade(container, "base", connections=[*connections])
upgrade(container)
print(json.dumps([len(each.pending) for each in current(container)]))
container.shutdown_resources()
"""


def migrated(warehouse: str, **urls: str) -> None:
    connections = {name: {"url": url} for name, url in {"warehouse": warehouse, **urls}.items()}
    connections["log"]["transactional"] = False  # type: ignore[assignment]
    program = PROGRAM.format(examples=str(ROOT / "examples"), connections=json.dumps(connections))
    assert json.loads(run_python("-c", program).stdout) == [0, 0, 0]


@pytest.mark.exhaustive
def test_on_three_databases_of_a_kind(new_database_url: Callable[[], str]) -> None:
    migrated(writer=new_database_url(), warehouse=new_database_url(), log=new_database_url())


@pytest.mark.exhaustive
def test_on_databases_of_three_kinds(sqlite_url: str, postgres_url: str, mariadb_url: str) -> None:
    migrated(writer=postgres_url, warehouse=mariadb_url, log=sqlite_url)


@pytest.mark.exhaustive
def test_in_one_database(database_url: str) -> None:
    migrated(writer=database_url, warehouse=database_url, log=database_url)
