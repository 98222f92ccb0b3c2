"""APP_DB_TWO_PHASE=true is all that units of work need to commit in several databases together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import create_engine, text

from app_db import ConnectionSettings, DatabaseContainer, DatabaseSettings, container_of
from app_db.errors import ContradictorySettings, NotAtomic, TwoPhaseUnavailable
from app_db.testing import overridden, sqlite
from harness.coroutines import with_driver
from harness.servers import PostgresServer

NewUrl = Callable[[], str]

PG, MY, LITE = "postgresql://h/d", "mysql://h/d", "sqlite:///x.db"
XID = "SELECT gid FROM pg_prepared_xacts WHERE gid LIKE 'switch%'"


def preparing(connections: dict[str, Any], **given: Any) -> set[str]:
    settings = DatabaseSettings(_env_file=None, two_phase=True, connections=connections, **given)
    return {name for name in settings.connections if settings.connection(name).two_phase}


# ---- who prepares


def test_all_that_can_prepare_do_by_one_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APP_DB_TWO_PHASE", "true")
    monkeypatch.setenv("APP_DB_CONNECTIONS__WRITER__URL", PG)
    monkeypatch.setenv("APP_DB_CONNECTIONS__WAREHOUSE__URL", MY)
    monkeypatch.setenv("APP_DB_CONNECTIONS__ARCHIVE__URL", f"{PG}2")
    monkeypatch.setenv("APP_DB_CONNECTIONS__ARCHIVE__TWO_PHASE", "false")
    settings = DatabaseSettings()
    assert {name: each.two_phase for name, each in settings.connections.items()} == {
        "writer": True,
        "warehouse": True,
        "archive": False,
    }


@pytest.mark.parametrize(
    "own",
    [
        {"url": PG, "read_only": True},
        {"mirror": "writer", "read_only": True},
        {"url": LITE, "read_only": True},
        {"url": LITE, "transactional": False},
        {"url": PG, "transactional": False, "isolation_level": "AUTOCOMMIT"},
        {"url": LITE, "two_phase": False},
    ],
    ids=repr,
)
def test_what_takes_no_part_in_the_commit_is_no_obstacle(own: dict[str, Any]) -> None:
    assert preparing({"writer": {"url": PG}, "audit": {"url": "sqlite:///a.db"}, "other": own}) == {"writer"}


def test_a_writable_mirror_prepares_with_its_own() -> None:
    assert preparing({"writer": {"url": PG}, "serial": {"mirror": "writer", "isolation_level": "SERIALIZABLE"}}) == {
        "writer",
        "serial",
    }


def test_connections_that_share_a_transaction_are_one_last_resource() -> None:
    assert preparing({"writer": {"url": PG}, "audit": {"url": LITE}, "second": {"url": LITE}}) == {"writer"}


def test_one_switch_is_no_obstacle_where_nothing_can_prepare() -> None:
    assert preparing({"writer": {"url": LITE}}) == set()


@pytest.mark.parametrize("unable", [{"url": "sqlite:///b.db"}, {"url": "sqlite://"}])
def test_two_that_can_not_prepare_are_named_with_the_reason_and_the_ways_out(unable: dict[str, Any]) -> None:
    with pytest.raises(ContradictorySettings) as caught:
        preparing({"writer": {"url": PG}, "audit": {"url": LITE}, "log": unable, "a" * 23: {"url": PG}})
    problems = {problem.variable: problem.message for problem in caught.value.problems}
    long = "A" * 23
    assert set(problems) == {f"APP_DB_CONNECTIONS__{name}__TWO_PHASE" for name in ("AUDIT", "LOG", long)}
    assert "sqlite can't" in problems["APP_DB_CONNECTIONS__AUDIT__TWO_PHASE"]
    assert "'log'" in problems["APP_DB_CONNECTIONS__AUDIT__TWO_PHASE"]
    assert "APP_DB_TWO_PHASE" in problems["APP_DB_CONNECTIONS__AUDIT__TWO_PHASE"]
    assert "TRANSACTIONAL=false" in problems["APP_DB_CONNECTIONS__AUDIT__TWO_PHASE"]
    assert "at most 22 characters" in problems[f"APP_DB_CONNECTIONS__{long}__TWO_PHASE"]


def test_a_connection_that_says_itself_that_it_prepares_must_be_able_to() -> None:
    with pytest.raises(ContradictorySettings, match="AUDIT__TWO_PHASE: needs a database that can prepare"):
        preparing({"writer": {"url": PG}, "audit": {"url": LITE, "two_phase": True}})


def test_other_problems_are_not_hidden() -> None:
    with pytest.raises(ContradictorySettings, match="MIRROR") as caught:
        preparing({"writer": {"url": PG}, "audit": {"mirror": "nothing"}})
    assert len(caught.value.problems) == 1


def test_a_copy_with_other_connections_decides_anew() -> None:
    settings = DatabaseSettings(_env_file=None, two_phase=True, connections={"writer": {"url": PG}, "log": {"url": PG + "2"}})
    copy = settings.with_connections({**settings.connections, "log": ConnectionSettings(url=LITE)})
    assert [name for name, each in copy.connections.items() if each.two_phase] == ["writer"]
    again = DatabaseSettings(_env_file=None, **settings.model_dump())
    assert all(each.two_phase for each in again.connections.values())


def test_a_test_may_put_sqlite_in_place_of_databases_that_prepare() -> None:
    settings = DatabaseSettings(_env_file=None, two_phase=True, connections={"writer": {"url": PG}, "log": {"url": PG + "2"}})
    container = container_of("writer", "log")(settings=settings)
    with overridden(container, {"log": "sqlite://"}):
        assert not container.settings().connection("log").two_phase
        assert container.settings().connection("writer").two_phase
    with sqlite(container):
        assert not container.settings().two_phase


# ---- what a unit does


@pytest.fixture
def shop(new_postgres_url: NewUrl, new_sqlite_url: NewUrl) -> Iterator[DatabaseContainer]:
    """Two databases that prepare and one that doesn't, configured by the switch alone."""
    urls = {"writer": new_postgres_url(), "warehouse": new_postgres_url(), "audit": new_sqlite_url()}
    for url in urls.values():
        engine = create_engine(url)
        with engine.begin() as connection:
            connection.execute(text("CREATE TABLE items (name varchar(20) PRIMARY KEY)"))
        engine.dispose()
    settings = DatabaseSettings(
        _env_file=None, application="switch", two_phase=True, connections={name: {"url": url} for name, url in urls.items()}
    )
    container = container_of(*urls)(settings=settings)
    yield container
    container.shutdown_resources()


