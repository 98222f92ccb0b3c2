"""What app_db knows of asyncmy that asyncmy does not promise. Each test says what breaks when it goes."""

from __future__ import annotations

import asyncio
import gc
import time
import warnings
from typing import Any

import asyncmy
from sqlalchemy import make_url

from app_db._compat.asyncmy import hang_up
from harness.servers import MariaDBServer


def test_a_connection_of_a_closed_loop_is_closed_at_its_socket_without_a_complaint(
    mariadb_url: str, mariadb: MariaDBServer
) -> None:
    """Without `_transport` (before 0.2.13: `_writer`), an engine that its loop has left behind would keep its connections at the
    server.
    """
    arguments = make_url(mariadb_url).translate_connect_args(username="user", database="db")

    async def work() -> tuple[Any, int]:
        connection = await asyncmy.connect(**arguments)
        async with connection.cursor() as cursor:
            await cursor.execute("SELECT CONNECTION_ID()")
            return connection, (await cursor.fetchone())[0]

    connection, number = asyncio.run(work())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hang_up(connection)
        give_up = time.monotonic() + 10
        while (left := is_alive(mariadb, number)) and time.monotonic() < give_up:
            time.sleep(0.02)
        assert not left
        hang_up(connection)  # as SQLAlchemy may once more
        del connection
        gc.collect()
    assert caught == []


def is_alive(mariadb: MariaDBServer, number: int) -> bool:
    return bool(mariadb.execute(f"SELECT count(*) FROM information_schema.processlist WHERE id = {number}")[0][0])
