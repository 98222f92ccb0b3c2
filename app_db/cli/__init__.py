"""The command line, `app-db`."""

from app_db.cli.commands import main

__all__ = ["main"]
