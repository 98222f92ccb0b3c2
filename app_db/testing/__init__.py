"""Switches for tests: everything rolled back, other settings for a while, throw-away databases, hooks that are only noted.

They are context managers, for every test runner. Under pytest they are fixtures, too.
"""

from app_db._units.hooks import CapturedHook, CapturedHooks
from app_db.testing._isolation import Isolation
from app_db.testing._row_counts import RowCounts
from app_db.testing._switches import (
    IsolatedTestCase,
    captured_hooks,
    isolated,
    made_tables,
    overridden,
    sqlite,
    worker_databases,
)

__all__ = [
    "CapturedHook",
    "CapturedHooks",
    "IsolatedTestCase",
    "Isolation",
    "RowCounts",
    "captured_hooks",
    "isolated",
    "made_tables",
    "overridden",
    "sqlite",
    "worker_databases",
]
