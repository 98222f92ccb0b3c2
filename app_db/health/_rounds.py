"""Asks all databases of a container at once, for all callers at the same time.

Each database is asked by a daemon thread, because no other way leaves every call of a driver behind: a name server may be silent,
too. A caller waits until the deadline, and then goes on without the answers that are missing. A database whose thread is still
there is not asked again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Hashable, Iterable
from concurrent.futures import Future, wait
from datetime import UTC, datetime
from threading import Lock, Thread
from typing import TYPE_CHECKING
from weakref import WeakSet

from app_db._compat.clocks import monotonic
from app_db._compat.os import after_fork_in_child
from app_db._databases.containers import Container
from app_db._databases.engines import SHARED
from app_db._databases.pool_states import PoolState, state_of
from app_db._sessions.own_engines import own_engine
from app_db._two_phase.recovery import GRACE
from app_db.errors import ConnectionNotConfigured, InvalidUse
from app_db.health._asking import Answer, Source, Target, sync_engine_of
from app_db.health._report import ConnectionHealth, Health, Status
from app_db.models._reflection import connections_in

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

TIMEOUT = 2.0

_LONGEST = 3600
"""The most seconds. Python and the drivers overflow beyond limits of their own."""


def health(checks: Checks, *, timeout: float = TIMEOUT) -> Health:
    """Return the health of all connections after at most `timeout` seconds. It asks each database by a connection of its own."""
    round_ = checks.join(timeout)
    wait([round_.told], round_.remaining(timeout))
    return round_.report()


async def async_health(checks: Checks, *, timeout: float = TIMEOUT) -> Health:  # noqa: ASYNC109  # the same as of `health`
    """Return the health of all connections after at most `timeout` seconds, and let the event loop run meanwhile."""
    round_ = checks.join(timeout)
    # Not wait_for(), which would cancel the future of all callers when one of them is cancelled or out of time.
    await asyncio.wait([asyncio.wrap_future(round_.told)], timeout=round_.remaining(timeout))
    return round_.report()


class Checks:
    """What a container instance keeps to be asked for its health."""

    def __init__(self, container: Container) -> None:
        self._container = container
        self._sources: dict[Hashable, Source] = {}
        self._lock = Lock()
        self._round: _Round | None = None
        self._askers: dict[Hashable, _Asker] = {}
        _instances.add(self)

    def forget_threads(self) -> None:
        """Begin anew, as in a forked child: the threads are the parent's."""
        self._lock, self._round, self._askers = Lock(), None, {}

    def join(self, timeout: float) -> _Round:
        """Return the round that is under way, or begin one that ends after `timeout` seconds."""
        _require_seconds(timeout)
        targets = _targets(self._container)
        with self._lock:
            round_ = self._round
            if round_ is None or round_.is_over():
                round_ = self._round = self._begin(targets, timeout)
            return round_

    def _begin(self, targets: list[Target], timeout: float) -> _Round:
        hanging = {database: asker for database, asker in self._askers.items() if not asker.answer.done()}
        groups: dict[Hashable, list[Target]] = {}
        for target in targets:
            groups.setdefault(target.database, []).append(target)
        known = self._sources
        self._sources = {each: known[each] if each in known else Source(group[0]) for each, group in groups.items()}
        new = {
            database: _Asker(self._sources[database], timeout, prepares=any(target.connection.two_phase for target in group))
            for database, group in groups.items()
            if database not in hanging
        }
        self._askers = hanging | new
        return _Round(self._container, [(target, self._askers[target.database]) for target in targets], new.values(), timeout)


def _require_seconds(timeout: object) -> None:
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 < timeout <= _LONGEST:
        raise InvalidUse(f"health(timeout={timeout!r}) gives no time limit", f"Give seconds, more than 0 and up to {_LONGEST}")


def build_checks(container: Container | None, name: str) -> Checks:
    """Return the checks of a container instance."""
    if container is None:
        raise InvalidUse("A container class has no health", "Make an instance, `container = Container()`, and ask that")
    return Checks(container)


