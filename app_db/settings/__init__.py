"""What the databases are, and where each setting comes from."""

from app_db.settings.connections import ConnectionSettings, PoolSettings, SessionSettings
from app_db.settings.databases import DatabaseSettings
from app_db.settings.sources import Origin

__all__ = [
    "ConnectionSettings",
    "DatabaseSettings",
    "Origin",
    "PoolSettings",
    "SessionSettings",
]
