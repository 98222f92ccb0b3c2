"""Which databases the shop has. What they are stands in the settings."""

from __future__ import annotations

from app_db import Connection, DatabaseContainer


class Container(DatabaseContainer):
    """The shop's connections: each provides `NAME_session`, `NAME_engine` and so on."""

    writer = Connection()
    reader = Connection()  # not configured: the writer's database, read-only
    warehouse = Connection()
    log = Connection()  # transactional=false: what is written to it stays
