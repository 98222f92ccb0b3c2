"""app_db works without what Windows does not have, and without every package that is optional.

Each case is a process of its own from which something is taken away before it imports app_db.
"""

from __future__ import annotations

import pytest

from harness.paths import run_python

PACKAGES = [
    "aiohttp",
    "aiosqlite",
    "alembic",
    "anyio",
    "asyncmy",
    "asyncpg",
    "celery",
    "fastapi",
    "flask",
    "greenlet",
    "litestar",
    "psycopg",
    "pymysql",
    "pyramid",
    "pytest",
    "starlette",
    "taskiq",
    "uvicorn",
]
"""What may not be installed."""

OF_UNIX = ["fchmod", "fchown", "fork", "getuid", "geteuid", "pread", "pwrite", "register_at_fork"]
"""What `os` does not have on Windows."""

WITHOUT = {
    "forks": (["fork", "register_at_fork"], []),  # the standard library itself needs the second where there is the first
    "fcntl": ([], ["fcntl"]),
    **{package: ([], [package]) for package in PACKAGES},
    "all of these": (OF_UNIX, ["fcntl", "pwd", "grp", "resource", *PACKAGES]),
}

TAKE_AWAY = """
import os, sys
functions, modules = {functions!r}, {modules!r}
for name in functions:
    delattr(os, name)
for name in modules:
    sys.modules[name] = None  # importing it raises ImportError, as if it were not there
"""

IMPORT_EVERYTHING = """
import pkgutil
from importlib import import_module
import app_db
left_out = {"app_db.__main__", "app_db._databases.drivers.begin_along"}  # a program, and a module that its driver brings in
if "greenlet" in modules:
    # SQLAlchemy's own asyncio needs greenlet.
    left_out |= {"app_db._sessions.async_routing", "app_db._sessions.async_sessions", "app_db.asyncio"}
if {"anyio", "starlette"} & set(modules):
    left_out |= {"app_db.integrations.starlette"}
if {"anyio", "starlette", "fastapi"} & set(modules):
    left_out |= {"app_db.integrations.fastapi"}
if {"anyio", "litestar"} & set(modules):
    left_out |= {"app_db.integrations.litestar"}
if {"anyio", "aiohttp"} & set(modules):
    left_out |= {"app_db.integrations.taskiq"}  # taskiq needs both
if "fcntl" in modules:
    left_out |= {"app_db.integrations.celery"}  # Celery's own modules want it, except on Windows
if "uvicorn" in modules:
    left_out |= {"app_db.testing._asgi_server"}
if "alembic" in modules:
    left_out |= {"app_db.migrations"}
for framework in ("aiohttp", "celery", "flask", "pyramid", "taskiq"):
    if framework in modules:
        left_out |= {f"app_db.integrations.{framework}"}
for module in pkgutil.walk_packages(app_db.__path__, "app_db."):
    if module.name not in left_out:
        import_module(module.name)
if "pytest" not in modules:
    import_module("pytest_app_db")
"""

USE_SQLITE = """
from sqlalchemy import text
from app_db import DatabaseSettings, container_of

settings = DatabaseSettings(connections={"writer": {"url": "sqlite:///shop.db"}}, _env_file=None)
container = container_of("writer")(settings=settings)
with container.transaction():
    container.writer_session().execute(text("CREATE TABLE item (name TEXT)"))
with container.transaction():
    container.writer_session().execute(text("INSERT INTO item VALUES ('kept')"))
try:
    with container.transaction():
        container.writer_session().execute(text("INSERT INTO item VALUES ('rolled back')"))
        1 / 0
except ZeroDivisionError:
    pass
with container.transaction():
    print(container.writer_session().execute(text("SELECT name FROM item")).scalars().all())
"""

USE_A_DECISION_FILE = """
from app_db._two_phase.decision_file import FileLog
from app_db._two_phase.decisions import Verdict
print(FileLog("decisions").decide("u" * 22, Verdict.COMMIT, ["writer"]))
"""


def run_without(what: str, program: str) -> str:
    """Run a program in a process that lacks something; return what it prints."""
    functions, modules = WITHOUT[what]
    return run_python("-c", TAKE_AWAY.format(functions=functions, modules=modules) + program).stdout


@pytest.mark.representative("all of these")
@pytest.mark.parametrize("what", WITHOUT)
def test_every_module_can_be_imported_and_sqlite_used_without(what: str) -> None:
    assert run_without(what, IMPORT_EVERYTHING + USE_SQLITE) == "['kept']\n"


@pytest.mark.representative("greenlet")
@pytest.mark.parametrize("what", WITHOUT)
def test_a_decision_file_can_be_used_without(what: str) -> None:
    assert run_without(what, USE_A_DECISION_FILE) == "commit\n"