def add(container: DatabaseContainer, name: str, *connections: str) -> None:
    for connection in connections:
        getattr(container, f"{connection}_session")().execute(text("INSERT INTO items VALUES (:name)"), {"name": name})


def items(container: DatabaseContainer) -> dict[str, list[str]]:
    found = {}
    for name in ("writer", "warehouse", "audit"):
        with getattr(container, f"{name}_engine")().connect() as connection:
            found[name] = list(connection.scalars(text("SELECT name FROM items ORDER BY name")))
    return found


def test_a_unit_over_several_databases_prepares_and_commits(shop: DatabaseContainer) -> None:
    shop.check()
    with shop.transaction():
        add(shop, "two", "writer", "warehouse")
    with shop.transaction():
        add(shop, "three", "writer", "warehouse", "audit")
    assert items(shop) == {"writer": ["three", "two"], "warehouse": ["three", "two"], "audit": ["three"]}


def test_a_unit_over_databases_of_two_kinds_prepares_by_the_switch(new_postgres_url: NewUrl, new_mariadb_url: NewUrl) -> None:
    connections = {"writer": {"url": new_postgres_url()}, "warehouse": {"url": new_mariadb_url()}}
    settings = DatabaseSettings(_env_file=None, application="switch", two_phase=True, connections=connections)
    container = container_of(*connections)(settings=settings)
    container.check()
    for name in connections:
        with getattr(container, f"{name}_engine")().begin() as connection:
            connection.execute(text("CREATE TABLE items (name varchar(20) PRIMARY KEY)"))
    with container.transaction():
        add(container, "both", *connections)
    for name in connections:
        with getattr(container, f"{name}_engine")().connect() as connection:
            assert connection.scalars(text("SELECT name FROM items")).all() == ["both"]
    container.shutdown_resources()


