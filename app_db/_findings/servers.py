"""What the server of one connection says: who may read and write there, its clock, and its time limits."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address

from app_db._databases.database import NEVER
from app_db._findings import matters
from app_db._findings.asking import Asked, Question
from app_db._findings.finding import Finding
from app_db.models._bases import metadata_of

_FARTHEST_CLOCK = 30.0
"""Seconds by which the clocks may differ."""

_SHORTEST_PAUSE = 10.0
"""Seconds that a unit of work may pause between two statements."""


def _the_pooler(asked: Asked) -> Iterator[Finding]:
    if asked.own.pooler != "transaction" or asked.inspection.is_pooled(asked.connection) is not False:
        return
    yield matters.NO_POOLER.found(
        asked.name,
        "The settings name a transaction pooler, but the server itself answers, or a pooler that can't be told from it.",
        asked.place("pooler"),
        "Unset it if there is no pooler: prepared statements, and reads without a transaction, are quicker.",
    )


def _the_server(asked: Asked) -> Iterator[Finding]:
    before = asked.now()
    asked.server = server = asked.inspection.server(asked.connection)
    after = asked.now()
    yield from _clock(asked, server.clock, before, after)
    if server.is_encrypted is False and not _is_local(asked.own.sqlalchemy_url().host):
        yield matters.NOT_ENCRYPTED.found(
            asked.name,
            "The connection to the server is not encrypted: what is read and written can be seen on the way.",
            asked.place_of_database(),
            "Switch TLS on in the URL's query, for example sslmode=verify-full (psycopg) or ssl_ca=FILE (PyMySQL).",
        )


def _clock(asked: Asked, clock: float | None, before: float, after: float) -> Iterator[Finding]:
    if clock is None or before - _FARTHEST_CLOCK <= clock <= after + _FARTHEST_CLOCK:
        return
    apart = clock - after if clock > after else before - clock
    yield matters.CLOCK.found(
        asked.name,
        f"The server's clock is {apart:.0f} s {'ahead of' if clock > after else 'behind'} the clock of this host.",
        asked.place_of_database(),
        "Synchronize the clocks (NTP), or give `app-db recover` a longer --grace: it would take what is being committed for old.",
    )


def _is_local(host: str | None) -> bool:
    if not host or host.startswith("/") or host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


# ---- reading and writing ------------------------------------------------------------------------------------------------


def _writing(asked: Asked) -> Iterator[Finding]:
    refusal = None if asked.server is None else asked.server.refuses_writes
    if asked.own.read_only:
        yield from _reader(asked, is_writable=refusal is None)
    elif refusal is not None:
        yield matters.WRITES_REFUSED.found(asked.name, refusal.what, asked.place_of_database(), refusal.remedy)


def _reader(asked: Asked, *, is_writable: bool) -> Iterator[Finding]:
    if not is_writable:
        return
    if asked.server is not None and asked.server.is_writable_replica:
        yield matters.REPLICA_WRITABLE.found(
            asked.name,
            "The server is a replica that accepts writes.",
            asked.place_of_database(),
            "SET GLOBAL read_only = ON there, and in its configuration.",
        )
    if asked.inspection.may_write(asked.connection):
        yield matters.READER_MAY_WRITE.found(
            asked.name,
            "The user may write. Only app_db's own sessions are refused; other programs with this user can write.",
            asked.place_of_database(),
            "Give the connection a user that has only SELECT.",
        )


def _privileges(asked: Asked) -> Iterator[Finding]:
    privilege = "SELECT" if asked.own.read_only else "INSERT"
    owner = asked.settings.replicas().get(asked.name) if asked.own.read_only else None
    tables = [table for name in (asked.name, owner) if name for table in metadata_of(name).tables.values()]
    lacking = asked.inspection.lacking(asked.connection, privilege, tables)
    if lacking:
        verb = "read" if asked.own.read_only else "write to"
        yield matters.NO_PRIVILEGE.found(
            asked.name,
            f"The user lacks {privilege} on {', '.join(lacking)}, so it can't {verb} what the models need.",
            asked.place_of_database(),
            f"GRANT {privilege} ON {', '.join(lacking)} to the user, or give the connection another user.",
        )


# ---- time limits ----------------------------------------------------------------------------------------------------------


def _time_limits(asked: Asked) -> Iterator[Finding]:
    limits = asked.inspection.limits(asked.connection)
    for name, seconds in limits.idle_in_unit:
        if 0 < seconds < _SHORTEST_PAUSE:
            yield matters.KILLS_UNITS.found(
                asked.name,
                f"{name} is {seconds:g} s: the server ends a unit of work that sends nothing for so long.",
                f"{name} of the server, for this user and database",
                f"Set {name} to at least {_SHORTEST_PAUSE:g} s for the application's user.",
            )
    window = asked.own.pool.alive_window
    for name, seconds in limits.idle_in_pool:
        if 0 < seconds <= window:
            yield matters.KILLS_IDLE.found(
                asked.name,
                f"{name} is {seconds:g} s: the server ends idle connections that the pool takes for alive for {window:g} s.",
                f"{name} of the server, and {asked.place('pool', 'alive_window')}",
                f"Set POOL__ALIVE_WINDOW below {seconds:g}, or {name} above {window:g} s.",
            )
    if limits.missing and not asked.own.read_only and (asked.own.statement_timeout or NEVER) == NEVER:
        yield matters.WAITS_FOR_EVER.found(
            asked.name,
            f"{' and '.join(limits.missing)} are 0, so a statement can wait for a lock forever.",
            asked.place("statement_timeout"),
            f"Set STATEMENT_TIMEOUT for the connection, or ALTER ROLE … SET {limits.missing[0]}.",
        )


QUESTIONS: tuple[Question, ...] = (_the_pooler, _the_server, _writing, _privileges, _time_limits)
"""The pooler first: it can be told only outside of a transaction."""
