"""Brings databases to a revision: those that can in one transaction each, committed together, and the others one by one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from alembic import command
from sqlalchemy import Connection

from app_db._wording import in_one_line
from app_db.container import DatabaseContainer
from app_db.errors import AppDbError, MigrationAccount, MigrationFailed
from app_db.migrations._chains import AUTOCOMMIT_BLOCK, Chain, shown
from app_db.migrations._results import Migrated, Step
from app_db.migrations._running import (
    EndsTransaction,
    Patience,
    Transaction,
    commit_rest,
    configure,
    leaves_transaction,
    locked,
    locks_of,
    run_command,
)
from app_db.models._reflection import engine_that_reads
from app_db.models._schema import refuse_inside_unit

if TYPE_CHECKING:
    from alembic.script import Script

Current = tuple[str, ...]
"""The revision of a database; empty if it has none."""

OnStep = Callable[[Step], object]


@dataclass(frozen=True)
class Verb:
    """What is done to the databases: a command of Alembic, its target, and the revisions that it would run."""

    command: Callable[..., object]
    target: str
    plan: Callable[[Chain, Current], Sequence[Script]]
    runs_revisions: bool = True

    def is_needed(self, chain: Chain, current: Current) -> bool:
        """Return whether there is something to do."""
        if self.runs_revisions:
            return bool(self.plan(chain, current))
        return current != tuple(each.revision for each in self.plan(chain, current))


def upward(target: str) -> Verb:
    """Return the verb that runs revisions up to `target`."""
    return Verb(command.upgrade, target, lambda chain, current: chain.up_to(target, current))


def downward(target: str) -> Verb:
    """Return the verb that undoes revisions down to `target`."""
    return Verb(command.downgrade, target, lambda chain, current: chain.down_to(target, current))


def stamping(target: str) -> Verb:
    """Return the verb that writes the revision and runs none."""
    return Verb(command.stamp, target, lambda chain, _: chain.named(target), runs_revisions=False)


def read_current(container: DatabaseContainer, chain: Chain) -> Current:
    """Return the revision of a database, without waiting for other transactions."""
    with engine_that_reads(chain.engine, container.settings().connection(chain.name)).connect() as connection:
        return chain.current(connection)


class Migration:
    """One verb, applied to chains."""

    def __init__(
        self,
        container: DatabaseContainer,
        verb: Verb,
        chains: Sequence[Chain],
        *,
        lock_timeout: float,
        on_step: OnStep | None = None,
    ) -> None:
        self._container = container
        self._verb = verb
        self._chains = chains
        self._lock_timeout = lock_timeout
        self._on_step = on_step
        self._before: dict[str, Current] = {}
        self._after: dict[str, Current] = {}
        self._run: dict[str, list[str]] = {}
        self._committed: list[str] = []
        """Connections, in the order in which their revisions became durable."""

    def apply(self) -> tuple[Migrated, ...]:
        """Do it, and return what was done. Nothing is locked if nothing is to be done."""
        for chain in self._chains:
            self._before[chain.name] = self._after[chain.name] = read_current(self._container, chain)
        needed = [chain for chain in self._chains if self._verb.is_needed(chain, self._before[chain.name])]
        for chain in needed:
            refuse_inside_unit(self._container, chain.name)
        alone = [chain for chain in needed if self._commits_by_itself(chain)]
        together = [chain for chain in needed if chain not in alone]
        rounds = self._rounds(together)
        for position, chains in enumerate(rounds):
            self._apply_together(chains, [*(chain for later in rounds[position + 1 :] for chain in later), *alone])
        for position, chain in enumerate(alone):
            self._apply_alone(chain, alone[position + 1 :])
        return tuple(
            Migrated(
                chain.name,
                shown(self._before[chain.name]),
                shown(self._after[chain.name]),
                tuple(self._run.get(chain.name, ())),
            )
            for chain in self._chains
        )

    def _commits_by_itself(self, chain: Chain) -> bool:
        rules = chain.database.migrating
        if not rules.transactional:
            return True
        if not self._verb.runs_revisions:
            return False
        leaving = [each for each in self._verb.plan(chain, self._before[chain.name]) if leaves_transaction(each)]
        if leaving and not rules.has_autocommit_blocks:
            raise chain.unusable(
                f"the revision {leaving[0].revision!r} has an {AUTOCOMMIT_BLOCK}, which can't run while the lock "
                f"of the migrations is held ({chain.engine.dialect.name})",
                "Run its statements outside of migrations",
            )
        if leaving and rules.lock_ends_with_transaction:
            chain.require_two_connections()
        return bool(leaving)

    # ---- in one transaction each, committed one after the other at the end

    def _apply_together(self, chains: Sequence[Chain], later: Sequence[Chain]) -> None:
        groups = self._by_transaction(chains)
        if len(groups) > 1 and all(map(self._can_prepare, chains)):
            self._apply_in_unit(groups, later)
            return
        with ExitStack() as stack:
            connections = _in_one_order(
                groups, lambda group: stack.enter_context(locked(group, self._lock_timeout, self._committed))
            )
            self._run_groups(groups, connections, later)
            for position, (group, connection) in enumerate(zip(groups, connections, strict=True)):
                rest = [chain for others in groups[position:] for chain in others]
                with self._explained(group[0], rolled_back=rest, left=later, at_commit=True):
                    connection.commit()
                self._committed += [chain.name for chain in group]

    def _run_groups(self, groups: Sequence[Sequence[Chain]], connections: Sequence[Connection], later: Sequence[Chain]) -> None:
        """Run what is to be done in open transactions, one for each group of chains."""
        chains = [chain for group in groups for chain in group]
        done: list[Chain] = []
        for group, connection in zip(groups, connections, strict=True):
            for chain in group:
                done.append(chain)
                with self._explained(chain, rolled_back=done, left=[*_without(chains, done), *later]):
                    self._execute(chain, connection)
            with self._explained(group[-1], rolled_back=done, left=[*_without(chains, done), *later]):
                group[0].database.migrating.check(connection)

    def _can_prepare(self, chain: Chain) -> bool:
        """Return whether the connection is two-phase, and its engine that of its sessions."""
        is_the_same = chain.engine is self._container.providers[f"{chain.name}_engine"]()
        return is_the_same and self._container.settings().connection(chain.name).two_phase

    def _apply_in_unit(self, groups: Sequence[Sequence[Chain]], later: Sequence[Chain]) -> None:
        """Do it in one unit of work, which commits in all databases or in none, by two-phase commit."""
        chains = [chain for group in groups for chain in group]
        patience = Patience(self._lock_timeout)
        while True:
            try:
                with (
                    self._explained(chains[0], rolled_back=chains, left=later, at_commit=True),
                    self._container.transaction(propagation="requires_new", isolation="READ COMMITTED"),
                ):
                    connections = _in_one_order(groups, self._connection_in_unit)
                    self._run_groups(groups, connections, later)
            except _Held as held:
                patience.wait(held.chain, lambda holder=held.holder: holder)  # type: ignore[misc]
            else:
                self._committed += [chain.name for chain in chains]
                return

    def _connection_in_unit(self, group: Sequence[Chain]) -> Connection:
        """Return the unit's connection to a database. Raise _Held if another process holds the lock."""
        rules, locks = group[0].database.migrating, locks_of(group)
        lender = self._container.settings().lender_of(group[0].name, self._container.providers)
        connection: Connection = self._container.providers[f"{lender or group[0].name}_session"]().connection()
        if not rules.take(connection, locks):
            raise _Held(group[0], rules.holder(connection, locks))
        return connection

    def _rounds(self, chains: Sequence[Chain]) -> list[list[Chain]]:
        """Return chains in rounds, which have one transaction for each database.

        Connections of two users to one database can't share a transaction, and one of two would wait for the locks of the other:
        for ever, because the server does not see that both belong to one process.
        """
        rounds: list[list[Chain]] = []
        seen: Counter[object] = Counter()
        for group in self._by_transaction(chains):
            place = self._container.settings().connection(group[0].name).place
            if seen[place] == len(rounds):
                rounds.append([])
            rounds[seen[place]] += group
            seen[place] += 1
        return rounds

    def _by_transaction(self, chains: Sequence[Chain]) -> list[list[Chain]]:
        """Return chains in groups that share a transaction: two in one database would wait for each other without an end."""
        groups: dict[object, list[Chain]] = {}
        for chain in chains:
            place = self._container.settings().connection(chain.name).place
            groups.setdefault(place if chain.database.has_one_writer else chain.engine.url, []).append(chain)
        return [*groups.values()]

    # ---- each revision by itself

    def _apply_alone(self, chain: Chain, left: Sequence[Chain]) -> None:
        with locked([chain], self._lock_timeout, self._committed) as locking, ExitStack() as stack:
            own = locking
            if chain.database.migrating.lock_ends_with_transaction:
                own = stack.enter_context(chain.engine.connect())
            with self._explained(chain, left=left, is_alone=True):
                self._execute(chain, own, one_by_one=True)
            self._committed.append(chain.name)

    # ---- both

    def _execute(self, chain: Chain, connection: Connection, *, one_by_one: bool = False) -> None:
        """Run what is still to be done now that the lock is held."""
        current = chain.current(connection)
        self._before[chain.name] = self._after[chain.name] = current
        if not self._verb.is_needed(chain, current):
            return
        total = len(self._verb.plan(chain, current))
        run = self._run.setdefault(chain.name, [])
        guard = nullcontext() if one_by_one else Transaction(connection, chain).guarded()

        def note(step: Any, heads: set[str], **_: object) -> None:
            if one_by_one:
                commit_rest(connection)
            revision = step.up_revision_id
            run.append(revision)
            self._after[chain.name] = tuple(heads)
            if self._on_step is not None:
                try:
                    self._on_step(Step(chain.name, revision, len(run), total))
                except Exception as error:
                    raise _OnStepFailed(in_one_line(error)) from error

        def environment(context: Any) -> None:
            noted = {"on_version_apply": note} if self._verb.runs_revisions else {}
            configure(context, chain, connection, one_by_one=one_by_one, **noted)
            with guard, context.begin_transaction():
                context.run_migrations()

        run_command(chain, self._verb.command, self._verb.target, environment=environment)
        if not self._verb.runs_revisions:
            self._after[chain.name] = chain.current(connection)

    @contextmanager
    def _explained(
        self,
        chain: Chain,
        *,
        rolled_back: Sequence[Chain] = (),
        left: Sequence[Chain] = (),
        at_commit: bool = False,
        is_alone: bool = False,
    ) -> Generator[None]:
        """Raise MigrationFailed, which says what is in the databases now, for whatever a revision raises."""
        try:
            yield
        except (AppDbError, _Held):
            raise
        except (Exception, KeyboardInterrupt) as error:
            run = self._run.get(chain.name, [])
            committed = {name: self._run[name] for name in self._committed if self._run.get(name)}
            if is_alone and run:
                committed[chain.name] = run
            was_run = isinstance(error, _OnStepFailed)
            account = MigrationAccount(
                committed,
                [each.name for each in rolled_back],
                [each.name for each in left],
                is_partial=is_alone and not was_run,
            )
            revision = run[-1] if was_run else "" if at_commit else self._failing(chain, run)
            failed = MigrationFailed(chain.name, revision, _reason(error), account)
            if isinstance(error, Exception):
                raise failed from error
            if not at_commit:  # a COMMIT that is interrupted may have been done
                error.add_note(failed.message)
            raise

    def _failing(self, chain: Chain, run: Sequence[str]) -> str:
        plan = [each.revision for each in self._verb.plan(chain, self._before[chain.name])]
        return next((revision for revision in plan if revision not in run), plan[-1] if plan else "")


