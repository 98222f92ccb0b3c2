"""Which databases the shop has, and how it sends letters. What the databases are stands in the settings."""

from __future__ import annotations

from dependency_injector import providers

from app_db import Connection, DatabaseContainer
from shop import mail


class Container(DatabaseContainer):
    """The shop's connections: each provides `NAME_session`, `NAME_engine` and so on."""

    writer = Connection()
    reader = Connection()  # not configured: the writer's database, read-only
    warehouse = Connection()
    log = Connection()  # transactional=false: what is written to it stays
    post = providers.Object(mail.send)  # opening.py puts a Celery task in its place


container = Container()
"""The container of the applications. It reads the settings when a database is first asked for."""
