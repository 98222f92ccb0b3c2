"""Which databases the shop has. What they are stands in the settings."""

from __future__ import annotations

from app_db import Connection, DatabaseContainer
from shop.models import LogBase, ShopBase, WarehouseBase


class Container(DatabaseContainer):
    """The shop's connections: each provides `NAME_session`, `NAME_engine` and so on."""

    writer = Connection()
    reader = Connection()  # not configured: the writer's database, read-only
    warehouse = Connection()
    log = Connection()  # transactional=false: what is written to it stays


def create_tables(container: Container) -> None:
    """Create the tables that are missing. An application of yours would have Alembic do this."""
    ShopBase.metadata.create_all(container.writer_engine())
    WarehouseBase.metadata.create_all(container.warehouse_engine())
    LogBase.metadata.create_all(container.log_engine())
