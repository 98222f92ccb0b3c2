"""The check beforehand names everything that keeps units of work from committing together, and what to set on the server."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import make_url

from app_db import DatabaseContainer, DatabaseSettings, container_of
from app_db.errors import ContradictorySettings, SettingsError, TwoPhaseUnavailable
from harness.servers import PASSWORD, PostgresServer

NewUrl = Callable[[], str]

NOWHERE = "postgresql+psycopg://app_db:s3cr3t@127.0.0.1:1/nowhere"


def container_with(decision_log: str | None = None, **connections: Any) -> DatabaseContainer:
    given = {name: {"url": url, "two_phase": True} for name, url in connections.items()}
    settings = DatabaseSettings(_env_file=None, connections=given, decision_log=decision_log)
    return container_of(*given)(settings=settings)


def problems(container: DatabaseContainer) -> dict[str, str]:
    """What the check finds wrong, by the end of the variable's name."""
    with pytest.raises(TwoPhaseUnavailable) as caught:
        container.check()
    container.shutdown_resources()
    assert isinstance(caught.value, SettingsError)
    assert PASSWORD not in str(caught.value)
    assert "s3cr3t" not in str(caught.value)
    found = {problem.variable.removeprefix("APP_DB_"): problem.message for problem in caught.value.problems}
    assert len(found) == len(caught.value.problems)
    assert all(message.endswith(".") and not message.endswith("..") for message in found.values())
    return found


def test_servers_that_can_prepare_pass_and_the_log_is_made(new_postgres_url: NewUrl, new_mariadb_url: NewUrl) -> None:
    container = container_with(writer=new_postgres_url(), maria=new_mariadb_url())
    container.check()
    container.check()
    log = container.core.decision_logs().configured
    assert log.id_if_made() == log.id
    assert log.decisions() == []
    container.shutdown_resources()


def test_a_postgresql_that_prepares_nothing_is_told_by_the_name_of_its_setting(
    new_postgres: Callable[..., PostgresServer], new_postgres_url: NewUrl
) -> None:
    server = new_postgres(settings={"max_prepared_transactions": 0})
    server.create_database("shop")
    found = problems(container_with(writer=new_postgres_url(), warehouse=server.url("shop"), other=server.url("shop")))
    assert set(found) == {"CONNECTIONS__WAREHOUSE__TWO_PHASE", "CONNECTIONS__OTHER__TWO_PHASE"}
    assert "max_prepared_transactions" in found["CONNECTIONS__WAREHOUSE__TWO_PHASE"]
    container = container_with(writer=server.url("shop"))
    with pytest.raises(TwoPhaseUnavailable, match="max_prepared_transactions"):
        container.init_resources()
    container.shutdown_resources()


def test_all_problems_are_told_at_once(new_postgres: Callable[..., PostgresServer], tmp_path: Path) -> None:
    server = new_postgres(settings={"max_prepared_transactions": 0})
    server.create_database("shop")
    found = problems(container_with(f"file:{tmp_path}/nowhere/decisions", writer=server.url("shop"), warehouse=NOWHERE))
    assert list(found) == ["CONNECTIONS__WAREHOUSE__TWO_PHASE", "CONNECTIONS__WRITER__TWO_PHASE", "DECISION_LOG"]
    assert "can't be asked" in found["CONNECTIONS__WAREHOUSE__TWO_PHASE"]
    assert str(tmp_path / "nowhere") in found["DECISION_LOG"]


@pytest.mark.parametrize("wrong", ["directory", "damaged"])
def test_a_file_that_can_not_be_the_log_is_told(wrong: str, new_postgres_url: NewUrl, tmp_path: Path) -> None:
    path = tmp_path / "decisions"
    if wrong == "directory":
        path.mkdir()
    else:
        path.write_text("something else")
    found = problems(container_with(f"file:{path}", writer=new_postgres_url()))
    assert list(found) == ["DECISION_LOG"]
    assert str(path) in found["DECISION_LOG"]


@pytest.fixture
def guest(postgres: PostgresServer, postgres_url: str) -> Iterator[str]:
    """The URL of a user who may connect, and no more."""
    name = f"guest_{time.monotonic_ns()}"
    database = make_url(postgres_url).database
    postgres.execute(f"CREATE ROLE {name} LOGIN PASSWORD 'guest'")
    postgres.execute("REVOKE CREATE ON SCHEMA public FROM public", database=database)
    yield make_url(postgres_url).set(username=name, password="guest").render_as_string(False)
    postgres.execute(f"DROP OWNED BY {name}", database=database)
    postgres.execute(f"DROP ROLE {name}")


def test_a_table_that_may_not_be_made_is_told(guest: str) -> None:
    found = problems(container_with(writer=guest))
    assert list(found) == ["DECISION_LOG"]
    assert "app_db_decisions" in found["DECISION_LOG"]
    assert "permission denied" in found["DECISION_LOG"]


def test_a_table_that_may_be_read_but_not_written_is_told(guest: str, postgres_url: str, postgres: PostgresServer) -> None:
    owner = container_with(writer=postgres_url)
    owner.check()
    owner.shutdown_resources()
    url = make_url(guest)
    postgres.execute(f"GRANT SELECT ON app_db_decisions TO {url.username}", database=url.database)
    assert "permission denied" in problems(container_with(writer=guest))["DECISION_LOG"]


def test_the_driver_of_coroutines_is_checked_by_way_of_that_of_threads(postgres_url: str) -> None:
    container = container_with(writer=postgres_url, report=postgres_url.replace("psycopg", "asyncpg"))
    container.check()
    container.shutdown_resources()


def test_sqlite_is_refused_before_that(sqlite_url: str) -> None:
    with pytest.raises(ContradictorySettings, match="prepare"):
        container_with(writer=sqlite_url)
