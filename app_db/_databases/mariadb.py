"""MariaDB, where a URL calls it so."""

from app_db._databases.mysql import DATABASE

__all__ = ["DATABASE"]
