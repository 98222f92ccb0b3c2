"""`app-db ping`: whether each database answers, and what it tells about itself."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from app_db.cli._calls import FINE, WRONG, Call, CannotRun, Commands, seconds
from app_db.cli._printing import Cell, Style, Styled

if TYPE_CHECKING:
    from app_db.health import ConnectionHealth, Status

_STYLES: dict[Status, Style] = {"up": "good", "degraded": "warning", "down": "bad"}


def add_to(commands: Commands) -> None:
    """Add `ping`."""
    ping = commands.add("ping", _ping)
    ping.add_argument("names", nargs="*", metavar="NAME", help="a connection (default: all)")
    ping.add_argument("--timeout", type=seconds, default=5.0, metavar="SECONDS", help="how long to wait (default: %(default)g)")


def _ping(call: Call) -> int:
    """Ask each database whether it answers: in how many milliseconds, the version of the server, whether it is a replica and
    how far behind, whether a pooler stands before it, and whether the connection has TLS. The container's pools are not used.
    """
    names = call.names(call.options.names)
    timeout: float = call.options.timeout
    if timeout == 0:
        raise CannotRun("--timeout 0: give more than 0 seconds.")
    with call.out.progress("Asking the databases"):
        found = call.container.health(timeout=timeout).connections
    asked = [found[name] for name in names if name in found]
    if not call.options.names:
        asked += [_without_settings(call, name) for name in call.without_settings()]
    columns = ["connection", "status", "ms", "server", "role", "pooler", "TLS", "why"]
    call.out.table(columns, [_row(each) for each in asked])
    call.out.data({"connections": [_data(each) for each in asked]})
    return FINE if all(each.status == "up" for each in asked) else WRONG


def _without_settings(call: Call, name: str) -> ConnectionHealth:
    from app_db.health import ConnectionHealth

    return ConnectionHealth(name, "down", required=True, reason=f"it has no settings. Set {call.url_of(name)}")


def _row(each: ConnectionHealth) -> list[Cell]:
    took = "" if each.milliseconds is None else f"{each.milliseconds:.1f}"
    lag = "" if each.lag is None else f", {each.lag:.1f} s behind"
    server = each.version or ""
    if each.galera:
        server += f", Galera {each.galera}"
    tls = "" if each.tls is None else each.tls or "no"
    pooler = "" if each.pooler is None else "yes" if each.pooler else "no"
    return [
        each.name,
        Styled(each.status, _STYLES[each.status]),
        took,
        server,
        f"{each.role or ''}{lag}",
        pooler,
        tls,
        each.reason,
    ]


def _data(each: ConnectionHealth) -> dict[str, Any]:
    told = asdict(each)
    del told["pool"]  # that of this process, which has none
    return told
