"""What app_db knows of SQLAlchemy that SQLAlchemy does not promise. Each test says what breaks when it goes."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from app_db._compat.sqlalchemy import is_executing


@pytest.mark.parametrize("driver", ["postgresql+asyncpg", "mysql+asyncmy"])
def test_a_statement_that_has_not_ended_can_be_seen(driver: str, request: pytest.FixtureRequest) -> None:
    """Without `_execute_mutex`, a connection that was interrupted in a statement would go back to its pool, and the next unit
    would wait for ever.
    """
    url = request.getfixturevalue("postgres_url" if "postgresql" in driver else "mariadb_url")
    sleeping = "SELECT pg_sleep(0.3)" if "postgresql" in driver else "SELECT SLEEP(0.3)"

    async def work() -> list[bool]:
        engine = create_async_engine(f"{driver}:{url.partition(':')[2]}")
        async with engine.connect() as connection:
            raw: Any = (await connection.get_raw_connection()).dbapi_connection
            seen = [is_executing(raw)]
            statement = asyncio.create_task(connection.execute(text(sleeping)))
            await asyncio.sleep(0.1)
            seen.append(is_executing(raw))
            await statement
            seen.append(is_executing(raw))
        await engine.dispose()
        return seen

    assert asyncio.run(work()) == [False, True, False]
