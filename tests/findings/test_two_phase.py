"""What keeps two-phase commit from working, and what a crash has left, is found before the first unit of work."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from app_db._findings.find import find
from harness.findings import GOODS, found, matters, run, user
from harness.requiring import started
from harness.servers import MariaDBServer, PostgresServer, ServerMissing, free_port
from harness.stranded import stranded

NewUrl = Callable[[], str]

GALERA = Path("/usr/lib/galera/libgalera_smm.so")
LATER = 3600
"""Seconds after which nothing is under way any more."""


def prepared(url: str, **more: object) -> dict[str, object]:
    return {"url": url, "two_phase": True, "pool": {"size": 1, "max_overflow": 0}, **more}


def test_a_server_that_can_not_prepare(new_postgres: Callable[..., PostgresServer], postgres_url: str) -> None:
    unable = new_postgres(settings={"max_prepared_transactions": 0})
    [finding] = found(main=prepared(postgres_url), copy=prepared(unable.url("postgres")))
    assert (finding.matter, finding.connection, finding.severity) == ("cannot-prepare", "copy", "error")
    assert finding.where == "APP_DB_CONNECTIONS__COPY__TWO_PHASE (given in code)"
    assert "restart the server" in finding.remedy


@pytest.fixture
def galera() -> Iterator[MariaDBServer]:
    """A cluster of one node."""

    def node() -> MariaDBServer:
        if not GALERA.exists():
            raise ServerMissing("Galera", f"there is no {GALERA}", "Install it (Debian and Ubuntu: apt-get install galera-4).")
        return MariaDBServer(
            settings={
                "wsrep_on": True,
                "wsrep_provider": str(GALERA),
                "wsrep_cluster_address": "gcomm://",
                "wsrep_provider_options": f"base_port={free_port()};base_host=127.0.0.1",
                "wsrep_node_address": "127.0.0.1",
                "binlog_format": "ROW",
                "innodb_autoinc_lock_mode": 2,
            }
        )

    server = started(node)
    yield server
    server.close()


@pytest.mark.exhaustive
def test_a_node_of_galera_can_not_prepare(galera: MariaDBServer, postgres_url: str) -> None:
    galera.create_database("shop")
    [finding] = found(main=prepared(postgres_url), copy=prepared(galera.url("shop")))
    assert (finding.matter, finding.connection) == ("cannot-prepare", "copy")
    assert "Galera" in finding.what


def test_more_transactions_than_the_server_can_prepare(small: PostgresServer) -> None:
    pool = {"size": 6, "max_overflow": 0}
    [finding] = found(main=prepared(small.url("postgres"), pool=pool))
    assert (finding.matter, finding.severity) == ("too-few-prepared", "warning")
    assert "max_prepared_transactions is 5" in finding.what
    assert found(main=prepared(small.url("postgres"), pool={"size": 5, "max_overflow": 0})) == []


# ---- the decision log -----------------------------------------------------------------------------------------------------


def test_a_decision_log_whose_directory_does_not_exist(postgres_url: str, tmp_path: Path) -> None:
    [finding] = found(main=prepared(postgres_url), common={"decision_log": f"file:{tmp_path}/nowhere/decisions"})
    assert (finding.matter, finding.connection, finding.severity) == ("decision-log", None, "error")
    assert finding.where == "APP_DB_DECISION_LOG (given in code)"
    assert "directory" in finding.remedy


def test_a_decision_log_that_the_user_may_not_make(postgres: PostgresServer, postgres_url: str) -> None:
    run(postgres_url, GOODS)
    with user(postgres, postgres_url, "SELECT, INSERT ON goods") as plain:
        [finding] = found(goods=prepared(plain))
        assert finding.matter == "decision-log"
        assert "permission denied for schema public" in finding.what
        assert "app_db_decisions" in finding.remedy


def test_a_decision_log_whose_database_is_down_is_one_finding(postgres_url: str) -> None:
    down = prepared("postgresql+psycopg://app_db:s3cr3t@127.0.0.1:1/nowhere")
    assert matters(found(main=prepared(postgres_url), copy=down, common={"decision_log": "copy"})) == [("unreachable", "copy")]


def test_a_decision_log_in_a_database_that_takes_no_part(new_postgres_url: NewUrl) -> None:
    log = {"url": new_postgres_url()}
    [finding] = found(main=prepared(new_postgres_url()), copy=log, common={"decision_log": "copy"})
    assert (finding.matter, finding.severity) == ("decision-log-apart", "hint")


# ---- in doubt -------------------------------------------------------------------------------------------------------------


@pytest.mark.representative("postgres")
@pytest.mark.parametrize("kind", ["postgres", "mariadb"])
def test_branches_that_a_crash_left(request: pytest.FixtureRequest, kind: str) -> None:
    url = request.getfixturevalue(f"{kind}_url")
    own = {"statement_timeout": 60, "pool": {"size": 1, "max_overflow": 0}}
    with stranded(main={"url": url, **own}, copy={"url": request.getfixturevalue(f"new_{kind}_url")(), **own}) as scene:
        scene.make_tables()
        assert find(scene.container) == []
        scene.prepare(scene.new_unit(), "main")
        assert find(scene.container) == [], "it may be committed at this moment"
        in_doubt = [finding for finding in find(scene.container, now=lambda: time.time() + LATER) if finding.matter != "clock"]
        assert matters(in_doubt) == [("in-doubt", "main")]
        assert "1 prepared branch is in doubt" in in_doubt[0].what
        scene.recover()
