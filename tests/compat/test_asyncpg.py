"""What app_db knows of asyncpg that asyncpg does not promise. Each test says what breaks when it goes."""

from __future__ import annotations

import asyncio
import gc
import time
import warnings
from typing import Any

import asyncpg

from app_db._compat.asyncpg import believes_in_transaction, hang_up
from harness.servers import PostgresServer


async def test_a_transaction_that_asyncpg_believes_in_can_be_seen(postgres_url: str) -> None:
    """Without `_top_xact`, a connection that was interrupted right after BEGIN would go back to its pool, and the next unit's
    COMMIT would only release a savepoint.
    """
    connection: Any = await asyncpg.connect(dsn_of(postgres_url))
    seen = [believes_in_transaction(connection)]
    transaction = connection.transaction()
    await transaction.start()
    seen.append(believes_in_transaction(connection))
    await transaction.rollback()
    seen.append(believes_in_transaction(connection))
    await connection.close()
    assert seen == [False, True, False]


def test_a_connection_of_a_closed_loop_is_closed_at_its_socket_without_a_complaint(
    postgres_url: str, postgres: PostgresServer
) -> None:
    """Without `_transport`, an engine that its loop has left behind would keep its connections at the server."""

    async def work() -> tuple[Any, int]:
        connection = await asyncpg.connect(dsn_of(postgres_url))
        return connection, connection.get_server_pid()

    connection, pid = asyncio.run(work())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hang_up(connection)
        assert connection.is_closed()
        give_up = time.monotonic() + 10
        while (left := is_alive(postgres, pid)) and time.monotonic() < give_up:
            time.sleep(0.02)
        assert not left
        del connection
        gc.collect()
    assert caught == []


def is_alive(postgres: PostgresServer, pid: int) -> bool:
    return bool(postgres.execute(f"SELECT count(*) FROM pg_stat_activity WHERE pid = {pid}")[0][0])


def dsn_of(url: str) -> str:
    return f"postgresql:{url.partition(':')[2]}"