def _in_one_order(groups: Sequence[Sequence[Chain]], connect: Callable[[Sequence[Chain]], Connection]) -> list[Connection]:
    """Return a connection for each group. All processes connect in the same order, or each could hold what another waits for."""
    ordered = sorted(range(len(groups)), key=lambda position: min(chain.name for chain in groups[position]))
    found = {position: connect(groups[position]) for position in ordered}
    return [found[position] for position in range(len(groups))]


class _Held(Exception):
    """Another process holds the lock, so the unit of work ends, and is tried again."""

    def __init__(self, chain: Chain, holder: str) -> None:
        super().__init__(chain, holder)
        self.chain = chain
        self.holder = holder


class _OnStepFailed(Exception):
    """`on_step` has raised an error, after a revision was run."""

    def __str__(self) -> str:
        return f"it was run, and then on_step raised {self.args[0]}"


def _without(chains: Sequence[Chain], done: Sequence[Chain]) -> list[Chain]:
    return [chain for chain in chains if chain not in done]


def _reason(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "it was interrupted"
    if isinstance(error, EndsTransaction | _OnStepFailed):
        return str(error)
    trace, names = error.__traceback__, set[str]()
    while trace is not None:
        names.add(trace.tb_frame.f_code.co_name)
        trace = trace.tb_next
    if isinstance(error, AssertionError) and AUTOCOMMIT_BLOCK in names:
        return "it enters an autocommit_block, and nothing in its file says so. Write `autocommit = True` into the file"
    return in_one_line(error)
