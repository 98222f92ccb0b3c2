"""Oracle Database: app_db knows only which of its errors are transient."""

from __future__ import annotations

from app_db._databases.database import Database


class Oracle(Database):
    """Oracle Database, by oracledb."""

    _transient = frozenset({60, 8177})  # deadlock, can't serialize access

    def is_transient(self, error: BaseException) -> bool:
        return bool(error.args) and getattr(error.args[0], "code", None) in self._transient


DATABASE = Oracle()
