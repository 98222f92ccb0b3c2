"""The FastAPI application from its start to its end, on databases that are thrown away: nothing isolates these tests."""

from __future__ import annotations

from pathlib import Path

from fastapi.testclient import TestClient
from shop.container import Container
from shop.fastapi_app import app
from shop.services import stock

from app_db import DatabaseSettings
from app_db.testing import overridden, sqlite


def test_it_makes_its_tables_sells_and_closes_its_databases(app_db_container: Container, tmp_path: Path) -> None:
    urls = {f"APP_DB_CONNECTIONS__{name}__URL": f"sqlite:///{tmp_path / 'shop.db'}" for name in ("WRITER", "WAREHOUSE", "LOG")}
    with overridden(app_db_container, DatabaseSettings.from_mapping(urls)):
        with TestClient(app) as client:
            client.post("/deliveries", json={"sku": "tea", "quantity": 3})
            order = client.post("/orders", json={"customer": "Ann", "sku": "tea", "quantity": 2})
            assert (order.status_code, client.get("/stock").json()) == (201, {"tea": 1})
            pool = app_db_container.warehouse.engine().pool
            assert "Connections in pool: 1" in pool.status()
        assert "Connections in pool: 0" in pool.status()


def test_it_has_other_databases_where_the_container_has(app_db_container: Container) -> None:
    client = TestClient(app)
    with sqlite(app_db_container):
        client.post("/deliveries", json={"sku": "tea", "quantity": 3})
        assert stock("tea") == 3
    with sqlite(app_db_container):
        assert stock("tea") == 0