def test_a_unit_that_can_not_prepare_everywhere_commits_nowhere(shop: DatabaseContainer) -> None:
    with shop.warehouse_engine().begin() as connection:
        connection.execute(text("ALTER TABLE items ADD UNIQUE (name) DEFERRABLE INITIALLY DEFERRED"))
        connection.execute(text("ALTER TABLE items DROP CONSTRAINT items_pkey"))
        connection.execute(text("INSERT INTO items VALUES ('x')"))
    with pytest.raises(Exception, match="duplicate key"), shop.transaction():
        add(shop, "x", "writer", "warehouse", "audit")
    assert items(shop) == {"writer": [], "warehouse": ["x"], "audit": []}
    with shop.writer_engine().connect() as connection:
        assert connection.scalars(text(XID)).all() == []


def test_an_exception_makes_a_connection_the_last_resource(shop: DatabaseContainer) -> None:
    settings = shop.settings()
    other = ConnectionSettings(url=settings.connections["warehouse"].url, two_phase=False)
    changed = container_of("writer", "warehouse", "audit")(
        settings=settings.with_connections({**settings.connections, "warehouse": other})
    )
    with changed.transaction():
        add(changed, "one", "writer", "warehouse")
    with pytest.raises(NotAtomic), changed.transaction():
        add(changed, "two", "warehouse", "audit")
    assert items(changed) == {"writer": ["one"], "warehouse": ["one"], "audit": []}
    changed.shutdown_resources()


async def test_coroutines_need_no_more(shop: DatabaseContainer) -> None:
    async with shop.transaction():
        for name in ("writer", "warehouse"):
            session = getattr(shop, f"{name}_async_session")()
            await session.execute(text("INSERT INTO items VALUES ('async')"))
    with pytest.raises(RuntimeError, match="no"):
        async with shop.transaction():
            for name in ("writer", "warehouse"):
                session = getattr(shop, f"{name}_async_session")()
                await session.execute(text("INSERT INTO items VALUES ('lost')"))
            raise RuntimeError("no")
    assert items(shop) == {"writer": ["async"], "warehouse": ["async"], "audit": []}
    disposal = shop.shutdown_resources()
    if disposal is not None:
        await disposal


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
def test_both_drivers_for_coroutines_prepare_by_the_switch(new_postgres_url: NewUrl, driver: str) -> None:
    urls = [with_driver(new_postgres_url(), driver) for _ in range(2)]
    assert preparing({"writer": {"url": urls[0]}, "log": {"url": urls[1]}}) == {"writer", "log"}


def test_the_check_names_a_server_that_can_not_prepare(
    new_postgres: Callable[..., PostgresServer], new_postgres_url: NewUrl
) -> None:
    server = new_postgres(settings={"max_prepared_transactions": 0})
    server.create_database("shop")
    connections = {"writer": {"url": new_postgres_url()}, "warehouse": {"url": server.url("shop")}}
    settings = DatabaseSettings(_env_file=None, two_phase=True, connections=connections)
    container = container_of(*connections)(settings=settings)
    with pytest.raises(TwoPhaseUnavailable) as caught:
        container.check()
    container.shutdown_resources()
    [problem] = caught.value.problems
    assert problem.variable == "APP_DB_CONNECTIONS__WAREHOUSE__TWO_PHASE"
    assert "max_prepared_transactions" in problem.message
