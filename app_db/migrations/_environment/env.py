# ruff: noqa: INP001  # Alembic runs this file by its path
"""The environment in which Alembic runs the migrations of app_db. What it does is given by app_db, for each command."""

from __future__ import annotations

from alembic import context

__all__: list[str] = []

context.config.attributes["app_db"](context)
