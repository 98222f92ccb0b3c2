"""The example's application, unchanged, has one SQLite file for everything or four PostgreSQL databases: the environment says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

from harness.paths import ROOT
from harness.servers import PostgresServer, PostgresStandby

EXAMPLES = ROOT / "examples"
ROWS = {"orders": 3, "movements": 5, "entries": 2}
SAID = """\
Bob wanted more tea than there is.
tea: 0 in the warehouse, 3 ordered
honey: 0 in the warehouse, 1 ordered
milk: 0 in the warehouse, 0 ordered
orders: [1, 1, 2]
movements: [-2, -1, -1, 1, 3]
log:
  receive 3 tea
  receive 1 honey
to Ann: Your order 1: 2 tea.
to Cid: Sold: tea, honey.
"""


def settings_in(file: str) -> dict[str, str]:
    """The variables that a file of the example sets."""
    lines = [line for line in (EXAMPLES / file).read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def spend_a_day(directory: Path, settings: Mapping[str, str]) -> str:
    """Run the program with a `.env` file in an empty directory, as its page says, and return what it printed."""
    directory.mkdir()
    (directory / ".env").write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
    kept = {name: value for name, value in os.environ.items() if not re.match("APP_DB_|DATABASE_URL$", name.upper())}
    command = [sys.executable, "-W", "error", str(EXAMPLES / "day.py")]
    environment = {**kept, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def count(url: str, table: str) -> int:
    engine = create_engine(url, poolclass=NullPool)
    with engine.connect() as connection:
        return int(connection.scalar(text(f"SELECT count(*) FROM {table}")) or 0)


def test_all_of_it_in_one_sqlite_file(tmp_path: Path) -> None:
    directory = tmp_path / "one"
    assert spend_a_day(directory, settings_in("one-file.env")) == SAID
    assert {table: count(f"sqlite:///{directory / 'shop.db'}", table) for table in ROWS} == ROWS
    assert [path.name for path in directory.glob("*.db")] == ["shop.db"]


@pytest.mark.exhaustive
def test_four_postgresql_databases_of_which_one_is_a_replica(
    tmp_path: Path,
    new_postgres: Callable[..., PostgresServer],
    new_standby: Callable[[PostgresServer], PostgresStandby],
    new_postgres_url: Callable[[], str],
) -> None:
    primary = new_postgres()
    primary.create_database("shop")
    primary.execute("ALTER DATABASE shop SET synchronous_commit = remote_apply")
    standby = new_standby(primary)
    primary.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")  # so that what was committed can be read there
    primary.execute("SELECT pg_reload_conf()")
    urls = {
        "WRITER": primary.url("shop"),
        "READER": standby.url("shop"),
        "WAREHOUSE": new_postgres_url(),
        "LOG": new_postgres_url(),
    }
    settings = settings_in("four-databases.env") | {f"APP_DB_CONNECTIONS__{name}__URL": url for name, url in urls.items()}
    assert settings.keys() == settings_in("four-databases.env").keys()

    assert spend_a_day(tmp_path / "four", settings) == SAID

    tables = {"WRITER": "orders", "READER": "orders", "WAREHOUSE": "movements", "LOG": "entries"}
    assert {name: count(urls[name], table) for name, table in tables.items()} == {
        name: ROWS[table] for name, table in tables.items()
    }
    assert primary.prepared_transactions("shop") == []
