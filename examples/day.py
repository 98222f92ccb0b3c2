"""A day in the shop: the same program, wherever its databases are.

    cp examples/one-file.env .env && python examples/day.py          all of it in one SQLite file
    cp examples/four-databases.env .env && python examples/day.py    four PostgreSQL databases, two-phase commit, a replica

Nothing here or in shop/ knows which it is.
"""

from __future__ import annotations

import sys
from pathlib import Path

from sqlalchemy import select

sys.path.insert(0, str(Path(__file__).parent))

from shop import checkout, mail, services
from shop.container import Container
from shop.models import Entry, Movement, Order


def main() -> None:
    """Open the shop, sell, and count what there is in the evening."""
    container = Container()
    container.create_all()
    container.wire(modules=[services, checkout])
    open_and_sell()
    count(container)
    container.shutdown_resources()


def open_and_sell() -> None:
    """Sell some tea, more tea than there is, and what there is of a list."""
    services.receive("tea", 3)
    services.receive("honey", 1)
    checkout.check_out("Ann", "tea", 2)
    try:
        checkout.check_out("Bob", "tea", 2)
    except services.OutOfStockError:
        print("Bob wanted more tea than there is.")
    checkout.check_out_what_there_is("Cid", ["tea", "milk", "honey"])


def count(container: Container) -> None:
    """Print what is where, through each connection's session and through the one that finds them all."""
    for sku in ("tea", "honey", "milk"):
        print(f"{sku}: {services.stock(sku)} in the warehouse, {services.ordered(sku)} ordered")
    with container.transaction():
        session = container.session()
        print("orders:", sorted(session.scalars(select(Order.quantity))))
        print("movements:", sorted(session.scalars(select(Movement.quantity))))
        print("log:", *session.scalars(select(Entry.text).order_by(Entry.id)), sep="\n  ")
    for customer, text in mail.sent:
        print(f"to {customer}: {text}")


if __name__ == "__main__":
    main()
