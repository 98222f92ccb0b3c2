"""The command line, `app-db`."""

from app_db.cli._commands import main

__all__ = ["main"]
