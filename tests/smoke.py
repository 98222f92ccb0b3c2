"""Use the installed app_db, from a wheel and without any extra: `python -I smoke.py CHECKOUT`.

Not a test of pytest's: tox's environment `package` runs it where app_db was installed elsewhere.
"""

from __future__ import annotations

import os
import sys
import tempfile
from importlib.metadata import requires, version
from pathlib import Path

from sqlalchemy import text

import app_db
from app_db import Connection, DatabaseContainer

CHECKOUT = Path(sys.argv[1])


class Container(DatabaseContainer):
    writer = Connection()


def main() -> None:
    here = Path(app_db.__file__).parent
    assert here != CHECKOUT / "app_db", "this is the checkout, and not what was installed"
    assert (here / "py.typed").exists()
    shipped = {path.relative_to(here) for path in here.rglob("*.py")}
    assert shipped == {path.relative_to(CHECKOUT / "app_db") for path in (CHECKOUT / "app_db").rglob("*.py")}
    assert len([line for line in requires("app-db") or [] if "extra ==" not in line]) == 5

    with tempfile.TemporaryDirectory() as directory:
        os.environ["APP_DB_CONNECTIONS__WRITER__URL"] = f"sqlite:///{directory}/shop.db"
        container = Container()
        with container.transaction():
            container.writer_session().execute(text("CREATE TABLE orders (sku TEXT)"))
            container.writer_session().execute(text("INSERT INTO orders VALUES ('A-1')"))
        with container.transaction():
            assert container.writer_session().execute(text("SELECT sku FROM orders")).scalars().all() == ["A-1"]
        container.shutdown_resources()
    print(f"app-db {version('app-db')} works in {here}")


main()
