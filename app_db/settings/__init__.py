"""The settings of the database connections, read with pydantic-settings."""

from app_db.settings._connection_settings import ConnectionSettings, PoolSettings, SessionSettings
from app_db.settings._database_settings import DatabaseSettings
from app_db.settings._reading import Origin

__all__ = [
    "ConnectionSettings",
    "DatabaseSettings",
    "Origin",
    "PoolSettings",
    "SessionSettings",
]
