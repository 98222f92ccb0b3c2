"""An application may give its variables a prefix of its own. Every error then names the variables that it has."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator

import pytest
from pydantic_settings import SettingsConfigDict
from sqlalchemy import text

from app_db import DatabaseContainer, DatabaseSettings, container_of
from app_db.errors import NotAtomic, ReplicaUnavailable, SettingsError
from app_db.testing import overridden

NewUrl = Callable[[], str]


class ShopSettings(DatabaseSettings):
    model_config = SettingsConfigDict(env_prefix="SHOP_")


@pytest.fixture
def container(new_sqlite_url: NewUrl, monkeypatch: pytest.MonkeyPatch) -> Iterator[DatabaseContainer]:
    for name in ("WRITER", "ARCHIVE"):
        monkeypatch.setenv(f"SHOP_CONNECTIONS__{name}__URL", new_sqlite_url())
    monkeypatch.setenv("SHOP_CONNECTIONS__READER__URL", "sqlite:////nowhere/shop.db")
    monkeypatch.setenv("SHOP_CONNECTIONS__READER__READ_ONLY", "true")
    monkeypatch.setenv("SHOP_CONNECTIONS__READER__REPLICA_OF", "writer")
    made = container_of("writer", "archive", "reader")(settings=ShopSettings())
    yield made
    made.shutdown_resources()


def test_a_unit_that_is_not_atomic_names_them(container: DatabaseContainer) -> None:
    with pytest.raises(NotAtomic) as refused, container.transaction():
        for name in ("writer", "archive"):
            container.connection(name).session().execute(text("CREATE TABLE a (n int)"))
    assert "set SHOP_CONNECTIONS__NAME__TWO_PHASE=true" in refused.value.message
    assert "set SHOP_ATOMICITY=best_effort" in refused.value.message


def test_a_replica_that_is_away_names_its_variable(container: DatabaseContainer) -> None:
    session = container.session
    with container.transaction(), session().using("reader"), pytest.raises(ReplicaUnavailable) as refused:
        session().execute(text("SELECT 1"))
    assert "SHOP_CONNECTIONS__READER__REPLICA_OF" in refused.value.message


def test_an_override_for_no_connection_names_the_variable(container: DatabaseContainer) -> None:
    with (
        pytest.raises(SettingsError, match="SHOP_CONNECTIONS__WRITR__URL: is for no connection"),
        overridden(container, {"writr": "sqlite://"}),
    ):
        pass


def test_errors_with_variables_survive_pickling() -> None:
    for error in (NotAtomic(["a"], "SHOP_A", "SHOP_B"), ReplicaUnavailable("reader", "writer", "SHOP_C")):
        assert str(pickle.loads(pickle.dumps(error))) == str(error)
