"""Context managers for tests: roll everything back, use other settings or databases, capture hooks, count
statements, serve the application.

They work with every test runner. The pytest plugin has fixtures for them.
"""

from app_db._units.hooks import CapturedHook, CapturedHooks
from app_db.testing._databases import made_databases
from app_db.testing._expecting import SentStatement, StatementCounts, expecting
from app_db.testing._fresh import FreshDatabases, KeptTemplates, kept_templates
from app_db.testing._isolation import Isolation
from app_db.testing._live_server import LiveServer, live_server
from app_db.testing._only_isolated import only_isolated
from app_db.testing._overrides import is_overridden
from app_db.testing._row_counts import RowCounts
from app_db.testing._row_watch import RowWatch
from app_db.testing._runner import Runner, running_under
from app_db.testing._switches import (
    IsolatedTestCase,
    captured_hooks,
    fresh_databases,
    isolated,
    overridden,
    sqlite,
    worker_databases,
)
from app_db.testing._tables import made_tables

__all__ = [
    "CapturedHook",
    "CapturedHooks",
    "FreshDatabases",
    "IsolatedTestCase",
    "Isolation",
    "KeptTemplates",
    "LiveServer",
    "RowCounts",
    "RowWatch",
    "Runner",
    "SentStatement",
    "StatementCounts",
    "captured_hooks",
    "expecting",
    "fresh_databases",
    "is_overridden",
    "isolated",
    "kept_templates",
    "live_server",
    "made_databases",
    "made_tables",
    "only_isolated",
    "overridden",
    "running_under",
    "sqlite",
    "worker_databases",
]
