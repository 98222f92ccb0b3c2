"""What is wrong between connections: replicas, one database under two names, and the room on a server for all pools."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import inf

from app_db._databases.inspection import Server
from app_db._findings import matters
from app_db._findings.finding import Finding, place_of, place_of_database
from app_db.container import DatabaseContainer
from app_db.settings import DatabaseSettings

Servers = Mapping[str, Server]
"""What servers said, by the connections that reached them."""


# ---- settings alone -------------------------------------------------------------------------------------------------------


def separate_rows(settings: DatabaseSettings) -> Iterator[Finding]:
    """Yield the writable connections to one database whose transactions are not shared."""
    first: dict[object, str] = {}
    for name, own in settings.connections.items():
        used = settings.connection(name)
        if own.read_only or not own.transactional or settings.lender_of(name, settings.connections) is not None:
            continue
        other = first.setdefault(used.place, name)
        if other != name:
            yield matters.SEPARATE_ROWS.found(
                name,
                f"{other!r} is a connection to the same database, and the two share no transaction: a unit of work commits their "
                "rows separately, and each waits for the locks of the other.",
                f"{place_of_database(settings, name)} and {place_of_database(settings, other)}",
                "Give both the same URL, ISOLATION_LEVEL, STATEMENT_TIMEOUT and CONNECT_ARGS, so that they share a transaction, "
                "or use one of them.",
            )


# ---- replicas -------------------------------------------------------------------------------------------------------------


def replicas(settings: DatabaseSettings, servers: Servers) -> Iterator[Finding]:
    """Yield what keeps replicas from having the rows of the connections whose reads are sent to them."""
    for name, owner in settings.replicas().items():
        own = settings.connections.get(name)
        if own is None or own.mirror is not None:
            continue
        if _is_same_database(settings, name, owner, servers):
            if own.replica_of:
                yield matters.REPLICA_IS_OWNER.found(
                    name,
                    f"It is called a replica of {owner!r}, and is a connection to the same database: it takes no load off it.",
                    place_of(settings, "connections", name, "replica_of"),
                    "Give it the URL of a replica, or unset REPLICA_OF.",
                )
        elif name in servers and not _follows(servers[name], servers.get(owner)):
            yield matters.NOT_A_REPLICA.found(
                name,
                f"Reads of {owner!r} are sent there, and its server does not follow that of {owner!r}: they don't see its rows.",
                place_of(settings, "connections", name, "replica_of" if own.replica_of else "url"),
                f"Give it the URL of a replica, or set {settings.variable('connections', name, 'replica_of')} to nothing.",
            )


def _is_same_database(settings: DatabaseSettings, name: str, owner: str, servers: Servers) -> bool:
    one, other = settings.connection(name), settings.connection(owner)
    if one.place == other.place:
        return True
    told, asked = servers.get(name), servers.get(owner)
    if told is None or asked is None or told.identity is None or told.identity != asked.identity:
        return False
    return told.is_copy is False and one.sqlalchemy_url().database == other.sqlalchemy_url().database


def _follows(server: Server, owner: Server | None) -> bool:
    """Return whether a server follows another one, as far as they say."""
    if server.is_copy is False:
        return False
    known = None not in (server.identity, None if owner is None else owner.identity)
    return not known or (owner is not None and server.identity == owner.identity)


# ---- room -----------------------------------------------------------------------------------------------------------------


def room(container: DatabaseContainer, settings: DatabaseSettings, servers: Servers) -> Iterator[Finding]:
    """Yield the servers that accept, or can prepare, less than the pools of one process may ask of them.

    Threads and coroutines have pools of their own. A process uses one of the two, as a rule, so the pools are counted once.
    """
    try:
        most = container.capacity(coroutines=False).connections
    except (ImportError, AttributeError):
        return  # the class of a pool can't be imported, which is a finding already
    for names in _by_server(settings, most).values():
        server = next((servers[name] for name in names if name in servers), None)
        if server is None:
            continue
        yield from _connections(settings, {name: most[name] for name in names}, server)
        preparing = {name: most[name] for name in names if settings.connection(name).two_phase}
        yield from _prepared(settings, preparing, server)


def _by_server(settings: DatabaseSettings, names: Mapping[str, float]) -> dict[object, list[str]]:
    """Return the connections of each server. Behind a transaction pooler, connections are the pooler's."""
    found: dict[object, list[str]] = {}
    for name in names:
        used = settings.connection(name)
        if used.pooler != "transaction":
            url = used.sqlalchemy_url()
            found.setdefault((url.get_backend_name(), url.host, url.port), []).append(name)
    return found


def _connections(settings: DatabaseSettings, most: Mapping[str, float], server: Server) -> Iterator[Finding]:
    if server.room is None:
        return
    for name in (name for name, number in most.items() if number == inf):
        yield matters.POOL_WITHOUT_LIMIT.found(
            name,
            f"The pool has no limit, and the server accepts {server.room} connections.",
            place_of(settings, "connections", name, "pool", "max_overflow"),
            "Set POOL__MAX_OVERFLOW and POOL__SIZE, or have something else limit the threads or requests.",
        )
    total = sum(number for number in most.values() if number != inf)
    if total > server.room:
        yield matters.TOO_MANY_CONNECTIONS.found(
            None,
            f"The pools of {_listed(most)} can open {total:g} connections in one process, and the server accepts {server.room}.",
            _pools(settings, most),
            "Lower POOL__SIZE and POOL__MAX_OVERFLOW, or raise max_connections of the server. Count each process.",
        )


def _prepared(settings: DatabaseSettings, most: Mapping[str, float], server: Server) -> Iterator[Finding]:
    at_once = min(sum(most.values()), inf if server.room is None else server.room)
    if not server.preparable or at_once <= server.preparable:
        return
    yield matters.TOO_FEW_PREPARED.found(
        None,
        f"max_prepared_transactions is {server.preparable}, and the pools of {_listed(most)} can prepare {at_once:g} "
        "transactions at once in one process.",
        f"max_prepared_transactions of the server, and {_pools(settings, most)}",
        "Set max_prepared_transactions to max_connections, and restart the server, or lower POOL__SIZE and POOL__MAX_OVERFLOW.",
    )


def _pools(settings: DatabaseSettings, names: Mapping[str, float]) -> str:
    return ", ".join(settings.variable("connections", name, "pool", "size") for name in names)


def _listed(names: Mapping[str, float]) -> str:
    return ", ".join(map(repr, names))