def _targets(container: Container) -> list[Target]:
    """Return the connections of a container that are configured."""
    settings = container.settings()
    replicas = settings.replicas()
    targets = []
    for name in connections_in(container):
        try:
            connection = settings.connection(name)
        except ConnectionNotConfigured:
            continue
        required = name not in replicas if connection.required is None else connection.required
        own = own_engine(container.providers[f"{name}_engine"], container.providers[f"{name}_async_engine"])
        is_isolated = own is not None and hasattr(own.dialect, SHARED)
        targets.append(Target(name, connection, settings.application, required, None if is_isolated else own))
    return targets


class _Asker:
    """A thread that asks one database."""

    def __init__(self, source: Source, timeout: float, *, prepares: bool) -> None:
        self.began = monotonic()
        self.answer: Future[Answer] = Future()

        def ask() -> None:
            self.answer.set_result(source.ask(timeout, prepares=prepares))

        Thread(target=ask, name="app_db-health", daemon=True).start()


class _Round:
    """One question to each database. `told` is done when all have answered, except those that hang since an earlier round."""

    def __init__(
        self, container: Container, askers: list[tuple[Target, _Asker]], awaited: Iterable[_Asker], timeout: float
    ) -> None:
        self.told: Future[None] = Future()
        self._container = container
        self._askers = askers
        self._deadline = monotonic() + timeout
        self._left = {asker.answer for asker in awaited}
        self._lock = Lock()
        for answer in [*self._left]:
            answer.add_done_callback(self._note)
        if not self._left and not self.told.done():
            self.told.set_result(None)

    def _note(self, answer: Future[Answer]) -> None:
        with self._lock:
            self._left.discard(answer)
            if not self._left and not self.told.done():
                self.told.set_result(None)

    def is_over(self) -> bool:
        return self.told.done() or monotonic() >= self._deadline

    def remaining(self, timeout: float) -> float:
        """Return how many seconds a caller waits who gives it `timeout`."""
        return max(min(timeout, self._deadline - monotonic()), 0.0)

    def report(self) -> Health:
        """Return what is known by now."""
        found = {target.name: _health_of(target, asker, self._container) for target, asker in self._askers}
        return Health(found, datetime.now(UTC))


# ---- one connection -----------------------------------------------------------------------------------------------------


def _health_of(target: Target, asker: _Asker, container: Container) -> ConnectionHealth:
    silence = monotonic() - asker.began
    late = f"it has not answered for {silence:.{3 if silence < 0.1 else 1}f} s"
    answer = asker.answer.result() if asker.answer.done() else Answer(error=late)
    engines: list[Engine] = container.core.state().engines(target.name) if target.own is None else [sync_engine_of(target.own)]
    pool = state_of(target.name, engines) if engines else None
    in_doubt = answer.in_doubt.get(target.name)
    status, reason = _judged(target, answer, pool, in_doubt)
    facts = answer.facts
    return ConnectionHealth(
        name=target.name,
        status=status,
        required=target.required,
        reason=reason,
        milliseconds=answer.milliseconds,
        version=facts.version,
        role=facts.role,
        lag=facts.lag,
        max_lag=target.connection.max_lag,
        galera=facts.galera,
        pooler=facts.pooler,
        tls=facts.tls,
        pool=pool,
        oldest_in_doubt=in_doubt,
    )


def _judged(target: Target, answer: Answer, pool: PoolState | None, in_doubt: float | None) -> tuple[Status, str]:
    """Return the status of a connection and the reason."""
    if answer.error:
        return "down", answer.error
    reasons = [answer.facts.problem] if answer.facts.problem else []
    connection, lag = target.connection, answer.facts.lag
    if lag is not None and connection.max_lag is not None and lag > connection.max_lag:
        reasons.append(f"it is {lag:.1f} s behind its primary, and {connection.variable('max_lag')} is {connection.max_lag:g}")
    if pool is not None and pool.is_full:
        reasons.append(f"its pool is full: {pool.in_use} connections are in use")
    if in_doubt is not None and in_doubt > GRACE:
        reasons.append(f"a branch is in doubt for {in_doubt:.0f} s, which `python -m app_db recover` settles")
    return ("degraded", "; ".join(reasons)) if reasons else ("up", "")


# ---- forks --------------------------------------------------------------------------------------------------------------

_instances: WeakSet[Checks] = WeakSet()


def _forget_parents_threads() -> None:
    for checks in list(_instances):
        checks.forget_threads()


after_fork_in_child(_forget_parents_threads)
