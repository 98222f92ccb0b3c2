"""What a SQLite file can be asked about itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from app_db._databases.facts import Facts
from app_db._databases.inspection import Inspection

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection


class SQLiteInspection(Inspection):
    """The questions to SQLite."""

    def facts(self, connection: Connection) -> Facts:
        # Counting reads the first page, which shows whether the file is a database.
        version, _ = connection.exec_driver_sql("SELECT sqlite_version(), count(*) FROM sqlite_master").one()
        return Facts(version=version)
