"""The tests of the example's application pass as a user runs them, on each database, and leave no row behind."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

from harness.paths import ROOT
from harness.requiring import need

EXAMPLES = ROOT / "examples"
TABLES = {"writer": "orders", "warehouse": "movements", "log": "entries"}
WARNINGS = (
    "error",
    "ignore:Using `httpx` with `starlette.testclient`",  # Starlette prefers another client from 1.0 on
    "ignore:'cgi' is deprecated",  # WebOb, of Pyramid, imports it before Python 3.13
)
UNLOAD = """
from shop import checkout, services
from shop.container import Container

container = Container()
container.wire(modules=[services, checkout])
checkout.unload([("tea", 1)])
container.shutdown_resources()
"""
MAKE_TABLES = "from shop.container import Container; import shop.models; Container().create_all()"


class Shop:
    """The example's application on databases of the test's."""

    def __init__(self, new_url: Callable[[], str], installed: Path) -> None:
        need("celery", "fastapi", "flask", "httpx", "pyramid", "pytest_randomly", "webtest", "xdist")
        self.urls = {name: new_url() for name in TABLES}
        kept = {name: value for name, value in os.environ.items() if not re.match("APP_DB_|PYTEST_", name)}
        settings = {f"APP_DB_CONNECTIONS__{name.upper()}__URL": url for name, url in self.urls.items()}
        if not self.urls["writer"].startswith("sqlite"):  # outside tests they commit by two phases
            settings |= {f"APP_DB_CONNECTIONS__{name}__TWO_PHASE": "true" for name in ("WRITER", "WAREHOUSE")}
            settings |= {"APP_DB_ATOMICITY": "strict"}
        paths = os.pathsep.join([str(installed), str(EXAMPLES)])
        self._environment = {**kept, **settings, "APP_DB_CONNECTIONS__LOG__TRANSACTIONAL": "false", "PYTHONPATH": paths}
        self.run("-c", MAKE_TABLES)

    def test(self, *arguments: str) -> str:
        """Run the application's tests, and return what they printed."""
        off = [
            argument
            for plugin in ("asyncio", "pytest_cov", "timeout", "hypothesispytest", "cacheprovider")
            for argument in ("-p", f"no:{plugin}")
        ]
        warnings = [argument for which in WARNINGS for argument in ("-W", which)]
        return self.run("-m", "pytest", *warnings, *off, "-c", os.devnull, "--rootdir", ".", *arguments, "shop_tests")

    def rows(self) -> dict[str, int]:
        """How many rows there are in each table."""
        return {name: self._count(name, table) for name, table in TABLES.items()}

    def _count(self, name: str, table: str) -> int:
        engine = create_engine(self.urls[name], poolclass=NullPool)
        with engine.connect() as connection:
            return int(connection.scalar(text(f"SELECT count(*) FROM {table}")) or 0)

    def run(self, *arguments: str) -> str:
        """Run Python as the application's developers would."""
        command = [sys.executable, *arguments]
        done = subprocess.run(
            command, cwd=EXAMPLES, env=self._environment, capture_output=True, text=True, check=False, timeout=110
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture
def shop(new_database_url: Callable[[], str], installed: Path) -> Shop:
    return Shop(new_database_url, installed)


def passed(output: str) -> int:
    found = re.search(r"(\d+) passed", output)
    return int(found[1]) if found else 0


@pytest.mark.exhaustive
def test_they_pass_in_any_order_and_in_two_processes_and_leave_no_row(shop: Shop) -> None:
    alone = shop.test("-p", "randomly", "-p", "no:xdist")
    together = shop.test("-p", "randomly", "-n", "2")
    assert passed(alone) == passed(together) >= 39
    assert "--randomly-seed=" in alone
    assert "--randomly-seed=" in together
    assert shop.rows() == {"writer": 0, "warehouse": 0, "log": 0}
    shop.run("-c", UNLOAD)  # where nothing isolates it, the same code leaves rows
    assert shop.rows() == {"writer": 0, "warehouse": 1, "log": 1}


@pytest.mark.exhaustive
def test_they_run_in_a_checkout_as_their_first_lines_say() -> None:
    """The settings of this project's own tests, which the directory above has, do not apply."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "shop_tests/test_flask_app.py"],
        cwd=EXAMPLES, capture_output=True, text=True, check=False, timeout=110,
    )  # fmt: skip
    assert passed(done.stdout) == 7, done.stdout + done.stderr
