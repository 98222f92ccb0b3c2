"""What a container, its connections and its units show: `repr()`, `dir()`, `inspect.signature()`, and names in variables."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine

import app_db
from app_db import Connection, DatabaseContainer, DatabaseSettings
from app_db.container import KINDS
from app_db.errors import InvalidUse, UnknownConnection

SECRET = "s3cr3t-pa55"


class Shop(DatabaseContainer):
    writer = Connection()
    copy = Connection()
    log = Connection()
    reader = Connection()
    missing = Connection()


@pytest.fixture
def shop(tmp_path: Path) -> Any:
    connections = {
        "writer": {"url": f"postgresql://shop:{SECRET}@db.example:5432/shop", "two_phase": True},
        "copy": {"mirror": "writer", "read_only": True},
        "log": {"url": "sqlite:///log.db", "transactional": False},
        "reader": {"url": f"postgresql://shop:{SECRET}@replica.example/shop", "read_only": True, "replica_of": "writer"},
    }
    return Shop(settings=DatabaseSettings(connections=connections, decision_log=f"file:{tmp_path}/decisions"))


def test_a_container_shows_its_connections(shop: Any) -> None:
    shop.settings()
    assert repr(shop) == (
        "<Shop: writer (postgresql, shop@db.example, two-phase), copy (mirror of writer, shop@db.example, read-only), "
        "log (sqlite, log.db, autonomous), reader (postgresql, shop@replica.example, read-only, replica of writer), "
        "missing (not configured)>"
    )
    assert SECRET not in repr(shop) + repr(shop.writer) + repr(shop.writer_engine()) + repr(shop.settings())


def test_to_show_a_container_reads_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APP_DB_CONNECTIONS__WRITER__URL", "this is no URL")
    assert repr(Shop()) == "<Shop: writer, copy, log, reader, missing>"


def test_a_connection_shows_its_name(shop: Any) -> None:
    assert repr(shop.writer) == repr(Shop.writer) == "<Connection 'writer'>"
    assert repr(Connection()) == "<Connection>"


def test_a_unit_shows_what_it_did(sqlite_url: str) -> None:
    container: Any = app_db.Container(settings=DatabaseSettings(connections={"writer": {"url": sqlite_url}}))
    with container.transaction(read_only=True) as unit:
        assert repr(unit) == repr(container.unit()) == "<UnitOfWork: under way, nothing used>"
        container.writer_session().connection()
        assert repr(unit) == "<UnitOfWork: under way, writer>"
    with container.transaction() as unit:
        container.writer_session().connection().exec_driver_sql("CREATE TABLE t (n INTEGER)")
        assert repr(unit) == "<UnitOfWork: under way, writer wrote>"
    assert repr(unit) == "<UnitOfWork: ended>"
    assert repr(container.transaction(timeout=2, attempts=3)) == "<transaction(timeout=2, attempts=3)>"


def test_dir_shows_what_users_use(shop: Any) -> None:
    shown = set(dir(shop))
    assert {"writer", "writer_session", "log_async_engine", "transaction", "unit", "wire", "override", "providers"} <= shown
    assert not {"core", "from_schema", "assign_parent", "parent", "wired_to_modules"} & shown
    for name in shown:
        getattr(shop, name)
    assert {"engine", "session", "async_session"} <= set(dir(shop.writer.container)) - {"holder", "name", "session_class"}
    assert set(KINDS) <= set(dir(shop.writer)) & set(dir(Shop.writer)), "what a shell completes"


def test_a_provider_shows_what_it_provides(shop: Any) -> None:
    assert repr(shop.writer.engine) == repr(shop.writer_engine) == "<Provider of the engine of 'writer'>"
    assert repr(Shop.log.async_sessionmaker) == "<Provider of the async_sessionmaker of 'log'>"
    assert repr(shop.settings) == "<Provider of the settings>"
    assert repr(shop.writer_session) == "<Provider of the session of 'writer'>"
    assert repr(shop.writer_async_session) == "<Provider of the async session of 'writer'>"
    assert repr(shop.connection) == "<Provider connection(name: 'str') -> 'Connection'>"


def test_a_connection_with_an_engine_of_its_own_shows_that_one(tmp_path: Path) -> None:
    class Given(DatabaseContainer):
        writer = Connection()
        reader = Connection(engine=create_engine(f"sqlite:///{tmp_path}/r.db"))

    given = Given(settings=DatabaseSettings(connections={"writer": {"url": "sqlite:///w.db"}}))
    given.settings()
    assert repr(given) == f"<Given: writer (sqlite, w.db), reader (sqlite, {tmp_path}/r.db, an engine of its own)>"


def test_what_is_no_engine_and_what_are_no_settings_is_told(sqlite_url: str) -> None:
    container: Any = app_db.Container(settings=DatabaseSettings(connections={"writer": {"url": sqlite_url}}))
    override = container.writer_engine.override("sqlite://")
    with override, container.transaction(), pytest.raises(InvalidUse, match="engine of 'writer' was overridden with a str"):
        container.writer_session()
    wrong: Any = app_db.Container(settings={"connections": {}})
    with pytest.raises(InvalidUse, match=r"has a dict as its settings\. Give it DatabaseSettings"):
        wrong.writer_engine()


def test_signatures_show_what_to_pass(shop: Any) -> None:
    shown = inspect.signature(shop.transaction)
    assert list(shown.parameters) == ["propagation", "read_only", "isolation", "timeout", "attempts", "backoff", "commit_on"]
    assert shown.parameters["attempts"].default == 1
    assert list(inspect.signature(shop.connection).parameters) == ["name"]
    assert list(inspect.signature(shop.unit).parameters) == []
    assert "container" not in inspect.signature(shop.create_all).parameters


def test_the_version_is_that_of_the_distribution() -> None:
    project = (Path(app_db.__file__).parent.parent / "pyproject.toml").read_text()
    assert app_db.__version__ == re.findall(r'^version = "(.*)"', project, re.MULTILINE)[0]
    with pytest.raises(AttributeError, match="nothing"):
        app_db.nothing  # type: ignore[attr-defined]  # noqa: B018  # and checkers find it, too


# ---- names in variables --------------------------------------------------------------------------------------------------


def test_a_connection_is_found_by_a_name_in_a_variable(shop: Any) -> None:
    for name in ("writer", "log"):
        assert shop.connection(name) is getattr(shop, name)
        assert shop.connection(name).engine() is getattr(shop, f"{name}_engine")()


@pytest.mark.parametrize("name", ["writr", "settings", "writer_session"])
def test_a_name_that_is_no_connection_is_refused_with_those_that_are(name: str, shop: Any) -> None:
    with pytest.raises(UnknownConnection, match=rf"'{name}'.*There are: 'copy', 'log', 'missing', 'reader', 'writer'"):
        shop.connection(name)


def test_a_class_has_no_connection_to_give() -> None:
    with pytest.raises(InvalidUse, match="on a container class"):
        Shop.connection("writer")
