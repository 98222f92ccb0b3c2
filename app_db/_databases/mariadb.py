"""MariaDB, for URLs that begin with `mariadb`."""

from app_db._databases.mysql import DATABASE

__all__ = ["DATABASE"]
