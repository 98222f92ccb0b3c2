"""Show what app_db does, on three SQLite databases: `make demo`.

The application is in shop/, and is what to copy from. This program wires its container, calls its services, and then looks
into the database files with the sqlite3 module: not through app_db, which might be believed too easily.
"""

from __future__ import annotations

import inspect
import os
import re
import sqlite3
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shop import services
from shop.container import Container
from shop.models import Order
from shop.services import OutOfStockError, ordered, place_order, receive, stock
from sqlalchemy.orm import Session

from app_db import AppDbError, DatabaseSettings, Provide, transactional

WIDTH = 96
TABLES = {"writer.db": "orders", "warehouse.db": "movements", "log.db": "entries"}

# ---- how the page looks ---------------------------------------------------------------------------------------------

COLOURED = sys.stdout.isatty() and "NO_COLOR" not in os.environ
BOLD, GREEN, YELLOW, BLUE = "1", "32", "33", "36"


def painted(colour: str, text: str) -> str:
    """Return the text in a colour where there are colours."""
    return f"\033[{colour}m{text}\033[0m" if COLOURED else text


def heading(text: str) -> None:
    """Begin a part of the page."""
    print(f"\n{painted(BOLD, text)}\n{painted(BOLD, '-' * len(text))}")


def say(text: str) -> None:
    """Print a paragraph."""
    print(textwrap.fill(inspect.cleandoc(text).replace("\n", " "), WIDTH))


def show(*functions: Callable[..., Any]) -> None:
    """Print the source of functions, which is what is about to run."""
    print()
    for function in functions:
        source = re.sub(r'\n    """.*?"""', "", inspect.getsource(function), flags=re.DOTALL)
        print(painted(BLUE, textwrap.indent(source, "    ")))


def call(text: str, function: Callable[[], Any]) -> None:
    """Call a function and print what it returned or raised."""
    print(f"  >>> {text}")
    try:
        result = function()
    except (AppDbError, OutOfStockError) as error:
        message = f"{type(error).__name__}: {error}"
        print(painted(YELLOW, textwrap.fill(message, WIDTH, initial_indent="  ", subsequent_indent="    ")))
    else:
        if result is not None:
            print(painted(GREEN, f"  {result!r}"))


def show_databases() -> None:
    """Print what the database files hold."""
    print()
    for file, table in TABLES.items():
        database = sqlite3.connect(file)
        rows = [" ".join(map(str, row[1:])) for row in database.execute(f"SELECT * FROM {table} ORDER BY id")]
        database.close()
        print(f"  {file:<13} {table:<10} {' | '.join(rows) or '(empty)'}")


# ---- what it shows --------------------------------------------------------------------------------------------------


def show_settings(container: Container) -> None:
    heading("1  Where the databases come from")
    say("""
        From the environment and from .env, where each connection has a name. Here are writer, warehouse and log; nobody said
        what the reader is, so it is the writer's database, read-only. To show what becomes of a password, this program has
        added an archive in os.environ; nothing connects to it. container.settings().origins() tells who said what:
    """)
    print()
    for origin in container.settings().origins():
        if re.search("URL|ATOMICITY|TRANSACTIONAL", origin.variable):
            print(f"  {origin.variable.removeprefix('APP_DB_'):<34} {origin.source:<12} {origin.shown_value}")


def show_injection() -> None:
    heading("2  A function asks for a session")
    say("""
        A default names the session, @transactional begins a unit of work and commits it when the function returns. note() is
        called inside, and takes part in the same unit.
    """)
    show(services.note, services.receive)
    call('receive("tea", 10)', lambda: receive("tea", 10))
    show_databases()


def show_strict_refusal() -> None:
    heading("3  Two databases, and no promise that can't be kept")
    say("""
        An order writes to the shop's database and to the warehouse's. SQLite can't prepare a commit, so a crash between the
        two commits would leave one without the other. atomicity=strict, the default, refuses before anything is committed:
    """)
    show(services.place_order)
    call('place_order("tea", 3)', lambda: place_order("tea", 3))
    show_databases()
    print()
    say("""
        No order, no movement. Only the log has a new line: it is transactional=false, so what is written to it stays
        whatever becomes of the unit.
    """)


def show_two_databases() -> None:
    heading("4  Two databases, one after the other")
    say("""
        atomicity=best_effort takes the risk: both are flushed and checked first, then committed one after the other. Given in
        code here; in .env it would be APP_DB_ATOMICITY=best_effort.
    """)
    print()
    call('place_order("tea", 3)', lambda: place_order("tea", 3))
    show_databases()


def show_abort() -> None:
    heading("5  A function that raises leaves nothing behind")
    say("""
        There are 7 left. place_order() adds the order and the movement, counts again, sees less than none, and raises. Both
        databases roll back; the log keeps the trace of the attempt.
    """)
    print()
    call('stock("tea")', lambda: stock("tea"))
    call('place_order("tea", 30)', lambda: place_order("tea", 30))
    call('stock("tea")', lambda: stock("tea"))
    show_databases()


@transactional
def take_back(
    sku: str,
    quantity: int,
    session: Session = Provide[Container.reader.session],
) -> None:
    """Take goods back, by a mistake in the line above: that is the reader's session."""
    session.add(Order(sku=sku, quantity=-quantity))


def show_read_only() -> None:
    heading("6  The reader only reads")
    say("""
        Somebody asked for the wrong session. app_db refuses before a statement is sent, and SQLite would refuse it too: the
        reader's connections have PRAGMA query_only set.
    """)
    show(take_back)
    call('take_back("tea", 1)', lambda: take_back("tea", 1))
    call('ordered("tea")', lambda: ordered("tea"))


def main() -> None:
    """Show everything, in an empty directory with settings.example.env in it as .env."""
    there = [file for file in TABLES if Path(file).exists()]
    if there or not Path(".env").exists():
        problem = f"{there[0]} is here already" if there else "there is no .env here"
        sys.exit(
            f"{problem}: the demo wants an empty directory with a copy of settings.example.env as .env, so that it\n"
            "touches no database of yours. `make demo` makes one."
        )
    os.environ["APP_DB_CONNECTIONS__ARCHIVE__URL"] = "postgresql+psycopg://shop:correct-horse@archive.example/shop"

    print(painted(BOLD, "app_db: sessions by injection, units of work over several databases"))
    container = Container()
    container.create_all()  # an application of yours would have Alembic do this
    container.wire(modules=[services, __name__])

    show_settings(container)
    show_injection()
    show_strict_refusal()
    with container.settings.override(DatabaseSettings(atomicity="best_effort")):
        show_two_databases()
        show_abort()
        show_read_only()

    container.shutdown_resources()
    heading("That was it")
    say(f"""
        The application: examples/shop/ (models.py, container.py, services.py). The databases: {", ".join(TABLES)} in
        this directory. What to read next: README.md, docs/tutorial.md.
    """)


if __name__ == "__main__":
    main()
