"""Migrations by Alembic, with a chain of revisions for each connection in `migrations/NAME/versions`.

    from app_db.migrations import revision, upgrade

    revision(container, "add prices")  # writes a file for each connection whose models differ from its database
    upgrade(container)                 # runs what is pending; any number of processes may do it at the same time

Alembic's `env.py` is not needed.
"""

from importlib.util import find_spec

from app_db.errors import AlembicMissing

if find_spec("alembic") is None:
    raise AlembicMissing

from app_db.migrations._commands import check, current, downgrade, history, revision, run, sql, stamp, upgrade
from app_db.migrations._results import Check, Current, Migrated, Revision, Step

__all__ = [
    "Check",
    "Current",
    "Migrated",
    "Revision",
    "Step",
    "check",
    "current",
    "downgrade",
    "history",
    "revision",
    "run",
    "sql",
    "stamp",
    "upgrade",
]
