"""`app-db show`: the connections, and where each setting came from. It connects to nothing."""

from __future__ import annotations

from collections.abc import Iterable
from math import isinf
from typing import TYPE_CHECKING, Any

from app_db.cli._calls import FINE, WRONG, Call, Commands
from app_db.cli._printing import Cell, Styled

if TYPE_CHECKING:
    from app_db.cli._connections import Configured
    from app_db.settings._reading import Origin


def add_to(commands: Commands) -> None:
    """Add `show`."""
    commands.add("show", _show).add_argument("names", nargs="*", metavar="NAME", help="a connection (default: all)")


def _show(call: Call) -> int:
    """Show the connections: the database, with secrets masked, how it is used, its pool, and the most connections that one
    process opens. Then show where each setting came from. Nothing is connected to.
    """
    from app_db.cli._connections import common_origins, configured, decision_log, name_of

    container = call.container
    given = [] if not call.options.names else call.names(call.options.names)
    found = [each for each in configured(container) if not given or each.name in given]
    general = [] if given else common_origins(container.settings())
    place = decision_log(container)
    call.out.table(["connection", "database", "use", "pool", "capacity"], [_row(each) for each in found])
    call.out.line()
    call.out.line("Capacity: the most connections of one process by threads; by coroutines it may open as many again.")
    if place:
        call.out.line(f"Decisions of two-phase units are written to {place}.")
    call.out.line()
    own = sorted({origin for each in found for origin in each.origins}, key=lambda origin: origin.variable)
    call.out.table(["setting", "value", "source"], _origin_rows([*general, *own]))
    call.out.data(
        {
            "container": name_of(container),
            "application": container.settings().application,
            "atomicity": container.settings().atomicity,
            "decision_log": place,
            "connections": [_data(each) for each in found],
            "settings": [_origin_data(origin) for origin in general],
        }
    )
    return FINE if all(each.database for each in found) else WRONG


def _row(each: Configured) -> list[Cell]:
    from app_db.cli._connections import number

    name = each.name if each.database else Styled(each.name, "bad")
    capacity = number(each.threads) if each.threads else ""  # SQLite has no server, and counts 0
    return [name, each.url, ", ".join(each.use) or "read and write", each.pool, capacity]


def _origin_rows(origins: Iterable[Origin]) -> Iterable[list[Cell]]:
    for origin in origins:
        yield [origin.variable, origin.shown_value, Styled(origin.source, "dim")]


def _data(each: Configured) -> dict[str, Any]:
    return {
        "name": each.name,
        "configured": bool(each.database),
        "in_container": each.declared,
        "database": each.database or None,
        "url": each.url or None,
        "read_only": each.read_only,
        "two_phase": each.two_phase,
        "transactional": each.transactional,
        "mirror": each.mirror,
        "replica_of": each.replica_of,
        "shares_transaction_with": each.shares_with,
        "pooler": each.pooler,
        "own_engine": each.own_engine,
        "pool": each.pool or None,
        "capacity": {"threads": _limit(each.threads), "coroutines": _limit(each.coroutines)},
        "settings": [_origin_data(origin) for origin in each.origins],
    }


def _limit(most: float) -> int | None:
    """Return a number of connections; None for no limit."""
    return None if isinf(most) else int(most)


def _origin_data(origin: Origin) -> dict[str, str]:
    return {"variable": origin.variable, "value": origin.shown_value, "source": origin.source}
