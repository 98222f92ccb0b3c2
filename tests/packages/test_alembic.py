"""Alembic's commands with an `env.py` that takes its engine from the container."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import Column, Integer, MetaData, Table, inspect, text

from harness.shops import NewShop, Shop

METADATA = MetaData()
OTHERS = Table("others", METADATA, Column("id", Integer, primary_key=True))

ENGINE = """
from alembic import context
from app_db.models import include_name
from shop_that_migrates import container, metadata

with container.writer_engine().connect() as connection:
    context.configure(connection=connection, target_metadata=metadata, include_name=include_name)
    with context.begin_transaction():
        context.run_migrations()
"""

ASYNC_ENGINE = """
import asyncio
from alembic import context
from app_db.models import include_name
from shop_that_migrates import container, metadata

def run(connection):
    context.configure(connection=connection, target_metadata=metadata, include_name=include_name)
    with context.begin_transaction():
        context.run_migrations()

async def run_async():
    async with container.writer_async_engine().connect() as connection:
        await connection.run_sync(run)
    await container.shutdown_resources()

asyncio.run(run_async())
"""

UNIT = """
from alembic import context
from app_db.models import include_name
from shop_that_migrates import container, metadata

with container.transaction():
    connection = container.writer_session().connection()
    context.configure(connection=connection, target_metadata=metadata, include_name=include_name)
    with context.begin_transaction():
        context.run_migrations()
"""

MIGRATIONS = {
    "1": """
import sqlalchemy as sa
from alembic import op
revision, down_revision = "1", None
def upgrade():
    op.create_table("orders", sa.Column("id", sa.Integer, primary_key=True))
    op.execute("INSERT INTO others VALUES (1)")
def downgrade():
    op.execute("DELETE FROM others")
    op.drop_table("orders")
""",
    "2": """
import sqlalchemy as sa
from alembic import op
revision, down_revision = "2", "1"
def upgrade():
    with op.batch_alter_table("orders") as orders:
        orders.add_column(sa.Column("sku", sa.String(20)))
    op.execute("INSERT INTO others VALUES (2)")
    op.execute("INSERT INTO orders VALUES (1, 'a')")
def downgrade():
    with op.batch_alter_table("orders") as orders:
        orders.drop_column("sku")
""",
    "3": """
revision, down_revision = "3", "2"
def upgrade():
    from alembic import op
    op.execute("DELETE FROM orders")
    raise ValueError("the third migration fails")
""",
}


@pytest.fixture
def migrate(tmp_path: Path) -> Config:
    versions = tmp_path / "migrations" / "versions"
    versions.mkdir(parents=True)
    for revision, source in MIGRATIONS.items():
        (versions / f"{revision}.py").write_text(source)
    config = Config()
    config.set_main_option("script_location", str(versions.parent))
    config.set_main_option("path_separator", "os")
    return config


@pytest.fixture
def shop(new_shop: NewShop, monkeypatch: pytest.MonkeyPatch) -> Shop:
    shop = new_shop(METADATA)
    module = ModuleType("shop_that_migrates")
    vars(module).update(container=shop.container, metadata=METADATA)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return shop


@pytest.mark.parametrize("environment", [ENGINE, ASYNC_ENGINE, UNIT], ids=["engine", "async engine", "unit"])
def test_migrations_go_up_and_down(environment: str, shop: Shop, migrate: Config, tmp_path: Path) -> None:
    (tmp_path / "migrations" / "env.py").write_text(environment)

    def columns() -> set[str]:
        with shop.container.transaction():
            found = inspect(shop.session().connection())
            return {column["name"] for column in found.get_columns("orders")} if found.has_table("orders") else set()

    def orders() -> int:
        with shop.container.transaction():
            return len(shop.session().execute(text("SELECT id FROM orders")).all())

    with shop.test():
        command.upgrade(migrate, "1")
        assert columns() == {"id"}
        command.upgrade(migrate, "2")
        assert columns() == {"id", "sku"}
        with pytest.raises(ValueError, match="third"):
            command.upgrade(migrate, "3")
        assert orders() == 1
        command.downgrade(migrate, "1")
        assert columns() == {"id"}
        command.downgrade(migrate, "base")
        assert columns() == set()
        command.upgrade(migrate, "2")
        assert columns() == {"id", "sku"}
    assert inspect(shop.plain["writer"]).has_table("orders") is not shop.is_isolated
